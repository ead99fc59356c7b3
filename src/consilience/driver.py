"""The live driver: draws for many problems at once and answers each as soon as its rule is satisfied.

The rule judges a problem's draws in index order, one prefix at a time, exactly as replay does; what runs ahead of it
only prefetches. So neither concurrency nor the order of arrival changes a verdict. A rule that couples its problems
judges them together, in rounds.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any, TypeVar

import numpy as np

from consilience.draws import Draw, Problem, Usage, Verdict
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError, InputError, SourceExhausted
from consilience.prefix import Prefix, view_of
from consilience.rules import Int, Rule
from consilience.text.asking import Asker
from consilience.text.prompts import messages
from consilience.text.session import Session
from consilience.text.sources.base import Request
from consilience.views import kind_of, number_of, right_answer, trait_of

T = TypeVar("T")

PREFETCH = 0.1
"""Draws that may run ahead of the rule, as a share of the draws it has judged: the bound on what can be wasted."""

NOT_DRAWN = "not drawn: the budget was spent"
"""The error of a draw that the budget refused although later ones of its wave arrived."""


@dataclass(frozen=True)
class Asking:
    """How problems become requests: sampling parameters by their OpenAI names, prompt parts, answer reading.

    ``required`` names the parameters the user set himself. ``build`` makes a problem's request for a session and
    the parameters of its arm, in place of prompt and ``params``.
    """

    params: dict[str, Any]
    seed: int = 0
    system: str | None = None
    template: str | None = None
    kind: str | None = None
    pattern: re.Pattern[str] | None = None
    required: frozenset[str] = frozenset()
    build: Callable[[Problem, Session, Mapping[str, Any]], Request] | None = None


@dataclass
class Progress:
    """How far a run is: problems, draws judged and draws that a fixed ``max`` would have taken."""

    problems: int
    answered: int = 0
    finished: int = 0
    judged: int = 0
    saved: int = 0
    started: float = field(default_factory=time.monotonic)


@dataclass
class Duplicates:
    """Watches for a backend that repeats itself: equal texts per question, equal completion ids."""

    draws: int = 0
    repeated: int = 0
    first_questions: list[bool] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)
    repeated_id: str | None = None

    def note(self, draws: Sequence[Draw], request: str, arm: int = 0) -> None:
        """Take in an arm's draws of a finished question; questions with the same ``request`` (its hash) share them."""
        if request in self.requests:
            return
        self.requests.add(request)
        texts = [draw.text for draw in draws if not draw.failed]
        self.draws += len(texts)
        self.repeated += len(texts) - len(set(texts))
        if len(texts) > 1 and len(self.first_questions) < 10:
            self.first_questions.append(len(set(texts)) == 1)
        here: set[str] = set()
        for draw in draws:
            name = (draw.model_extra or {}).get("completion_id")
            known = f"{arm} {name}"  # two endpoints may count their calls alike
            if known in self.ids or (known in here and draw.prompt_tokens):  # siblings of one call share its id
                self.repeated_id = self.repeated_id or str(name)
            if name:
                here.add(known)
        self.ids |= here

    @property
    def share(self) -> float | None:
        """Share of draws whose text repeats an earlier draw of the same question; None without draws."""
        return self.repeated / self.draws if self.draws else None

    def warning(self) -> str | None:
        """What to tell the user, once there is reason to."""
        if self.repeated_id is not None:
            return f"the endpoint returned the completion id {self.repeated_id!r} twice: its replies may be cached"
        if len(self.first_questions) == 10 and all(self.first_questions):
            return (
                "all draws of each of the first ten questions are identical although temperature > 0: "
                "a cache or a fixed seed at the endpoint makes repeated draws worthless"
            )
        return None


class Driver:
    """One run of one rule over problems.

    Several sessions are the arms of a rule that draws from several models, in their order; they share an account.
    ``on_progress`` is called after every judgement; ``warn`` gets a line the user should read, once per subject.
    """

    def __init__(
        self,
        session: Session | Sequence[Session],
        rule: Rule,
        asking: Asking,
        *,
        concurrency: int = 8,
        on_progress: Callable[[Progress], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.sessions = [session] if isinstance(session, Session) else list(session)
        self.session = self.sessions[0]
        self.rule = rule
        self._arms = _arms(self.sessions, rule)
        self.asking = asking
        self.concurrency = concurrency
        self.on_progress = on_progress
        self.warn = warn
        self.progress = Progress(0)
        self.duplicates = Duplicates()
        self.budget_spent: str | None = None
        self._warned = False
        self._unseen = set(rule.needs)
        self._failure: ConsilienceError | None = None
        self._failure_said = False
        self._first_want: Int | None = None
        self._rounds: _Rounds | None = None
        self._open: dict[int, _Open] = {}
        self._all_open = False
        self._ahead = 0
        self._prefetching: set[asyncio.Task[None]] = set()

    async def run(self, problems: Sequence[Problem], on_finished: Callable[[Finished], None]) -> None:
        """Answer all problems; ``on_finished`` gets each, with draws and verdict, in input order.

        Raises EndpointError when the run cannot go on; the draws made so far are in the ledger.
        """
        self.progress.problems = len(problems)
        finished = _InOrder(on_finished)
        together = max(4 * self.concurrency, 64)
        if self.rule.coupled:
            together = max(len(problems), 1)
            self._rounds = _Rounds(self.rule, len(problems))
        room = asyncio.Semaphore(together)
        try:
            await self._prepare(problems)
            async with asyncio.TaskGroup() as group:
                async for number, opened in self._opened(problems, room, together):
                    group.create_task(self._answer(number, opened, finished, room))
                self._all_open = True
            if self._prefetching:
                await asyncio.wait(self._prefetching)
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            for task in self._prefetching:
                task.cancel()

    async def _prepare(self, problems: Sequence[Problem]) -> None:
        """Ask the model for the numbers per problem that the rule reads, where they are not given."""
        try:
            for line in await prepare(problems, self.rule, self._asker()):
                self.warn(line)
        except BudgetSpent as stop:  # the numbers stay unknown, and the run goes on to its verdicts
            self._why_ended(stop)

    def _asker(self) -> Asker:
        asking = self.asking
        return Asker(self.session, params=asking.params, seed=asking.seed, required=asking.required)

    async def _opened(
        self, problems: Sequence[Problem], room: asyncio.Semaphore, ahead: int
    ) -> AsyncIterator[tuple[int, _Open]]:
        """Problems in order, as room comes free; the ledger is asked for many at a time."""
        for start in range(0, len(problems), ahead):
            chunk = [
                _Open(problem, self.requests(problem), self._kind(problem)) for problem in problems[start:][:ahead]
            ]
            for number, arm in enumerate(self._arms):
                await arm.session.open(opened.requests[number] for opened in chunk)
            for number, opened in enumerate(chunk, start):
                await room.acquire()
                self._open[number] = opened
                yield number, opened

    def tallies(self) -> dict[int, dict[str, int]]:
        """The votes so far of the problems that are open, by their place in the run."""
        return {number: opened.prefix.tally() for number, opened in self._open.items()}

    def _kind(self, problem: Problem) -> str:
        return kind_of(problem, self.asking.kind)

    def requests(self, problem: Problem) -> list[Request]:
        """The request of each arm that a problem's draws are drawn from."""
        asking = self.asking
        if asking.build is not None:
            return [asking.build(problem, arm.session, arm.params) for arm in self._arms]
        return [
            Request(
                endpoint=arm.session.source.endpoint,
                model=arm.session.source.model,
                messages=messages(
                    problem.question,
                    self._kind(problem),
                    system=asking.system,
                    template=asking.template,
                    bare=arm.session.source.endpoint == "house",
                ),
                params={**asking.params, **arm.params},
                seed=asking.seed,
                required=asking.required,
                question=problem.question,
                problem_id=problem.id,
            )
            for arm in self._arms
        ]

    async def _answer(self, number: int, opened: _Open, finished: _InOrder, room: asyncio.Semaphore) -> None:
        try:
            reason = await self._judge(number, opened)
            verdict, first, asked = await self._conclude(opened, reason)
            problem = opened.problem
            by_arm = await self._all_draws(opened)
            verdict.usage = usage_of([*(draw for draws in by_arm for draw in draws), *asked])
            verdict.cost = verdict.usage.cost
            problem.verdict = verdict
            problem.collected_by = self.rule.name
            right = await self._right(verdict.answer, first, opened)
            self._finish(verdict, by_arm, opened.requests[0].hash)
        finally:
            if self._rounds is not None:
                self._rounds.leave(number)
            del self._open[number]
            pairs = zip(self._arms, opened.requests, strict=True)
            shared = [arm.session.release(request) for arm, request in pairs]
            room.release()
        problem.draws = [
            draw for arm, draws in enumerate(by_arm) for draw in opened.prefix.with_answers(draws, shared[arm], arm)
        ]
        finished.put(number, Finished(problem, opened.kind, right, first))

    async def _conclude(self, opened: _Open, reason: str) -> tuple[Verdict, Draw | None, list[Draw]]:
        """The verdict on the judged draws, its first supporting draw, and the replies a procedure asked for."""
        verdict, first = opened.prefix.verdict(self.rule, reason)
        if self.rule.procedure is None or not opened.prefix.draws:
            return verdict, first, []
        asker = self._asker()
        try:
            verdict, first = await conclude(self.rule, asker, opened.problem, opened.prefix, verdict)
        except BudgetSpent as stop:
            verdict.stopped_because = self._why_ended(stop)
        return verdict, first, asker.asked

    async def _right(self, answer: str | None, first: Draw | None, opened: _Open) -> bool | None:
        if opened.kind in ("math", "code", "sql"):  # may ask the computer algebra system, or run it
            return await asyncio.to_thread(right_answer, answer, first, opened.problem, opened.kind)
        return right_answer(answer, first, opened.problem, opened.kind)

    async def _judge(self, number: int, opened: _Open) -> str:
        """Draw what the rule certainly needs, judge that prefix, and so on until it wants no more; returns why."""
        while (want := await self._want(number, opened)).any():
            waves = [
                (arm, range(opened.prefix.judged(arm), opened.prefix.judged(arm) + n)) for arm, n in enumerate(want)
            ]
            stop = await self._draw([wave for wave in waves if wave[1]], opened)
            self.on_progress(self.progress)
            if stop is not None:
                opened.buying = False
                return self._why_ended(stop)
        opened.buying = False
        return "rule" if opened.judged < self.rule.max else "max"

    async def _draw(self, waves: list[tuple[int, range]], opened: _Open) -> BudgetSpent | SourceExhausted | None:
        """Draw these indices of each arm and judge them; returns what ended it, if something did."""
        opened.buying = not all(self._has(opened, arm, index) for arm, indices in waves for index in indices)
        if len(self._arms) == 1:
            opened.asked = max(opened.asked, waves[0][1].stop)
            self._prefetch()
            outcomes = [await self._wave(opened, *waves[0])]
        else:
            outcomes = await _all_of(self._wave(opened, *wave) for wave in waves)
        stop = None
        for (arm, indices), (draws, ended) in zip(waves, outcomes, strict=True):
            await opened.prefix.take(draws, self.asking.pattern, arm)
            self.progress.judged += len(draws) if ended is None else 0
            self._ahead -= sum(index in opened.ahead for index in indices[: len(draws)]) if ended is None else 0
            stop = stop or ended
        return stop

    async def _wave(
        self, opened: _Open, arm: int, indices: range
    ) -> tuple[list[Draw], BudgetSpent | SourceExhausted | None]:
        """The draws of an arm at these indices, perhaps only the first of them, and what ended it, if something did."""
        try:
            return await self._arms[arm].session.draw(opened.requests[arm], indices), None
        except (BudgetSpent, SourceExhausted) as stop:
            return self._behind_gaps(opened, arm, indices), stop

    def _has(self, opened: _Open, arm: int, index: int) -> bool:
        return self._arms[arm].session.has(opened.requests[arm], index)

    async def _want(self, number: int, opened: _Open) -> Int:
        """How many further draws of each arm the rule certainly needs: none at its max; int32 [arms]."""
        if self._rounds is not None:
            return await self._rounds.want(number, opened.prefix)
        if opened.judged == 0 and not self.rule.traits:  # the same for every problem without draws
            if self._first_want is None:
                self._first_want = opened.prefix.want(self.rule)
            return self._first_want
        if opened.judged >= self.rule.max:
            return np.zeros(len(self._arms), np.int32)
        return opened.prefix.want(self.rule)

    def _behind_gaps(self, opened: _Open, arm: int, indices: range) -> list[Draw]:
        """What arrived of a wave behind a draw that the budget refused; the refused ones never vote."""
        session, request = self._arms[arm].session, opened.requests[arm]
        end = min(indices.stop, session.last(request) + 1)
        found = [session.at(request, index) for index in range(indices.start, end)]
        return [Draw(text="", error=NOT_DRAWN) if draw is None else draw for draw in found]

    def _why_ended(self, stop: BudgetSpent | SourceExhausted) -> str:
        if isinstance(stop, SourceExhausted):
            return "source exhausted"
        if self.budget_spent is None:
            self.budget_spent = stop.limit
            self.warn(f"budget: {stop}; the questions left get what was drawn for them")
        return f"budget: {stop.limit}"

    async def _all_draws(self, opened: _Open) -> list[list[Draw]]:
        """Each arm's judged draws and, behind them, those that were prefetched and are here without a gap."""
        pending = [task for index, task in opened.ahead.items() if index >= opened.judged]
        if pending:
            await asyncio.wait(pending)
        if self._failure is not None:
            raise self._failure
        by_arm = [list(arm.draws) for arm in opened.prefix.arms]
        if opened.ahead:
            by_arm[0] += self.session.held(opened.requests[0], opened.judged)
        return by_arm

    def _prefetch(self) -> None:
        """Fill idle connections with draws that the rule may need, round robin, within the allowance.

        Only for problems that are waiting for the endpoint: what the ledger answers needs no head start.
        """
        if not self._all_open or self._rounds is not None:
            return
        waiting = sorted((o for o in self._open.values() if o.buying), key=lambda o: o.asked - o.judged)
        for opened in waiting:
            idle = self.concurrency - self.session.in_flight
            allowance = PREFETCH * self.progress.judged - self._ahead
            if idle < 1 or allowance < 1 or self.budget_spent:
                return
            if opened.asked < self.rule.max and not self._has(opened, 0, opened.asked):
                index, opened.asked = opened.asked, opened.asked + 1
                self._ahead += 1
                task = asyncio.create_task(self._draw_ahead(opened, index))
                opened.ahead[index] = task
                self._prefetching.add(task)
                task.add_done_callback(self._prefetching.discard)

    async def _draw_ahead(self, opened: _Open, index: int) -> None:
        try:
            await self.session.draw(opened.requests[0], [index])
        except (BudgetSpent, SourceExhausted, EndpointError):
            return  # it is raised where the rule needs a draw
        except ConsilienceError as error:  # a draw that cannot be kept
            self._failure = self._failure or error

    def _finish(self, verdict: Verdict, by_arm: Sequence[Sequence[Draw]], request: str) -> None:
        self.progress.finished += 1
        self.progress.answered += not verdict.abstained
        if verdict.decided:
            self.progress.saved += self.rule.max - verdict.draws
        self.on_progress(self.progress)
        for arm, drawn in enumerate(by_arm):
            if self._arms[arm].params.get("temperature") != 0:
                self.duplicates.note(drawn, f"{request} {arm}", arm)
        draws = [draw for drawn in by_arm for draw in drawn]
        if not self._failure_said and (
            reason := next((d.error for d in draws if d.error not in (None, NOT_DRAWN)), None)
        ):
            self._failure_said = True
            self.warn(f"a draw failed: {reason}")
        for name in sorted(self._unseen):
            self._unseen.discard(name)
            if all(isnan(number_of(draw, name)) for draw in draws):
                self.warn(f"{self.rule.name} reads {name!r}, which the draws do not have: such draws do not vote")
        if not self._warned and self.asking.params.get("temperature", 1) > 0 and (text := self.duplicates.warning()):
            self._warned = True
            self.warn(text)


class _Open:
    """A problem being answered: its judged prefix, and what was asked for beyond it."""

    def __init__(self, problem: Problem, requests: list[Request], kind: str) -> None:
        self.problem, self.requests, self.kind = problem, requests, kind
        self.prefix = Prefix(problem, kind, len(requests))
        self.asked = 0
        self.ahead: dict[int, asyncio.Task[None]] = {}
        self.buying = False

    @property
    def judged(self) -> int:
        """How many draws the rule has seen, all arms together."""
        return sum(len(arm.draws) for arm in self.prefix.arms)


@dataclass(frozen=True)
class _Arm:
    """Where an arm's draws come from: a session, and the parameters that are its own."""

    session: Session
    params: Mapping[str, Any]


def _arms(sessions: Sequence[Session], rule: Rule) -> list[_Arm]:
    if rule.settings is not None and len(sessions) == 1:
        return [_Arm(sessions[0], params) for params in rule.settings]
    if len(sessions) != rule.arms or rule.settings is not None:
        several = 1 if rule.settings is not None else rule.arms
        raise InputError(f"policy {rule.name}: draws from {_models(several)}, but {_models(len(sessions))} given")
    names = Counter((session.source.endpoint, session.source.model) for session in sessions)
    if twice := [model for (_, model), times in names.items() if times > 1]:
        raise InputError(f"policy {rule.name}: {twice[0]!r} is given twice; its draws would be counted twice")
    return [_Arm(session, {}) for session in sessions]


def _models(count: int) -> str:
    return "1 model" if count == 1 else f"{count} models"


class _Rounds:
    """Judges all problems of a coupled rule together: when each has got what it wanted, the rule is asked again."""

    def __init__(self, rule: Rule, problems: int) -> None:
        self._rule = rule
        self._prefixes: dict[int, Prefix] = {}
        self._waiting: dict[int, asyncio.Future[Int]] = {}
        self._gone: set[int] = set()
        self._problems = problems

    async def want(self, number: int, prefix: Prefix) -> Int:
        """What a problem is to draw in the next round it has a part in; all zero when there is none."""
        self._prefixes[number] = prefix
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._judge()
        return await answer

    def leave(self, number: int) -> None:
        """A problem that will not come again: its draws still count for the others."""
        self._gone.add(number)
        self._judge()

    def _judge(self) -> None:
        while self._waiting and len(self._waiting) + len(self._gone) == self._problems:
            numbers = sorted(self._prefixes)
            view = view_of([self._prefixes[number] for number in numbers], self._rule)
            closed = np.array([number in self._gone for number in numbers])
            want = self._rule.want(replace(view, closed=closed))
            wanted = {number: row for number, row in zip(numbers, want, strict=True) if number in self._waiting}
            over = not any(row.any() for row in wanted.values())
            for number, row in wanted.items():
                if over or row.any():
                    future = self._waiting.pop(number)
                    if not future.done():
                        future.set_result(row)
            return


async def _all_of(waves: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them give; raises what one raised only when the others, whose draws are being paid for, are over."""
    results = await asyncio.gather(*waves, return_exceptions=True)
    done: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


async def prepare(problems: Sequence[Problem], rule: Rule, asker: Asker | None) -> list[str]:
    """Give every problem the numbers that the rule reads, asking the model for those that are missing.

    Returns what the user should read. Raises InputError where there is nobody to ask.
    """
    missing = [name for name in rule.traits if any(isnan(trait_of(problem, name)) for problem in problems)]
    if not missing or not problems:
        return []
    if asker is None or not hasattr(rule.stop, "prepare"):
        raise InputError(f"policy {rule.name}: the problems have no {missing[0]!r}, and there is no model to ask")
    found: dict[str, Sequence[float]] = await rule.stop.prepare(asker, problems)
    for name in missing:
        for problem, value in zip(problems, found[name], strict=True):
            setattr(problem, name, float(value))
    alike = [name for name in missing if len(problems) > 1 and len(set(found[name])) == 1]
    return [f"{rule.name}: the model's replies gave no {name}; all problems count alike" for name in alike]


async def conclude(
    rule: Rule, asker: Asker | None, problem: Problem, prefix: Prefix, vote: Verdict
) -> tuple[Verdict, Draw | None]:
    """The verdict of the rule's procedure, with the counts of ``vote``, and its first supporting draw."""
    assert rule.procedure is not None
    draws = prefix.answered()
    problem = problem.model_copy(update={"kind": prefix.kind})
    said: Verdict = await rule.procedure(asker, problem, draws)
    counted = ("votes", "draws", "failed", "usage", "cost", "stopped_because", "decided")
    more = said.model_dump(exclude=set(counted), exclude_unset=True)
    verdict = vote.model_copy(update={**more, "abstained": said.answer is None})
    chosen = more.get("chosen")
    first = draws[chosen] if chosen is not None else await asyncio.to_thread(prefix.supporter, verdict.answer)
    return verdict, first


def usage_of(draws: Iterable[Draw]) -> Usage:
    """Tokens and money of draws as their endpoint stated them, one request counted per completion."""
    prompt = completion = requests = 0
    cost = 0.0
    calls: set[str] = set()
    for draw in draws:
        prompt += draw.prompt_tokens or 0
        completion += draw.completion_tokens or 0
        cost += draw.cost or 0.0
        call = (draw.model_extra or {}).get("completion_id")
        requests += call is None or call not in calls
        if call:
            calls.add(call)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cost=cost, requests=requests)


@dataclass(frozen=True, slots=True)
class Finished:
    """A problem with its draws and verdict, the answer kind in force, and whether the verdict is right (if known).

    ``first`` is the first judged draw that supports the verdict's answer.
    """

    problem: Problem
    kind: str
    right: bool | None
    first: Draw | None = None


class _InOrder:
    """Passes finished problems on in their numbers' order."""

    def __init__(self, on_finished: Callable[[Finished], None]) -> None:
        self._on_finished = on_finished
        self._next = 0
        self._waiting: dict[int, Finished] = {}

    def put(self, number: int, finished: Finished) -> None:
        self._waiting[number] = finished
        while self._next in self._waiting:
            self._on_finished(self._waiting.pop(self._next))
            self._next += 1
