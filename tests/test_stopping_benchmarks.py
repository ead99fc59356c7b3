"""The benchmarks of the stopping rules at a tiny size: their sides agree with each other. No speeds."""

from __future__ import annotations

from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from consilience import record
from consilience.draws import Draw, Problem
from consilience.replay import order, tabulate


@pytest.fixture
def small_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve questions with 40 draws each; the benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    generator = np.random.default_rng(21)
    problems = []
    for number in range(12):
        letters = generator.choice(list("abcd"), size=40, p=generator.dirichlet([2, 1, 0.5, 0.5]))
        draws = [Draw(text=f"So the answer is {letter}.") for letter in letters]
        problems.append(Problem(id=str(number), question=f"q{number}", answer="a", kind="text", draws=draws))
    path = tmp_path / "record.jsonl.gz"
    record.write(path, problems)
    return path


def test_stopping_speed_counts_the_same_on_every_side(small_record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stopping_speed

    monkeypatch.setattr(stopping_speed, "PEERS", Path("no-such-python"))
    sizes = {"orders": 3, "seed": 0, "rounds": 1, "plain_rounds": 1, "sequences": 5, "votes": 4}
    result = stopping_speed.measure(Namespace(record=small_record, **sizes))
    assert result["peer"] is None
    for one in result["policies"].values():
        assert one["same"]
        assert one["steps"] == pytest.approx(one["mean_draws"] * 36)
    assert result["exact"]["different"] == 0
    assert "AdaptiveConsistency was skipped" in stopping_speed.markdown(result)


def test_the_exact_posterior_is_a_posterior(small_record: Path) -> None:
    import stopping_speed

    assert stopping_speed.exact_posterior(0, 0) == Fraction(1, 2)
    assert stopping_speed.exact_posterior(1, 0) == Fraction(3, 4)
    for first, second in ((7, 3), (12, 12), (0, 5)):
        turned = stopping_speed.exact_posterior(second, first)
        assert stopping_speed.exact_posterior(first, second) + turned == 1


def test_the_peer_decides_alike(small_record: Path) -> None:
    import stopping_speed

    recorded = tabulate(record.read(small_record))
    view = stopping_speed.view_of_orders(recorded, [order(recorded, 0, r) for r in range(2)])
    theirs = stopping_speed.peer(view, sequences=8, votes=6)
    if theirs is None:
        pytest.skip("AdaptiveConsistency is not installed in .venv-peers: make .venv-peers/.ready")
    assert theirs["stop_elsewhere"] == 0
    assert all(one["different"] == 0 for one in theirs["criteria"].values())
    assert theirs["criteria"]["dirichlet"]["apart"] < 1e-3


def test_esc_control_forecasts_and_measures_every_pair(small_record: Path) -> None:
    import esc_control

    result = esc_control.measure(Namespace(record=small_record, orders=2, seed=0, first=5))
    shape = (len(esc_control.WINDOWS), len(esc_control.MAXES))
    for figures in (result["draws"], result["unlike"], *result["forecast"].values(), *result["from_all"].values()):
        assert np.array(figures).shape == shape
    assert all(one["draws"] > 0 and one["best_unlike"] <= 1 for one in result["choices"])
    assert esc_control.markdown(result).count("\n| ") == 2 + len(esc_control.BUDGETS) + np.prod(shape)
