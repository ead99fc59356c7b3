"""What processes on one ledger share: claims, so that nothing is bought twice, and budgets whose caps hold."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

import consilience
from consilience.draws import Budget, Draw, Usage
from consilience.errors import BudgetSpent, ConsilienceError
from consilience.ledger import Ledger, budgets, owners, tables
from consilience.ledger.budgets import Amount
from consilience.ledger.claims import Claimed
from consilience.testing import ScriptedServer
from consilience.text import budget as budget_module
from consilience.text import shared as shared_module
from consilience.text.budget import Account
from consilience.text.session import Session
from consilience.text.shared import SharedAccount
from consilience.text.sources.base import Request
from consilience.text.sources.openai import OpenAISource


def request(question: str = "q") -> Request:
    return Request("e", "m", ({"role": "user", "content": question},), {"max_tokens": 10}, question=question)


@contextmanager
def ledgers(url: str, count: int) -> Iterator[list[Ledger]]:
    opened = [Ledger(url) for _ in range(count)]
    try:
        yield opened
    finally:
        for ledger in opened:
            ledger.close()


def rows(ledger: Ledger, table) -> list[tuple]:
    with ledger._engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(table))]


def age(ledger: Ledger, seconds: float, place: str = "elsewhere") -> None:
    """Let the last beat of a ledger's owner be so long ago, on another machine."""
    own = tables.owners.c
    with ledger._engine.begin() as connection:
        values = {"beat": own.beat - seconds, "place": place}
        connection.execute(update(tables.owners).where(own.id == ledger._owner.id).values(values))


# --------------------------------------------------------------------------------------------------- claims


async def test_a_claim_keeps_others_out_until_it_is_released_behind_the_draws(ledger_url: str) -> None:
    asked = request()
    with ledgers(ledger_url, 2) as (one, two):
        assert await one.claim(asked.hash, 0) == Claimed(True, {})
        assert (await one.claim(asked.hash, 0)).mine  # again, and two releases are owed
        one.release(asked.hash)
        assert await two.claim(asked.hash, 0) == Claimed(False, {})
        assert (await two.claim(request("other").hash, 0)).mine
        written = one.put(asked, 3, Draw(text="x"))
        one.release(asked.hash)
        await written
        assert await two.claim(asked.hash, 0) == Claimed(True, {3: Draw(text="x")})
        assert await one.claim(asked.hash, 4) == Claimed(False, {})
        assert await one.claim(asked.hash, 3) == Claimed(False, {3: Draw(text="x")})
    with Ledger(ledger_url) as later:
        assert rows(later, tables.claims) == rows(later, tables.owners) == []


async def test_whoever_gives_up_waiting_for_a_claim_leaves_none_behind(ledger_url: str) -> None:
    with ledgers(ledger_url, 2) as (one, two):
        for _ in range(20):
            waiting = asyncio.ensure_future(one.claim(request().hash, 0))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        while not (await two.claim(request().hash, 0)).mine:
            await asyncio.sleep(0.01)
        assert one._claimed == {}


async def test_the_claim_of_a_killed_process_is_free_at_once(ledger_url: str) -> None:
    script = textwrap.dedent("""
        import asyncio, sys, time
        from consilience.ledger import Ledger
        async def work():
            ledger = Ledger(sys.argv[1])
            assert (await ledger.claim("h", 0)).mine
            print("claimed", flush=True)
            time.sleep(1000)
        asyncio.run(work())
    """)
    process = subprocess.Popen([sys.executable, "-c", script, ledger_url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    with Ledger(ledger_url) as ledger:
        assert not (await ledger.claim("h", 0)).mine
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert (await ledger.claim("h", 0)).mine
        ledger.release("h")


async def test_the_claim_of_another_machine_expires_unless_it_is_renewed(ledger_url: str) -> None:
    with ledgers(ledger_url, 2) as (one, two):
        assert (await one.claim("h", 0)).mine
        age(one, owners.EXPIRY - 1)
        assert not (await two.claim("h", 0)).mine
        with one._engine.begin() as connection:
            assert owners.renew(connection, one._owner)
        age(one, owners.EXPIRY - 1)
        assert not (await two.claim("h", 0)).mine
        age(one, 2)
        assert (await two.claim("h", 0)).mine
        with one._engine.begin() as connection:
            assert not owners.renew(connection, one._owner)  # and so it learns that its claims are void
        assert not (await one.claim("h", 0)).mine


def test_a_ledger_without_the_new_tables_gets_them(tmp_path: Path) -> None:
    url = str(tmp_path / "old.db")
    with Ledger(url) as ledger:
        asyncio.run(_put(ledger))
        for table in (tables.owners, tables.claims, tables.budgets, tables.holds):
            table.drop(ledger._engine)
    with Ledger(url) as ledger:
        assert ledger.stored([request().hash]) == {request().hash: {0: Draw(text="x")}}
        assert asyncio.run(ledger.claim(request().hash, 0)).found == {0: Draw(text="x")}


async def _put(ledger: Ledger) -> None:
    await ledger.put(request(), 0, Draw(text="x"))


# -------------------------------------------------------------------------------------------- nothing twice


@pytest.mark.parametrize("policy", ["sc:n=8", "esc:window=3,max=12", "asc:max=9"])
async def test_runs_at_the_same_time_buy_once(ledger_url: str, policy: str) -> None:
    """Verdicts depend on the draws alone, so three runs that share them agree in everything."""
    asked = [{"id": f"q{n}", "question": f"{n}?"} for n in range(12)]
    with ScriptedServer(answers={"42": 0.6, "41": 0.4}, latency=0.01, supports_n=False) as server:
        given = {"model": f"openai:m@{server.url}", "policy": policy, "ledger": ledger_url, "concurrency": 6}
        runs = await asyncio.gather(*(consilience.asolve(asked, **given) for _ in range(3)))
        alone = await consilience.asolve(asked, **given)
        bought = server.counts["draws"]
    assert alone.totals["draws_bought"] == 0
    assert sum(run.totals["draws_bought"] for run in runs) == bought
    judged = [[(p.verdict.answer, p.verdict.draws) for p in run] for run in (*runs, alone)]
    assert judged == judged[:1] * 4
    with Ledger(ledger_url) as ledger:
        assert sum(len(held) for _, _, held in ledger._requests()) == bought  # no (request, index) was paid twice


async def test_two_who_want_two_requests_in_opposite_order_both_get_them(ledger_url: str) -> None:
    with (
        ScriptedServer(answers={"42": 1.0}, latency=0.005, supports_n=False) as server,
        ledgers(ledger_url, 2) as stores,
    ):
        source = OpenAISource("m", server.url, api_key=None)
        asked = [request("a"), request("b")]

        async def run(store: Ledger, order: list[Request]) -> None:
            session = Session(source, store, Account(Budget()))
            await session.open(order)
            for index in range(5):
                for one in order:
                    assert len(await session.draw(one, [index])) == 1
            for one in order:
                session.release(one)

        async with asyncio.timeout(60):
            await asyncio.gather(run(stores[0], asked), run(stores[1], asked[::-1]))
        await source.close()
        assert server.counts["draws"] == 10


# -------------------------------------------------------------------------------------------------- budgets


class Till:
    """What all processes together have paid and reserved, seen from outside."""

    def __init__(self, caps: Amount) -> None:
        self.caps, self.paid, self.reserved = caps, Amount(), Amount()

    def check(self) -> None:
        assert (self.paid + self.reserved).fits(self.caps), (self.paid, self.reserved)


async def spend(account: Account, till: Till, rng: random.Random, worst: Amount, calls: int) -> None:
    """Calls one after the other, as a source would make them, until one is refused."""
    for _ in range(calls):
        try:
            await account.take(1)
        except BudgetSpent:
            return
        try:
            await account.reserve(worst.tokens, worst.pico)
        except BudgetSpent:
            account.give_back_draws(1)
            return
        till.reserved += worst
        till.check()
        await asyncio.sleep(rng.random() * 0.004)
        used = Amount(1, rng.randint(1, worst.tokens), rng.randint(1, worst.pico))
        till.reserved -= worst
        till.paid += used
        account.settle(worst.tokens, worst.pico, Usage(completion_tokens=used.tokens, requests=1), used.pico)


@pytest.mark.parametrize("short", ["draws", "tokens", "usd"])
async def test_no_cap_is_passed_and_little_of_it_is_left(ledger_url: str, short: str) -> None:
    """Four accounts, each of its own ledger, spend until they are refused: what is left pays for no call."""
    limits = {"draws": 90, "tokens": 3000, "usd": 0.03}
    budget = Budget(**({"draws": 10_000, "tokens": 10**7, "usd": 1000.0} | {short: limits[short]}))
    worst = Amount(1, 100, 10**9)
    caps = Amount(budget.draws or 0, budget.tokens or 0, round((budget.usd or 0) * 10**12))
    till = Till(caps)
    with ledgers(ledger_url, 4) as stores:
        accounts = [SharedAccount(budget, store.budget("b")) for store in stores]
        work = [
            spend(Account(Budget(), account), till, random.Random(10 * place + n), worst, 400)
            for place, account in enumerate(accounts)
            for n in range(6)
        ]
        flushing = asyncio.ensure_future(flush_now_and_then(accounts))
        async with asyncio.timeout(120):
            await asyncio.gather(*work)
        flushing.cancel()
        for account in accounts:
            await account.flush()
        settled, held = rows(stores[0], tables.budgets), rows(stores[0], tables.holds)
    assert settled == [("b", till.paid.draws, till.paid.tokens, till.paid.pico)]
    assert all(amounts == [0, 0, 0] for _, _, *amounts in held)
    assert till.reserved == Amount()
    assert not (till.paid + worst).fits(caps)
    assert sum(account.tokens for account in accounts) == till.paid.tokens


async def flush_now_and_then(accounts: list[SharedAccount]) -> None:
    """As the server does: what a process holds and does not use goes back."""
    while True:
        await asyncio.sleep(0.5)
        for account in accounts:
            await account.flush()


async def churn(account: SharedAccount, till: Till, rng: random.Random, calls: int) -> None:
    """Calls that are given up at any moment: while they wait for room, before they are sent, on their way."""
    for _ in range(calls):
        taken = 0
        try:
            async with asyncio.timeout(rng.choice((0.001, 0.004, 0.02, 1.0))):
                taken = await account.take(rng.randint(1, 4))
                till.reserved += Amount(draws=taken)
                till.check()
                worst = Amount(0, 10 * taken, 10**8 * taken)
                await account.reserve(worst.tokens, worst.pico)
        except (TimeoutError, BudgetSpent):
            till.reserved -= Amount(draws=taken)
            account.give_back_draws(taken)
            continue
        till.reserved += worst
        till.check()
        await asyncio.sleep(rng.random() * 0.002)
        sent = rng.randint(0, taken)
        used = Amount(sent, rng.randint(0, 10 * sent), rng.randint(0, 10**8 * sent))
        till.reserved -= worst + Amount(draws=taken)
        till.paid += used
        account.give_back_draws(taken - sent)
        account.settle(worst.tokens, worst.pico, Usage(completion_tokens=used.tokens, requests=1), used.pico)


@pytest.mark.parametrize("deaths", [False, True])
@pytest.mark.parametrize("caps", [Amount(260, 2000, 2 * 10**10), Amount(400, 1000, 10**10)])
async def test_no_cap_is_passed_whoever_gives_up_and_is_taken_for_dead(
    ledger_url: str, monkeypatch, caps: Amount, deaths: bool
) -> None:
    """Four owners take, give back, reserve, settle and flush in any order; what stands in the database adds up.

    With ``deaths`` owners that live are buried meanwhile: then more is counted than was spent, and never less.
    """
    for module in (budget_module, shared_module):
        monkeypatch.setattr(module, "LOOK", 0.002)
    till, rng = Till(caps), random.Random(4)

    def check(store: Ledger) -> Amount:
        with store._engine.begin() as connection:
            connection.execute(update(tables.budgets).values(name="b"))  # its lock: the holds stay as they are
            (_, *settled), *_ = connection.execute(select(tables.budgets)).all()
            held = [Amount(*amounts) for _, _, *amounts in connection.execute(select(tables.holds))]
        assert deaths or sum(held, Amount(*settled)).fits(caps)
        return Amount(*settled)

    def bury(store: Ledger, owner: str) -> None:
        with store._engine.begin() as connection:
            owners.bury(connection, [owner])

    with ledgers(ledger_url, 4) as stores:
        budget = Budget(draws=caps.draws, tokens=caps.tokens, usd=caps.pico / 10**12)
        accounts = [SharedAccount(budget, store.budget("b")) for store in stores]
        ended = asyncio.Event()

        async def disturb() -> None:
            while not ended.is_set():
                await rng.choice(accounts).flush()
                await asyncio.to_thread(check, rng.choice(stores))
                if deaths and rng.random() < 0.1:
                    await asyncio.to_thread(bury, rng.choice(stores), rng.choice(stores).owner)
                await asyncio.sleep(rng.random() * 0.003)

        disturbing = asyncio.ensure_future(disturb())
        async with asyncio.TaskGroup() as group:
            for n, account in itertools.product(range(5), accounts):
                group.create_task(churn(account, till, random.Random(f"{caps} {n}"), 25))
        ended.set()
        await disturbing
        for account in accounts:
            await account.flush()
        settled = check(stores[0])
        assert till.paid.fits(settled) if deaths else till.paid == settled
        assert till.reserved == Amount()
        assert Amount(*map(sum, zip(*((a.draws, a.tokens, a.pico) for a in accounts), strict=True))) == till.paid


async def test_a_server_and_its_clients_share_their_caps(ledger_url: str) -> None:
    with ledgers(ledger_url, 2) as stores:
        above = [SharedAccount(Budget(draws=50), store.budget("server")) for store in stores]
        below = [
            SharedAccount(Budget(draws=20), store.budget("key"), one) for store, one in zip(stores, above, strict=True)
        ]
        assert all(account.shared for account in (*above, *below, Account(Budget(), below[0])))
        granted = [await account.take(12) for account in below]
        assert granted == [12, 8]
        with pytest.raises(BudgetSpent):
            await below[0].take(1)
        assert below[0].refused_by is below[0]
        assert [await account.take(20) for account in above] == [20, 10]
        with pytest.raises(BudgetSpent):
            await above[1].take(1)
        below[1].give_back_draws(3)
        await asyncio.gather(*(account.flush() for account in (*above, *below)))
        await asyncio.sleep(0.05)  # a refusal stands for a moment
        assert await below[0].take(5) == 3


async def test_what_a_dead_process_held_is_spent_and_the_rest_is_not(ledger_url: str) -> None:
    with ledgers(ledger_url, 2) as (one, two):
        dying = SharedAccount(Budget(tokens=1000), one.budget("b"))
        living = SharedAccount(Budget(tokens=1000), two.budget("b"))
        await dying.reserve(300, 0)
        dying.settle(300, 0, Usage(completion_tokens=120), 0)
        await dying.flush()
        await dying.reserve(200, 0)  # on its way for ever
        await living.reserve(600, 0)
        living.settle(600, 0, Usage(completion_tokens=600), 0)
        waiting = asyncio.ensure_future(living.reserve(200, 0))
        await asyncio.sleep(0.2)
        assert not waiting.done()  # it fits beside what is settled, so it waits for what is on its way
        age(one, owners.EXPIRY + 1)
        two.bury_dead()
        with pytest.raises(BudgetSpent):
            await waiting
        await living.reserve(80, 0)
        living.settle(80, 0, Usage(), 0)
        await living.flush()
        assert [row[2] for row in rows(two, tables.budgets)] == [120 + 200 + 600]
        # it was not dead after all: what it has on its way is held, and counted, once more, and no cap is passed
        with pytest.raises(BudgetSpent):
            await dying.reserve(100, 0)
        dying.settle(200, 0, Usage(completion_tokens=50), 0)
        await dying.flush()
        assert [row[2] for row in rows(two, tables.budgets)] == [120 + 200 + 600 + 50]


async def test_who_waits_for_what_a_dead_process_held_is_told_that_it_is_spent(ledger_url, monkeypatch) -> None:
    """Nobody has to bury by hand: the others look for the dead with every beat."""
    monkeypatch.setattr(owners, "BEAT", 0.05)
    with ledgers(ledger_url, 2) as (one, two):
        dying = SharedAccount(Budget(draws=100), one.budget("b"))
        living = SharedAccount(Budget(draws=100), two.budget("b"))
        await dying.take(60)
        await living.take(40)
        await dying.flush()
        one._end.set()  # its process ends without a word
        one._beating.join()
        with one._engine.begin() as connection:
            held = tables.holds.c
            connection.execute(update(tables.holds).where(held.owner == one.owner).values(draws=10))
        age(one, owners.EXPIRY + 1)

        async def take_all() -> None:
            while True:
                await living.take(1)

        async with asyncio.timeout(20):
            with pytest.raises(BudgetSpent):
                await take_all()


def test_a_ledger_that_cannot_register_says_so(tmp_path, monkeypatch) -> None:
    def broken(*_: object) -> bool:
        raise OperationalError("UPDATE owners", {}, Exception("server closed the connection"))

    monkeypatch.setattr(owners, "renew", broken)
    with Ledger(str(tmp_path / "l.db")) as ledger, pytest.raises(ConsilienceError, match="cannot be written"):
        ledger.budget("b")


async def test_who_is_buried_in_the_middle_of_an_exchange_ends_it_first(ledger_url: str) -> None:
    """The one that buries waits for the budget as another exchange would; neither waits for the other for ever."""
    with ledgers(ledger_url, 2) as (one, two):
        budget = one.budget("b")
        assert budget.exchange(Amount(5), Amount(), Amount(), Amount(), Amount(5)).granted == Amount(5)
        with one._engine.begin() as connection:
            budget._settle(connection, Amount(1))
            burying = asyncio.ensure_future(asyncio.to_thread(two.bury_dead, one.owner))
            await asyncio.sleep(0.3)
            budget._hold(connection, Amount(5), Amount(4))
        await burying
        assert rows(two, tables.budgets) == [("b", 1 + 4, 0, 0)]
        assert rows(two, tables.holds) == []
        assert budget.exchange(Amount(5), Amount(), Amount(4), Amount(4), Amount()).lost


async def test_who_leaves_while_he_waits_for_a_grant_loses_nothing_for_the_others(ledger_url: str) -> None:
    rng = random.Random(5)
    with Ledger(ledger_url) as store:
        account = SharedAccount(Budget(tokens=10_000), store.budget("b"))
        for _ in range(30):
            waiting = [asyncio.ensure_future(account.reserve(10, 0)) for _ in range(4)]
            await asyncio.sleep(rng.random() * 0.003)
            for one in waiting:
                one.cancel()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            for _ in range(sum(end is None for end in ended)):
                account.settle(10, 0, Usage(completion_tokens=1), 0)
        spent = account.tokens
        await account.flush()
        assert [row[2] for row in rows(store, tables.budgets)] == [spent]
        assert [row[3] for row in rows(store, tables.holds)] in ([], [0])


def test_a_grant_is_a_small_part_of_what_is_free_and_a_single_call_near_the_end() -> None:
    need = Amount(2, 100, 0)
    for free in range(0, 200_000, 777):
        granted = budgets._granted(Amount(10**6, free, 0), need)
        if free < 100:
            assert granted == Amount()
        elif free < 100 + 100 * budgets.PART:
            assert granted.tokens == 100
        else:
            assert 100 < granted.tokens - 100 <= (free - 100) / budgets.PART
    assert budgets._granted(Amount(1, 0, 0), Amount(draws=3)) == Amount(draws=1)
