"""Grouping answers into classes: first-seen order, stable ids, undecided pairs counted."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.text.answers import AnswerClasses, Equality, canonical

ANSWERS = st.lists(
    st.none() | st.sampled_from(["18", "18.0", "$18", "5", "paris", "Paris!", "", "+", "[1]", "B"]), max_size=30
)


class ScriptedPool:
    """Answers every pair from a table."""

    def __init__(self, outcomes: dict[frozenset[str], Equality]) -> None:
        self.outcomes = outcomes
        self.calls = 0

    def compare(self, a: str, b: str) -> Equality:
        self.calls += 1
        return self.outcomes.get(frozenset((a, b)), Equality.DIFFERENT)


@settings(max_examples=200, deadline=None)
@given(ANSWERS, st.sampled_from(["auto", "number", "choice", "text", "json"]))
def test_classes_are_the_keys_in_first_seen_order(answers: list[str | None], kind: str) -> None:
    classes = AnswerClasses(kind)
    ids = [classes.add(answer) for answer in answers]
    keys = [None if answer is None else canonical(answer, kind) for answer in answers]
    order = list(dict.fromkeys(key for key in keys if key is not None))
    assert ids == [-1 if key is None else order.index(key) for key in keys]
    assert len(classes) == len(order)
    assert [classes.add(answer) for answer in answers] == ids  # an id once given never changes
    assert [classes.add(representative) for representative in classes.representatives] == list(range(len(classes)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20), st.permutations(range(6)))
def test_grouping_does_not_depend_on_the_labels(draws: list[int], relabelled: list[int]) -> None:
    first, second = AnswerClasses("text"), AnswerClasses("text")
    assert [first.add(f"word{n}") for n in draws] == [second.add(f"word{relabelled[n]}") for n in draws]


def test_unknown_is_a_class_of_its_own_and_counted() -> None:
    pool = ScriptedPool({frozenset(("x+a", "x+b")): Equality.UNKNOWN, frozenset(("x+c", "x+b")): Equality.EQUAL})
    classes = AnswerClasses("math", pool=pool)  # type: ignore[arg-type]
    assert [classes.add(a) for a in ("x+a", "x+b", "x+b", "x+c", "x + a", None)] == [0, 1, 1, 1, 0, -1]
    assert classes.unknown_pairs == 1
    assert pool.calls == 3
    assert classes.representatives == ["x+a", "x+b"]


def test_equal_words_and_numbers_need_no_symbolic_work() -> None:
    pool = ScriptedPool({})
    classes = AnswerClasses("math", pool=pool)  # type: ignore[arg-type]
    assert [classes.add(a) for a in ("0.5", "\\frac12", "no solution", "No solution.", "1/3")] == [0, 0, 1, 1, 2]
    assert pool.calls == 0
    assert not classes.needs_symbolic("7")
    assert classes.needs_symbolic("x+1")


async def test_add_async_keeps_the_order_of_the_calls() -> None:
    classes = AnswerClasses("math", pool=ScriptedPool({}))  # type: ignore[arg-type]
    answers = ["x+1", "2", "x+2", "2", "x+3"]
    ids = await asyncio.gather(*(classes.add_async(answer) for answer in answers))
    assert list(ids) == [0, 1, 2, 1, 3]


def test_threads_agree() -> None:
    classes = AnswerClasses("number")
    seen: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: seen.append([classes.add(str(n % 7)) for n in range(200)])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(classes) == 7
    assert all(ids == seen[0] for ids in seen)


def test_bad_kind() -> None:
    with pytest.raises(ValueError, match="the kinds are"):
        AnswerClasses("essay")
