"""The whole stack against a real HTTP server: failures, caps, kills, and an endpoint that is not there.

The server counts; what it counted is what these tests believe.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import consilience
from consilience.errors import EndpointError
from consilience.testing import ScriptedServer

ANSWERS = {"right": 0.7, **{f"wrong {n}": 0.03 for n in range(10)}}


def questions(count: int) -> list[dict]:
    return [
        {"id": f"q{n}", "question": f"Question number {n}?", "answer": "right", "kind": "text"} for n in range(count)
    ]


def model(server: ScriptedServer) -> str:
    return f"openai:m@{server.url}"


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text("[prices.m]\ninput = 1000.0\noutput = 2000.0\n")
    return path


@pytest.mark.parametrize("share", [0.02, 0.10])
@pytest.mark.parametrize("supports_n", [False, True])
@pytest.mark.parametrize("spec", ["sc:n=16", "asc"])
def test_no_question_is_lost_when_calls_fail_for_good(
    spec: str, supports_n: bool, share: float, tmp_path: Path
) -> None:
    with ScriptedServer(answers=ANSWERS, failure_rate=share, supports_n=supports_n, seed=4) as server:
        asked = questions(300 if supports_n else 60)
        run = consilience.solve(asked, model=model(server), policy=spec, ledger=str(tmp_path / "l.db"))
        assert server.counts["failures"] > 0
        assert run.totals["answered"] == len(asked)
        assert run.totals["failed"] <= server.counts["failures"]
        assert run.totals["accuracy"] >= 0.9


def test_passing_errors_and_cut_bodies_lose_nothing(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, error_rate=0.1, truncate_rate=0.1, supports_n=False) as server:
        run = consilience.solve(questions(15), model=model(server), policy="sc:n=8", ledger=str(tmp_path / "l.db"))
        assert (run.totals["failed"], run.totals["draws_bought"]) == (0, 120)
        assert server.counts["completed"] == 120
        assert run.totals["spent"]["attempts_of_unknown_usage"] == server.counts["failures"] > 0


@pytest.mark.parametrize("faults", [{}, {"error_rate": 0.05, "truncate_rate": 0.05}])
@pytest.mark.parametrize("supports_n", [False, True])
def test_a_money_cap_holds_with_64_workers_counted_by_the_server(
    faults: dict, supports_n: bool, prices: Path, tmp_path: Path
) -> None:
    cap = 6.0
    with ScriptedServer(answers=ANSWERS, latency=0.01, supports_n=supports_n, **faults) as server:
        run = consilience.solve(
            questions(100),
            model=model(server),
            policy="sc:n=8",
            concurrency=64,
            max_tokens=20,
            budget=f"usd={cap}",
            config=prices,
            ledger=str(tmp_path / "l.db"),
        )
        counted = (server.counts["prompt_tokens"] * 1000 + server.counts["completion_tokens"] * 2000) / 1e6
    assert counted <= cap
    assert run.totals["budget_spent"] == "usd"
    assert run.totals["spent"]["cost"] <= cap
    assert run.totals["spent"]["cost"] >= counted - 1e-9
    if not faults:
        assert counted > 0.8 * cap


def test_a_token_and_a_draw_cap_hold_with_64_workers(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.005, supports_n=False) as server:
        common = {"model": model(server), "policy": "sc:n=8", "concurrency": 64, "max_tokens": 20}
        consilience.solve(questions(80), **common, budget="tokens=5000", ledger=str(tmp_path / "a.db"))
        assert server.counts["prompt_tokens"] + server.counts["completion_tokens"] <= 5000
        server.reset()
        run = consilience.solve(questions(80), **common, budget="draws=333", ledger=str(tmp_path / "b.db"))
        assert server.counts["calls"] == 333
        assert run.totals["draws_bought"] == 333


def test_a_time_cap_ends_the_run_and_keeps_what_came(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.1, latency_shape="fixed", supports_n=False) as server:
        settings = {"model": model(server), "policy": "sc:n=8", "ledger": str(tmp_path / "l.db")}
        run = consilience.solve(questions(40), **settings, budget="seconds=1")
        assert run.totals["budget_spent"] == "seconds"
        assert 0 < run.totals["draws_bought"] < 320
        kept = run.totals["draws_bought"]
        server.reset()
        assert consilience.solve(questions(40), **settings, concurrency=32).totals["draws_bought"] == 320 - kept


def solve_process(server: ScriptedServer, folder: Path, *flags: str) -> subprocess.Popen:
    arguments = ["solve", "questions.jsonl", "--model", model(server), "--policy", "sc:n=10", "--json", *flags]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "consilience", *arguments],
        cwd=folder,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("moment", [40, 300])
def test_kill_minus_nine_costs_only_what_was_in_flight(moment: int, ledger_url: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(60)))
    concurrency = 16
    flags = ("--ledger", ledger_url, "--concurrency", str(concurrency))
    with ScriptedServer(answers=ANSWERS, latency=0.01, supports_n=False) as server:
        first = solve_process(server, tmp_path, *flags)
        while server.counts["completed"] < moment:
            assert first.poll() is None, first.communicate()
            time.sleep(0.002)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.communicate()
        second = solve_process(server, tmp_path, *flags)
        printed, errors = second.communicate(timeout=120)
        assert second.returncode == 0, errors
        totals = json.loads(printed)["totals"]
        assert totals["draws"] == 600
        assert totals["draws_bought"] < 600
        sent_twice = server.counts["calls"] - 600
        assert 0 <= sent_twice <= 2 * concurrency  # on the wire, or answered and on the way to the disk
        seeds = Counter(request["body"]["seed"] for request in server.requests)
        assert sum(count - 1 for count in seeds.values()) == sent_twice
        third = solve_process(server, tmp_path, *flags)
        third.communicate(timeout=120)
        assert server.counts["calls"] == 600 + sent_twice


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ({"api_key": "right-key"}, "OPENAI_API_KEY"),
        ({"models": ["other"]}, "does not serve 'm'"),
    ],
)
def test_a_refused_run_exits_with_two(script: dict, says: str, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions(20)))
    with ScriptedServer(**script) as server:
        process = solve_process(server, tmp_path)
        printed, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert says in errors
        assert "right-key" not in errors
        assert printed == ""
        assert server.counts["calls"] <= 16


def test_a_dead_endpoint_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        url = server.url
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1"):
        consilience.solve(questions(2), model=f"openai:m@{url}", policy="one", ledger=str(tmp_path / "l.db"))


def test_a_caching_backend_is_warned_of_and_its_share_reported(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, identical=True, supports_n=False) as server:
        run = consilience.solve(questions(12), model=model(server), policy="sc:n=4", ledger=str(tmp_path / "l.db"))
    warnings = [note for note in run.notes if "cache" in note]
    assert len(warnings) == 1
    assert run.totals["duplicate_share"] == pytest.approx(0.75)


def test_the_prompt_says_how_to_end_and_each_call_has_its_own_seed(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, supports_n=False) as server:
        consilience.solve(questions(5), model=model(server), policy="sc:n=4", ledger=str(tmp_path / "l.db"), top_p=0.9)
        bodies = [request["body"] for request in server.requests]
    assert all(body["messages"][-1]["content"].endswith("End with: The answer is <answer>.") for body in bodies)
    assert len({body["seed"] for body in bodies}) == 20
    assert all((body["temperature"], body["top_p"], body["max_tokens"]) == (0.7, 0.9, 1024) for body in bodies)


def test_a_parameter_that_the_user_set_and_the_endpoint_refuses_ends_the_run(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, unsupported=["temperature"]) as server:
        common = {"model": model(server), "policy": "one", "concurrency": 1, "ledger": str(tmp_path / "l.db")}
        with pytest.raises(EndpointError, match="temperature"):
            consilience.solve(questions(3), temperature=0.5, **common)
        assert server.counts["calls"] == 1
        run = consilience.solve(questions(3), **common)  # our own default is dropped, and said
        assert run.totals["answered"] == 3
        assert any("temperature" in note for note in run.notes)


def test_n_is_used_for_the_certain_draws_and_costs_one_call(tmp_path: Path) -> None:
    with ScriptedServer(answers={"right": 1.0}) as server:
        run = consilience.solve(questions(10), model=model(server), policy="asc", ledger=str(tmp_path / "l.db"))
        assert run.totals["mean_draws"] == 4
        assert (server.counts["calls"], server.counts["draws"]) == (10, 40)


def test_live_draws_at_concurrency_8_stay_within_the_bound(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.002, seed=9) as server:
        ledger = str(tmp_path / "l.db")
        run = consilience.solve(questions(110), model=model(server), policy="asc", concurrency=8, ledger=ledger)
        judged = sum(problem.verdict.draws for problem in run)
        assert judged <= server.counts["draws"] <= 1.15 * judged


def test_half_a_surrogate_pair_in_a_reply_is_kept_as_a_replacement(ledger_url: str) -> None:
    with ScriptedServer(answers=lambda question, lots: "Fine \ud83d. The answer is 7.", supports_n=False) as server:
        run = consilience.solve(questions(4), model=model(server), policy="sc:n=5", ledger=ledger_url)
        assert run.totals["draws_bought"] == 20
        assert {problem.verdict.answer for problem in run} == {"7"}
        assert "\ufffd" in run.problems[0].draws[0].text
        again = consilience.solve(questions(4), model=model(server), policy="sc:n=5", ledger=ledger_url)
        assert again.totals["draws_bought"] == 0


def test_a_question_with_a_nul_is_kept_on_both_databases(ledger_url: str) -> None:
    asked = [{"question": "What is \0 in ASCII?", "kind": "text"}]
    with ScriptedServer(answers=ANSWERS) as server:
        run = consilience.solve(asked, model=model(server), policy="sc:n=3", ledger=ledger_url)
        assert run.totals["draws_bought"] == 3


def test_a_time_cap_ends_a_pause_that_the_endpoint_asked_for(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, calls_per_second=1, retry_after=600, supports_n=False) as server:
        common = {"model": model(server), "policy": "sc:n=4", "ledger": str(tmp_path / "l.db")}
        run = consilience.solve(questions(8), **common, budget="seconds=2")
        assert run.totals["budget_spent"] == "seconds"
        assert run.totals["seconds"] < 100  # not the ten minutes of Retry-After


def test_retry_after_zero_does_not_hammer_the_endpoint(tmp_path: Path) -> None:
    with ScriptedServer(answers=ANSWERS, calls_per_second=20, retry_after=0, supports_n=False) as server:
        consilience.solve(questions(5), model=model(server), policy="sc:n=8", ledger=str(tmp_path / "l.db"))
        assert server.counts["completed"] == 40
        assert server.counts["calls"] < 2000


def test_questions_that_share_their_draws_raise_no_alarm(tmp_path: Path) -> None:
    same = [{"question": "The same?", "id": f"{n}"} for n in range(3)]
    with ScriptedServer(answers=ANSWERS, supports_n=False) as server:
        run = consilience.solve(same, model=model(server), policy="sc:n=3", ledger=str(tmp_path / "l.db"))
        assert server.counts["calls"] == 3
    assert not any("twice" in note for note in run.notes)
