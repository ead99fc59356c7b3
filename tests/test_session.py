"""What a session pays for when those who asked leave: whatever was made upstream counts, and no cap is passed."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import pytest

from consilience.draws import Budget, Draw, Usage
from consilience.errors import BudgetSpent, ConsilienceError
from consilience.ledger import Ledger
from consilience.text.budget import Account
from consilience.text.session import Session
from consilience.text.shared import SharedAccount
from consilience.text.sources.base import Deliver, Meter, Request


def request(question: str = "q") -> Request:
    return Request("e", "m", ({"role": "user", "content": question},), {"max_tokens": 10}, question=question)


class Counting:
    """A source that makes what it is asked for, whether anyone still waits for it or not, and counts it.

    One call per draw; ``longest`` is the most seconds that one takes.
    """

    name, endpoint, model, priced = "counting", "e", "m", False

    def __init__(self, longest: float = 0.0, seed: int = 0) -> None:
        self.made = 0
        self.notes: list[str] = []
        self.delivered = asyncio.Event()
        self._longest, self._rng = longest, random.Random(seed)

    async def draw(self, request: Request, indices: Sequence[int], meter: Meter, deliver: Deliver) -> None:
        for index in indices:
            async with meter.attempt(1) as attempt:
                self.made += 1
                if self._longest:
                    await asyncio.sleep(self._rng.random() * self._longest)
                attempt.settle(Usage(completion_tokens=1, requests=1))
            deliver(index, Draw(text=str(index)))
        self.delivered.set()

    async def close(self) -> None:
        """Nothing to give back."""


async def asked(session: Session, one: Request, indices: Sequence[int]) -> list[Draw]:
    await session.open([one])
    try:
        return await session.draw(one, indices)
    finally:
        session.release(one)


async def test_who_leaves_while_his_draws_are_written_has_paid_for_them(ledger_url: str, monkeypatch) -> None:
    """They were made; and they are there for the next who wants them, so they are not made again."""
    with Ledger(ledger_url) as ledger:
        source, account, one = Counting(), Account(Budget(draws=10)), request()
        session = Session(source, ledger, account, claiming=False)
        left, write = threading.Event(), ledger._write
        monkeypatch.setattr(ledger, "_write", lambda batch: write(batch) if left.wait(30) else [])
        await session.open([one])
        leaving = asyncio.ensure_future(session.draw(one, range(4)))
        await source.delivered.wait()
        for _ in range(3):
            leaving.cancel()
            await asyncio.sleep(0)
        assert not leaving.done()  # until what it has is on disk
        left.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (source.made, account.draws, session.bought, session.in_flight) == (4, 4, 4, 0)
        assert [draw.text for draw in await session.draw(one, range(5))] == ["0", "1", "2", "3", "4"]
        assert (source.made, account.draws) == (5, 5)
        assert set(ledger.stored([one.hash])[one.hash]) == set(range(5))


async def test_draws_that_cannot_be_written_were_made_all_the_same(ledger_url: str, monkeypatch) -> None:
    with Ledger(ledger_url) as ledger:
        source, account = Counting(), Account(Budget(draws=10))
        refused = ConsilienceError("the disk is full")
        monkeypatch.setattr(ledger, "_write", lambda batch: refused)
        with pytest.raises(ConsilienceError, match="the disk is full"):
            await asked(Session(source, ledger, account, claiming=False), request(), range(4))
        assert source.made == account.draws == 4


@pytest.mark.parametrize("seed", range(4))
async def test_no_cap_on_draws_is_passed_by_asking_and_leaving(ledger_url: str, seed: int) -> None:
    """Three processes' accounts on one cap, clients that leave at any moment: what is made is what is counted."""
    cap, rng = 120, random.Random(seed)
    with ExitStack() as stack:
        ledgers = [stack.enter_context(Ledger(ledger_url)) for _ in range(3)]
        accounts = [SharedAccount(Budget(draws=cap), ledger.budget("b")) for ledger in ledgers]
        source = Counting(longest=0.003, seed=seed)
        sessions = [Session(source, ledger, account) for ledger, account in zip(ledgers, accounts, strict=True)]

        async def client(number: int) -> None:
            place, refusals = number % 3, 0
            while refusals < 2:
                nested = sessions[place].nested(source, Account(Budget(), accounts[place]), None, rng.random() < 0.5)
                wave = range(rng.randint(1, 5))
                asking = asyncio.ensure_future(asked(nested, request(str(rng.random())), wave))
                await asyncio.wait([asking], timeout=rng.choice((0.002, 0.005, 0.01, 0.02, None)))
                asking.cancel()
                (end,) = await asyncio.gather(asking, return_exceptions=True)
                refusals += isinstance(end, BudgetSpent)
                assert isinstance(end, BudgetSpent | asyncio.CancelledError | list), end
                assert source.made <= cap
                assert sum(account.draws for account in accounts) <= cap

        async with asyncio.TaskGroup() as group:
            for number in range(12):
                group.create_task(client(number))
        for account in accounts:
            await account.flush()
        assert sum(account.draws for account in accounts) == source.made
        assert 0.9 * cap < source.made <= cap  # all were refused in the end, some of them a moment before the last draw
