"""Stopping rules over whole sequences of draws: the same verdicts as a plain loop, and the time per judged draw.

On recorded draws in random orders, one run measures for `esc` and `asc`: the rule alone (`stopping_index`), the whole
replay (`replay_orders`: stopping, votes, right or wrong), and a plain-Python loop over the same orders, whose draws
and right answers must be the same numbers. `asc` is checked against the exact integral for all pairs of counts, and
beside the package AdaptiveConsistency, where it is installed in .venv-peers. A step is one judged draw.

    python benchmarks/stopping_speed.py esc-last-letters-a.jsonl.gz [--picture plot.png]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gzip
import json
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial
from pathlib import Path
from typing import Any

import numpy as np
import replay_check
from _common import COLOURS, PEERS, ROOT, emit, environment, parser, picture, table
from numpy.typing import NDArray

from consilience import policy, record
from consilience.montecarlo.dirichlet import largest_share
from consilience.replay import Table, order, replay_orders, tabulate
from consilience.rules import View
from consilience.text.stopping.asc import BY_CRITERION, AdaptiveConsistency

POLICIES = {"esc": "esc:window=5,max=40", "asc": "asc:threshold=0.95,max=40"}
NO_PEER = "AdaptiveConsistency was skipped: it is not installed (`make .venv-peers/.ready` installs it)."
Orders = list[NDArray[np.intp]]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


# ------------------------------------------------------------------------------------------------ this library


def view_of_orders(recorded: Table, orders: Orders) -> View:
    """All problems in all orders, one after the other."""
    labels = np.concatenate([np.take_along_axis(recorded.labels, one, axis=1) for one in orders])
    return View.single(labels, np.tile(recorded.counts, len(orders)))


def library(spec: str, recorded: Table, orders: Orders) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The rule alone and the whole replay, ready to be timed."""
    rule = policy.parse(spec)
    view = view_of_orders(recorded, orders)
    return lambda: rule.stopping_index(view), lambda: replay_orders(recorded, rule, orders)


# ------------------------------------------------------------------------------------------------ plain Python


def load(path: Path) -> tuple[list[list[str | None]], list[str]]:
    """Answers of every question and gold answers, read by the plain computation's own rules."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream]
    answers = [[replay_check.answer(draw["text"]) for draw in problem["draws"]] for problem in problems]
    return answers, [replay_check.key(problem["answer"]) for problem in problems]


def plain(spec: str, answers: list[list[str | None]], gold: list[str], orders: Orders) -> tuple[int, int]:
    """Judged draws and right verdicts, draw by draw."""
    draws = right = 0
    for one in orders:
        for number, places in enumerate(one.tolist()):
            shuffled = [answers[number][place] for place in places]
            used = replay_check.stop(spec, shuffled)
            draws += used
            right += replay_check.vote(shuffled[:used]) == gold[number]
    return draws, right


# ------------------------------------------------------------------------------------------------ exactness


def exact_posterior(first: int, second: int) -> Fraction:
    """Integral of x^first (1 - x)^second over [1/2, 1], divided by that over [0, 1], term by term."""
    powers = range(first + 1, first + second + 2)
    upper = sum((-1) ** k * comb(second, k) * (1 - Fraction(1, 2**power)) / power for k, power in enumerate(powers))
    return upper * factorial(first + second + 1) / (factorial(first) * factorial(second))


def exact_decisions(most: int = 40) -> dict[str, int]:
    """`asc` against exact integration, for all pairs of vote counts up to ``most`` each."""
    rule = AdaptiveConsistency(max=2 * most)
    pairs = [(a, b) for a in range(most + 1) for b in range(a + 1)]
    different = 0
    for first, second in pairs:
        stops = rule.want(View.single(np.repeat([0, 1], [first, second])[None]))[0, 0] == 0
        different += bool(stops) != (exact_posterior(first, second) >= Fraction(0.95) or first + second == 2 * most)
    return {"pairs": len(pairs), "different": different}


# ------------------------------------------------------------------------------------------------ the peer


def partitions(total: int, most: int) -> list[tuple[int, ...]]:
    """All count vectors of ``total`` votes, in falling order, none larger than ``most``."""
    if total == 0:
        return [()]
    return [(c, *rest) for c in range(min(total, most), 0, -1) for rest in partitions(total - c, c)]


def peer(view: View, sequences: int, votes: int) -> dict[str, Any] | None:
    """AdaptiveConsistency on the first complete sequences and on all count vectors up to ``votes`` votes."""
    probe = PEERS.exists() and subprocess.run([PEERS, "-c", "import adaptive_consistency"], capture_output=True)
    if not probe or probe.returncode:
        return None
    rows = np.flatnonzero((view.answers[:, 0, :40] >= 0).all(1))[:: max(1, len(view.answers) // sequences)]
    part = view.answers[rows, 0, :40]
    counts = [c for total in range(1, votes + 1) for c in partitions(total, total)]
    given = json.dumps({"sequences": part.tolist(), "counts": counts})
    command = [str(PEERS), str(ROOT / "benchmarks" / "peers" / "adaptive_consistency_side.py")]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"adaptive_consistency_side.py failed: {done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    index, _ = AdaptiveConsistency().stopping_index(View.single(part))
    return {
        "release": theirs["release"],
        "ns": 1e9 * theirs["seconds"] / theirs["steps"],
        "steps": theirs["steps"],
        "sequences": len(rows),
        "stop_elsewhere": int((index != np.array(theirs["index"])).sum()),
        "criteria": {name: agreement(name, counts, theirs["decisions"][name]) for name in BY_CRITERION},
    }


def agreement(criterion: str, counts: list[tuple[int, ...]], theirs: list[list[Any] | None]) -> dict[str, Any]:
    """On how many count vectors the decisions differ; for ``dirichlet`` also how far the probabilities are apart."""
    rule = BY_CRITERION[criterion](max=1000)
    judged = [(one, found) for one, found in zip(counts, theirs, strict=True) if found is not None]
    own = [bool(rule.want(View.single(np.repeat(np.arange(len(one)), one)[None]))[0, 0] == 0) for one, _ in judged]
    apart = 0.0
    if criterion == "dirichlet":
        apart = max(abs(float(largest_share([one])[0]) - found[1]) for one, found in judged if len(one) > 2)
    different = sum(ours != found[0] for ours, (_, found) in zip(own, judged, strict=True))
    return {"states": len(judged), "stops": sum(own), "different": different, "apart": apart}


# ------------------------------------------------------------------------------------------------ the run


def measure(options: Namespace) -> dict[str, Any]:
    """All sides of both policies, each the best of some rounds that alternate between them."""
    recorded = tabulate(record.read(options.record))
    orders = [order(recorded, options.seed, r) for r in range(options.orders)]
    answers, gold = load(options.record)
    result: dict[str, Any] = {"questions": len(gold), "orders": options.orders, "policies": {}}
    for name, spec in POLICIES.items():
        alone, whole = library(spec, recorded, orders)
        best = {"rule": np.inf, "replay": np.inf, "plain": np.inf}
        for turn in range(options.rounds):
            seconds, (index, _) = timed(alone)
            best["rule"] = min(best["rule"], seconds)
            seconds, replayed = timed(whole)
            best["replay"] = min(best["replay"], seconds)
            if turn < options.plain_rounds:
                seconds, (draws, right) = timed(lambda: plain(spec, answers, gold, orders))  # noqa: B023
                best["plain"] = min(best["plain"], seconds)
        runs = len(gold) * options.orders
        result["policies"][name] = {
            "spec": spec,
            "steps": draws,
            "mean_draws": draws / runs,
            "accuracy": right / runs,
            "same": int(index.sum()) == int(replayed.draws.sum()) == draws and int(replayed.right.sum()) == right,
            **{f"{side}_ns": 1e9 * seconds / draws for side, seconds in best.items()},
        }
    result["exact"] = exact_decisions()
    result["peer"] = peer(view_of_orders(recorded, orders), options.sequences, options.votes)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    rows: list[list[object]] = []
    for name, one in result["policies"].items():
        sides = {"rule alone": one["rule_ns"], "whole replay": one["replay_ns"], "plain-Python loop": one["plain_ns"]}
        for side, ns in sides.items():
            ratios = [f"{ns / one[key]:.2f}" for key in ("rule_ns", "replay_ns")]
            rows.append([f"{name}, {side}", one["steps"], f"{ns / 1000:.3f}", *ratios])
    theirs = result["peer"]
    if theirs is not None:
        own = result["policies"]["asc"]
        ratios = [f"{theirs['ns'] / own[key]:.0f}" for key in ("rule_ns", "replay_ns")]
        side = f"AdaptiveConsistency {theirs['release']}, should_stop"
        rows.append([side, theirs["steps"], f"{theirs['ns'] / 1000:.1f}", *ratios])
    head = ["side", "steps", "microseconds per step", "times the rule alone", "times the whole replay"]
    verdicts = [
        [one["spec"], f"{one['mean_draws']:.6f}", f"{one['accuracy']:.6f}", "yes" if one["same"] else "NO"]
        for one in result["policies"].values()
    ]
    exact = result["exact"]
    parts = [
        f"{result['questions']} questions in {result['orders']} orders. {environment()}",
        table(head, rows),
        table(["policy", "draws per question", "accuracy", "same numbers on all three sides"], verdicts),
        f"Of {exact['pairs']} pairs of counts, `asc` decides {exact['different']} unlike the exact integral.",
    ]
    if theirs is None:
        return "\n\n".join([*parts, NO_PEER])
    states = [[name, one["states"], one["stops"], one["different"]] for name, one in theirs["criteria"].items()]
    parts.append(
        f"{theirs['stop_elsewhere']} of {theirs['sequences']} sequences stop elsewhere by AdaptiveConsistency's Beta."
    )
    parts.append(table(["criterion", "count vectors", "that stop", "decided differently"], states))
    parts.append(f"Dirichlet probabilities are at most {theirs['criteria']['dirichlet']['apart']:.1e} apart.")
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: str) -> None:
    """Time per step of every side, on a logarithmic axis."""
    sides = [
        (f"{name}, {side}", one[key], COLOURS[number])
        for name, one in result["policies"].items()
        for number, (side, key) in enumerate((("rule", "rule_ns"), ("replay", "replay_ns"), ("plain loop", "plain_ns")))
    ]
    if result["peer"] is not None:
        sides.append(("AdaptiveConsistency", result["peer"]["ns"], COLOURS[3]))
    with picture(path, height=2.8) as figure:
        axes = figure.add_subplot()
        names, values, colours = zip(*reversed(sides), strict=True)
        axes.barh(names, [value / 1000 for value in values], color=colours)
        axes.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("microseconds per judged draw, one core (dotted: 0.5)")


def main() -> None:
    """Measure, print, draw."""
    flags = parser(__doc__, orders=50, seed=0, rounds=7, plain_rounds=2, sequences=250, votes=14, picture="")
    flags.add_argument("record", type=Path, nargs="?")
    options = flags.parse_args()
    if options.record is None:
        print("left out: it needs the recorded draws, named on the command line")
        return
    result = measure(options)
    if options.picture:
        draw(result, options.picture)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
