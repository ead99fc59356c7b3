"""The session: draws of a request, bought once, on disk before anyone sees them.

Concurrency, retries, budget and ledger live below it; rules, procedures and drivers stand on it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count

from consilience.draws import Draw
from consilience.errors import BudgetSpent, SourceExhausted
from consilience.ledger import Ledger
from consilience.text.budget import Account, CallMeter, Price
from consilience.text.sources.base import Request, Source

FIRST_LOOK, LAST_LOOK = 0.02, 0.5
"""Seconds between looks at whether another process has bought what is wanted here: at first, and at most."""
LINGER = 0.2
"""Seconds for which a claim is kept between waves. It is not kept longer: another process may be waiting for it while
this one waits for another request of that process."""


@dataclass
class _Held:
    """The draws of one request at hand, and those on their way.

    ``claim`` is the life of the ledger in which the request was claimed, ``buying`` how many buy under that claim.
    """

    draws: dict[int, Draw]
    coming: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    claim: int | None = None
    buying: int = 0
    idle_since: float = 0.0


class Session:
    """One source, one ledger, one account; without a ``price`` the draws' cost stays unknown.

    ``bought`` counts the draws the source delivered in this run, ``asked`` the replies to what procedures asked,
    ``failed`` those of both that failed for good, ``in_flight`` what is on its way. ``asking`` holds the hashes of
    the requests that procedures ask. ``claiming``: other processes may want the same draws, so a request is claimed in
    the ledger while draws of it are bought.
    """

    def __init__(
        self, source: Source, ledger: Ledger, account: Account, price: Price | None = None, claiming: bool = True
    ) -> None:
        self.source = source
        self.ledger = ledger
        self.account = account
        self.price = price
        self.claiming = claiming
        self.bought = 0
        self.asked = 0
        self.asking: Counter[str] = Counter()
        self.failed = 0
        self.in_flight = 0
        self._held: dict[str, _Held] = {}
        self._holders: Counter[str] = Counter()

    def nested(self, source: Source, account: Account, price: Price | None, claiming: bool) -> Session:
        """A session of its own for one request of many: the same ledger and draws at hand, its own account."""
        session = Session(source, self.ledger, account, price, claiming)
        session._held, session._holders = self._held, self._holders
        return session

    async def open(self, requests: Iterable[Request]) -> None:
        """Hold these requests: look up in one go what the ledger has of them."""
        asked = [request.hash for request in requests]
        self._holders.update(asked)
        if fresh := set(asked) - set(self._held):
            stored = await asyncio.to_thread(self.ledger.stored, fresh)
            for key, draws in stored.items():
                self._held.setdefault(key, _Held(draws))

    def release(self, request: Request) -> bool:
        """Let go of a request that is finished; its draws stay in the ledger.

        Says whether others hold it still, and with it the very draws that `draw` gave.
        """
        self._holders[request.hash] -= 1
        if self._holders[request.hash] > 0:
            return True
        del self._holders[request.hash]
        if (held := self._held.pop(request.hash, None)) is not None:
            self._let_go(request.hash, held)
        return False

    def has(self, request: Request, index: int) -> bool:
        """Whether the draw at ``index`` of an open request is at hand."""
        return index in self._held[request.hash].draws

    def held(self, request: Request, start: int) -> list[Draw]:
        """The draws of an open request at hand from index ``start`` on, up to the first that is missing."""
        return _leading(self._held[request.hash].draws, count(start))

    def last(self, request: Request) -> int:
        """The highest index of an open request at hand, -1 without any."""
        return max(self._held[request.hash].draws, default=-1)

    def at(self, request: Request, index: int) -> Draw | None:
        """The draw at ``index`` of an open request, None where it is not at hand."""
        return self._held[request.hash].draws.get(index)

    async def draw(self, request: Request, indices: Sequence[int]) -> list[Draw]:
        """The draws at ``indices``, in order: those in the ledger are free, the others are bought.

        May return fewer, a prefix of what was asked, when the budget or a finite source ends in between; a draw
        that failed for good has its ``error`` set. Raises BudgetSpent or SourceExhausted when there is nothing at
        the first index, EndpointError when the run cannot go on. The request must be open.
        """
        held = self._held[request.hash]
        coming = [held.coming[index] for index in indices if index in held.coming]
        missing = [index for index in indices if index not in held.draws and index not in held.coming]
        stop: Exception | None = None
        if missing:
            try:
                await self._come(request, missing, held)
            except (BudgetSpent, SourceExhausted) as error:
                stop = error
        if coming:
            await asyncio.wait(coming)
        got = _leading(held.draws, indices)
        if got or not indices:
            return got
        if stop is None:  # what another task was drawing for the same request did not come
            return await self.draw(request, indices)
        raise stop

    async def _come(self, request: Request, missing: list[int], held: _Held) -> None:
        """Get draws here; other tasks of this process that want them wait for it."""
        arrival = asyncio.get_running_loop().create_future()
        held.coming.update(dict.fromkeys(missing, arrival))
        try:
            await (self._claim_and_buy if self.claiming else self._buy)(request, missing, held)
        finally:
            for index in missing:
                held.coming.pop(index, None)
            arrival.set_result(None)

    async def _claim_and_buy(self, request: Request, missing: list[int], held: _Held) -> None:
        """Buy what other processes have not bought and are not buying; wait for the rest until they have."""
        pause = FIRST_LOOK
        while not (held.claim == self.ledger.lives or await self._claim(request, held)):
            if all(index in held.draws for index in missing):
                return
            if self.account.seconds_left <= 0:
                raise BudgetSpent("seconds", "time is up while another process is drawing the same")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK)
        held.buying += 1
        try:
            await self._buy(request, [index for index in missing if index not in held.draws], held)
        finally:
            held.buying -= 1
            held.idle_since = time.monotonic()

    async def _claim(self, request: Request, held: _Held) -> bool:
        """Claim a request, and take in what others bought of it: whatever is bought under the claim then is new."""
        lives = self.ledger.lives
        first_missing = next(index for index in count() if index not in held.draws)
        claimed = await self.ledger.claim(request.hash, first_missing)
        held.draws.update(claimed.found)
        if claimed.mine:
            if held.claim is not None:  # another task was as quick, or that claim is void
                self.ledger.release(request.hash)
            else:
                asyncio.get_running_loop().call_later(LINGER, self._linger, request.hash, held)
            held.claim = lives
        return claimed.mine

    def _linger(self, request_hash: str, held: _Held) -> None:
        """Let a claim go that nobody has used for a while."""
        if held.claim is not None:
            left = LINGER if held.buying else held.idle_since + LINGER - time.monotonic()
            if left <= 0:
                self._let_go(request_hash, held)
            else:
                asyncio.get_running_loop().call_later(left, self._linger, request_hash, held)

    def _let_go(self, request_hash: str, held: _Held) -> None:
        if held.claim is not None:
            held.claim = None
            self.ledger.release(request_hash)

    async def _buy(self, request: Request, missing: list[int], held: _Held) -> None:
        meter = CallMeter(self.account, request, self.price or Price())
        while missing:
            wanted = meter.affordable(len(missing))
            granted = await self.account.take(wanted) if self.account.shared else self.account.take_draws(wanted)
            wave, missing = missing[:granted], missing[granted:]
            drawn: dict[int, Draw] = {}
            try:
                await self._wave(request, wave, meter, held, drawn)
            except BaseException as error:
                absent = len(wave) - len(drawn)  # what was delivered was made, also where it could not be written
                self.account.give_back_draws(max(0, absent - meter.abandoned))
                meter.abandoned = 0
                smaller = absent == len(wave) > meter.affordable(len(wave))
                if not (isinstance(error, BudgetSpent) and smaller):
                    raise
                missing = wave + missing  # others spent what this wave counted on: a smaller one may still fit

    async def _wave(
        self, request: Request, wave: list[int], meter: CallMeter, held: _Held, drawn: dict[int, Draw]
    ) -> None:
        """Draw a wave into ``drawn`` and, once it is on disk, into ``held``; who leaves waits for that too."""
        writes: set[asyncio.Future[None]] = set()
        self.in_flight += len(wave)

        def deliver(index: int, draw: Draw) -> None:
            if self.price is not None and self.source.priced and draw.cost is None:
                draw.cost = self.price.usd(draw.prompt_tokens or 0, draw.completion_tokens or 0)
            if request.hash in self.asking:
                self.asked += 1
            else:
                self.bought += 1
            self.failed += draw.failed
            self.in_flight -= 1
            writes.add(self.ledger.put(request, index, draw))
            drawn[index] = draw

        try:
            await self.source.draw(request, wave, meter, deliver)
        finally:
            self.in_flight -= len(wave) - len(drawn)
            try:
                await _ended(writes)
            finally:
                for write in writes:
                    write.result()
                held.draws.update(drawn)


async def _ended(futures: Iterable[asyncio.Future[None]]) -> None:
    """Wait until futures that others wait for too are done; raises CancelledError only then."""
    cancelled: asyncio.CancelledError | None = None
    while pending := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _leading(draws: dict[int, Draw], indices: Iterable[int]) -> list[Draw]:
    """The draws at ``indices`` up to the first that is missing."""
    found: list[Draw] = []
    for index in indices:
        if index not in draws:
            break
        found.append(draws[index])
    return found
