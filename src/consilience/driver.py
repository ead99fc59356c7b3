"""The live driver: draws for many problems at once and answers each as soon as its rule is satisfied.

The rule judges a problem's draws in index order, one prefix at a time, exactly as replay does; what runs ahead of it
only prefetches. So neither concurrency nor the order of arrival changes a verdict.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from consilience.draws import Draw, Problem, Usage, Verdict
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError, SourceExhausted
from consilience.rules import Rule
from consilience.text.prompts import messages
from consilience.text.session import Session
from consilience.text.sources.base import Request
from consilience.views import Prefix, kind_of, number_of, right_answer

PREFETCH = 0.1
"""Draws that may run ahead of the rule, as a share of the draws it has judged: the bound on what can be wasted."""

NOT_DRAWN = "not drawn: the budget was spent"
"""The error of a draw that the budget refused although later ones of its wave arrived."""


@dataclass(frozen=True)
class Asking:
    """How problems become requests: sampling parameters by their OpenAI names, prompt parts, answer reading.

    ``required`` names the parameters the user set himself; ``bare`` asks the question alone.
    """

    params: dict[str, Any]
    seed: int = 0
    system: str | None = None
    template: str | None = None
    kind: str | None = None
    pattern: re.Pattern[str] | None = None
    required: frozenset[str] = frozenset()
    bare: bool = False


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

    def note(self, draws: Sequence[Draw], request: str) -> None:
        """Take in all draws of one finished question; questions with the same ``request`` (its hash) share them."""
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
            if name in self.ids or (name in here and draw.prompt_tokens):  # siblings of one call share its id
                self.repeated_id = self.repeated_id or str(name)
            if name:
                here.add(str(name))
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

    ``on_progress`` is called after every judgement; ``warn`` gets a line the user should read, once per subject.
    """

    def __init__(
        self,
        session: Session,
        rule: Rule,
        asking: Asking,
        *,
        concurrency: int = 8,
        on_progress: Callable[[Progress], None] = lambda _: None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.session = session
        self.rule = rule
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
        self._first_want: int | None = None
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
        room = asyncio.Semaphore(max(4 * self.concurrency, 64))
        try:
            async with asyncio.TaskGroup() as group:
                async for number, opened in self._opened(problems, room):
                    group.create_task(self._answer(number, opened, finished, room))
                self._all_open = True
            if self._prefetching:
                await asyncio.wait(self._prefetching)
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            for task in self._prefetching:
                task.cancel()

    async def _opened(self, problems: Sequence[Problem], room: asyncio.Semaphore) -> AsyncIterator[tuple[int, _Open]]:
        """Problems in order, as room comes free; the ledger is asked for many at a time."""
        ahead = max(4 * self.concurrency, 64)
        for start in range(0, len(problems), ahead):
            chunk = [_Open(problem, self.request(problem), self._kind(problem)) for problem in problems[start:][:ahead]]
            await self.session.open(opened.request for opened in chunk)
            for number, opened in enumerate(chunk, start):
                await room.acquire()
                self._open[number] = opened
                yield number, opened

    def _kind(self, problem: Problem) -> str:
        return kind_of(problem, self.asking.kind)

    def request(self, problem: Problem) -> Request:
        """The request that a problem's draws are drawn from."""
        asking, source = self.asking, self.session.source
        return Request(
            endpoint=source.endpoint,
            model=source.model,
            messages=messages(
                problem.question,
                self._kind(problem),
                system=asking.system,
                template=asking.template,
                bare=asking.bare,
            ),
            params=asking.params,
            seed=asking.seed,
            required=asking.required,
            question=problem.question,
            problem_id=problem.id,
        )

    async def _answer(self, number: int, opened: _Open, finished: _InOrder, room: asyncio.Semaphore) -> None:
        try:
            verdict, first = await self._judge(opened)
            problem = opened.problem
            problem.draws = await self._all_draws(opened)
            problem.collected_by = self.rule.name
            verdict.usage = usage_of(problem.draws)
            verdict.cost = verdict.usage.cost
            problem.verdict = verdict
            right = await self._right(verdict.answer, first, opened)
            self._finish(verdict, problem.draws, opened.request.hash)
        finally:
            del self._open[number]
            shared = self.session.release(opened.request)
            room.release()
        problem.draws = opened.prefix.with_answers(problem.draws, shared)
        finished.put(number, Finished(problem, opened.kind, right))

    async def _right(self, answer: str | None, first: Draw | None, opened: _Open) -> bool | None:
        if opened.kind == "math":  # may ask the computer algebra system
            return await asyncio.to_thread(right_answer, answer, first, opened.problem, opened.kind)
        return right_answer(answer, first, opened.problem, opened.kind)

    async def _judge(self, opened: _Open) -> tuple[Verdict, Draw | None]:
        """Draw what the rule certainly needs, judge that prefix, and so on until it wants no more.

        Returns the verdict and its first supporting draw.
        """
        reason = "max"
        while want := self._want(opened):
            opened.asked = max(opened.asked, opened.judged + want)
            opened.buying = not all(self.session.has(opened.request, opened.judged + n) for n in range(want))
            self._prefetch()
            try:
                draws = await self.session.draw(opened.request, range(opened.judged, opened.judged + want))
            except (BudgetSpent, SourceExhausted) as stop:
                reason = self._why_ended(stop)
                await opened.prefix.take(self._behind_gaps(opened, want), self.asking.pattern)
                break
            self._ahead -= sum(1 for index in range(len(draws)) if opened.judged + index in opened.ahead)
            await opened.prefix.take(draws, self.asking.pattern)
            self.progress.judged += len(draws)
            self.on_progress(self.progress)
        else:
            reason = "rule" if opened.judged < self.rule.max else "max"
        opened.buying = False
        return opened.prefix.verdict(self.rule, reason)

    def _want(self, opened: _Open) -> int:
        """How many further draws the rule certainly needs: the same for every problem without draws, 0 at its max."""
        if opened.judged == 0:
            if self._first_want is None:
                self._first_want = opened.prefix.want(self.rule)
            return self._first_want
        return opened.prefix.want(self.rule) if opened.judged < self.rule.max else 0

    def _behind_gaps(self, opened: _Open, want: int) -> list[Draw]:
        """What arrived of the last wave behind a draw that the budget refused; the refused ones never vote."""
        end = min(opened.judged + want, self.session.last(opened.request) + 1)
        found = [self.session.at(opened.request, index) for index in range(opened.judged, end)]
        return [Draw(text="", error=NOT_DRAWN) if draw is None else draw for draw in found]

    def _why_ended(self, stop: BudgetSpent | SourceExhausted) -> str:
        if isinstance(stop, SourceExhausted):
            return "source exhausted"
        if self.budget_spent is None:
            self.budget_spent = stop.limit
            self.warn(f"budget: {stop}; the questions left get what was drawn for them")
        return f"budget: {stop.limit}"

    async def _all_draws(self, opened: _Open) -> list[Draw]:
        """The judged draws and, behind them, those that were prefetched and are here without a gap."""
        pending = [task for index, task in opened.ahead.items() if index >= opened.judged]
        if pending:
            await asyncio.wait(pending)
        if self._failure is not None:
            raise self._failure
        return [*opened.prefix.draws, *(self.session.held(opened.request, opened.judged) if opened.ahead else ())]

    def _prefetch(self) -> None:
        """Fill idle connections with draws that the rule may need, round robin, within the allowance.

        Only for problems that are waiting for the endpoint: what the ledger answers needs no head start.
        """
        if not self._all_open:
            return
        waiting = sorted((o for o in self._open.values() if o.buying), key=lambda o: o.asked - o.judged)
        for opened in waiting:
            idle = self.concurrency - self.session.in_flight
            allowance = PREFETCH * self.progress.judged - self._ahead
            if idle < 1 or allowance < 1 or self.budget_spent:
                return
            if opened.asked < self.rule.max and not self.session.has(opened.request, opened.asked):
                index, opened.asked = opened.asked, opened.asked + 1
                self._ahead += 1
                task = asyncio.create_task(self._draw_ahead(opened, index))
                opened.ahead[index] = task
                self._prefetching.add(task)
                task.add_done_callback(self._prefetching.discard)

    async def _draw_ahead(self, opened: _Open, index: int) -> None:
        try:
            await self.session.draw(opened.request, [index])
        except (BudgetSpent, SourceExhausted, EndpointError):
            return  # it is raised where the rule needs a draw
        except ConsilienceError as error:  # a draw that cannot be kept
            self._failure = self._failure or error

    def _finish(self, verdict: Verdict, draws: Sequence[Draw], request: str) -> None:
        self.progress.finished += 1
        self.progress.answered += not verdict.abstained
        if verdict.decided:
            self.progress.saved += self.rule.max - verdict.draws
        self.on_progress(self.progress)
        self.duplicates.note(draws, request)
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

    def __init__(self, problem: Problem, request: Request, kind: str) -> None:
        self.problem, self.request, self.kind = problem, request, kind
        self.prefix = Prefix(kind)
        self.asked = 0
        self.ahead: dict[int, asyncio.Task[None]] = {}
        self.buying = False

    @property
    def judged(self) -> int:
        """How many leading draws the rule has seen."""
        return len(self.prefix.draws)


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
    """A problem with its draws and verdict, the answer kind in force, and whether the verdict is right (if known)."""

    problem: Problem
    kind: str
    right: bool | None


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
