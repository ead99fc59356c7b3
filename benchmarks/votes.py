"""Every weighted vote that the recorded fields allow, replayed on real draws beside the plurality of the same draws.

The records are those of the library's own measurements: Qwen2.5-Math draws with a reward, and subjectivity ratings of
three models with token log-probabilities. For each vote: accuracy with its interval over questions, and the difference
to the plurality, paired by question, with a percentile bootstrap interval.

    python benchmarks/votes.py qwen-math-reward.jsonl.gz subjectivity-logprobs.jsonl.gz [--repeats 50] [--picture FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table

from consilience import policy, record
from consilience.draws import Draw, Problem
from consilience.montecarlo.estimators import proportion_interval
from consilience.replay import Replayed, Table, replay, tabulate
from consilience.rules import Rule, VoteRule
from consilience.text.stopping.fixed import One, SelfConsistency
from consilience.text.voting.best_of_n import BestOfN
from consilience.text.voting.logprob_weighted import LogprobWeighted
from consilience.text.voting.plurality import Plurality
from consilience.text.voting.reward_weighted import RewardWeighted
from consilience.text.voting.rpc import PerplexityConsistency
from consilience.text.voting.selective_ensembles import SelectiveEnsembles
from consilience.text.voting.self_certainty import SelfCertainty
from consilience.text.voting.soft_sc import SoftSelfConsistency
from consilience.text.voting.token_statistics import token_statistics

BY_REWARD = {
    "reward-weighted": [RewardWeighted(), RewardWeighted(weights="softmax")],
    "best-of-n": [BestOfN()],
    "self-certainty": [SelfCertainty(power=power, field="reward") for power in (0.5, 2.0)],
}
BY_LIKELIHOOD = {
    "logprob-weighted": [LogprobWeighted(), LogprobWeighted(normalised=False)],
    "soft-sc": [SoftSelfConsistency(aggregate) for aggregate in ("mean", "min", "product")],
    "best-of-n": [BestOfN("logprob")],
    "self-certainty": [SelfCertainty(power=power, field="mean_logprob") for power in (0.5, 2.0)],
    "rpc": [PerplexityConsistency(n, p) for n in (True, False) for p in (True, False)],
}
LEVELS = (0.05, 0.3)
BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Data:
    """Draws of one model (or of several together) and the votes that their fields allow."""

    name: str
    problems: list[Problem]
    votes: dict[str, list[Any]]


def rated(problem: Problem, model: str | None) -> Problem:
    """The draws of one model (None: of all): a rating above 50 of 100 (Mistral: above 5, one digit) is answer 1."""
    chosen = [draw for draw in problem.draws if model is None or draw.model == model]
    return problem.model_copy(update={"kind": "text", "draws": [with_statistics(draw) for draw in chosen]})


def with_statistics(draw: Draw) -> Draw:
    """The draw with its rating as an answer, and the numbers made of its token log-probabilities."""
    digits = draw.text.strip()
    least = 5 if "Mistral" in (draw.model or "") else 50
    answer = str(int(int(digits) > least)) if digits.isdigit() else None
    given = (draw.model_extra or {}).get("token_logprobs") or []
    text = draw.text if answer else ""
    return draw.model_copy(update={**token_statistics(given), "answer": answer, "text": text})


def read(rewards: str, likelihoods: str) -> list[Data]:
    """The data sets: the draws with rewards, and the ratings by model and pooled."""
    ratings = list(record.read(likelihoods))
    models = sorted({draw.model for problem in ratings for draw in problem.draws if draw.model})
    sets = [Data("Qwen2.5-Math, rewards", list(record.read(rewards)), BY_REWARD)]
    for model in models:
        sets.append(Data(f"Ratings, {model}", [rated(problem, model) for problem in ratings], BY_LIKELIHOOD))
    sets.append(Data("Ratings, three models pooled", [rated(problem, None) for problem in ratings], BY_LIKELIHOOD))
    return sets


def replayed(data: Table, name: str, vote: VoteRule, draws: int, options: argparse.Namespace) -> Replayed:
    """One vote over ``draws`` draws of every problem, in the orders that all votes share."""
    rule = Rule(name, SelfConsistency(n=draws), vote)
    return replay(data, rule, repeats=options.repeats, seed=options.seed)


def difference(own: np.ndarray, base: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean difference of two shares by problem [problems], and its 95 % percentile bootstrap interval."""
    gains = own - base
    resampled = np.random.default_rng(seed).integers(0, len(gains), size=(BOOTSTRAPS, len(gains)))
    low, high = np.quantile(gains[resampled].mean(1), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def measure(data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and paired difference of every vote on one data set, at all its draws and at half of them."""
    needs = {name for votes in data.votes.values() for vote in votes for name in vote.needs}
    arrays = tabulate(data.problems, needs=sorted(needs))
    full = int(arrays.counts.max())
    listed: list[tuple[str, VoteRule]] = [("plurality", Plurality())]
    listed += [(policy.canonical(vote, name), vote) for name, votes in data.votes.items() for vote in votes]
    one = replay(arrays, Rule("one", One(), Plurality()), repeats=options.repeats, seed=options.seed)
    gold = np.array([problem.answer for problem in data.problems])
    rows: list[dict[str, Any]] = []
    bases: dict[int, np.ndarray] = {}
    for name, vote in listed:
        row: dict[str, Any] = {"vote": name}
        for draws in (full, full // 2):
            shares = replayed(arrays, name, vote, draws, options).accuracy_per_problem()
            bases.setdefault(draws, shares)
            row[str(draws)] = {
                "accuracy": float(shares.mean()),
                "interval": proportion_interval(shares),
                "gain": difference(shares, bases[draws], options.seed),
                "is_base": not rows,
                "balanced": float(np.mean([shares[gold == answer].mean() for answer in np.unique(gold)])),
            }
        rows.append(row)
        print(f"{data.name}: {name}", file=sys.stderr)
    return {
        "name": data.name,
        "problems": len(data.problems),
        "draws": full,
        "single": float(one.accuracy_per_problem().mean()),
        "constant": float(max((gold == answer).mean() for answer in np.unique(gold))),
        "any": float((arrays.right & (arrays.labels >= 0)).any(1).mean()),
        "votes": rows,
        "abstaining": [abstaining(arrays, alpha, full, options) for alpha in LEVELS],
    }


def abstaining(arrays: Table, alpha: float, draws: int, options: argparse.Namespace) -> dict[str, float]:
    """How often the abstaining vote answers, and how often it is then right."""
    found = replayed(arrays, "selective", SelectiveEnsembles(alpha), draws, options)
    answered, right = float(found.answered.mean()), float(found.right.mean())
    return {"alpha": alpha, "answered": answered, "right_when_answered": right / answered if answered else float("nan")}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def between(low: float, high: float, sign: str = "") -> str:
    return f"{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """One table a data set, and one for the abstaining votes."""
    rows = [
        [data["name"], f"{one['alpha']:g}", percent(one["answered"]), percent(one["right_when_answered"])]
        for data in found
        for one in data["abstaining"]
    ]
    abstained = table(["`selective-ensembles`, all draws", "alpha", "answers %", "right when it answers %"], rows)
    return "\n\n".join([*(block(data) for data in found), abstained])


def block(data: dict[str, Any]) -> str:
    """The table of one data set under a line of its reference figures."""
    full, half = str(data["draws"]), str(data["draws"] // 2)
    ratings = data["constant"] > 0.5  # two answers: accuracy alone would reward a vote that always gives the commoner
    head = ["vote", f"{full} draws %", "95 % interval", "over plurality", "95 % interval"]
    head += ["balanced %"] * ratings + [f"{half} draws %", "over plurality", "95 % interval"]
    rows = []
    for row in data["votes"]:
        many, few = row[full], row[half]
        cells = [f"`{row['vote']}`", percent(many["accuracy"]), between(*many["interval"]), *gained(many)]
        cells += [percent(many["balanced"])] * ratings
        rows.append([*cells, percent(few["accuracy"]), *gained(few)])
    references = [f"{data['problems']} questions", f"a single draw {percent(data['single'])} %"]
    references += [f"any of {full} right {percent(data['any'])} %"]
    references += [f"always the commoner answer {percent(data['constant'])} %"] * ratings
    return f"**{data['name']}**: {', '.join(references)}.\n\n{table(head, rows)}"


def gained(measured: dict[str, Any]) -> list[str]:
    """The difference to the plurality and its interval, in points; blank for the plurality itself."""
    gain, low, high = measured["gain"]
    if measured["is_base"]:
        return ["", ""]
    return [f"{100 * gain:+.1f}", between(low, high, "+")]


def draw_picture(found: Sequence[dict[str, Any]], path: str) -> None:
    """Differences to the plurality at all draws, with their intervals: rewards above, ratings below."""
    heights = [len(data["votes"]) for data in found[:2]]
    with picture(path, 8.0, 1.2 + 0.34 * sum(heights)) as figure:
        upper, lower = figure.subplots(2, 1, height_ratios=heights, sharex=True)
        draw_panel(upper, found[:1])
        draw_panel(lower, found[1:])
        lower.set_xlabel("points over plurality, all draws; 95 % intervals over questions")


def draw_panel(axes: Any, found: Sequence[dict[str, Any]]) -> None:
    """One line a vote, one mark a data set."""
    names = [row["vote"] for row in found[0]["votes"][1:]]
    for place, data in enumerate(found):
        gains = 100 * np.array([row[str(data["draws"])]["gain"] for row in data["votes"][1:]])
        height = np.arange(len(names)) + 0.17 * (place - (len(found) - 1) / 2)
        sides = np.abs(gains[:, 1:].T - gains[:, 0])
        axes.errorbar(gains[:, 0], height, xerr=sides, fmt="o", ms=3, lw=1, color=COLOURS[place], label=data["name"])
    axes.axvline(0, color="#5D6B7A", lw=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, repeats=50, seed=0)
    shown.add_argument("rewards", nargs="?", help="qwen-math-reward.jsonl.gz")
    shown.add_argument("likelihoods", nargs="?", help="subjectivity-logprobs.jsonl.gz")
    shown.add_argument("--picture", help="also write the differences as this PNG")
    options = shown.parse_args()
    if options.likelihoods is None:
        print("left out: it needs the two recorded files, named on the command line")
        return
    found = [measure(data, options) for data in read(options.rewards, options.likelihoods)]
    if options.picture:
        draw_picture(found, str(Path(options.picture)))
    emit(options, {"data": found}, markdown(found) + "\n\n" + environment())


if __name__ == "__main__":
    main()
