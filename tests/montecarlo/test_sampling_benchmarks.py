"""The benchmarks of repeated sampling and of interval coverage, at a small size, against plain computations."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consilience.montecarlo.estimators import plurality_curve
from consilience.replay import Table, replay
from consilience.rules import Rule
from consilience.text.voting.plurality import Plurality

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def as_json(name: str, *flags: str) -> Any:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("interval_coverage")


def test_chances_of_a_verdict_are_those_of_replay(module: Any) -> None:
    """c right of 40 draws, 400 orders of each through `consilience.replay`: 5 standard errors, 3 x 41 numbers."""
    counts = np.arange(41)
    right = np.arange(40) < counts[:, None]
    blank = np.zeros((41, 40))
    data = Table((~right).astype(np.int32), np.full(41, 40, np.int32), right, np.ones(41, bool), blank, blank, {})
    for stop in module.STOPS.values():
        chance = module.right_given(stop)
        found = replay(data, Rule("rule", stop, Plurality()), repeats=400, seed=3).accuracy_per_problem()
        error = np.sqrt(chance * (1 - chance) / 400)
        assert (np.abs(found - chance) <= 5 * error + 2e-3).all()
    exact = plurality_curve((~right).astype(int), np.tile([True, False], (41, 1)), [5]).per_problem[:, 0]
    np.testing.assert_allclose(module.right_given(module.STOPS["sc:n=5"]), exact, atol=1e-12)
    np.testing.assert_allclose(module.right_given(module.STOPS["sc:n=1"]), counts / 40, atol=1e-12)


def test_every_cell_has_the_accuracy_it_says(module: Any) -> None:
    for cell in module.cells(20):
        assert cell.shares.sum() == pytest.approx(1)
        assert cell.shares @ np.arange(len(cell.shares)) / (len(cell.shares) - 1) == pytest.approx(cell.accuracy)


def test_interval_coverage_runs() -> None:
    result = as_json("interval_coverage", "--runs", "40", "--orders", "10", "--replays", "1")
    assert len(result["replayed"]) == 4
    shares = [cell[size] for cell in result["cells"] for size in ("100", "1000")]
    assert 0.93 < np.mean(shares) < 0.98
    assert min(shares) > 0.75


def write(path: Path, problems: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
    return str(path)


def test_repeated_sampling_runs_and_adds_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    problems = []
    for number, chance in enumerate(rng.beta(0.6, 1.0, 30)):
        hits = rng.random(16) < chance
        draws = [{"text": "", "answer": str(7 if hit else 1), "reward": float(hit + rng.normal())} for hit in hits]
        problems.append({"id": str(number), "question": "?", "answer": "7", "kind": "number", "draws": draws})
    right = np.array([[draw["answer"] == "7" for draw in problem["draws"]] for problem in problems])
    picture = tmp_path / "plot.png"
    flags = (write(tmp_path / "r.jsonl", problems), "--resamples", "200", "--picture", str(picture))
    (found,) = as_json("repeated_sampling", *flags)["records"]
    assert (found["problems"], found["draws"]) == (30, 16)
    first, last = found["curve"][0], found["curve"][-1]
    assert first["pass"][0] == pytest.approx(right.mean())
    assert first["majority"][0] == pytest.approx(right.mean())
    assert last["pass"][0] == pytest.approx(right.any(axis=1).mean()) == pytest.approx(found["law"]["measured"])
    votes = right.sum(axis=1)
    assert last["majority"][0] == pytest.approx(((votes > 8) + 0.5 * (votes == 8)).mean())
    for row in found["curve"]:
        assert row["gap"][0] == pytest.approx(row["pass"][0] - row["majority"][0])
    assert found["law"]["fitted to"] == [1, 2, 3, 4]
    assert found["share"]["accuracy"]["1.0"] == pytest.approx(last["majority"][0])
    rewards = np.array([[draw["reward"] for draw in problem["draws"]] for problem in problems])
    best = right[np.arange(30), rewards.argmax(axis=1)].mean()
    assert found["verifier"]["best of k"][-1]["best"] == pytest.approx(best)
    assert picture.stat().st_size < 80_000


def test_expressions_agree_only_where_they_are_equal(tmp_path: Path) -> None:
    """Without a gold answer (1 + 2) * 3 and 1 + 2 * 3 are two answers, though their letters and digits are the same."""
    texts = [("Answer: (1 + 2) * 3", True), *[("Answer: 1 + 2 * 3", False)] * 3] * 3 + [("Answer: 5", False)] * 4
    draws = [{"text": text, "passed": hit} for text, hit in texts]
    path = write(tmp_path / "r.jsonl", [{"question": "?", "kind": "text", "draws": draws}] * 2)
    (found,) = as_json("repeated_sampling", path, "--resamples", "20")["records"]
    assert found["curve"][-1]["majority"][0] == 0
    assert found["curve"][0]["majority"][0] == pytest.approx(3 / 16)
