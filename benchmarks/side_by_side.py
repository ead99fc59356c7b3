"""Requests sent and questions right, here and in its_hub, on the same mock questions in one run; and who survives.

A scripted server of its own process answers rightly with probability 0.7 per draw; the rest is spread over ten wrong
answers, and a call takes 50 ms in the mean (exponential). Its k-th reply to a question is the same for every side that
asks singly. It counts what it is asked; nobody's own count is used. All sides ask all questions at once, at most 32
calls in flight and 16 draws a question; rounds differ by the server's seed and the sides take turns within a round.
its_hub runs in a process of its own with its own defaults (thresholds 0.75 and 0.95, three tries) and a projection
onto the number behind "The answer is". `BetaSelfConsistency` runs twice: with its own limit of 32 calls, and with
that limit off and two questions at a time.

"Sequential" is arithmetic, no run: the draws that the Beta rule needs when it sees one draw at a time, on simulated
questions of the same probabilities. Then the same with 2 % and 10 % of all calls failing for good (HTTP 400), its_hub
also with its option ``replace_error_with_message``: a question is lost when it ends without an answer.

    python benchmarks/side_by_side.py [--questions 40 200] [--rounds 3] [--json] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from _common import (
    COLOURS,
    NO_PEERS,
    Server,
    answers,
    emit,
    environment,
    its_hub,
    parser,
    peers_python,
    picture,
    questions,
    release_of,
    serving,
    table,
)

import consilience

MOST = 16
FAILING = (0.0, 0.02, 0.10)
RIGHT = 0.7


@dataclass(frozen=True)
class Side:
    """One line of the table: a policy here (``n``: whether the endpoint honours it), or an algorithm of its_hub."""

    name: str
    policy: str = ""
    n: bool = False
    algorithm: str = ""
    limit: str = "own"
    replace: bool = False

    @property
    def ours(self) -> bool:
        """Whether Consilience is what runs."""
        return bool(self.policy)


ASC = f"asc:threshold=0.95,max={MOST}"
OURS = (
    Side(f"{ASC}, n on", policy=ASC, n=True),
    Side(f"{ASC}, n off", policy=ASC),
    Side(f"asc:threshold=0.85,max={MOST}, n off", policy=f"asc:threshold=0.85,max={MOST}"),
    Side(f"sc:n={MOST}, n off", policy=f"sc:n={MOST}"),
)
THEIRS = (
    Side("its_hub Adaptive 0.75", algorithm="adaptive"),
    Side("its_hub Beta 0.95, its own limit", algorithm="beta"),
    Side("its_hub Beta 0.95, 2 questions at a time", algorithm="beta", limit="questions"),
    Side("its_hub SelfConsistency", algorithm="sc"),
)
REPLACING = (
    Side("its_hub Adaptive 0.75, errors replaced", algorithm="adaptive", replace=True),
    Side("its_hub Beta 0.95, 2 at a time, errors replaced", algorithm="beta", limit="questions", replace=True),
    Side("its_hub SelfConsistency, errors replaced", algorithm="sc", replace=True),
)


@dataclass(frozen=True)
class Setting:
    """The sizes of a run."""

    rounds: int
    concurrency: int
    latency: float
    timeout: int
    python: str | None


def enough(leader: int, second: int, threshold: float) -> bool:
    """P(Beta(leader + 1, second + 1) > 1/2) >= threshold, by the binomial tail in integers."""
    n = leader + second + 1
    return sum(comb(n, k) for k in range(leader + 1)) >= threshold * (1 << n)


def sequential(threshold: float, count: int = 20_000, seed: int = 0) -> dict[str, float]:
    """Mean draws, and share right, of the Beta rule that sees one draw at a time; ties go to the first seen."""
    dice, weights, drawn, right = Random(seed), answers(RIGHT), 0, 0
    names, shares = list(weights), list(weights.values())
    for _ in range(count):
        votes: Counter[str] = Counter()
        for answer in dice.choices(names, shares, k=MOST):
            votes[answer] += 1
            drawn += 1
            first, second = (*(v for _, v in votes.most_common(2)), 0)[:2]
            if enough(first, second, threshold):
                break
        right += votes.most_common(1)[0][0] == "42"
    return {"draws_per_question": drawn / count, "right": right / count}


def ours(side: Side, server: Server, asked: int, setting: Setting) -> dict[str, Any]:
    """One run of `consilience.asolve` on a fresh ledger."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        work = consilience.asolve(
            questions(asked),
            model=f"openai:m@{server.url}",
            policy=side.policy,
            concurrency=setting.concurrency,
            ledger=str(Path(folder) / "ledger.db"),
        )
        run = asyncio.run(work)
        seconds = time.perf_counter() - start
    lost = sum(1 for problem in run if problem.verdict is None or problem.verdict.answer is None)
    return {"right": sum(map(bool, run.right)), "lost": lost, "hung": 0, "seconds": seconds}


def theirs(side: Side, server: Server, asked: int, setting: Setting) -> dict[str, Any]:
    """One run of its_hub."""
    assert setting.python is not None
    options: dict[str, Any] = {"algorithm": side.algorithm, "limit": side.limit, "timeout": setting.timeout}
    if side.replace:
        options["replace"] = "error"
    return its_hub(setting.python, server.url, questions=asked, budget=MOST, concurrency=setting.concurrency, **options)


def counted(server: Server) -> dict[str, int]:
    """The server's counts once nothing is in flight any more."""
    while (counts := server.counts())["in_flight"]:
        time.sleep(0.02)
    return counts


def one(side: Side, asked: int, failing: float, seed: int, setting: Setting) -> dict[str, Any]:
    """One side, one round: what it answered and what the server counted."""
    options: dict[str, Any] = {"answers": answers(RIGHT), "latency": setting.latency, "failure_rate": failing}
    options |= {"seed": seed, "supports_n": side.n, "supports_logprobs": False, "log_bodies": False}
    with serving(**options, supports_seed=False) as server:
        done = (ours if side.ours else theirs)(side, server, asked, setting)
        counts = counted(server)
    taken = {name: done[name] for name in ("right", "lost", "hung", "seconds")}
    return taken | {"requests": counts["calls"], "draws": counts["draws"], "failures": counts["failures"]}


def compare(sides: Sequence[Side], asked: int, failing: float, setting: Setting) -> list[dict[str, Any]]:
    """All sides over all rounds, one entry per side: sums over the rounds, seconds as their median."""
    taken: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for seed in range(setting.rounds):
        for side in sides:
            taken[side.name].append(one(side, asked, failing, seed, setting))
    rows = []
    for side in sides:
        rounds, total = taken[side.name], asked * setting.rounds
        summed = {key: sum(r[key] for r in rounds) for key in rounds[0] if key != "seconds"}
        per_question = {f"{key}_per_question": round(summed[key] / total, 2) for key in ("requests", "draws")}
        seconds = round(median(r["seconds"] for r in rounds), 2)
        rows.append({"side": side.name, "questions": total, **summed, **per_question, "seconds": seconds})
    return rows


def lost(row: dict[str, Any]) -> str:
    """Questions without an answer, and how many of them never came back."""
    return f"{row['lost']} ({row['hung']} hung)" if row["hung"] else str(row["lost"])


def cost_table(rows: Sequence[dict[str, Any]], optimum: dict[str, float]) -> str:
    """Requests, draws, right answers and wall time of one number of questions."""
    best = optimum["draws_per_question"]
    head = ["side", "requests", "draws", "draws/question", "times sequential", "right", "no answer", "seconds"]
    lines: list[list[object]] = [
        ["sequential Beta 0.95 (arithmetic)", "", "", f"{best:.2f}", "1.00", f"{100 * optimum['right']:.1f} %", "", ""]
    ]
    for r in rows:
        share, times = f"{100 * r['right'] / r['questions']:.1f} %", f"{r['draws_per_question'] / best:.2f}"
        spent = [r["requests"], r["draws"], f"{r['draws_per_question']:.2f}", times]
        lines.append([r["side"], *spent, share, lost(r), f"{r['seconds']:.2f}"])
    return table(head, lines)


def survival_table(found: dict[float, list[dict[str, Any]]]) -> str:
    """Questions lost by share of failing calls."""
    head = ["side", *(text for s in FAILING[1:] for text in (f"lost at {s:.0%}", f"right at {s:.0%}"))]
    lines = []
    for name in [row["side"] for row in found[FAILING[1]]]:
        cells: list[object] = [name]
        for share in FAILING[1:]:
            row = next(r for r in found[share] if r["side"] == name)
            cells += [f"{lost(row)} of {row['questions']}", f"{100 * row['right'] / row['questions']:.1f} %"]
        lines.append(cells)
    return table(head, lines)


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    parts = []
    for asked, rows in result["cost"].items():
        title = f"{asked} questions at once, {result['rounds']} rounds, sums"
        parts.append(f"{title}:\n\n{cost_table(rows, result['sequential'])}")
    parts.append(
        f"Calls that fail for good, {result['survival_questions']} questions at once, {result['rounds']} rounds, "
        f"sums:\n\n{survival_table(result['survival'])}"
    )
    shape = f"Latency {result['latency']:g} s in the mean, {result['concurrency']} calls in flight"
    notes = [
        f"{shape}, at most {MOST} draws a question; seconds are medians of a round.",
        f"Hung: not back after {result['timeout']} s.",
        result["environment"],
        f"its_hub {result['its_hub']}." if result["its_hub"] else NO_PEERS,
    ]
    return "\n\n".join([*parts, "\n".join(notes)])


def plot(result: dict[str, Any], path: str) -> None:
    """Draws per question against questions lost at 2 %: two panels of bars, one line per side."""
    rows = next(iter(result["cost"].values()))
    names = [row["side"] for row in rows]
    with picture(path, width=8.0, height=0.8 + 0.36 * len(names)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        colours = [COLOURS[0 if any(s.name == n and s.ours for s in OURS) else 1] for n in names]
        left.barh(names, [row["draws_per_question"] for row in rows], color=colours)
        left.axvline(result["sequential"]["draws_per_question"], color="#5b6675", linestyle="--", linewidth=1)
        left.invert_yaxis()
        left.set_xlabel("draws per question (dashed: sequential)")
        failed = {row["side"]: 100 * row["lost"] / row["questions"] for row in result["survival"][FAILING[1]]}
        right.barh(names, [failed[name] for name in names], color=colours)
        for place, name in enumerate(names):
            right.text(failed[name], place, f" {failed[name]:.0f}", va="center", fontsize=8)
        right.set_xlabel("% of questions lost, 2 % of calls failing")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON-ready object."""
    python = peers_python(options.peers_python)
    setting = Setting(options.rounds, options.concurrency, options.latency, options.timeout, python)
    sides = OURS + (THEIRS if python else ())
    again = sides + (REPLACING if python else ())
    few = min(options.questions)
    return {
        "cost": {asked: compare(sides, asked, 0.0, setting) for asked in options.questions},
        "survival": {share: compare(again, few, share, setting) for share in FAILING[1:]},
        "survival_questions": few,
        "sequential": sequential(0.95),
        "rounds": options.rounds,
        "concurrency": options.concurrency,
        "latency": options.latency,
        "timeout": options.timeout,
        "environment": environment(),
        "its_hub": release_of(python) if python else None,
    }


def main() -> None:
    """Measure and print."""
    shown = parser(__doc__, rounds=3, concurrency=32, latency=0.05, timeout=12)
    shown.add_argument("--questions", type=int, nargs="+", default=[40, 200], help="default 40 200")
    shown.add_argument("--peers-python", help="the Python that has its_hub (default: that of .venv-peers)")
    shown.add_argument("--plot", metavar="FILE.png", help="also draw draws per question and survival")
    options = shown.parse_args()
    result = run(options)
    emit(options, result, markdown(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
