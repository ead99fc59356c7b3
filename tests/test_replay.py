"""Replay against a plain-Python computation over the same orders."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from consilience import policy, record
from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.replay import replay, stopped_early, tabulate
from consilience.run import solve

_spec = importlib.util.spec_from_file_location(
    "replay_check", Path(__file__).parents[1] / "benchmarks" / "replay_check.py"
)
assert _spec is not None
assert _spec.loader is not None
replay_check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(replay_check)


@pytest.mark.parametrize("spec", ["one", "sc:n=40", "esc:window=5,max=40", "asc:threshold=0.95,max=40"])
def test_every_figure_equals_a_plain_computation(spec: str, recorded) -> None:
    path: Path = recorded("esc-last-letters-a.jsonl.gz")
    repeats, seed = 20, 3
    got = replay(tabulate(list(record.read(path))), policy.parse(spec), repeats=repeats, seed=seed).summary()
    expected = replay_check.plain(path, spec, repeats, seed)
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert (got["problems"], got["repeats"], got["short"]) == (250, repeats, 0.0)
    assert got["accuracy_ci"][0] < got["accuracy"] < got["accuracy_ci"][1]


def test_published_figures_of_the_record(recorded) -> None:
    table = tabulate(list(record.read(recorded("esc-last-letters-a.jsonl.gz"))))
    assert table.right.mean() == pytest.approx(0.798, abs=0.0005)
    assert replay(table, policy.parse("sc:n=40"), repeats=5).summary()["accuracy"] == pytest.approx(0.82, abs=1e-9)


def ragged() -> list[Problem]:
    rows = [["a", "a", "b"], ["c"], [], ["d", None, "d", "e", "d"]]
    return [
        Problem(
            id=str(number),
            question=f"q{number}",
            answer="a" if number < 3 else "d",
            kind="text",
            draws=[Draw(text=f"The answer is {a}." if a else "", completion_tokens=2, prompt_tokens=1) for a in row],
        )
        for number, row in enumerate(rows)
    ]


def test_ragged_records() -> None:
    table = tabulate(ragged())
    result = replay(table, policy.parse("sc:n=4"), repeats=40, seed=1)
    assert result.draws.tolist() == [[3, 1, 0, 4]] * 40
    assert result.summary()["short"] == 0.75
    assert result.summary()["mean_draws"] == 2.0
    assert result.summary()["mean_tokens"] == 6.0
    assert result.summary()["mean_cost"] is None
    assert not result.right[:, 1:3].any()
    assert not result.answered[:, 2].any()
    full = replay(table, policy.parse("sc:n=9"), repeats=3)
    assert full.agrees.all()
    assert full.accuracy_per_problem().tolist() == [1, 0, 0, 1]


def test_passed_wins_over_gold_and_decides_without_it() -> None:
    draws = [Draw(text="The answer is 1.", passed=True), Draw(text="The answer is 2.", passed=False)]
    problem = Problem(question="q", draws=draws)
    table = tabulate([problem, Problem(question="r", draws=[Draw(text="The answer is 3.")])])
    assert table.known.tolist() == [True, False]
    result = replay(table, policy.parse("one"), repeats=200, seed=0)
    assert 0.4 < result.summary()["accuracy"] < 0.6  # 200 fair coins: outside with probability 0.005
    assert replay(tabulate([Problem(question="r", draws=draws[:1], answer="9")]), policy.parse("one")).right.all()


def test_without_gold_what_cannot_be_computed_is_none() -> None:
    table = tabulate([Problem(question="q", draws=[Draw(text="The answer is 1.")] * 3)])
    row = replay(table, policy.parse("sc:n=3"), repeats=2).summary()
    assert row["accuracy"] is row["accuracy_ci"] is row["decided_wrong"] is row["mean_tokens"] is None


def test_the_order_depends_on_seed_and_repeat_alone() -> None:
    table = tabulate(ragged())
    once = replay(table, policy.parse("one"), repeats=30, seed=5)
    again = replay(table, policy.parse("one"), repeats=10, seed=5)
    other = replay(table, policy.parse("one"), repeats=30, seed=6)
    assert np.array_equal(once.right[:10], again.right)
    assert not np.array_equal(once.right, other.right)


def test_many_problems_are_replayed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    import consilience.replay as module

    table = tabulate(ragged())
    whole = replay(table, policy.parse("asc"), repeats=25)
    monkeypatch.setattr(module, "CELLS", 8)
    parts = replay(table, policy.parse("asc"), repeats=25)
    assert np.array_equal(whole.draws, parts.draws)
    assert whole.summary() == parts.summary()


def test_records_that_cannot_be_replayed() -> None:
    with pytest.raises(InputError, match="no problems"):
        tabulate([])
    with pytest.raises(InputError, match="no draws"):
        tabulate([Problem(question="q")])
    with pytest.raises(InputError, match="auto, number, math, choice, text, json"):
        tabulate([Problem(id="7", question="q", kind="essay", draws=[Draw(text="x")])])


def test_a_record_that_a_rule_stopped_is_known_as_biased(tmp_path: Path) -> None:
    questions = [f"{n} + {n}" for n in range(4)]
    source = tmp_path / "source.jsonl"
    record.write(
        source,
        [Problem(question=q, draws=[Draw(text=f"The answer is {len(q)}.") for _ in range(40)]) for q in questions],
    )
    by = {}
    for spec in ("asc", "sc:n=40"):
        run = solve(questions, model=f"record:{source}", policy=spec, ledger=str(tmp_path / "l.db"))
        by[spec] = stopped_early(run.problems)
    assert by == {"asc": "asc:threshold=0.95,max=40", "sc:n=40": None}
