"""What is lost when calls fail, when money is short, and when the process is killed; all counted by the server.

- **Failures.** 2 % and 10 % of all calls fail for good (HTTP 400). A question is lost when it ends without an answer.
- **Money cap.** 64 workers, a cap that ends the run early, prices of 1000 and 2000 USD per million prompt and
  completion tokens; calls also fail in passing, are cut in the middle, fail for good or meet 429. What the
  endpoint billed is computed from the tokens that the server generated, replies that never arrived included.
- **kill -9.** A run is killed at a random point (5 % to 95 % of its calls answered), then the same command is given
  again, and once more. The server logs the seed of every call: a seed seen twice is a call sent twice, and one
  answered twice was answered but not yet on disk at the kill.

Every line is many runs that differ by the server's seed.

    python benchmarks/robustness.py [--questions 1000] [--caps 20] [--kills 10] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from _common import Server, answers, emit, environment, parser, questions, serving, table

import consilience

ANSWERS = answers(0.7)
PRICES = "[prices.m]\ninput = 1000.0\noutput = 2000.0\n"
WORKERS = 64
CAPPED_QUESTIONS = 700
CAPS = (35.0, 70.0)
"""USD; the whole run would cost at least 87, and 64 calls of 8 draws reserve about 33."""

KILLED = ((8, 0.01), (32, 0.01), (32, 0.1))
"""Calls in flight and mean latency in seconds of the runs that are killed."""

FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "5 % HTTP 500, 5 % bodies cut": {"error_rate": 0.05, "truncate_rate": 0.05},
    "10 % HTTP 400": {"failure_rate": 0.1},
    "429 beyond 32 in flight": {"max_concurrent": 32, "retry_after": 0.05},
    "all of these": {
        "error_rate": 0.05,
        "truncate_rate": 0.05,
        "failure_rate": 0.1,
        "max_concurrent": 32,
        "retry_after": 0.05,
    },
}


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder that goes away."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def solve(server: Server, asked: int, place: Path, **settings: Any) -> consilience.Run:
    """A run on mock questions with a fresh ledger in ``place``."""
    work = consilience.asolve(
        questions(asked), model=f"openai:m@{server.url}", ledger=str(place / "ledger.db"), **settings
    )
    return asyncio.run(work)


# ---------------------------------------------------------------------------------------------------- failures


def failing(policy: str, n: bool, share: float, asked: int, seed: int) -> dict[str, Any]:
    """One run with a share of calls failing for good."""
    with folder() as place, serving(answers=ANSWERS, failure_rate=share, supports_n=n, seed=seed) as server:
        run = solve(server, asked, place, policy=policy, concurrency=32)
        counts = server.counts()
    return {
        "policy": f"{policy}, n {'on' if n else 'off'}",
        "share": share,
        "questions": asked,
        "calls": counts["calls"],
        "calls_failed": counts["failures"],
        "lost": sum(1 for one in run if one.verdict is None or one.verdict.answer is None),
        "right": sum(map(bool, run.right)),
    }


def failures(asked: int) -> list[dict[str, Any]]:
    """Both policies, `n` on and off, both shares."""
    cases = [(p, n, s) for p in ("sc:n=16", "asc:threshold=0.95,max=16") for n in (False, True) for s in (0.02, 0.10)]
    return [failing(policy, n, share, asked, seed) for seed, (policy, n, share) in enumerate(cases)]


# ---------------------------------------------------------------------------------------------------- money cap


def capped(faults: dict[str, Any], n: bool, cap: float, seed: int) -> dict[str, Any]:
    """One run of 64 workers that has to stop at ``cap`` USD."""
    script: dict[str, Any] = {"answers": ANSWERS, "latency": 0.01, "supports_n": n, "seed": seed, **faults}
    with folder() as place, serving(**script) as server:
        (place / "prices.toml").write_text(PRICES)
        config = place / "prices.toml"
        run = solve(
            server,
            CAPPED_QUESTIONS,
            place,
            policy="sc:n=8",
            concurrency=WORKERS,
            max_tokens=20,
            budget=f"usd={cap}",
            config=config,
        )
        while (counts := server.counts())["in_flight"]:
            time.sleep(0.01)
    billed = (counts["prompt_tokens"] * 1000 + counts["completion_tokens"] * 2000) / 1e6
    return {
        "billed": billed,
        "own_count": run.totals["spent"]["cost"],
        "in_flight": counts["max_in_flight"],
        "stopped": run.totals["budget_spent"] == "usd",
    }


def caps(runs: int) -> list[dict[str, Any]]:
    """Every mix of faults with `n` off and on, ``runs`` each, at random caps."""
    rows = []
    for name, faults in FAULTS.items() if runs else ():
        for n in (False, True):
            drawn = [(Random(seed).uniform(*CAPS), seed) for seed in range(runs)]
            taken = [(cap, capped(faults, n, cap, seed)) for cap, seed in drawn]
            used = [one["billed"] / cap for cap, one in taken]
            rows.append(
                {
                    "faults": name,
                    "n": n,
                    "runs": runs,
                    "above": sum(share > 1 for share in used),
                    "most": max(used),
                    "median": median(used),
                    "understated": sum(one["own_count"] < one["billed"] - 1e-9 for _, one in taken),
                    "stopped": sum(one["stopped"] for _, one in taken),
                    "most_in_flight": max(one["in_flight"] for _, one in taken),
                }
            )
    return rows


# ------------------------------------------------------------------------------------------------------ kill -9


def command(server: Server, place: Path, concurrency: int) -> subprocess.Popen[str]:
    """`consilience solve` as a process of its own."""
    flags = ["--model", f"openai:m@{server.url}", "--policy", "sc:n=10", "--concurrency", str(concurrency), "--json"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "consilience", "solve", "questions.jsonl", *flags],
        cwd=place,
        env=clean,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The totals that it printed; raises RuntimeError where it failed."""
    printed, _ = process.communicate(timeout=300)
    if process.returncode != 0:
        raise RuntimeError(f"consilience solve ended with {process.returncode}")
    return dict(json.loads(printed)["totals"])


def stored(place: Path) -> int:
    """The good draws on disk, read without Consilience."""
    with closing(sqlite3.connect(place / ".consilience" / "ledger.db")) as database:
        count: int = database.execute("select count(*) from draws where failed = 0").fetchone()[0]
    return count


def killed(concurrency: int, latency: float, asked: int, seed: int) -> dict[str, Any]:
    """One kill at a random point, the same command again, and again."""
    whole = asked * 10
    moment = Random(seed).uniform(0.05, 0.95) * whole
    with folder() as place, serving(answers=ANSWERS, latency=latency, supports_n=False, seed=seed) as server:
        lines = "".join(json.dumps(one) + "\n" for one in questions(asked))
        (place / "questions.jsonl").write_text(lines)
        first = command(server, place, concurrency)
        while (counts := server.counts())["completed"] < moment and first.poll() is None:
            time.sleep(0.002)
        early = first.poll() is None
        if early:
            os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        kept = stored(place)
        second = finished(command(server, place, concurrency))
        calls = server.counts()["calls"]
        log = server.log()
        times = Counter(one["body"]["seed"] for one in log)
        sent, answered = sum(times.values()) - len(times), sum(one["status"] == 200 for one in log)
        third = finished(command(server, place, concurrency))
        after = server.counts()["calls"]
    assert sent == calls - whole
    return {
        "killed_in_mid_run": early,
        "answered_before": counts["completed"],
        "sent_twice": sent,
        "answered_twice": answered - whole,
        "missing": whole - second["draws"],
        "stored_bought_again": second["draws_bought"] - (whole - kept),
        "bought_by_the_third": after - calls + third["draws_bought"],
    }


def kills(times: int, asked: int) -> list[dict[str, Any]]:
    """``times`` kills of each kind of run."""
    rows = []
    for concurrency, latency in KILLED:
        taken = [killed(concurrency, latency, asked, seed) for seed in range(times)]
        twice, answered = ([one[key] for one in taken] for key in ("sent_twice", "answered_twice"))
        rows.append(
            {
                "concurrency": concurrency,
                "latency": latency,
                "kills": sum(one["killed_in_mid_run"] for one in taken),
                "calls": asked * 10,
                "median": median(twice),
                "most": max(twice),
                "answered_median": median(answered),
                "answered_most": max(answered),
                "missing": sum(one["missing"] for one in taken),
                "stored_bought_again": sum(one["stored_bought_again"] for one in taken),
                "third": sum(one["bought_by_the_third"] for one in taken),
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------- output


def markdown(result: dict[str, Any]) -> str:
    """Three tables."""
    lost = [
        [r["policy"], f"{r['share']:.0%}", r["questions"], r["calls"], r["calls_failed"], r["lost"], r["right"]]
        for r in result["failures"]
    ]
    money = [
        [
            f"{r['faults']}, n {'on' if r['n'] else 'off'}",
            r["runs"],
            r["above"],
            f"{r['most']:.3f}",
            f"{r['median']:.3f}",
            r["stopped"],
            r["understated"],
            r["most_in_flight"],
        ]
        for r in result["caps"]
    ]
    ends = [
        [
            f"{r['concurrency']} in flight, {r['latency']:g} s",
            r["kills"],
            r["calls"],
            f"{r['median']:g}, {r['most']}",
            f"{r['answered_median']:g}, {r['answered_most']}",
            r["stored_bought_again"],
            r["missing"],
            r["third"],
        ]
        for r in result["kills"]
    ]
    heads = (
        ["policy", "calls to fail", "questions", "calls", "calls failed", "questions lost", "right"],
        ["faults", "runs", "above cap", "most billed/cap", "median", "stopped by cap", "own count below", "in flight"],
        [
            "calls, mean latency",
            "kills",
            "calls needed",
            "sent twice (median, most)",
            "of them answered before",
            "bought again though on disk",
            "draws missing",
            "third run bought",
        ],
    )
    titles = ("Calls that fail for good", f"Money cap, {WORKERS} workers", "kill -9, then the same command")
    parts = [f"{t}:\n\n{table(h, r)}" for t, h, r in zip(titles, heads, (lost, money, ends), strict=True)]
    return "\n\n".join([*parts, result["environment"]])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON-ready object."""
    return {
        "failures": failures(options.questions),
        "caps": caps(options.caps),
        "kills": kills(options.kills, options.kill_questions),
        "environment": environment(),
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, questions=1000, caps=20, kills=10, kill_questions=100).parse_args()
    result = run(options)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
