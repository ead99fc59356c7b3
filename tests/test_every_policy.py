"""The benchmark of all policies at a tiny size: its figures are those of a plain computation. No speeds."""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience import record
from consilience.draws import Draw, Problem
from consilience.methods import register

ROOT = Path(__file__).parents[1]
BENCHMARKS = str(ROOT / "benchmarks")


def call(*flags: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "every_policy.py"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(path: Path) -> list[Problem]:
    """Twelve questions with nine draws over three answers, no two answers level at the top; 'a' is right."""
    generator = random.Random(5)
    problems: list[Problem] = []
    while len(problems) < 12:
        letters = generator.choices("abc", weights=[4, 2, 1], k=9)
        counts = sorted(collections.Counter(letters).values(), reverse=True)
        if len(counts) > 1 and counts[0] == counts[1]:
            continue
        draws = [Draw(text=f"The answer is {one}.", reward=generator.random(), confidence=0.5) for one in letters]
        extra: dict[str, Any] = {"level": f"Level {generator.randint(1, 5)}"}
        problems.append(Problem(id=str(len(problems)), question="q", answer="a", kind="text", draws=draws, **extra))
    record.write(path, problems)
    return problems


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Problem], dict[str, Any]]:
    """The made problems and what the benchmark finds on them."""
    folder = tmp_path_factory.mktemp("every-policy")
    path, other = folder / "tiny.jsonl.gz", folder / "statements.jsonl"
    problems = made(path)
    record.write(other, [Problem(id="s", question="a passage", kind="statement", draws=[Draw(text="another")])])
    return problems, json.loads(call(path, other, "--repeats", "4", "--json"))


def test_the_baselines_are_those_of_a_plain_count(tiny: tuple[list[Problem], dict[str, Any]]) -> None:
    problems, result = tiny
    right = [[draw.text == "The answer is a." for draw in problem.draws] for problem in problems]
    most = [collections.Counter(draw.text for draw in problem.draws).most_common(1)[0][0] for problem in problems]
    (data,) = result["readings"]
    assert data["single"] == pytest.approx(np.mean(right))
    assert data["any"] == pytest.approx(np.mean([any(row) for row in right]))
    vote = np.mean([text == "The answer is a." for text in most])
    assert data["recorded_vote"] == pytest.approx(vote)
    assert data["rows"][0]["policy"] == "sc:n=9"
    assert data["rows"][0]["accuracy"] == pytest.approx(vote)  # without ties no order matters
    assert len(result["refused"]) == 1
    assert "statement" in result["refused"][0]


def test_every_row_follows_from_the_others(tiny: tuple[list[Problem], dict[str, Any]]) -> None:
    (data,) = tiny[1]["readings"]
    rows = data["rows"]
    full = rows[0]
    assert full["over_full"] == [0, 0, 0]
    assert full["p"] is None
    for row in rows:
        middle, low, high = row["over_full"]
        assert middle == pytest.approx(row["accuracy"] - full["accuracy"])
        assert low <= middle <= high
        assert row["saved"] == pytest.approx(1 - row["draws"] / 9)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["agrees"] < 1 or (middle == 0 and row["drop_bound"] == 0)
    stops = {row["policy"].partition(":")[0] for row in rows if row["group"] == "stopping"}
    assert stops == {
        "esc", "asc", "asc-dirichlet", "asc-entropy", "asc-majority", "certified", "knowledge-gradient", "dsc"
    }  # fmt: skip
    named = " ".join(row["policy"] for row in rows)
    assert all(name in named for name in ("best-of-n", "reward-weighted", "self-calibration", "mbr"))
    assert not any(name in named for name in ("modelswitch", "soft-sc", "rpc"))  # no models, no log-probabilities


def test_the_same_command_prints_the_same_page(tmp_path: Path) -> None:
    path, picture = tmp_path / "tiny.jsonl.gz", tmp_path / "plot.png"
    made(path)
    first = call(path, "--repeats", "2", "--picture", picture)
    assert first == call(path, "--repeats", "2")
    assert picture.stat().st_size > 5_000
    assert first.count("\n## ") == 5
    assert "no record here allows it" in first


def test_programs_vote_by_text_and_by_behaviour(tmp_path: Path) -> None:
    """Two ways to write the right program lose to a wrong one by text and win by what they do."""
    bodies = ["    return x + 1\n", "    y = x\n    return y + 1\n", "    return 1 + x\n", *["    return x - 1\n"] * 2]
    draws = [Draw(text=body, passed="-" not in body) for body in bodies]
    shared = {"entry_point": "step", "prompt": "def step(x: int) -> int:\n", "tests": ""}
    problems = [Problem(id=f"p{n}", question="a step", kind="code", draws=draws, **shared) for n in range(2)]
    path, labels = tmp_path / "programs.jsonl.gz", tmp_path / "labels.json"
    record.write(path, problems)
    flags = (path, "--labels", labels, "--repeats", "2", "--json")
    text, behaviour = json.loads(call(*flags))["readings"]
    assert text["rows"][0]["accuracy"] == 0
    assert behaviour["rows"][0]["accuracy"] == 1
    assert json.loads(labels.read_text())["p0"] == [0, 0, 0, 1, 1]
    labels.write_text(json.dumps({"p0": [0, 0, 0, 1, 1], "p1": [0, 1, 2, 3, 3]}))  # what is in the file is taken
    assert json.loads(call(*flags))["readings"][1]["rows"][0]["accuracy"] == 0.5


def test_last_letters_are_what_the_record_says(recorded: Callable[[str], Path]) -> None:
    found = json.loads(call(recorded("esc-last-letters-a.jsonl.gz"), "--repeats", "3", "--json"))
    (data,) = found["readings"]
    assert round(100 * data["single"], 1) == 79.8
    assert round(100 * data["recorded_vote"], 1) == 82.0
    by = {row["policy"].partition(":")[0]: row for row in data["rows"] if "+" not in row["policy"]}
    # The exact mean of 500 orders is 8.50 draws (docs/results/last-letters.md); three orders of 250 questions stray
    # by less than 0.9 (five standard errors of a draw count whose deviation is below 5).
    assert by["esc"]["draws"] == pytest.approx(8.50, abs=0.9)
    assert by["asc"]["agrees"] > 0.99


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_rejects(p_values: list[float], level: float) -> None:
    sys.path.insert(0, BENCHMARKS)
    try:
        from every_policy import holm
    finally:
        sys.path.remove(BENCHMARKS)
    rejected: set[int] = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - rank) * p_values[place] > level:
            break
        rejected.add(place)
    adjusted = holm(p_values)
    assert {place for place, value in enumerate(adjusted) if value <= level} == rejected
    assert all(own <= value <= 1 for own, value in zip(p_values, adjusted, strict=True))


def test_the_same_cost_is_a_mixture_of_the_numbers_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from every_policy import at_cost

    plain = {3: np.array([0.0, 1.0]), 4: np.array([1.0, 1.0])}
    assert at_cost(plain, 3.0).tolist() == [0, 1]
    assert at_cost(plain, 3.25).tolist() == [0.25, 1]
    assert at_cost(plain, 4.0).tolist() == [1, 1]


def test_every_paper_of_the_register_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from _papers import CLAIMS, NOT_COMPARABLE

    said = {(claim.method, claim.arxiv) for claim in CLAIMS}
    said |= {(name, arxiv) for names, arxiv, _, _ in NOT_COMPARABLE for name in names}
    methods = {name: method for name, method in register().items() if not method.family.startswith("gen-")}
    assert all(methods[name].arxiv == arxiv for name, arxiv in said)
    papers = {method.arxiv for method in methods.values() if "diffusion" not in method.needs}
    assert papers - {""} == {arxiv for _, arxiv in said}
