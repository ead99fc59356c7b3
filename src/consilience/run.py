"""`solve`: ask a model several times, agree, answer; in Python, and under the command line."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from consilience import config as configuration
from consilience import policy, record
from consilience.config import Config
from consilience.draws import Budget, Problem
from consilience.driver import NOT_DRAWN, Asking, Driver, Finished, Progress
from consilience.errors import InputError
from consilience.ledger import Ledger
from consilience.rules import Rule
from consilience.text.answers import BEHAVIOUR_KINDS, classes_of, compile_pattern
from consilience.text.asking import Asker
from consilience.text.budget import Account, Price
from consilience.text.prompts import read_template
from consilience.text.session import Session
from consilience.text.sources import open_source
from consilience.text.sources.base import Source
from consilience.views import kind_of

Problems = str | Path | Iterable[str | Mapping[str, Any] | Problem]


@dataclass(frozen=True)
class Settings:
    """The settings of a run; None stands for the configuration file's default, then the documented one.

    ``model`` (several for a policy that draws from several) and ``policy`` are specifications, ``budget`` a `Budget`
    or its specification, ``temperature`` and ``top_p`` the sampling parameters, ``max_tokens`` the cap per draw in
    tokens, ``extract`` a regular expression for the answer, ``concurrency`` the most calls in flight.
    """

    model: str | Sequence[str] | None = None
    policy: str | None = None
    budget: Budget | str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    system: str | None = None
    template: str | Path | None = None
    kind: str | None = None
    extract: str | None = None
    seed: int = 0
    ledger: str | None = None
    concurrency: int | None = None
    config: str | Path | None = None

    @property
    def required(self) -> frozenset[str]:
        """The sampling parameters that were set here: an endpoint that refuses one of them ends the run."""
        return frozenset(name for name in ("temperature", "top_p", "max_tokens") if getattr(self, name) is not None)

    def resolved(self) -> tuple[Settings, Config]:
        """The settings with every default filled in, and the configuration; raises InputError."""
        config = configuration.read(self.config)
        given = config.defaults
        filled = Settings(
            model=self.model or given.model or "house",
            policy=self.policy or given.policy or "asc",
            budget=Budget.parse(self.budget) if isinstance(self.budget, str) else self.budget or Budget(),
            temperature=_first(self.temperature, given.temperature, 0.7),
            top_p=self.top_p,
            max_tokens=_first(self.max_tokens, given.max_tokens, 1024),
            system=self.system,
            template=self.template,
            kind=self.kind,
            extract=self.extract,
            seed=self.seed,
            ledger=self.ledger or given.ledger,
            concurrency=_first(self.concurrency, given.concurrency, 8),
            config=self.config,
        )
        filled._check()
        return filled, config

    def _check(self) -> None:
        bounds = {"temperature": (0, 2), "max_tokens": (1, None), "concurrency": (1, None)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                limit = f"between {low} and {high}" if high is not None else f"at least {low}"
                raise InputError(f"{name} must be {limit}, got {value}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    @property
    def models(self) -> tuple[str, ...]:
        """The model specifications, in the order of the arms."""
        return (self.model,) if isinstance(self.model, str) else tuple(self.model or ())

    def asking(self, required: frozenset[str]) -> Asking:
        """How problems become requests under these (resolved) settings; ``required`` as of the unresolved ones."""
        params: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.top_p is not None:
            params["top_p"] = self.top_p
        try:
            pattern = None if self.extract is None else compile_pattern(self.extract)
        except ValueError as error:
            raise InputError(f"extract: {error}") from error
        return Asking(
            params=params,
            seed=self.seed,
            system=self.system,
            template=None if self.template is None else read_template(self.template),
            kind=self.kind,
            pattern=pattern,
            required=required,
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


@dataclass
class Run:
    """What `solve` returns: the problems with draws and verdicts, in input order, and the totals of the run.

    ``right`` says per problem whether the verdict equals the gold answer, None where that is not known.
    """

    problems: list[Problem] = field(repr=False)
    right: list[bool | None] = field(repr=False)
    totals: dict[str, Any]
    policy: str
    model: str
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Any:
        return iter(self.problems)

    def __len__(self) -> int:
        return len(self.problems)


def solve(problems: Problems, **settings: Any) -> Run:
    """Ask a model about problems under a policy and return the answers; works inside a running event loop too.

    ``problems`` is a path to a question file, or questions, dicts or `Problem` objects; ``settings`` are the fields
    of `Settings` (``model``, ``policy``, ``budget``, ``temperature``, ...). Raises InputError for bad input and
    EndpointError when the endpoint refuses the run; draws made before are in the ledger.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asolve(problems, **settings))
    return _solve_in_thread(problems, settings)


def _solve_in_thread(problems: Problems, settings: dict[str, Any]) -> Run:
    """`asolve` in a loop of its own beside the running one; an interrupt cancels it before it is raised."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(asolve(problems, **settings))

    done = threading.Event()

    def work() -> None:
        with suppress(BaseException):  # the task holds what it raised
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        done.set()

    threading.Thread(target=work, name="consilience-solve", daemon=True).start()
    try:
        done.wait()
    except BaseException:
        with suppress(RuntimeError):  # it may have ended in the same moment
            loop.call_soon_threadsafe(task.cancel)
        done.wait()
        raise
    return task.result()


async def asolve(problems: Problems, **settings: Any) -> Run:
    """As `solve`, for asynchronous callers."""
    finished: list[Finished] = []
    warned: list[str] = []
    unknown = set(settings) - set(Settings.__dataclass_fields__)
    if unknown:
        known = ", ".join(Settings.__dataclass_fields__)
        raise TypeError(f"solve() has no setting {sorted(unknown)[0]!r} (it has: {known})")
    outcome = await stream(problems, Settings(**settings), finished.append, warn=warned.append)
    return Run(
        problems=[one.problem for one in finished],
        right=[one.right for one in finished],
        totals=outcome.totals,
        policy=outcome.policy,
        model=outcome.model,
        notes=[*warned, *outcome.notes],
    )


@dataclass
class Outcome:
    """The run-level results of `stream`."""

    totals: dict[str, Any]
    policy: str
    model: str
    most: int
    notes: list[str]


async def stream(
    problems: Problems,
    settings: Settings,
    on_finished: Callable[[Finished], None],
    *,
    on_progress: Callable[[Progress, Sequence[Session]], None] = lambda *_: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """The run itself: every finished problem goes to ``on_finished`` in input order and is not kept."""
    required = settings.required
    settings, config = settings.resolved()
    todo, drawn = read_problems(problems)
    if drawn and not any(name.startswith("record:") for name in settings.models):
        warn(f"{drawn} problems already hold draws, which are not used here (to vote on them: --model record:FILE)")
    rule = policy.parse(cast(str, settings.policy))
    for problem in todo:  # whatever is wrong with a problem is said before anything is spent
        if (kind := kind_of(problem, settings.kind)) in BEHAVIOUR_KINDS:
            classes_of(problem, kind)
    tally = _Tally(rule)
    async with AsyncExitStack() as stack:
        asking = settings.asking(required)
        sessions = _sessions(settings, config, stack)
        driver = Driver(
            sessions,
            rule,
            asking,
            concurrency=cast(int, settings.concurrency),
            on_progress=lambda progress: on_progress(progress, sessions),
            warn=warn,
        )

        def finish(one: Finished) -> None:
            tally.add(one)
            on_finished(one)

        await driver.run(todo, finish)
    names = " + ".join(session.source.name for session in sessions)
    notes = [note for session in sessions for note in session.source.notes]
    if tally.fallbacks:
        share = f"{len(tally.fallbacks)} of {len(todo)} questions"
        notes.append(f"{rule.name}: the procedure left {share} to the vote; the first because {tally.fallbacks[0]}")
    if said := rule.statement(tally.remarks):
        notes.append(said)
    return Outcome(tally.totals(driver), rule.name, names, rule.max, list(dict.fromkeys(notes)))


def _sessions(settings: Settings, config: Config, stack: AsyncExitStack) -> list[Session]:
    """A session per model on one account and ledger, closed with ``stack``; nothing is made before all is in order."""
    account = Account(cast(Budget, settings.budget))
    sources = []
    for spec in settings.models:
        sources.append(open_source(spec, config, concurrency=cast(int, settings.concurrency), seed=settings.seed))
        stack.push_async_callback(sources[-1].close)
    prices = [price_of(source, config, account) for source in sources]
    ledger = stack.enter_context(Ledger(settings.ledger))
    return [Session(source, ledger, account, price) for source, price in zip(sources, prices, strict=True)]


@asynccontextmanager
async def asking_with(settings: Settings) -> AsyncIterator[Callable[[], Asker]]:
    """Lines to the model of ``settings``, through its ledger and budget: what replay needs to run a procedure."""
    required = settings.required
    settings, config = settings.resolved()
    async with AsyncExitStack() as stack:
        session = _sessions(settings, config, stack)[0]
        asking = settings.asking(required)
        yield lambda: Asker(session, params=asking.params, seed=asking.seed, required=asking.required)


def price_of(source: Source, config: Config, account: Account) -> Price | None:
    """The price of the source's model; raises InputError when a money cap has no price to count with."""
    if not source.priced:
        return Price()
    known = config.prices.get(source.model)
    if known is None and account.budget.usd is not None:
        raise InputError(
            f'a money cap needs a price: add [prices."{source.model}"] with input and output '
            f"(USD per million tokens) to {configuration.FILE}"
        )
    return None if known is None else Price(known.input, known.output)


def read_problems(problems: Problems) -> tuple[list[Problem], int]:
    """All problems, without draws, and how many of them had some; checked before anything is spent.

    Raises InputError naming the place of the first bad one.
    """
    if isinstance(problems, (str, Path)):
        found = list(record.read(problems))
        if not found:
            raise InputError(f"{problems}: holds no questions")
    else:
        found = [_problem(number, item) for number, item in enumerate(problems, 1)]
    drawn = 0
    for problem in found:
        drawn += bool(problem.draws)
        problem.draws, problem.verdict = [], None
    return found, drawn


def _problem(number: int, item: str | Mapping[str, Any] | Problem) -> Problem:
    try:
        given = {"question": item} if isinstance(item, str) else item
        problem = given.model_copy() if isinstance(given, Problem) else Problem.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"problem {number}: field {place!r}: {first['msg']}") from error
    if not problem.question.strip():
        raise InputError(f"problem {number}: field 'question': must not be empty")
    problem.id = problem.id or str(number)
    return problem


class _Tally:
    """Sums over finished problems."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.started = time.monotonic()
        self.count: dict[str, int] = dict.fromkeys(("problems", "answered", "decided", "known", "right"), 0)
        self.sums: dict[str, float] = dict.fromkeys(("judged", "draws", "failed"), 0)
        self.usage: dict[str, float] = dict.fromkeys(("prompt_tokens", "completion_tokens", "cost"), 0)
        self.remarks: dict[str, list[float]] = {}
        self.fallbacks: list[str] = []

    def add(self, one: Finished) -> None:
        verdict = one.problem.verdict
        assert verdict is not None
        self.count["problems"] += 1
        self.count["answered"] += not verdict.abstained
        self.count["decided"] += verdict.decided
        self.count["known"] += one.right is not None
        self.count["right"] += bool(one.right)
        self.sums["judged"] += verdict.draws
        self.sums["draws"] += sum(draw.error != NOT_DRAWN for draw in one.problem.draws)
        self.sums["failed"] += sum(draw.failed for draw in one.problem.draws)
        for name in self.usage:
            self.usage[name] += getattr(verdict.usage, name)
        if (why := (verdict.model_extra or {}).get("fallback")) is not None:
            self.fallbacks.append(str(why))
        for name in self.rule.remarked:
            if (value := (verdict.model_extra or {}).get(name)) is not None:
                self.remarks.setdefault(name, []).append(value)

    def totals(self, driver: Driver) -> dict[str, Any]:
        count, account = self.count, driver.session.account
        bought = sum(session.bought for session in driver.sessions)
        asked = sum(session.asked for session in driver.sessions)
        problems = count["problems"]
        return {
            "problems": problems,
            "answered": count["answered"],
            "abstained": problems - count["answered"],
            "decided": count["decided"],
            "accuracy": count["right"] / count["known"] if count["known"] else None,
            "mean_draws": self.sums["judged"] / problems if problems else None,
            "draws": int(self.sums["draws"]),
            "draws_judged": int(self.sums["judged"]),
            "draws_saved": driver.progress.saved,
            "draws_bought": bought,
            "draws_from_ledger": max(int(self.sums["draws"]) - bought, 0),
            "asks_bought": asked,
            "fallbacks": len(self.fallbacks),
            "failed": int(self.sums["failed"]),
            "duplicate_share": driver.duplicates.share,
            "cost": self.usage["cost"],
            "usage": {
                "prompt_tokens": int(self.usage["prompt_tokens"]),
                "completion_tokens": int(self.usage["completion_tokens"]),
                "cost": self.usage["cost"],
            },
            "spent": {
                "requests": account.spent.requests,
                "tokens": account.tokens,
                "cost": account.spent.cost,
                "attempts_of_unknown_usage": account.unknown,
            },
            "budget_spent": driver.budget_spent,
            "statement": self.rule.statement(self.remarks),
            "seconds": round(time.monotonic() - self.started, 3),
        }
