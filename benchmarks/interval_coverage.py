"""How often the interval for accuracy holds the accuracy, over simulated populations of questions.

What `consilience replay` reports: questions sampled from a population, the draws of each recorded once, a policy run
over many random orders of them, and the interval computed from the share of right verdicts by question. The truth is
the policy's accuracy over the population with fresh draws. A question is the probability that a draw of it is right,
against one wrong answer. Nothing is approximated: the probability that a policy is right, given c right among the
recorded draws, comes from counting orders with the rule's own `want`, so that a question's share has a known law and a
run is one multinomial draw from it. As a check, some runs go through `consilience.replay` itself.

    python benchmarks/interval_coverage.py [--runs 4000] [--picture FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table
from scipy.optimize import brentq
from scipy.stats import betabinom, binom

from consilience.montecarlo.estimators import proportion_interval
from consilience.replay import Table, replay
from consilience.rules import Rule, StopRule, View
from consilience.text.stopping.asc import AdaptiveConsistency
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.voting.plurality import Plurality

DRAWS = 40
ACCURACIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97)
SIZES = {1000: (0.935, 0.965), 100: (0.93, 1.0)}
STOPS: dict[str, StopRule] = {
    "sc:n=1": SelfConsistency(n=1),
    "sc:n=5": SelfConsistency(n=5),
    "asc": AdaptiveConsistency(),
}


def beta(size: float) -> Callable[[float], np.ndarray]:
    """The law of right draws where a question's probability is Beta with this sum of parameters and mean x."""
    return lambda x: betabinom.pmf(np.arange(DRAWS + 1), DRAWS, size * x, size * (1 - x))


def all_or_nothing(x: float) -> np.ndarray:
    """Each question is always right, a share x of them, or never."""
    law = np.zeros(DRAWS + 1)
    law[[0, DRAWS]] = 1 - x, x
    return law


def u_shape(x: float) -> np.ndarray:
    """A share x of easy questions (99 % right on average); of the others 60 % nearly hopeless, 40 % in between."""
    parts = [(30, 0.3), (0.5, 12), (2, 2)]
    laws = [betabinom.pmf(np.arange(DRAWS + 1), DRAWS, *part) for part in parts]
    return np.array([x, 0.6 * (1 - x), 0.4 * (1 - x)]) @ np.array(laws)


def hopeless(share: float) -> Callable[[float], np.ndarray]:
    """A fixed small share of questions that are never right; the others are alike, so that little else varies."""
    return lambda x: (1 - share) * beta(50.0)(x) + share * (np.arange(DRAWS + 1) == 0)


POPULATIONS: dict[str, Callable[[float], np.ndarray]] = {
    "all or nothing": all_or_nothing,
    "U shape": u_shape,
    "Beta, split (0.5)": beta(0.5),
    "Beta, mixed (2)": beta(2.0),
    "Beta, alike (20)": beta(20.0),
    "1 % hopeless": hopeless(0.01),
    "2 % hopeless": hopeless(0.02),
}


def right_given(stop: StopRule) -> np.ndarray:
    """P(the verdict is right | c of `DRAWS` recorded draws are right), c = 0 .. `DRAWS`; float64, by counting orders.

    For a rule that looks at the counts of two answers alone. A tie is right with probability 1/2: of the orders that
    lead to it, half begin with the right answer.
    """
    ways = {(0, 0): 1}
    right = np.zeros(DRAWS + 1)
    for made in range(DRAWS + 1):
        for good in range(made + 1):
            orders = ways.pop((good, made - good), 0)
            if not orders:
                continue
            row = np.array([[0] * good + [1] * (made - good)], np.int32).reshape(1, made)
            if made == DRAWS or stop.want(View.single(row)).sum() == 0:
                wins = 1.0 if 2 * good > made else 0.5 if 2 * good == made else 0.0
                for c in range(good, DRAWS - made + good + 1):
                    right[c] += wins * orders * comb(DRAWS - made, c - good) / comb(DRAWS, c)
            else:
                for step in ((good + 1, made - good), (good, made - good + 1)):
                    ways[step] = ways.get(step, 0) + orders
    return right


@dataclass(frozen=True)
class Cell:
    """One population under one policy, at one accuracy: the law of right draws of a question, and of its share."""

    population: str
    policy: str
    accuracy: float
    counts: np.ndarray
    shares: np.ndarray


def cells(orders: int) -> list[Cell]:
    """Every population and policy at every accuracy; the population's own parameter is solved for the accuracy."""
    found = [Cell("any", "any, one order", p, np.array([1.0]), np.array([1 - p, p])) for p in ACCURACIES]
    for policy, stop in STOPS.items():
        right = right_given(stop).clip(0, 1)
        by_count = binom.pmf(np.arange(orders + 1)[None], orders, right[:, None])
        for name, law in POPULATIONS.items():
            for p in ACCURACIES:
                counts = law_at(law, right, p)
                found.append(Cell(name, policy, p, counts, counts @ by_count))
    return found


def law_at(law: Callable[[float], np.ndarray], right: np.ndarray, accuracy: float) -> np.ndarray:
    """The population of this family in which the policy has this accuracy; float64 [DRAWS + 1]."""
    return law(brentq(lambda x: law(x) @ right - accuracy, 1e-6, 1 - 1e-6, xtol=1e-14))


def coverage(cell: Cell, size: int, runs: int, generator: np.random.Generator) -> float:
    """The share of runs whose interval holds the accuracy."""
    law = cell.shares.clip(0) / cell.shares.clip(0).sum()
    values = np.arange(len(law)) / (len(law) - 1)
    held = 0
    for counts in generator.multinomial(size, law, size=runs):
        low, high = proportion_interval(np.repeat(values, counts))
        held += low <= cell.accuracy <= high
    return held / runs


def replayed_coverage(cell: Cell, stop: StopRule, size: int, runs: int, orders: int, seed: int) -> float:
    """The same with records made up draw by draw, and `consilience.replay` over them."""
    generator = np.random.default_rng([seed, 1])
    rule = Rule("rule", stop, Plurality())
    held = 0
    for run in range(runs):
        hits = generator.choice(DRAWS + 1, size=size, p=cell.counts / cell.counts.sum())
        right = generator.random((size, DRAWS)).argsort(1) < hits[:, None]
        blank = np.zeros((size, DRAWS))
        made = np.full(size, DRAWS, np.int32)
        data = Table((~right).astype(np.int32), made, right, np.ones(size, bool), blank, blank, {})
        low, high = replay(data, rule, repeats=orders, seed=run).summary()["accuracy_ci"]
        held += low <= cell.accuracy <= high
    return held / runs


def measure(options: Any) -> dict[str, Any]:
    """Coverage of every cell at both sizes, and of a few through replay."""
    rows = []
    generator = np.random.default_rng(options.seed)
    found = cells(options.orders)
    for cell in found:
        sides = {str(size): coverage(cell, size, options.runs, generator) for size in SIZES}
        rows.append({"population": cell.population, "policy": cell.policy, "accuracy": cell.accuracy, **sides})
    print(f"{len(rows)} cells done", file=sys.stderr)
    checks = []
    for cell in found if options.replays else []:
        if cell.population == "U shape" and cell.policy in ("sc:n=5", "asc") and cell.accuracy in (0.7, 0.95):
            share = replayed_coverage(cell, STOPS[cell.policy], 100, options.replays, options.orders, options.seed)
            checks.append({"policy": cell.policy, "accuracy": cell.accuracy, "coverage": share})
    outside = [row for row in rows if not all(low <= row[str(n)] <= high for n, (low, high) in SIZES.items())]
    return {"cells": rows, "outside": outside, "replayed": checks, "runs": options.runs}


def markdown(result: dict[str, Any]) -> str:
    """One table a size, then the runs through replay."""
    parts = []
    for size, (low, high) in SIZES.items():
        groups: dict[tuple[str, str], list[float]] = {}
        for row in result["cells"]:
            groups.setdefault((row["policy"], row["population"]), []).append(row[str(size)])
        head = ["policy, population", *(f"p = {p:g}" for p in ACCURACIES)]
        body = [[f"{a}, {b}" if b != "any" else a, *(f"{100 * v:.1f}" for v in vs)] for (a, b), vs in groups.items()]
        every = [v for vs in groups.values() for v in vs]
        line = f"**{size:,} questions**, coverage in %: {100 * min(every):.1f} to {100 * max(every):.1f}"
        parts += [f"{line}, promised {100 * low:g} to {100 * high:g}.", table(head, body)]
    parts.append(f"Cells outside of what is promised: {len(result['outside'])} of {len(result['cells'])}.")
    if result["replayed"]:
        body = [[one["policy"], f"{one['accuracy']:g}", f"{100 * one['coverage']:.1f}"] for one in result["replayed"]]
        parts.append(table(["through `consilience.replay`, U shape, 100 questions", "p", "coverage %"], body))
    return "\n\n".join(parts)


def draw_picture(result: dict[str, Any], path: str) -> None:
    """Coverage of every cell against the accuracy, one panel a size."""
    with picture(path, 8.0, 3.4) as figure:
        for axes, (size, (low, high)) in zip(figure.subplots(1, 2, sharey=True), SIZES.items(), strict=True):
            axes.axhspan(100 * low, 100 * high, color="#E8EDF2")
            axes.axhline(95, color="#5D6B7A", lw=0.8)
            for colour, policy in zip(COLOURS, dict.fromkeys(row["policy"] for row in result["cells"]), strict=False):
                mine = [row for row in result["cells"] if row["policy"] == policy]
                place = [ACCURACIES.index(row["accuracy"]) for row in mine]
                axes.plot(place, [100 * row[str(size)] for row in mine], "o", ms=3, color=colour, label=policy)
            axes.set_xticks(range(len(ACCURACIES)), [f"{p:g}" for p in ACCURACIES])
            axes.set_title(f"{size:,} questions", fontsize=9)
            axes.set_xlabel("accuracy over the population")
        figure.axes[0].set_ylabel("intervals that hold it, %")
        figure.axes[0].legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
        figure.axes[0].set_ylim(92, 100.2)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, runs=4000, orders=100, replays=400, seed=0)
    shown.add_argument("--picture", help="also write the coverages as this PNG")
    options = shown.parse_args()
    result = measure(options)
    if options.picture:
        draw_picture(result, options.picture)
    emit(options, result, markdown(result) + "\n\n" + environment())


if __name__ == "__main__":
    main()
