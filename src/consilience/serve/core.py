"""The server without HTTP: an `Ask` becomes an `Answer`, one run of the driver under an account of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience import config as configuration
from consilience.draws import Budget, Draw, Problem, Usage, Verdict
from consilience.driver import NOT_DRAWN, Asking, Driver, Finished, Progress
from consilience.errors import ConsilienceError, EndpointError, InputError
from consilience.ledger import Ledger
from consilience.rules import Rule
from consilience.serve.errors import ApiError, bad, of_endpoint, of_failed, of_spent
from consilience.serve.keys import Client, Keyring, total_budget
from consilience.serve.observe import Observer
from consilience.serve.policies import NONE, rule_of, served_rule
from consilience.serve.schema import EXTENSION, Ask
from consilience.text.answers.kinds import check_words_kind
from consilience.text.budget import Account, Price
from consilience.text.session import Session
from consilience.text.shared import SharedAccount
from consilience.text.sources.base import Request, Source
from consilience.text.sources.openai import OpenAISource
from consilience.text.transport import Retry

log = logging.getLogger("consilience.serve")

FLUSH = 1.0
"""Seconds after which others know what was spent here of a shared budget, and have what is idle."""
MODELS = 256
"""How many models' sources are kept, with what was learnt of their endpoint."""
CAPPED_TOKENS = 1024
"""What a draw may have at most where a cap is in force and the client states no limit: as in `solve`."""
WHOLE = re.compile(r"(?s).+")
"""Reads a whole reply: what ``response_format`` asked for is compared by its whole value."""
HOUSE_TAKES = frozenset(("temperature", "top_p", "max_tokens", "max_completion_tokens", "logprobs"))
HOUSE_IGNORES = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key"))  # say nothing on the reply


@dataclass(frozen=True)
class Settings:
    """What the server is started with; None stands for the configuration file's default, then the documented one.

    ``upstream`` is a URL, the name of an endpoint in the configuration, or ``house``. ``budget`` caps all requests
    together, ``max_tokens`` is sent where a client sets no limit, ``concurrency`` caps the calls to the upstream in
    flight, ``max_prompt_tokens`` is what is reserved for a prompt with images, ``queue`` the requests that are answered
    at once, ``heartbeat`` is in seconds. ``budget_name``: the caps of the server and its keys hold over all servers and
    worker processes of that name on the ledger.
    """

    upstream: str = "house"
    policy: str | None = None
    kind: str = "auto"
    budget: str | None = None
    max_tokens: int | None = None
    ledger: str | None = None
    concurrency: int = 64
    config: str | Path | None = None
    heartbeat: float = 10.0
    queue: int = 256
    max_prompt_tokens: int | None = None
    budget_name: str | None = None


@dataclass(frozen=True)
class Choice:
    """One agreed reply: the winning draw, and the verdict it stands for (``confidence`` None without an answer).

    ``drawn`` are the draws that were judged for it.
    """

    draw: Draw
    verdict: Verdict
    confidence: float | None
    drawn: tuple[Draw, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The agreed replies to a request, in the order of their indices, and what they took."""

    choices: list[Choice]
    policy: str
    kind: str
    usage: Usage
    draws_bought: int
    cost: float | None
    saved: int


OnProgress = Callable[[dict[int, dict[str, int]], int], None]
"""Told after every judgement: the votes so far of the choices still open, by index, and how many draws were judged."""


class Core:
    """One upstream, one ledger, one account; every request is a run of its own. Raises InputError for bad settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.config = configuration.read(settings.config)
        self.policy = settings.policy or self.config.defaults.policy or "asc"
        self.house = settings.upstream == "house"
        if self.policy != NONE:
            served_rule(self.policy)
        _check_kind(settings.kind)
        if min(settings.concurrency, settings.queue) < 1 or (
            settings.max_tokens is not None and settings.max_tokens < 1
        ):
            raise InputError("concurrency, queue and max_tokens must be at least 1")
        budget = Budget() if settings.budget is None else total_budget(settings.budget, "budget")
        self.source = _open_upstream(settings, self.config)
        self._siblings: OrderedDict[str, OpenAISource] = OrderedDict()
        self.ledger = Ledger(settings.ledger or self.config.defaults.ledger)
        self.shared: list[SharedAccount] = []
        self._keeping: asyncio.Task[None] | None = None
        self.account = self._open_account("server", budget, None)
        self.keyring = Keyring(self.config, self.account, self._open_account)
        self.session = Session(self.source, self.ledger, self.account)
        self.observers: list[Observer] = []
        self._sessions: set[Session] = set()

    def _open_account(self, name: str, budget: Budget, above: Account | None) -> Account:
        """An account on a total budget; on a shared one where there is a cap and others may spend from it."""
        if self.settings.budget_name is None or budget == Budget():
            return Account(budget, above)
        shared = self.ledger.budget(f"{self.settings.budget_name} {name}")
        self.shared.append(SharedAccount(budget, shared, above))
        return self.shared[-1]

    def start(self) -> None:
        """Keep the shared accounts until `close`; call from a running event loop."""
        if self.shared:
            self._keeping = asyncio.ensure_future(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(FLUSH)
            await self._flush()

    async def _flush(self) -> None:
        for account in self.shared:
            try:
                await account.flush()
            except ConsilienceError as error:  # what is held stays held
                log.warning("%s", error)

    async def close(self) -> None:
        """Close the connections, and write what is still to be written."""
        if self._keeping is not None:
            self._keeping.cancel()
        await self._flush()
        await self.source.close()
        await asyncio.to_thread(self.ledger.close)

    def draws_in_flight(self) -> int:
        """How many draws of all requests are on their way."""
        return sum(session.in_flight for session in self._sessions)

    # ------------------------------------------------------------------------------------------- what is asked

    def spec_of(self, ask_policy: str | None, client: Client) -> str:
        """The policy in force: the request's, else the client's, else the server's."""
        return ask_policy or client.policy or self.policy

    def source_of(self, model: str) -> Source:
        """The source of a model; raises ApiError (404) where the house model is asked for by another name."""
        if self.house:
            if model != "house":
                raise ApiError(
                    404, f"The model {model!r} does not exist; there is 'house'.", param="model", code="model_not_found"
                )
            return self.source
        assert isinstance(self.source, OpenAISource)
        source = self._siblings.get(model)
        if source is None:
            source = self._siblings[model] = self.source.sibling(model)
            if len(self._siblings) > MODELS:
                self._siblings.popitem(last=False)
        self._siblings.move_to_end(model)
        return source

    def price_of(self, model: str, account: Account) -> Price | None:
        """What a model's tokens cost; raises ApiError where a cap on money cannot be kept without knowing."""
        if self.house:
            return Price()
        known = self.config.prices.get(model)
        if known is not None:
            return Price(known.input, known.output)
        while account.budget.usd is None and account.parent is not None:
            account = account.parent
        if account.budget.usd is not None:
            raise bad(
                f'a money cap is in force and the price of {model!r} is not known: [prices."{model}"] with input and '
                f"output (USD per million tokens) is missing from the server's {configuration.FILE}",
                "model",
                "price_unknown",
            )
        return None

    # ----------------------------------------------------------------------------------------------- answering

    async def answer(
        self,
        ask: Ask,
        client: Client,
        seed: int,
        on_progress: OnProgress | None = None,
        on_end: Callable[[Session], None] = lambda _: None,
        *,
        repeatable: bool = True,
    ) -> Answer:
        """Draw for a request until its policy is satisfied; raises ApiError.

        ``repeatable``: the seed may come again, perhaps elsewhere, so that other processes may want the same draws.
        ``on_end`` gets the session, with what it bought, however that ends.
        """
        spec = self.spec_of(ask.policy, client)
        if spec == NONE:  # of the house, which there is nothing to pass through to
            spec = "sc:n=1"
        rule = rule_of(spec, ask.policy_field) if ask.policy else served_rule(spec)
        account = Account(ask.budget or Budget(), client.account)
        bounded = self.bounds_prompt(ask.plain, account)
        source = self.source_of(ask.model)
        session = self.session.nested(source, account, self.price_of(ask.model, account), repeatable)
        asking = self._asking(ask, rule, seed, account, None if bounded else self.settings.max_prompt_tokens)
        driver = Driver(session, rule, asking, concurrency=0, warn=log.info)  # 0: nothing is drawn ahead of the rule
        if on_progress is not None:
            driver.on_progress = _telling(driver, on_progress)
        self._sessions.add(session)
        try:
            finished = await _run(driver, ask)
        finally:
            self._sessions.discard(session)
            on_end(session)
        choices = [_choice(one, account) for one in finished]
        usage = sum((choice.verdict.usage for choice in choices), Usage())
        return Answer(
            choices=choices,
            policy=rule.name,
            kind=finished[0].kind,
            usage=usage,
            draws_bought=session.bought + session.asked,
            cost=None if session.price is None else usage.cost,
            saved=driver.progress.saved,
        )

    def bounds_prompt(self, plain: bool, account: Account) -> bool:
        """Whether its bytes bound a prompt's tokens; raises ApiError where nothing does, and a cap is in force."""
        if not plain and account.capped and self.settings.max_prompt_tokens is None:
            text = "a cap on tokens or money is in force, and what an image, a sound or a file takes cannot be known"
            text += ": the server has to be started with --max-prompt-tokens"
            raise bad(text, "messages", "prompt_not_bounded")
        return plain

    def _asking(self, ask: Ask, rule: Rule, seed: int, account: Account, most_prompt: int | None) -> Asking:
        params = self._params(ask, rule, account)
        required = frozenset(ask.params)
        structured = isinstance(ask.response_format, dict) and ask.response_format.get("type") != "text"
        kind = ask.kind or ("json" if structured else self.settings.kind)

        def build(problem: Problem, session: Session, own: Mapping[str, Any]) -> Request:
            number = int(problem.id)
            return Request(
                endpoint=session.source.endpoint,
                model=session.source.model,
                messages=ask.prompts[number // ask.n],
                params={**params, **own},
                seed=(seed + number) % 2**63,
                tools=ask.tools,
                response_format=ask.response_format,
                required=required,
                question=problem.question,
                problem_id=problem.id,
                whole=True,
                most_prompt=most_prompt,
            )

        plain = {name: params[name] for name in ("temperature", "top_p", *_LIMITS) if name in params}
        return Asking(
            params=plain,
            seed=seed,
            kind=kind,
            pattern=WHOLE if structured and ask.kind is None else None,
            required=required.intersection(plain),
            build=build,
        )

    def _params(self, ask: Ask, rule: Rule, account: Account) -> dict[str, Any]:
        """The parameters that go upstream: the client's, and what the policy and the caps need beside them."""
        params = dict(ask.params)
        limit = self.settings.max_tokens or (CAPPED_TOKENS if account.capped else None)
        if limit is not None and not params.keys() & set(_LIMITS):
            params["max_tokens"] = limit
        if self.house:
            return _house_params(ask, params)
        if not ask.chat:
            params["completion"] = True
            params["logprobs"] = params.get("logprobs", 1 if rule.needs else False)
        elif not ask.logprobs:
            params["logprobs"] = bool(rule.needs)
        return params


_LIMITS = ("max_tokens", "max_completion_tokens")


def _check_kind(kind: str) -> None:
    try:
        check_words_kind(kind)
    except ValueError as error:
        raise InputError(f"kind: {error}") from error


def _open_upstream(settings: Settings, config: configuration.Config) -> Source:
    if settings.upstream == "house":
        from consilience.text.sources.house_source import HouseSource

        return HouseSource()
    url, variable = settings.upstream, "OPENAI_API_KEY"
    if url in config.endpoints:
        url, variable = config.endpoints[url].url, config.endpoints[url].api_key_env
    elif "://" not in url:
        there = ", ".join(config.endpoints) or "none configured"
        raise InputError(f"upstream {url!r}: neither house nor a URL, nor an endpoint (there are: {there})")
    return OpenAISource(
        "(upstream)",
        url,
        api_key=os.environ.get(variable),
        key_variable=variable,
        concurrency=settings.concurrency,
        retry=Retry(patience=60.0),
    )


def _house_params(ask: Ask, params: dict[str, Any]) -> dict[str, Any]:
    """What the house model is asked with; raises ApiError for what it cannot do."""
    takes = HOUSE_TAKES | HOUSE_IGNORES
    if (name := next((name for name in params if name not in takes), None)) is not None:
        raise bad(f"the house model does not take '{name}'", name, "unsupported_parameter")
    if ask.logprobs:
        raise bad("the house model gives no log-probabilities per token", "logprobs", "unsupported_parameter")
    asked = {"tools": ask.tools, "response_format": ask.response_format}
    if (name := next((name for name, value in asked.items() if value is not None), None)) is not None:
        raise bad(f"the house model does not take '{name}'", name, "unsupported_parameter")
    for messages in ask.prompts:
        if not all(isinstance(message.get("content"), str) for message in messages):
            raise bad("the house model reads texts alone", "messages" if ask.chat else "prompt")
    kept = {name: value for name, value in params.items() if name not in (*HOUSE_IGNORES, "logprobs")}
    return {"temperature": 0.7} | kept


def _telling(driver: Driver, on_progress: OnProgress) -> Callable[[Progress], None]:
    """Passes the driver's progress on where draws were judged since the last time."""
    told = 0

    def tell(progress: Progress) -> None:
        nonlocal told
        if progress.judged > told:
            told = progress.judged
            on_progress(driver.tallies(), told)

    return tell


async def _run(driver: Driver, ask: Ask) -> list[Finished]:
    """One run over all choices of a request."""
    problems = [
        Problem(question=ask.question(prompt), id=str(prompt * ask.n + place))
        for prompt in range(len(ask.prompts))
        for place in range(ask.n)
    ]
    finished: list[Finished] = []
    try:
        await driver.run(problems, finished.append)
    except EndpointError as error:
        raise of_endpoint(error) from error
    except InputError as error:
        raise bad(str(error)) from error
    return finished


def _choice(one: Finished, account: Account) -> Choice:
    """The reply that a finished run stands for; raises ApiError where no draw came."""
    verdict = one.problem.verdict
    assert verdict is not None
    if one.first is not None:
        return Choice(one.first, verdict, verdict.confidence, tuple(one.problem.draws[: verdict.draws]))
    drawn = one.problem.draws
    if (fallback := next((draw for draw in drawn if not draw.failed), None)) is not None:
        if not verdict.votes and verdict.stopped_because in ("rule", "max"):
            verdict.stopped_because = "no answer"
        return Choice(fallback, verdict, None, tuple(drawn[: verdict.draws]))
    failed = next((draw for draw in drawn if draw.error != NOT_DRAWN), None)
    raise of_failed(failed) if failed is not None else _unpaid(verdict.stopped_because, account)


def _unpaid(reason: str, account: Account) -> ApiError:
    if account.refused_by is account:
        return bad(f"the request's budget does not pay for one draw ({reason})", f"{EXTENSION}.budget", "budget_spent")
    return of_spent(account.refused_by, reason)
