"""The control scheme of `esc` on recorded draws: what it forecasts from the first draws, and what then happens.

In each of many random orders the first draws of every question give the forecast for every window and maximum; the
same orders, replayed, give the mean draws and how often the verdict differs from the vote of all draws. Also measured:
the pairs that `choose` takes under a budget, and those that hindsight would have taken.

    python benchmarks/esc_control.py esc-last-letters-a.jsonl.gz [--first 5]
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from _common import emit, parser, table
from numpy.typing import NDArray

from consilience import record
from consilience.replay import order, tabulate
from consilience.rules import View
from consilience.text.stopping.esc import EarlyStopping
from consilience.text.stopping.esc_control import Forecast, choose, forecast
from consilience.text.voting.plurality import Plurality

WINDOWS = (2, 3, 4, 5, 6, 8, 10)
MAXES = (10, 20, 40)
BUDGETS = (4.0, 6.0, 8.0, 10.0, 15.0, 40.0)
Float = NDArray[np.float64]


def measured(labels: NDArray[np.int32]) -> tuple[Float, Float]:
    """Mean draws and the share of verdicts unlike the vote of all draws, float64 [windows, maxes] each."""
    full, _ = Plurality().decide(View.single(labels))
    draws, unlike = np.full((2, len(WINDOWS), len(MAXES)), np.nan)
    for i, window in enumerate(WINDOWS):
        for j, most in enumerate(MAXES):
            if window <= most:
                index, _ = EarlyStopping(window, most).stopping_index(View.single(labels))
                winner, _ = Plurality().decide(View.single(labels, index))
                draws[i, j], unlike[i, j] = index.mean(), (winner != full).mean()
    return draws, unlike


def mean_of(forecasts: list[Forecast]) -> dict[str, Float]:
    """The mean of every prediction over the orders."""
    return {name: np.mean([getattr(one, name) for one in forecasts], axis=0) for name in ("draws", "cut", "loss")}


def choices(forecasts: list[Forecast], happened: list[tuple[Float, Float]]) -> list[dict[str, Any]]:
    """For every budget: what was spent and lost by the pair chosen in each order, and by the best one in hindsight."""
    draws, unlike = (np.mean(one, axis=0) for one in zip(*happened, strict=True))
    rows = []
    for budget in BUDGETS:
        chosen = [choose(one, budget=budget) for one in forecasts if np.nanmin(one.draws) <= budget]
        at = [(WINDOWS.index(rule.window), MAXES.index(rule.max)) for rule in chosen]
        names = [f"{rule.window}/{rule.max}" for rule in chosen]
        within = np.where(draws <= budget, unlike, np.inf)
        best = np.unravel_index(within.argmin(), within.shape)
        rows.append(
            {
                "budget": budget,
                "chosen": max(set(names), key=names.count),
                "draws": float(np.mean([draws[place] for place in at])),
                "unlike": float(np.mean([unlike[place] for place in at])),
                "best": f"{WINDOWS[best[0]]}/{MAXES[best[1]]}",
                "best_draws": float(draws[best]),
                "best_unlike": float(unlike[best]),
            }
        )
    return rows


def measure(options: Namespace) -> dict[str, Any]:
    """Forecast and outcome of every order."""
    recorded = tabulate(record.read(options.record))
    forecasts, happened, sure = [], [], []
    for repeat in range(options.orders):
        labels = np.take_along_axis(recorded.labels, order(recorded, options.seed, repeat), axis=1)
        forecasts.append(forecast(labels[:, : options.first], WINDOWS, MAXES))
        sure.append(forecast(labels, WINDOWS, MAXES))
        happened.append(measured(labels))
    draws, unlike = (np.mean(one, axis=0) for one in zip(*happened, strict=True))
    spread = np.std([one.draws for one in forecasts], axis=0)
    return {
        "questions": len(recorded.labels),
        "orders": options.orders,
        "first": options.first,
        "windows": WINDOWS,
        "maxes": MAXES,
        "forecast": {name: value.tolist() for name, value in mean_of(forecasts).items()},
        "spread": spread.tolist(),
        "from_all": {name: value.tolist() for name, value in mean_of(sure).items()},
        "draws": draws.tolist(),
        "unlike": unlike.tolist(),
        "choices": choices(forecasts, happened),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of the results page."""
    rows = []
    for j, most in enumerate(MAXES):
        for i, window in enumerate(WINDOWS):
            predicted, sure = result["forecast"], result["from_all"]
            figures = [
                f"{predicted['draws'][i][j]:.2f} ± {result['spread'][i][j]:.2f}",
                f"{sure['draws'][i][j]:.2f}",
                f"{result['draws'][i][j]:.2f}",
            ]
            losses = [predicted["loss"][i][j], sure["loss"][i][j], result["unlike"][i][j]]
            rows.append([f"{window} / {most}", *figures, *(f"{100 * value:.2f}" for value in losses)])
    first = result["first"]
    head = ["window / max", f"draws, first {first}", "draws, from all", "draws, measured"]
    head += [f"loss %, first {first}", "loss %, from all", "unlike the full vote %"]
    picked = [
        [
            f"{one['budget']:g}",
            one["chosen"],
            f"{one['draws']:.2f}",
            f"{100 * one['unlike']:.2f}",
            one["best"],
            f"{one['best_draws']:.2f}",
            f"{100 * one['best_unlike']:.2f}",
        ]
        for one in result["choices"]
    ]
    head_picked = ["budget", "chosen (most often)", "draws", "unlike %", "best in hindsight", "draws", "unlike %"]
    return "\n\n".join(
        [
            f"{result['questions']} questions in {result['orders']} orders.",
            table(head, rows),
            table(head_picked, picked),
        ]
    )


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__, orders=50, seed=0, first=5)
    flags.add_argument("record", type=Path, nargs="?")
    options = flags.parse_args()
    if options.record is None:
        print("left out: it needs the recorded draws, named on the command line")
        return
    result = measure(options)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
