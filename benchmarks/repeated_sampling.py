"""Laws of repeated sampling on recorded draws: coverage and its power law, the vote, and what a verifier leaves.

For each record: pass@k; the exponentiated power law and the Beta law of difficulty, fitted to the first n / 4 draws and
held against what was measured at n; majority@k beside it and the gap between the two; the risk-coverage curve of the
vote share. Where draws have a reward: the best of k by it, and it as a verifier at a threshold, with the ceiling of
drawing until one passes and the best number of draws under a cost of a wrong answer.

    python benchmarks/repeated_sampling.py RECORD.jsonl.gz ... [--picture FILE]
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table

from consilience import record
from consilience.draws import Problem
from consilience.montecarlo.coverage import Curve, fit_beta_difficulty, fit_power_law, majority_at_k, pass_at_k
from consilience.montecarlo.estimators import proportion_interval
from consilience.montecarlo.resampling import Interval, difference_interval, paired_permutation_test, sign_test
from consilience.montecarlo.selective import RiskCoverage, risk_coverage
from consilience.montecarlo.verification import Resampling, best_of_k, selection_gap, verifier_rates
from consilience.replay import Table, tabulate
from consilience.views import answer_of

LEVEL = 0.95
ENDS_PROGRAM = re.compile(r"^(?:def|class|#|if|print|import|from|@)", re.MULTILINE)
COSTS = (0.0, 1.0, 3.0, 10.0, 30.0)
QUANTILES = (0.1, 0.3, 0.5)


def steps(draws: int) -> list[int]:
    """Numbers of draws to look at, about evenly in their logarithm, with n / 4 and n among them."""
    fixed = [1, 2, 3, 5, 8, 12, 18, 25, 40, 60, 100, 150, 250, 400, 650, 1000]
    return sorted({k for k in fixed if k < draws} | {max(1, draws // 4), draws})


def exact_answers(problem: Problem) -> Problem:
    """A problem whose answers are programs or expressions: two draws agree where these are the same text, no less.

    The kind ``text`` looks at letters and digits alone, which would take (1 + 2) * 3 for 1 + 2 * 3. A program is cut
    as it was run. Problems with a gold answer are left as they are.
    """
    if problem.answer is not None:
        return problem
    if problem.kind == "code":
        answers = [ENDS_PROGRAM.split(draw.text, maxsplit=1)[0].rstrip() for draw in problem.draws]
    else:
        answers = ["".join((answer_of(draw, problem.kind) or "").split()) for draw in problem.draws]
    names = [hashlib.sha256(answer.encode()).hexdigest() if answer else None for answer in answers]
    draws = [
        draw.model_copy(update={"answer": name, "text": draw.text if name else ""})
        for draw, name in zip(problem.draws, names, strict=True)
    ]
    return problem.model_copy(update={"kind": "text", "draws": draws})


def by_class(data: Table) -> np.ndarray:
    """Which classes of answers are right, bool [problems, classes]: by the first draw that gave it, as in a replay."""
    truth = np.zeros((len(data.labels), int(data.labels.max()) + 1), bool)
    for problem, (labels, right) in enumerate(zip(data.labels, data.right, strict=True)):
        for label in np.unique(labels[labels >= 0]):
            truth[problem, label] = right[(labels == label).argmax()]
    return truth


def measure(path: str, options: Any) -> dict[str, Any]:
    """Every number of one record; its draws must be as many for each problem."""
    problems = [exact_answers(problem) for problem in record.read(path)]
    rewarded = all(draw.reward is not None for problem in problems for draw in problem.draws)
    data = tabulate(problems, needs=["reward"] if rewarded else [])
    draws = int(data.counts.min())
    right, labels = data.right[:, :draws], data.labels[:, :draws]
    generator = np.random.default_rng(options.seed)
    ks = steps(draws)
    cover = pass_at_k(right.sum(axis=1), draws, ks)
    vote = majority_at_k(labels, by_class(data), ks)
    found: dict[str, Any] = {
        "name": Path(path).name.removesuffix(".jsonl.gz"),
        "problems": len(problems),
        "draws": draws,
        "curve": curve_rows(cover, vote, options, generator),
        "law": law(cover, right, generator, options.resamples),
        "whole": whole_curve(cover, generator),
        "share": confidence_of_vote(labels, by_class(data)),
    }
    if rewarded:
        found["verifier"] = verifier(data.fields["reward"][:, :draws], right, cover, vote, ks, options)
    return found


def curve_rows(cover: Curve, vote: Curve, options: Any, generator: np.random.Generator) -> list[dict[str, Any]]:
    """pass@k, majority@k and their difference with its interval, by k."""
    low, high = cover.band(LEVEL)
    below, above = vote.band(LEVEL)
    gap = selection_gap(cover, vote, generator, resamples=options.resamples, level=LEVEL)
    return [
        {
            "k": int(k),
            "pass": [float(cover.mean[i]), float(low[i]), float(high[i])],
            "majority": [float(vote.mean[i]), float(below[i]), float(above[i])],
            "gap": triple(gap.gap, i),
        }
        for i, k in enumerate(cover.ks)
    ]


def triple(interval: Interval, place: int) -> list[float]:
    return [float(values[place]) for values in (interval.estimate, interval.low, interval.high)]


def law(cover: Curve, right: np.ndarray, generator: np.random.Generator, resamples: int) -> dict[str, Any]:
    """Both laws fitted to the first n / 4 draws of each problem alone, and their forecast at n."""
    draws = right.shape[1]
    quarter = max(2, draws // 4)
    first = right[:, :quarter]
    early = pass_at_k(first.sum(axis=1), quarter, [k for k in steps(draws) if k <= quarter])
    fit = fit_power_law(early, generator, resamples)
    low, high = fit.interval([draws], LEVEL)
    ends = fit.parameter_interval(LEVEL)
    beta = fit_beta_difficulty(first.sum(axis=1), quarter)
    truth = float(cover.mean[-1])
    return {
        "fitted to": [int(k) for k in early.ks],
        "a": [fit.a, float(ends[0][0]), float(ends[1][0])],
        "b": [fit.b, float(ends[0][1]), float(ends[1][1])],
        "fit error": float(np.abs(fit.coverage(early.ks) - early.mean).max()),
        "forecast": [float(fit.coverage([draws])[0]), float(low[0]), float(high[0])],
        "beta": [beta.alpha, beta.beta],
        "beta forecast": float(beta.coverage([draws])[0]),
        "measured": truth,
        "never": float((right.sum(axis=1) == 0).mean()),
    }


def whole_curve(cover: Curve, generator: np.random.Generator) -> dict[str, float]:
    """How far two laws, each fitted to all k up to n, are off at most: the power law, and a line in log k."""
    fit = fit_power_law(cover, generator, resamples=1)
    line = np.polyval(np.polyfit(np.log(cover.ks), cover.mean, 1), np.log(cover.ks))
    power = float(np.abs(fit.coverage(cover.ks) - cover.mean).max())
    return {"power law": power, "line": float(np.abs(line - cover.mean).max()), "a": fit.a, "b": fit.b}


def confidence_of_vote(labels: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """The leader's share of the answers as a confidence, on all draws; ties of answers share the verdict."""
    counts = np.array([np.bincount(row[row >= 0], minlength=truth.shape[1]) for row in labels])
    most = counts.max(axis=1)
    leading = (counts == most[:, None]) & (most > 0)[:, None]
    right = (leading & truth).sum(axis=1) / leading.sum(axis=1).clip(1)
    curve = risk_coverage(most / counts.sum(axis=1).clip(1), right)
    return {"aurc": curve.aurc(), "excess": curve.excess_aurc(), **points(curve)}


def points(curve: RiskCoverage) -> dict[str, Any]:
    """Selective accuracy at some coverages, and the curve itself."""
    return {
        "accuracy": {str(share): float(curve.accuracy_at(share)) for share in (1.0, 0.8, 0.5, 0.2)},
        "curve": [curve.coverage.tolist(), (1 - curve.risk).tolist()],
    }


def verifier(
    reward: np.ndarray, right: np.ndarray, cover: Curve, vote: Curve, ks: Sequence[int], options: Any
) -> dict[str, Any]:
    """The reward as a score (best of k against coverage and the vote) and as a verifier at thresholds."""
    best = best_of_k(reward, right, ks)
    gap = selection_gap(cover, best, np.random.default_rng(options.seed), resamples=options.resamples, level=LEVEL)
    rows = [
        {
            "k": int(k),
            "best": float(best.mean[i]),
            "ci": proportion_interval(best.per_problem[:, i]),
            "gap": triple(gap.gap, i),
        }
        for i, k in enumerate(ks)
    ]
    one, other = best.per_problem[:, -1], vote.per_problem[:, -1]
    paired = {
        "difference": float((one - other).mean()),
        "interval": difference_interval(one, other),
        "permutation": paired_permutation_test(one, other, np.random.default_rng(options.seed)).p_value,
        "sign": sign_test(one, other).p_value,
    }
    thresholds = []
    for quantile in QUANTILES:
        at = float(np.quantile(reward, quantile))
        passes = reward >= at
        rates, limit = verifier_rates(right, passes), Resampling.from_draws(right, passes)
        answered = float(limit.reach(np.inf).mean())
        thresholds.append(
            {
                "quantile": quantile,
                "threshold": at,
                "pooled": rates.pooled,
                "answered": answered,
                "ceiling": float(limit.accuracy(np.inf)),
                "precision": float(limit.accuracy(np.inf)) / answered,
                "best": {str(cost): [limit.best(cost).draws, limit.best(cost).utility] for cost in COSTS},
            }
        )
    return {"best of k": rows, "paired": paired, "thresholds": thresholds}


def percent(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:.1f}"  # no minus sign before 0.0


def spread(values: Sequence[float]) -> list[str]:
    return [percent(values[0]), f"{percent(values[1])} to {percent(values[2])}"]


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The laws of all records in one table, then the curves of each, then rewards."""
    parts = [laws_table(found), whole_table(found), shares_table(found)]
    for data in found:
        head = ["k", "pass@k %", "95 % interval", "majority@k %", "95 % interval", "gap", "95 % interval"]
        rows = [
            [one["k"], *spread(one["pass"]), *spread(one["majority"]), *spread(one["gap"])] for one in data["curve"]
        ]
        parts.append(f"**{data['name']}**, {data['problems']} problems, {data['draws']} draws\n\n{table(head, rows)}")
        if "verifier" in data:
            parts.append(verifier_tables(data["verifier"]))
    return "\n\n".join(parts)


def laws_table(found: Sequence[dict[str, Any]]) -> str:
    head = ["record", "fitted to k", "a", "b", "95 % interval", "off by at most", "at n forecast %", "95 % interval"]
    head += ["Beta(alpha, beta)", "Beta forecast %", "measured %", "never right %"]
    rows = []
    for data in found:
        fit = data["law"]
        rows.append(
            [
                data["name"],
                f"{fit['fitted to'][0]} to {fit['fitted to'][-1]}",
                f"{fit['a'][0]:.2f}",
                f"{fit['b'][0]:.2f}",
                f"{fit['b'][1]:.2f} to {fit['b'][2]:.2f}",
                percent(fit["fit error"]),
                *spread(fit["forecast"]),
                f"{fit['beta'][0]:.2f}, {fit['beta'][1]:.2f}",
                percent(fit["beta forecast"]),
                percent(fit["measured"]),
                percent(fit["never"]),
            ]
        )
    return table(head, rows)


def whole_table(found: Sequence[dict[str, Any]]) -> str:
    head = [
        "record, fitted to all k",
        "a",
        "b",
        "power law off by at most, points",
        "line in log k off by at most, points",
    ]
    rows = [
        [
            data["name"],
            f"{data['whole']['a']:.2f}",
            f"{data['whole']['b']:.2f}",
            percent(data["whole"]["power law"]),
            percent(data["whole"]["line"]),
        ]
        for data in found
    ]
    return table(head, rows)


def shares_table(found: Sequence[dict[str, Any]]) -> str:
    head = ["vote share as a confidence", "all %", "surest 80 %", "surest 50 %", "surest 20 %", "AURC", "excess"]
    rows = [
        [
            data["name"],
            *(percent(value) for value in data["share"]["accuracy"].values()),
            f"{data['share']['aurc']:.3f}",
            f"{data['share']['excess']:.3f}",
        ]
        for data in found
    ]
    return table(head, rows)


def verifier_tables(found: dict[str, Any]) -> str:
    """Best of k by reward; then the thresholds."""
    rows = [[one["k"], *spread([one["best"], *one["ci"]]), *spread(one["gap"])] for one in found["best of k"]]
    first = table(["k", "best of k by reward %", "95 % interval", "pass@k minus it", "95 % interval"], rows)
    paired = found["paired"]
    low, high = paired["interval"]
    line = (
        f"Best of all against the vote of all: {100 * paired['difference']:+.1f} points, 95 % interval "
        f"{100 * low:+.1f} to {100 * high:+.1f}; permutation test p = {paired['permutation']:.2f}, "
        f"sign test p = {paired['sign']:.2f}."
    )
    head = ["draws passed %", "true pass %", "false pass %", "answered %", "ceiling %", "right when answered %"]
    head += [f"best K at cost {cost:g}" for cost in COSTS]
    rows = [
        [
            f"{100 * (1 - one['quantile']):.0f}",
            *(percent(value) for value in one["pooled"][1:]),
            *(percent(one[name]) for name in ("answered", "ceiling", "precision")),
            *("inf" if np.isinf(k) else f"{k:.0f}" for k, _ in one["best"].values()),
        ]
        for one in found["thresholds"]
    ]
    return "\n\n".join([first, line, table(head, rows)])


def draw_picture(found: Sequence[dict[str, Any]], path: str) -> None:
    """Coverage and vote against k, with the power law beyond the ks it was fitted to."""
    with picture(path, 8.0, 2.6 * ((len(found) + 1) // 2)) as figure:
        panels = np.ravel(figure.subplots((len(found) + 1) // 2, 2, squeeze=False))
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        for axes, data in zip(panels, found, strict=False):
            ks = np.array([one["k"] for one in data["curve"]])
            for colour, name, label in ((COLOURS[0], "pass", "pass@k"), (COLOURS[1], "majority", "majority@k")):
                values = 100 * np.array([one[name] for one in data["curve"]])
                axes.fill_between(ks, values[:, 1], values[:, 2], color=colour, alpha=0.12, lw=0)
                axes.plot(ks, values[:, 0], "o-", ms=3, lw=1, color=colour, label=label)
            if "verifier" in data:
                best = [100 * one["best"] for one in data["verifier"]["best of k"]]
                axes.plot(ks, best, "o-", ms=3, lw=1, color=COLOURS[2], label="best of k by reward")
            a, b = data["law"]["a"][0], data["law"]["b"][0]
            smooth = np.geomspace(1, 4 * ks[-1], 200)
            axes.plot(smooth, 100 * np.exp(a * smooth**b), "--", lw=1, color=COLOURS[5], label="power law")
            axes.axvline(data["law"]["fitted to"][-1], color=COLOURS[5], lw=0.6, ls=":")
            axes.set_xscale("log")
            axes.set_title(data["name"], fontsize=9)
        fullest = max(panels[: len(found)], key=lambda axes: len(axes.get_lines()))
        fullest.legend(fontsize=7, frameon=False, loc="lower right")
        figure.supxlabel("draws k; dotted: the fit ends here", fontsize=9)
        figure.supylabel("problems, %", fontsize=9)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, resamples=5000, seed=0)
    shown.add_argument("records", nargs="*", help="recorded draws, as many for each problem of a record")
    shown.add_argument("--picture", help="also write the curves as this PNG")
    options = shown.parse_args()
    if not options.records:
        print("left out: it needs recorded draws, named on the command line")
        return
    found = [measure(path, options) for path in options.records]
    if options.picture:
        draw_picture(found, options.picture)
    emit(options, {"records": found}, markdown(found) + "\n\n" + environment())


if __name__ == "__main__":
    main()
