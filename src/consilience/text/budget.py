"""Hard budgets under concurrency: the worst case is reserved before a call is sent and settled after it.

Money is counted in whole picodollars (1e-12 USD) and tokens as integers, so nothing drifts over a long run.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass

from consilience.draws import Budget, Usage
from consilience.errors import BudgetSpent
from consilience.text.sources.base import Request

PICO = 1_000_000_000_000

LOOK = 0.05
"""Seconds after which one who waits for room looks again whether other processes left some."""


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens, input and output."""

    input: float = 0.0
    output: float = 0.0

    def pico(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Picodollars for so many tokens, rounded up."""
        return math.ceil(round((prompt_tokens * self.input + completion_tokens * self.output) * 1e6, 3))

    def usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """USD for so many tokens."""
        return self.pico(prompt_tokens, completion_tokens) / PICO


class Account:
    """What a run has spent and reserved, against its caps.

    ``spent`` is everything settled in this run, with reservations of attempts whose usage nobody knows; ``unknown``
    counts those attempts. All that an account spends counts against its ``parent`` too, and the caps of both hold;
    ``refused_by`` is the account, this one or one above it, whose cap was met last. ``shared`` says that other
    processes spend from the same cap, here or above: then `lease` may have to be awaited for room.
    """

    leased = False

    def __init__(self, budget: Budget, parent: Account | None = None) -> None:
        self.budget = budget
        self.parent = parent
        self.shared: bool = self.leased or (parent is not None and parent.shared)
        self.refused_by: Account | None = None
        self.draws = 0
        self.tokens = 0
        self.pico = 0
        self.prompt_tokens = 0
        self.requests = 0
        self.unknown = 0
        self._reserved_tokens = 0
        self._reserved_pico = 0
        self._pico_cap = None if budget.usd is None else math.floor(round(budget.usd * PICO, 3))
        self._draw_room, self._token_room, self._pico_room = budget.draws, budget.tokens, self._pico_cap
        self._tokens_elsewhere = self._pico_elsewhere = 0
        self._deadline = None if budget.seconds is None else time.monotonic() + budget.seconds
        self._waiting: deque[asyncio.Future[None]] = deque() if parent is None else parent._waiting

    @property
    def capped(self) -> bool:
        """Whether tokens or money are capped, here or above: then the worst case of a call has to be known."""
        own = self.budget.tokens is not None or self.budget.usd is not None
        return own or (self.parent is not None and self.parent.capped)

    @property
    def limited(self) -> bool:
        """Whether draws, tokens or money are capped, here or above."""
        own = self.budget.draws is not None or self.capped
        return own or (self.parent is not None and self.parent.limited)

    @property
    def spent(self) -> Usage:
        """What was settled so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.tokens - self.prompt_tokens,
            cost=self.pico / PICO,
            requests=self.requests,
        )

    @property
    def seconds_left(self) -> float:
        """Seconds until the time cap, infinite without one."""
        own = math.inf if self._deadline is None else self._deadline - time.monotonic()
        return own if self.parent is None else min(own, self.parent.seconds_left)

    def take_draws(self, wanted: int) -> int:
        """Count up to ``wanted`` draws against the cap and return how many were granted.

        Raises BudgetSpent when none is left.
        """
        left = wanted if self._draw_room is None else min(wanted, self._draw_room - self.draws)
        if left <= 0:
            self.refused_by = self
            raise BudgetSpent("draws", f"the budget of {self.budget.draws} draws is spent")
        if self.parent is not None:
            try:
                left = self.parent.take_draws(left)
            except BudgetSpent:
                self.refused_by = self.parent.refused_by
                raise
        self.draws += left
        return left

    async def take(self, wanted: int) -> int:
        """As `take_draws`, once those that other processes leave are here."""
        while True:
            more = self.shared and await self.lease(draws=wanted)
            try:
                return self.take_draws(wanted)
            except BudgetSpent:
                assert self.refused_by is not None
                if not (more and self.refused_by.leased):
                    raise  # where others were quicker, there may be more to have

    async def lease(self, draws: int = 0, tokens: int = 0, pico: int = 0) -> bool:
        """Have room for so much where processes share a cap; False where there is none, now or for good."""
        return self.parent is None or await self.parent.lease(draws, tokens, pico)

    def give_back_draws(self, count: int) -> None:
        """Take back draws that were granted but never sent for."""
        self.draws -= count
        if self.parent is not None:
            self.parent.give_back_draws(count)

    def fits(self, tokens: int, pico: int) -> bool:
        """Whether a call of that worst case could be sent once everything in flight has used nothing more."""
        return self._blocking(tokens, pico) is None

    async def reserve(self, tokens: int, pico: int) -> None:
        """Wait until the worst case fits beside what is in flight; raises BudgetSpent once it never will."""
        while not self.reserve_now(tokens, pico):
            if self.shared and await self.lease(tokens=tokens, pico=pico) and self.reserve_now(tokens, pico):
                return
            await self._settlement()

    def reserve_now(self, tokens: int, pico: int) -> bool:
        """Reserve a worst case that fits beside what is in flight; False where it has to wait, raises as `reserve`."""
        if (blocking := self._blocking(tokens, pico)) is not None:
            self.refused_by, limit = blocking
            shown = self.refused_by._shown(limit)
            raise BudgetSpent(limit, f"the next call could pass the cap on {limit} ({shown})")
        if not self._room(tokens, pico):
            return False
        self._reserve(tokens, pico)
        return True

    def _reserve(self, tokens: int, pico: int) -> None:
        self._reserved_tokens += tokens
        self._reserved_pico += pico
        if self.parent is not None:
            self.parent._reserve(tokens, pico)

    def note_unknown(self) -> None:
        """An attempt ended whose usage nobody knows."""
        self.unknown += 1
        if self.parent is not None:
            self.parent.note_unknown()

    def settle(self, tokens: int, pico: int, usage: Usage, used_pico: int) -> None:
        """Replace a reservation by what was used."""
        self._reserved_tokens -= tokens
        self._reserved_pico -= pico
        self.tokens += usage.tokens
        self.pico += used_pico
        self.prompt_tokens += usage.prompt_tokens
        self.requests += usage.requests
        if self.parent is not None:
            self.parent.settle(tokens, pico, usage, used_pico)
            return
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)

    def _blocking(self, tokens: int, pico: int) -> tuple[Account, str] | None:
        """The account and the cap of it that a call of that worst case can never fit under."""
        if self._deadline is not None and self._deadline <= time.monotonic():
            return self, "seconds"
        if self.budget.tokens is not None and self.tokens + self._tokens_elsewhere + tokens > self.budget.tokens:
            return self, "tokens"
        if self._pico_cap is not None and self.pico + self._pico_elsewhere + pico > self._pico_cap:
            return self, "usd"
        return None if self.parent is None else self.parent._blocking(tokens, pico)

    def _room(self, tokens: int, pico: int) -> bool:
        if self._token_room is not None and self.tokens + self._reserved_tokens + tokens > self._token_room:
            return False
        enough = self._pico_room is None or self.pico + self._reserved_pico + pico <= self._pico_room
        return enough and (self.parent is None or self.parent._room(tokens, pico))

    async def _settlement(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        left = min(self.seconds_left, LOOK) if self.shared else self.seconds_left
        await asyncio.wait([future], timeout=None if left == math.inf else max(left, 0))

    def _shown(self, limit: str) -> str:
        tokens, pico = self.tokens + self._tokens_elsewhere, self.pico + self._pico_elsewhere
        spent = {"tokens": tokens, "usd": f"{pico / PICO:.6f}", "seconds": "time is up"}[limit]
        return f"{spent} of {getattr(self.budget, limit)} spent"


class CallMeter:
    """The meter of one request: every attempt at a call passes through it (`Meter` of the sources).

    ``abandoned`` counts draws of calls that were cancelled on their way: the endpoint may have made them.
    """

    def __init__(self, account: Account, request: Request, price: Price) -> None:
        self.account = account
        self.price = price
        self._prompt = request.prompt_bound()
        self._per_draw = request.max_tokens
        self._worst: dict[int, tuple[int, int]] = {}
        self.abandoned = 0

    def worst_case(self, draws: int) -> tuple[int, int]:
        """Tokens and picodollars that one call for ``draws`` draws can cost at most."""
        if (known := self._worst.get(draws)) is not None:
            return known
        completion = draws * self._per_draw
        self._worst[draws] = worst = self._prompt + completion, self.price.pico(self._prompt, completion)
        return worst

    def affordable(self, draws: int) -> int:
        """The most draws, up to ``draws``, that one call may ask for; at least 1 (reserving then refuses)."""
        while draws > 1 and not self.account.fits(*self.worst_case(draws)):
            draws //= 2
        return draws

    @property
    def seconds_left(self) -> float:
        """Seconds until the time cap of the run, infinite without one."""
        return self.account.seconds_left

    def attempt(self, draws: int) -> _Attempt:
        """Reserve the worst case of one call for ``draws`` draws while the block runs."""
        return _Attempt(self, draws)


class _Attempt:
    __slots__ = ("_done", "_draws", "_meter", "_pico", "_tokens", "seconds_left")

    def __init__(self, meter: CallMeter, draws: int) -> None:
        self._meter, self._draws, self._done = meter, draws, False
        self._tokens, self._pico = meter.worst_case(draws)
        self.seconds_left = math.inf

    async def __aenter__(self) -> _Attempt:
        account = self._meter.account
        if not account.reserve_now(self._tokens, self._pico):
            await account.reserve(self._tokens, self._pico)
        self.seconds_left = account.seconds_left
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._done:
            if kind is asyncio.CancelledError:
                self._meter.abandoned += self._draws
            self._meter.account.note_unknown()
            completion = self._draws * self._meter._per_draw
            self.settle(Usage(prompt_tokens=self._tokens - completion, completion_tokens=completion, requests=1))

    def settle(self, usage: Usage) -> None:
        """The endpoint stated what the attempt used."""
        pico = self._meter.price.pico(usage.prompt_tokens, usage.completion_tokens)
        self._finish(usage, pico)

    def release(self) -> None:
        """The attempt used nothing."""
        self._finish(Usage(requests=1), 0)

    def _finish(self, usage: Usage, pico: int) -> None:
        if not self._done:
            self._done = True
            self._meter.account.settle(self._tokens, self._pico, usage, pico)
