"""The command line with several models, shared budgets and procedures, over real HTTP."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consilience import record
from consilience.draws import Problem
from consilience.testing import ScriptedServer

QUESTIONS = 12


def run(*flags: str, code: int = 0) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-m", "consilience", *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


def totals(*flags: str, code: int = 0) -> Any:
    return json.loads(run(*flags, "--json", code=code)[0])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    record.write(
        path,
        [
            Problem(id=f"q{n}", question=f"What is {n} + {n}?", answer=str(2 * n), kind="number")
            for n in range(QUESTIONS)
        ],
    )
    return path


def adder(right: float, *, judge: str | None = None) -> Any:
    """A model that adds, right with this probability; asked to choose, it replies ``judge``."""

    def reply(prompt: str, lots: random.Random) -> str:
        if judge is not None and "What is" in prompt and "Response" in prompt:
            return judge
        number = int(prompt.split("What is ")[1].split(" + ")[0])
        return f"The answer is {2 * number if lots.random() < right else 2 * number + lots.randrange(1, 9)}."

    return reply


def test_modelswitch_over_two_endpoints_then_replay_by_arm(tmp_path: Path, questions: Path) -> None:
    out, ledger = tmp_path / "r.jsonl", str(tmp_path / "l.db")
    with ScriptedServer(answers=adder(0.6)) as small, ScriptedServer(answers=adder(1.0)) as large:
        flags = [
            "solve", str(questions), "--policy", "modelswitch:models=2,draws=3", "--out", str(out), "--ledger", ledger,
            "--model", f"openai:small@{small.url}", "--model", f"openai:large@{large.url}",
        ]  # fmt: skip
        found = totals(*flags)
        assert small.counts["completed"] > 0
        drawn = sum(problem["verdict"]["draws"] for problem in found["problems"])
        assert found["totals"]["draws_bought"] == drawn
        before = (small.counts["completed"], large.counts["completed"])
        assert totals(*flags)["totals"]["draws_bought"] == 0
        assert (small.counts["completed"], large.counts["completed"]) == before
        message = run(*flags[:-2], code=2)[1]
        assert "draws from 2 models, but 1 model given" in message
    arms = {(draw.model_extra or {})["arm"] for problem in record.read(out) for draw in problem.draws}
    assert arms == {0, 1}
    row = totals("replay", str(out), "--policy", "modelswitch:models=2,draws=3", "--repeats", "4")["policies"][0]
    assert row["mean_draws"] == drawn / QUESTIONS  # three of three agree, or not, in any order
    assert "names 1" in run("replay", str(out), "--policy", "modelswitch", "--arm", "0", code=2)[1]


def test_a_shared_budget_is_spent_to_the_draw(tmp_path: Path, questions: Path) -> None:
    with ScriptedServer(answers=adder(0.5)) as server:
        found = totals(
            "solve", str(questions), "--model", f"openai:m@{server.url}", "--ledger", str(tmp_path / "l.db"),
            "--policy", "knowledge-gradient:mean=5,min=2,max=12",
        )  # fmt: skip
    assert found["totals"]["draws_bought"] == 5 * QUESTIONS
    assert len({problem["verdict"]["draws"] for problem in found["problems"]}) > 1


def test_usc_live_and_in_replay(tmp_path: Path, questions: Path) -> None:
    out, ledger = tmp_path / "r.jsonl", str(tmp_path / "l.db")
    with ScriptedServer(answers=adder(0.7, judge="The most consistent response is Response 2")) as server:
        model = f"openai:m@{server.url}"
        found = totals(
            "solve", str(questions), "--model", model, "--policy", "sc:n=4+usc", "--out", str(out), "--ledger", ledger
        )
        assert found["totals"]["draws_bought"] == 4 * QUESTIONS
        assert 0 < found["totals"]["asks_bought"] <= QUESTIONS  # unanimous questions need not be asked about
        split = [problem for problem in found["problems"] if len(problem["verdict"]["votes"]) > 1]
        assert len(split) == found["totals"]["asks_bought"]
        for problem in record.read(out):
            verdict = problem.verdict
            assert verdict is not None
            assert verdict.answer == problem.draws[1 if len(verdict.votes) > 1 else 0].answer
        flags = [
            "replay",
            str(out),
            "--policy",
            "sc:n=4+usc",
            "--policy",
            "sc:n=4",
            "--repeats",
            "2",
            "--ledger",
            ledger,
        ]
        rows = totals(*flags, "--model", model)["policies"]
        assert [row["policy"] for row in rows] == ["sc:n=4+usc", "sc:n=4"]
        asked = server.counts["completed"]
        assert totals(*flags, "--model", model)["policies"] == rows
        assert server.counts["completed"] == asked
        assert "name it with --model" in run(*flags, code=2)[1]


def test_code_is_voted_by_behaviour_while_it_is_drawn(tmp_path: Path) -> None:
    programs = {
        "```python\ndef double(x):\n    return x + x\n```": 0.35,
        "```python\ndef double(x):\n    return 2 * x\n```": 0.35,
        "```python\ndef double(x):\n    return x ** 2\n```": 0.2,
        "```python\ndef double(x):\n    import os\n    os._exit(0)\n```": 0.1,
    }
    path = tmp_path / "q.jsonl"
    fields = {"entry_point": "double", "inputs": [[1], [2], [5], [-3]]}
    record.write(path, [Problem(id="d", question="Write double(x).", kind="code", **fields)])
    pick = lambda _, lots: lots.choices(list(programs), list(programs.values()))[0]  # noqa: E731
    with ScriptedServer(answers=pick) as server:
        found = totals(
            "solve",
            str(path),
            "--model",
            f"openai:m@{server.url}",
            "--policy",
            "asc",
            "--ledger",
            str(tmp_path / "l.db"),
        )
    verdict = found["problems"][0]["verdict"]
    assert "x + x" in verdict["answer"] or "2 * x" in verdict["answer"]
    assert verdict["decided"]
    assert len(verdict["votes"]) <= 2


def test_tune_writes_what_solve_reads(tmp_path: Path, questions: Path) -> None:
    many, out, chosen = tmp_path / "many.jsonl", tmp_path / "r.jsonl", tmp_path / "p.json"
    record.write(
        many, [Problem(id=f"q{n}", question=f"What is {n} + {n}?", answer=str(2 * n), kind="number") for n in range(60)]
    )
    with ScriptedServer(answers=adder(0.8)) as server:
        model = f"openai:m@{server.url}"
        run(
            "solve",
            str(many),
            "--model",
            model,
            "--policy",
            "sc:n=12",
            "--out",
            str(out),
            "--ledger",
            str(tmp_path / "l.db"),
        )
        run("tune", str(out), "--max-drop", "5", "--out", str(chosen))
        policy = json.loads(chosen.read_text())["policy"]
        found = totals(
            "solve", str(questions), "--model", model, "--policy", f"@{chosen}", "--ledger", str(tmp_path / "m.db")
        )
    assert found["totals"]["draws"] < 12 * QUESTIONS
    assert policy.split(":")[0] in (
        "one",
        "sc",
        "esc",
        "asc",
        "certified",
        "asc-dirichlet",
        "asc-entropy",
        "asc-majority",
    )
    assert all(0 <= problem["verdict"]["confidence"] <= 1 for problem in found["problems"])
