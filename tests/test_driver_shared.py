"""Problems that share a request share its draws, but each reads its own kind of answer from them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from consilience import policy
from consilience.draws import Budget, Problem
from consilience.driver import Asking, Driver, Finished
from consilience.ledger import Ledger
from consilience.testing.laws import ShuffledSource
from consilience.text.budget import Account
from consilience.text.session import Session

KINDS = ("choice", "text", "auto", "choice")


@pytest.mark.parametrize("concurrency", [1, 8])
def test_each_problem_keeps_the_answers_of_its_own_kind(concurrency: int, tmp_path: Path) -> None:
    source = ShuffledSource({"which": ["The answer is (B) Paris.", "The answer is (C) Rome.", "I give up."] * 2})
    asking = Asking(params={"temperature": 1.0, "max_tokens": 16}, template="{question}")
    finished: list[Finished] = []

    async def work(kinds: tuple[str, ...]) -> None:
        with Ledger(str(tmp_path / "l.db")) as store:
            driver = Driver(
                Session(source, store, Account(Budget())), policy.parse("sc:n=6"), asking, concurrency=concurrency
            )
            problems = [Problem(id=str(n), question="which", kind=kind) for n, kind in enumerate(kinds)]
            await driver.run(problems, finished.append)

    asyncio.run(work(KINDS))
    asyncio.run(work(("text",)))  # from the ledger, which holds no answers
    expected = {
        "choice": ["B", "C", None] * 2,
        "text": ["(B) Paris", "(C) Rome", "I give up"] * 2,
        "auto": ["(B) Paris", "(C) Rome", None] * 2,
    }
    assert source.sent == 6
    for one in finished:
        assert [draw.answer for draw in one.problem.draws] == expected[one.kind]
    assert [one.kind for one in finished] == [*KINDS, "text"]
