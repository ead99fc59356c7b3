"""Tune on one half of a record, look at the other: what was promised, what was found, over many random halves.

For each record and limit: how often a policy was found, the drop promised (the bound of the search half) and the drop
found on the held-out half, how often that passed the limit, and the draws saved. Beside it, the same with two weaker
guards: no bound at all, and Student's bound with the plain variance of the drops.

    python benchmarks/tune_halves.py RECORD.jsonl.gz ... [--splits 50] [--repeats 50] [--picture FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table
from scipy.special import stdtrit

from consilience import record
from consilience.draws import Draw, Problem
from consilience.tune import Candidate, Survey, Tuned, survey
from consilience.tune.results import LEVEL
from consilience.tune.search import Rows, cheapest_within

LIMITS = (0.005, 0.01, 0.02)
SHOWN = 0.01
"""The limit of the picture and of the table of guards."""

Guard = Callable[[Survey, int, Rows], float]


def rated(draw: Draw) -> Draw:
    """A draw of the subjectivity record: a rating above 50 of 100 (Mistral: above 5, one digit) is answer 1."""
    digits = draw.text.strip()
    least = 5 if "Mistral" in (draw.model or "") else 50
    answer = str(int(int(digits) > least)) if digits.isdigit() else None
    return draw.model_copy(update={"answer": answer, "text": draw.text if answer else ""})


def read(path: str) -> list[Problem]:
    """A record, prepared so that its answers can be compared: kinds without a vote rule of their own as text."""
    found = list(record.read(path))
    if any(problem.kind == "rating" for problem in found):
        ratings = [[rated(draw) for draw in problem.draws] for problem in found]
        return [p.model_copy(update={"kind": "text", "draws": r}) for p, r in zip(found, ratings, strict=True)]
    as_text = {"kind": "text"}  # code: the recorded output is compared as it stands
    return [problem.model_copy(update=as_text) if problem.kind == "code" else problem for problem in found]


def mean_only(found: Survey, index: int, rows: Rows) -> float:
    """No guard: the mean drop itself."""
    return float((found.right[0, rows] - found.right[index, rows]).mean())


def plain(found: Survey, index: int, rows: Rows) -> float:
    """Student's one-sided bound with the variance of the drops alone."""
    drops = found.right[0, rows] - found.right[index, rows]
    error = drops.std(ddof=1) / np.sqrt(len(drops))
    return float(drops.mean() + stdtrit(len(drops) - 1, LEVEL) * error)


def chosen_by(tuned: Tuned, found: Survey, seed: int, guard: Guard) -> Candidate:
    """The choice with another bound on the search half."""
    rows, _ = found.halves(seed)
    listed = [
        dataclasses.replace(one, search=dataclasses.replace(one.search, drop_bound=guard(found, index, rows)))
        for index, one in enumerate(tuned.candidates)
    ]
    return cheapest_within(listed, tuned.max_drop) or tuned.full


def measure(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """All splits of one record, at every limit."""
    began = time.perf_counter()
    name = Path(path).name.split(".")[0]
    found = survey(read(path), repeats=options.repeats, seed=options.seed)
    took = time.perf_counter() - began
    rows = []
    for limit in LIMITS:
        results = [found.choose(limit, seed) for seed in range(options.splits)]
        row = {"limit": limit, **summary([one.chosen for one in results], results, limit)}
        row["promised"] = float(np.mean([one.chosen.search.drop_bound for one in results]))
        row["ece"] = [float(np.mean(values)) for values in zip(*(ece(one) for one in results), strict=True)]
        row["points"] = [[one.chosen.held_out.saved, one.chosen.held_out.drop] for one in results]
        row["most_often"] = most_often([one.chosen.rule.name for one in results])
        for guard in (mean_only, plain):
            chosen = [chosen_by(one, found, seed, guard) for seed, one in enumerate(results)]
            row[guard.__name__] = summary(chosen, results, limit)
        rows.append(row)
    print(f"{name}: {len(found.rules)} policies replayed in {took:.0f} s", file=sys.stderr)
    problems, draws = found.right.shape[1], float(found.draws[0].mean())
    return {"name": name, "problems": problems, "draws": draws, "policies": len(found.rules), "limits": rows}


def ece(tuned: Tuned) -> tuple[float, float]:
    """Calibration error on the held-out half, raw and calibrated; nan where no confidence could be calibrated."""
    fitted = tuned.calibration
    return (float("nan"), float("nan")) if fitted is None else (fitted.ece_before, fitted.ece_after)


def summary(chosen: Sequence[Candidate], results: Sequence[Tuned], limit: float) -> dict[str, Any]:
    """What the held-out halves say of the policies chosen."""
    drops = np.array([one.held_out.drop for one in chosen])
    surely = [one.held_out.drop_ci[0] > limit for one in chosen]
    return {
        "found": sum(one.rule != of.full.rule for one, of in zip(chosen, results, strict=True)),
        "drop": float(drops.mean()),
        "worst": float(drops.max()),
        "above": int((drops > limit + 1e-12).sum()),
        "surely_above": int(sum(surely)),
        "saved": float(np.mean([one.held_out.saved for one in chosen])),
    }


def most_often(names: Sequence[str]) -> tuple[str, int]:
    """The commonest choice and how often it was made."""
    best = max(sorted(set(names)), key=names.count)
    return best, names.count(best)


def markdown(found: Sequence[dict[str, Any]], splits: int) -> str:
    """The promises against what was found, and what the guard is worth."""
    head = ["record", "limit", "found", "promised at most", "drop found", "worst", "above the limit", "surely above"]
    rows = [
        [
            f"{data['name']} ({data['problems']} x {data['draws']:.4g})" if not place else "",
            f"{100 * row['limit']:g}",
            f"{row['found']} of {splits}",
            points(row["promised"]),
            points(row["drop"]),
            points(row["worst"]),
            row["above"],
            row["surely_above"],
            f"{row['saved']:.0%}",
            f"{row['ece'][0]:.1%}, {row['ece'][1]:.1%}",
        ]
        for data in found
        for place, row in enumerate(data["limits"])
    ]
    promises = table([*head, "draws saved", "ECE raw, calibrated"], rows)
    guards = table(
        ["record, limit 1 point", "no guard", "above", "plain Student", "above", "`tune`", "above"],
        [guard_row(data) for data in found],
    )
    commonest = table(
        ["record, limit 1 point", "chosen most often", "times"],
        [[data["name"], f"`{at(data, SHOWN)['most_often'][0]}`", at(data, SHOWN)["most_often"][1]] for data in found],
    )
    return "\n\n".join((promises, guards, commonest))


def at(data: dict[str, Any], limit: float) -> dict[str, Any]:
    """The row of a limit."""
    return next(row for row in data["limits"] if row["limit"] == limit)


def guard_row(data: dict[str, Any]) -> list[object]:
    """Draws saved and splits above the limit by each guard."""
    row = at(data, SHOWN)
    sides = [row["mean_only"], row["plain"], row]
    return [data["name"], *(cell for side in sides for cell in (f"{side['saved']:.0%}", side["above"]))]


def points(share: float) -> str:
    return f"{100 * share:+.2f}"


def draw_picture(found: Sequence[dict[str, Any]], path: str) -> None:
    """One panel a record: every split's savings and drop on its held-out half."""
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with picture(path, 8.0, 2.4 * lines) as figure:
        for place, data in enumerate(found):
            axes = figure.add_subplot(lines, columns, place + 1)
            saved, drops = 100 * np.array(at(data, SHOWN)["points"]).T
            axes.axhline(0, color="#C9D0D8", lw=0.8)
            axes.axhline(100 * SHOWN, color=COLOURS[1], lw=1, ls="--")
            axes.plot(saved, drops, "o", ms=4, color=COLOURS[0], alpha=0.6)
            axes.set_title(data["name"], fontsize=8, loc="left")
            axes.set_xlim(0, 100)
            axes.set_ylim(min(-2.5, drops.min() - 0.3), max(2.5, drops.max() + 0.3))
            axes.set_xlabel("draws saved, %", fontsize=8)
            axes.set_ylabel("drop found, points", fontsize=8)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, splits=50, repeats=50, seed=0)
    shown.add_argument("records", nargs="*", help="records with many draws per problem")
    shown.add_argument("--picture", help="also write the splits at one point as this PNG")
    options = shown.parse_args()
    if not options.records:
        print("left out: it needs recorded files, named on the command line")
        return
    found = [measure(path, options) for path in options.records]
    if options.picture:
        draw_picture(found, options.picture)
    emit(
        options, {"records": found, "splits": options.splits}, markdown(found, options.splits) + "\n\n" + environment()
    )


if __name__ == "__main__":
    main()
