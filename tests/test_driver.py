"""The session and the live driver: nothing bought twice, nothing bought in vain, nothing lost."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from consilience import policy
from consilience.draws import Budget, Draw, Problem, Usage
from consilience.driver import Asking, Driver, Duplicates, Finished
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError
from consilience.ledger import Ledger
from consilience.testing.laws import ShuffledSource
from consilience.text.budget import Account, Price
from consilience.text.session import Session
from consilience.text.sources.base import Request

ASKING = Asking(params={"temperature": 1.0, "max_tokens": 16})


def noisy(questions: int, *, right: float = 0.7, draws: int = 40, seed: int = 0) -> dict[str, list[str]]:
    lots = random.Random(seed)
    answers = lambda: "right" if lots.random() < right else f"wrong {lots.randrange(12)}"  # noqa: E731
    return {f"question {n}": [f"The answer is {answers()}." for _ in range(draws)] for n in range(questions)}


def live(
    source, spec: str, ledger: Path, *, budget: Budget | None = None, price: Price | None = None, concurrency: int = 8
) -> tuple[list[Finished], Driver]:
    finished: list[Finished] = []
    problems = [Problem(id=question, question=question, answer="right") for question in source.texts]

    async def work() -> Driver:
        with Ledger(str(ledger)) as store:
            session = Session(source, store, Account(budget or Budget()), price)
            driver = Driver(session, policy.parse(spec), ASKING, concurrency=concurrency)
            await driver.run(problems, finished.append)
            return driver

    return finished, asyncio.run(work())


def verdicts(finished: list[Finished]) -> list[tuple]:
    return [
        (v.answer, v.draws, v.confidence, v.stopped_because)
        for one in finished
        if (v := one.problem.verdict) is not None
    ]


@pytest.mark.parametrize("spec", ["asc", "esc", "asc:threshold=0.99,max=40"])
def test_draws_sent_stay_near_those_of_a_sequential_run(spec: str, tmp_path: Path) -> None:
    texts = noisy(120)
    one_by_one, many = ShuffledSource(texts), ShuffledSource(texts, seed=5)
    sequential, _ = live(one_by_one, spec, tmp_path / "a.db", concurrency=1)
    together, _ = live(many, spec, tmp_path / "b.db", concurrency=8)
    judged = sum(one.problem.verdict.draws for one in sequential)
    assert verdicts(together) == verdicts(sequential)
    assert many.sent <= 1.15 * judged
    assert one_by_one.sent <= 1.15 * judged


def test_few_questions_use_idle_connections_within_the_allowance(tmp_path: Path) -> None:
    source = ShuffledSource(noisy(10, right=0.5, seed=3))
    finished, _ = live(source, "asc", tmp_path / "a.db", concurrency=32)
    judged = sum(one.problem.verdict.draws for one in finished)
    assert judged < source.sent <= 1.1 * judged + 1
    assert sum(len(one.problem.draws) for one in finished) <= source.sent


def test_a_second_run_buys_nothing_and_concludes_the_same(tmp_path: Path) -> None:
    texts = noisy(60)
    first, again = ShuffledSource(texts), ShuffledSource(texts)
    before, _ = live(first, "asc", tmp_path / "l.db")
    after, driver = live(again, "asc", tmp_path / "l.db")
    assert again.sent == 0
    assert driver.session.bought == 0
    assert verdicts(before) == verdicts(after)
    wider = ShuffledSource(texts)
    live(wider, "sc:n=20", tmp_path / "l.db")
    assert wider.sent == 60 * 20 - first.sent + sum(max(0, len(one.problem.draws) - 20) for one in before)


def test_failed_draws_keep_their_index_do_not_vote_and_are_asked_for_again(tmp_path: Path) -> None:
    texts = noisy(30)
    broken = ShuffledSource(texts, failing=0.2)
    finished, driver = live(broken, "sc:n=10", tmp_path / "l.db")
    failed = sum(one.problem.verdict.failed for one in finished)
    assert failed == driver.session.failed > 0
    for one in finished:
        assert one.problem.verdict.draws == 10
        assert sum(one.problem.verdict.votes.values()) == 10 - one.problem.verdict.failed
        assert one.problem.verdict.answer is not None
    whole = ShuffledSource(texts)
    again, _ = live(whole, "sc:n=10", tmp_path / "l.db")
    assert whole.sent == failed
    assert all(one.problem.verdict.failed == 0 for one in again)


def test_questions_asked_twice_share_their_draws(tmp_path: Path) -> None:
    texts = noisy(1)
    source = ShuffledSource(texts)
    finished: list[Finished] = []

    async def work() -> None:
        with Ledger(str(tmp_path / "l.db")) as store:
            session = Session(source, store, Account(Budget()))
            twice = [Problem(id=name, question="question 0") for name in "abc"]
            await Driver(session, policy.parse("sc:n=6"), ASKING).run(twice, finished.append)

    asyncio.run(work())
    assert source.sent == 6
    assert [one.problem.id for one in finished] == ["a", "b", "c"]
    assert len({str(v) for v in verdicts(finished)}) == 1


@pytest.mark.parametrize("limit", [0, 1, 7, 100, 239, 240])
def test_a_draw_budget_is_kept_exactly_and_what_was_drawn_is_used(limit: int, tmp_path: Path) -> None:
    source = ShuffledSource(noisy(30))
    finished, driver = live(source, "sc:n=8", tmp_path / "l.db", budget=Budget(draws=limit), concurrency=16)
    assert source.sent == limit
    answered = [one for one in finished if not one.problem.verdict.abstained]
    assert len(finished) == 30
    assert sum(one.problem.verdict.draws for one in finished) <= limit
    assert driver.budget_spent == (None if limit == 240 else "draws")
    assert len(answered) >= limit // 8
    reasons = {one.problem.verdict.stopped_because for one in finished}
    assert reasons <= {"max", "budget: draws"}


def test_a_token_budget_holds_and_leaves_no_question_half_told(tmp_path: Path) -> None:
    source = ShuffledSource(noisy(20))
    finished, driver = live(source, "asc", tmp_path / "l.db", budget=Budget(tokens=900), concurrency=16)
    assert driver.session.account.tokens <= 900
    assert driver.budget_spent == "tokens"
    assert any(not one.problem.verdict.abstained for one in finished)


class Refusing(ShuffledSource):
    """Refuses the run once the first eight questions are drawn."""

    async def draw(self, request, indices, meter, deliver) -> None:
        if int(request.question.split()[1]) >= 8:
            await asyncio.sleep(0.1)
            raise EndpointError("401: no authority")
        await super().draw(request, indices, meter, deliver)


def test_an_endpoint_that_refuses_stops_the_run_and_keeps_what_was_drawn(tmp_path: Path) -> None:
    texts = noisy(40)
    with pytest.raises(EndpointError, match="401"):
        live(Refusing(texts), "sc:n=4", tmp_path / "l.db")
    resumed = ShuffledSource(texts)
    live(resumed, "sc:n=4", tmp_path / "l.db")
    assert resumed.sent == 160 - 8 * 4


class Slow(ShuffledSource):
    """Delivers five draws of each call and then hangs."""

    async def draw(self, request, indices, meter, deliver) -> None:
        await super().draw(request, list(indices)[:5], meter, deliver)
        await asyncio.sleep(60)


def test_cancelling_keeps_what_was_delivered(tmp_path: Path) -> None:
    texts = noisy(3)
    source = Slow(texts)

    async def work() -> None:
        with Ledger(str(tmp_path / "l.db")) as store:
            session = Session(source, store, Account(Budget()))
            driver = Driver(session, policy.parse("sc:n=8"), ASKING)
            task = asyncio.create_task(driver.run([Problem(id=q, question=q) for q in texts], lambda _: None))
            while source.sent < 15:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
    whole = ShuffledSource(texts)
    live(whole, "sc:n=8", tmp_path / "l.db")
    assert whole.sent == 3 * (8 - 5)


class Broke(ShuffledSource):
    """Its attempts use more than half of what is left, so a wave of several draws stops fitting."""

    async def draw(self, request, indices, meter, deliver) -> None:
        async with meter.attempt(len(indices)) as attempt:
            await asyncio.sleep(0)
            self.sent += len(indices)
            attempt.settle(Usage(prompt_tokens=70, completion_tokens=16 * len(indices)))
        for index in indices:
            deliver(index, Draw(text=self.texts[request.question][index]))


def test_a_wave_shrinks_to_what_still_fits(tmp_path: Path) -> None:
    source = Broke(noisy(1))
    finished, driver = live(source, "sc:n=40", tmp_path / "l.db", budget=Budget(tokens=400))
    assert driver.session.account.tokens <= 400
    assert finished[0].problem.verdict.draws >= 8
    assert finished[0].problem.verdict.stopped_because == "budget: tokens"


async def test_drawing_nothing_under_a_spent_budget_is_said(tmp_path: Path) -> None:
    source = ShuffledSource(noisy(1))
    with Ledger(str(tmp_path / "l.db")) as store:
        session = Session(source, store, Account(Budget(draws=2)))
        request = Request("e", "m", ({"role": "user", "content": "q"},), {"max_tokens": 5}, question="question 0")
        await session.open([request])
        assert len(await session.draw(request, range(5))) == 2
        with pytest.raises(BudgetSpent):
            await session.draw(request, [2])
        assert len(await session.draw(request, range(2))) == 2


def test_duplicates_are_counted_and_warned_of_once() -> None:
    watch = Duplicates()
    for number in range(9):
        watch.note([Draw(text="same"), Draw(text="same"), Draw(text="", error="x")], f"{number}")
    assert watch.warning() is None
    watch.note([Draw(text="same"), Draw(text="same")], "9")
    assert "identical" in str(watch.warning())
    assert watch.share == 0.5
    varied = Duplicates()
    for number in range(12):
        varied.note([Draw(text=t, completion_id=f"{number}") for t in "ab"], f"{number}")
    assert varied.warning() is None
    varied.note([Draw(text=t, completion_id="3") for t in "ab"], "3")  # the same question again: the same draws
    assert varied.warning() is None
    varied.note([Draw(text="c", completion_id="3"), Draw(text="d", completion_id="new")], "other")
    assert "'3' twice" in str(varied.warning())
    cached = Duplicates()
    siblings = [Draw(text="a", completion_id="x", prompt_tokens=9), Draw(text="b", completion_id="x", prompt_tokens=0)]
    cached.note(siblings, "x")
    assert cached.warning() is None
    cached.note([Draw(text=t, completion_id="y", prompt_tokens=9) for t in "ab"], "y")  # two calls, one id
    assert "'y' twice" in str(cached.warning())


def test_a_ledger_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    import sqlite3

    source = ShuffledSource(noisy(5))
    live(source, "one", tmp_path / "l.db")
    with sqlite3.connect(tmp_path / "l.db") as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON draws BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    with pytest.raises(ConsilienceError, match="disk full"):
        live(ShuffledSource(noisy(5)), "sc:n=3", tmp_path / "l.db")


class Gappy(ShuffledSource):
    """Delivers every draw of a wave but the first, which the budget refuses."""

    async def draw(self, request, indices, meter, deliver) -> None:
        await super().draw(request, list(indices)[1:], meter, deliver)
        raise BudgetSpent("tokens", "no room for a retry")


def test_draws_behind_one_that_the_budget_refused_still_vote(tmp_path: Path) -> None:
    finished, _ = live(Gappy(noisy(1)), "sc:n=8", tmp_path / "l.db")
    verdict = finished[0].problem.verdict
    assert sum(verdict.votes.values()) == 7
    assert (verdict.draws, verdict.failed, verdict.abstained) == (8, 1, False)
    assert verdict.stopped_because == "budget: tokens"
    again, _ = live(ShuffledSource(noisy(1)), "sc:n=8", tmp_path / "l.db")
    assert again[0].problem.verdict.failed == 0
