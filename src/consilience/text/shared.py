"""An account whose caps hold over several processes: it spends what it was granted, and asks the ledger for more.

What is granted is held until it is used or given back; near the end of a cap grants are single calls, and what they
leave goes back at once.
"""

from __future__ import annotations

import asyncio
import logging
import time

from consilience.draws import Budget, Usage
from consilience.errors import ConsilienceError
from consilience.ledger.budgets import Amount, Exchange, SharedBudget
from consilience.text.budget import LOOK, Account

log = logging.getLogger("consilience")

UNCAPPED = 2**62


class SharedAccount(Account):
    """An account of this process on a budget that others use too; its own counts are this process's alone.

    `flush` must be awaited every now and then: it tells the others what was spent, and gives back what is idle.
    """

    leased = True

    def __init__(self, budget: Budget, shared: SharedBudget, parent: Account | None = None) -> None:
        super().__init__(budget, parent)
        self._budget = shared
        caps = (budget.draws, budget.tokens, self._pico_cap)
        self._caps = Amount(*(UNCAPPED if cap is None else cap for cap in caps))
        self._granted = self._flushed = self._held = self._expected = Amount()
        self._lock = asyncio.Lock()
        self._last = Exchange(Amount(), Amount(), Amount())
        self._refused_at = -1.0
        self._flushing: asyncio.Task[None] | None = None
        self._allow(Amount())

    async def lease(self, draws: int = 0, tokens: int = 0, pico: int = 0) -> bool:
        """See `Account.lease`; it may give fewer draws. Raises ConsilienceError where the database does not answer."""
        need = self._capped(Amount(draws, tokens, pico))
        self._expected += need
        try:
            while not self._covers(need):
                # a turn is not cut short with the one who asked: what it brings belongs to all
                granted = await asyncio.shield(asyncio.ensure_future(self._turn(need)))
                if draws and self._covers(Amount(draws=1)):
                    break
                if granted:
                    continue  # where others here were quicker to use it, there may be more
                if not draws or self._last.held.draws <= 0:
                    return False
                await asyncio.sleep(LOOK)  # other processes hold some, and give back what they do not use
            return self.parent is None or await self.parent.lease(draws, tokens, pico)
        finally:
            self._expected -= need

    async def flush(self) -> None:
        """Tell what was spent, and give back what nobody here waits for."""
        await asyncio.shield(asyncio.ensure_future(self._give_back()))

    def forget(self) -> None:
        """Take the budget's name off the ledger: nobody will use it again. Blocks on the database."""
        self._budget.close()

    def settle(self, tokens: int, pico: int, usage: Usage, used_pico: int) -> None:
        """See `Account.settle`; near the end of the cap others are told at once."""
        super().settle(tokens, pico, usage, used_pico)
        self._flush_soon()

    def take_draws(self, wanted: int) -> int:
        """See `Account.take_draws`."""
        granted = super().take_draws(wanted)
        self._flush_soon()
        return granted

    def give_back_draws(self, count: int) -> None:
        """See `Account.give_back_draws`."""
        super().give_back_draws(count)
        if count:
            self._flush_soon()

    def _flush_soon(self) -> None:
        if self._last.tight and (self._flushing is None or self._flushing.done()):
            self._flushing = asyncio.ensure_future(self._flush_all())

    async def _flush_all(self) -> None:
        try:
            while self._last.tight and (self._spent() != self._flushed or self._idle() != Amount()):
                await self._give_back()
        except ConsilienceError as error:  # what is held stays held, until a later flush
            log.warning("%s", error)

    async def _turn(self, need: Amount) -> bool:
        """Ask for more, one at a time; False where there is nothing, now or just now."""
        async with self._lock:
            if self._covers(need):
                return True
            if time.monotonic() - self._refused_at < LOOK / 2:
                return False
            done = await self._exchange(need, idle=Amount())
            if done.granted == Amount() and not done.lost:
                self._refused_at = time.monotonic()
                if (idle := self._left(Amount())) != Amount():  # too little for this, but others may be as short
                    await self._exchange(Amount(), idle)
                return False
            return True

    async def _give_back(self) -> None:
        async with self._lock:
            idle = self._idle()
            if self._spent() != self._flushed or idle != Amount():
                await self._exchange(Amount(), idle)

    async def _exchange(self, need: Amount, idle: Amount) -> Exchange:
        """Settle what was spent by now, give ``idle`` back and get ``need``; others here go on spending meanwhile."""
        spent = self._spent()
        self._allow(self._granted - idle)
        keep = self._capped(self._granted - spent).each(lambda left: max(left, 0))
        done = await asyncio.to_thread(self._budget.exchange, self._caps, spent - self._flushed, self._held, keep, need)
        self._flushed = spent
        if done.lost:  # all that was held counts as spent: what is in flight is held, and counted, once more
            self._flushed, self._held = self._spent(), Amount()
            self._allow(self._flushed + self._reserved())
            return done
        self._held = keep + done.granted
        self._allow(spent + self._held)
        self._last = done if need != Amount() else Exchange(done.granted, done.settled, done.held, self._last.tight)
        self._tokens_elsewhere = done.settled.tokens - spent.tokens
        self._pico_elsewhere = done.settled.pico - spent.pico
        return done

    def _allow(self, granted: Amount) -> None:
        self._granted = granted
        self._draw_room = None if self.budget.draws is None else granted.draws
        self._token_room = None if self.budget.tokens is None else granted.tokens
        self._pico_room = None if self._pico_cap is None else granted.pico

    def _spent(self) -> Amount:
        return Amount(self.draws, self.tokens, self.pico)

    def _reserved(self) -> Amount:
        return Amount(0, self._reserved_tokens, self._reserved_pico)

    def _capped(self, amount: Amount) -> Amount:
        """An amount without what has no cap."""
        return amount.each(lambda one, cap: 0 if cap == UNCAPPED else one, self._caps)

    def _covers(self, need: Amount) -> bool:
        return need.fits(self._left(Amount()))

    def _idle(self) -> Amount:
        return self._left(self._expected)

    def _left(self, expected: Amount) -> Amount:
        """What is granted and neither spent nor reserved nor expected by those who asked for it."""
        left = self._capped(self._granted - self._spent() - self._reserved() - expected)
        return left.each(lambda one: max(one, 0))
