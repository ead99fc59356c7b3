"""The command line as its users meet it: real processes, real files, exit codes, streams kept apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience import record
from consilience.draws import Draw, Problem

QUESTIONS = "A coin is heads up. Ann flips the coin. Bob flips the coin. Is the coin still heads up?"


def command(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CONSILIENCE_", "OPENAI_"))}
    return subprocess.run(
        [sys.executable, "-m", "consilience", *map(str, arguments)],
        cwd=cwd,
        env=clean | {"COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = [
        {"question": QUESTIONS.replace("Ann", name), "answer": "yes", "mark": name} for name in ("Ann", "Eve", "Tom")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "recording.jsonl"
    draws = ["4", "4", "5", "4", "4", "4", "4", "4"]
    problems = [
        Problem(
            id=f"p{n}",
            question=f"What is {n} and {4 - n}?",
            answer="4" if n else "5",
            draws=[Draw(text=f"The answer is {a}.", prompt_tokens=2, completion_tokens=3, cost=0.5) for a in draws],
        )
        for n in range(3)
    ]
    record.write(path, problems)
    return path


def test_solve_with_the_defaults(questions: Path, tmp_path: Path) -> None:
    done = command("solve", questions, "--json", "--out", "out.jsonl.gz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert set(printed) == {"problems", "totals"}
    assert [set(problem) for problem in printed["problems"]] == [{"id", "verdict"}] * 3
    assert "model: house" in done.stderr
    assert (tmp_path / ".consilience" / "ledger.db").exists()
    written = list(record.read(tmp_path / "out.jsonl.gz"))
    assert [problem.id for problem in written] == ["1", "2", "3"]
    for problem, shown in zip(written, printed["problems"], strict=True):
        assert problem.model_extra == {"mark": problem.question.split(". ")[1].split()[0]}
        assert problem.collected_by == "asc:threshold=0.95,max=40"
        assert problem.verdict is not None
        assert shown["verdict"] == problem.verdict.model_dump()
        assert {"answer", "confidence", "votes", "draws", "failed", "usage", "cost"} <= set(shown["verdict"])
        assert {"stopped_because", "decided", "abstained"} <= set(shown["verdict"])
    again = command("solve", questions, "--json", cwd=tmp_path)
    for problem in printed["problems"] + (repeated := json.loads(again.stdout)["problems"]):
        del problem["verdict"]["usage"]  # counts the draws of the run: those that ran ahead come and go
    assert repeated == printed["problems"]
    assert json.loads(again.stdout)["totals"]["draws_bought"] == 0


def test_a_changed_temperature_or_seed_draws_anew(questions: Path, tmp_path: Path) -> None:
    bought = []
    for flags in (["--seed", "0"], ["--seed", "1"], ["--temperature", "0.9"], ["--top-p", "0.9"], ["--seed", "1"]):
        done = command("solve", questions, "--policy", "sc:n=2", "--json", *flags, cwd=tmp_path)
        bought.append(json.loads(done.stdout)["totals"]["draws_bought"])
    assert bought == [6, 6, 6, 6, 0]


def test_solve_prints_a_table_and_a_report(questions: Path, tmp_path: Path) -> None:
    done = command("solve", questions, "--policy", "sc:n=3", "--report", "page/report.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("answered", "3 of 3", "draws per question", "sc:n=3 on house"):
        assert part in done.stdout
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "Is the coin still heads up?" in page
    assert sorted(p.suffix for p in (tmp_path / "page").iterdir()) == [".html", ".png", ".png", ".png"]


def test_replay_prints_the_contract(recording: Path, tmp_path: Path) -> None:
    done = command(
        "replay", recording, "--policy", "one", "--policy", "sc:n=8", "--repeats", "50", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    one, full = json.loads(done.stdout)["policies"]
    assert [one["policy"], full["policy"]] == ["one", "sc:n=8"]
    assert full["accuracy"] == pytest.approx(2 / 3)
    assert full["mean_tokens"] == 40
    assert full["mean_cost"] == 4
    assert full["agreement_with_full_vote"] == 1
    assert one["short"] == 0
    assert one["repeats"] == 50
    table = command("replay", recording, "--policy", "asc", "--report", "page.html", cwd=tmp_path)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What is 2 and 2?" in page
    assert "asc:threshold=0.95,max=40" in table.stdout
    assert "100.0%" in table.stdout


def test_a_record_is_a_model(recording: Path, tmp_path: Path) -> None:
    done = command("solve", recording, "--model", f"record:{recording}", "--policy", "sc:n=8", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = [problem["verdict"] for problem in json.loads(done.stdout)["problems"]]
    assert [verdict["votes"] for verdict in verdicts] == [{"4": 7, "5": 1}] * 3
    assert "already hold draws" not in done.stderr  # they are what is voted on
    short = command("solve", recording, "--model", f"record:{recording}", "--policy", "sc:n=9", "--json", cwd=tmp_path)
    assert {p["verdict"]["stopped_because"] for p in json.loads(short.stdout)["problems"]} == {"source exhausted"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["solve", "nowhere.jsonl"], "nowhere.jsonl"),
        (["solve", "empty.jsonl"], "holds no questions"),
        (["solve", "broken.jsonl"], "line 2"),
        (["solve", "code.jsonl"], "auto, number, math, choice, text, json"),
        (["solve", "good.jsonl", "--policy", "ascc"], "did you mean 'asc'"),
        (["solve", "good.jsonl", "--model", "gpt-4"], "unknown form"),
        (["solve", "good.jsonl", "--model", "record:nowhere.jsonl"], "nowhere.jsonl"),
        (["solve", "good.jsonl", "--budget", "draw=3"], "budget 'draw=3'"),
        (["solve", "good.jsonl", "--temperature", "3"], "temperature must be between 0 and 2"),
        (["solve", "good.jsonl", "--temperature", "nan"], "temperature"),
        (["solve", "good.jsonl", "--top-p", "0"], "top_p must be above 0"),
        (["solve", "good.jsonl", "--extract", "("], "extract"),
        (["solve", "good.jsonl", "--template", "nowhere.txt"], "nowhere.txt"),
        (["solve", "good.jsonl", "--ledger", "postgresql://joe:secret@127.0.0.1:1/x"], "cannot be opened"),
        (["solve", "good.jsonl", "--model", "openai:m@http://127.0.0.1:9/v1", "--budget", "usd=1"], "needs a price"),
        (["solve", "good.jsonl", "--out", "."], "is a folder"),
        (["solve", "good.jsonl", "--config", "broken.jsonl"], "not TOML"),
        (["solve", "good.jsonl", "--frobnicate"], "No such option"),
        (["replay", "good.jsonl", "--policy", "asc"], "holds no draws"),
        (["replay", "good.jsonl"], "--policy"),
        (["ledger", "show"], "there is none yet"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_exits_with_two_and_says_what(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"question": "a"}\n{"questio": "a"}\n')
    (tmp_path / "code.jsonl").write_text('{"question": "a", "kind": "essay"}\n')
    (tmp_path / "good.jsonl").write_text('{"question": "a"}\n')
    before = sorted(tmp_path.iterdir())
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr + done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert done.stdout == ""
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != ".consilience"] == before


def test_a_spent_budget_exits_with_three_and_answers_what_it_can(questions: Path, tmp_path: Path) -> None:
    done = command("solve", questions, "--policy", "sc:n=4", "--budget", "draws=6", "--json", cwd=tmp_path)
    assert done.returncode == 3
    printed = json.loads(done.stdout)
    assert printed["totals"]["budget_spent"] == "draws"
    assert sum(p["verdict"]["draws"] for p in printed["problems"]) <= 6
    assert "budget" in done.stderr


def test_methods_and_ledger(questions: Path, tmp_path: Path) -> None:
    listed = json.loads(command("methods", "--json", cwd=tmp_path).stdout)["methods"]
    assert {"sc", "esc", "asc", "one", "plurality"} <= {method["id"] for method in listed}
    assert "adaptive" in command("methods", cwd=tmp_path).stdout.lower()
    command("solve", questions, "--policy", "sc:n=2", cwd=tmp_path)
    shown = json.loads(command("ledger", "show", "--json", cwd=tmp_path).stdout)["models"]
    assert [(row["requests"], row["draws"]) for row in shown] == [(3, 6)]
    assert "3 requests" in command("ledger", "export", "all.jsonl", cwd=tmp_path).stdout
    copied = command("ledger", "import", "all.jsonl", "--ledger", "second.db", cwd=tmp_path)
    assert "6 draws added" in copied.stdout
    done = command("solve", questions, "--policy", "sc:n=2", "--json", "--ledger", "second.db", cwd=tmp_path)
    assert json.loads(done.stdout)["totals"]["draws_bought"] == 0


def test_help_version_and_completion(tmp_path: Path) -> None:
    helped = command("--help", cwd=tmp_path)
    assert helped.returncode == 0
    for name in ("solve", "replay", "methods", "ledger"):
        assert name in helped.stdout
    assert command("--version", cwd=tmp_path).stdout.startswith("consilience 0.")
    shown = command("--show-completion", cwd=tmp_path, _CONSILIENCE_COMPLETE="source_bash")
    assert "complete" in shown.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_130_and_the_next_run_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    lines = [{"question": QUESTIONS.replace("Ann", name), "id": name} for name in ("Ann", "Eve", "Tom", "Ida") * 30]
    path.write_text(
        "".join(json.dumps(line | {"question": f"{line['question']} ({n})"}) + "\n" for n, line in enumerate(lines))
    )
    arguments = [sys.executable, "-m", "consilience", "solve", str(path), "--policy", "sc:n=40", "--out", "r.jsonl"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ledger = tmp_path / ".consilience" / "ledger.db"
    held = 0
    while held == 0 and process.poll() is None:
        time.sleep(0.1)
        if ledger.exists():
            shown = command("ledger", "show", "--json", cwd=tmp_path)
            held = sum(row["draws"] for row in json.loads(shown.stdout or '{"models": []}')["models"])
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command again" in errors
    assert not (tmp_path / "r.jsonl").exists()
    done = command("solve", path, "--policy", "sc:n=40", "--json", cwd=tmp_path)
    totals = json.loads(done.stdout)["totals"]
    assert totals["draws"] == 120 * 40
    assert totals["draws_from_ledger"] >= held
    assert totals["draws_bought"] + totals["draws_from_ledger"] == 120 * 40
