"""Switching and cascading between models, and a budget shared over questions, on recorded draws and simulated ones.

Every policy runs over the same random orders of the same draws, by its own `stopping_index`, so each difference is
paired by question; its interval is a percentile bootstrap over questions. The records are named on the command line,
each part that lacks its record is left out:

    --date LLAMA GPT35 GPT4   date_cot1.json of llama2_13B_result, GPT3_result and GPT4_result in the public repository
                              MurongYue/LLM_MoT_cascade: 369 date questions, 20, 20 and 3 draws
    --ratings FILE            subjectivity-logprobs.jsonl.gz: 100 sentences, three models, 10 draws each
    --models FILE             zeroeval-gsm8k-models.jsonl.gz: 1319 questions, 42 models, one draw each
    --letters FILE            esc-last-letters-a.jsonl.gz: 250 questions, 40 draws of one model

    python benchmarks/routing.py [--date ...] [--letters FILE] [--repeats 20] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table

from consilience import record
from consilience.rules import Rule, View
from consilience.text.answers import AnswerClasses, equal_to_gold
from consilience.text.routing.arms import votes_for
from consilience.text.routing.cascade import Cascade
from consilience.text.routing.dsc import DifficultyAdaptive
from consilience.text.routing.knowledge_gradient import KnowledgeGradient
from consilience.text.routing.last_arm import LastArm
from consilience.text.routing.modelswitch import ModelSwitch
from consilience.text.routing.thresholds import choose_thresholds, outcome
from consilience.text.stopping.asc import AdaptiveConsistency
from consilience.text.stopping.esc import EarlyStopping
from consilience.text.stopping.fixed import SelfConsistency
from consilience.text.voting.entropy_weighted import EntropyWeighted
from consilience.text.voting.plurality import Plurality
from consilience.views import answer_of

BOOTSTRAPS = 10_000
MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec"
TIERS = {
    "five of at most 9 billion parameters": [
        "Meta-Llama-3-8B-Instruct", "Meta-Llama-3.1-8B-Instruct", "Qwen2-7B-Instruct", "Yi-1.5-9B-Chat",
        "gemma-2-9b-it",
    ],
    "five of 27 to 72 billion": [
        "Meta-Llama-3-70B-Instruct", "Meta-Llama-3.1-70B-Instruct", "Qwen2-72B-Instruct", "Yi-1.5-34B-Chat",
        "gemma-2-27b-it@together",
    ],
    "five of the largest": [
        "Llama-3.1-405B-Instruct-Turbo", "Mistral-Large-2", "claude-3-5-sonnet-20240620", "gpt-4o-2024-08-06",
        "gemini-1.5-pro",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Draws of one or more models on the same questions.

    labels int32 [problems, arms, draws], -1 = no answer or no draw; right bool likewise; have [arms], the draws of
    each arm; prices [arms], what a draw costs; difficulty float [problems], where a rule reads one.
    """

    name: str
    labels: np.ndarray
    right: np.ndarray
    have: tuple[int, ...]
    prices: tuple[float, ...] = (1.0,)

    def shuffled(self, seed: int, repeat: int, have: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The draws of each arm in a random order of their own, of ``have`` draws each."""
        keys = np.random.default_rng([seed, repeat]).random(self.labels.shape)
        keys += np.arange(self.labels.shape[2]) >= np.array(have)[:, None]
        order = keys.argsort(2)
        return np.take_along_axis(self.labels, order, 2), np.take_along_axis(self.right, order, 2)


# ------------------------------------------------------------------------------------------------------- records


def labelled(answers: Sequence[Sequence[Sequence[str | None]]], gold: Sequence[str], kind: str) -> tuple[Any, Any]:
    """Labels and right or wrong, [problems, arms, draws], from the answers of each problem, arm and draw."""
    width = max(len(arm) for arms in answers for arm in arms)
    labels = np.full((len(answers), len(answers[0]), width), -1, np.int32)
    right = np.zeros(labels.shape, bool)
    for number, (arms, truth) in enumerate(zip(answers, gold, strict=True)):
        classes = AnswerClasses(kind)
        for arm, given in enumerate(arms):
            labels[number, arm, : len(given)] = [classes.add(answer) for answer in given]
        known = [bool(equal_to_gold(name, truth, kind)) for name in classes.representatives]
        right[number] = (labels[number] >= 0) & np.array([*known, False])[labels[number]]
    return labels, right


def dates(paths: Sequence[str], prices: Sequence[float]) -> Data:
    """The date questions: the answer is the first date after the reply's last ``A:``."""
    content = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    gold = {problem["question"]: problem["answer"] for problem in content[1]}
    replies = [{problem["question"]: problem["generated"] for problem in one} for one in content]
    answers = [[[date_in(text) for text in by[question]] for by in replies] for question in gold]
    have = tuple(len(next(iter(by.values()))) for by in replies)
    labels, right = labelled(answers, list(gold.values()), "text")
    return Data("Date questions", labels, right, have, tuple(prices))


def date_in(text: str) -> str | None:
    """The first date in the part after the last ``A:``, as MM/DD/YYYY; also ``4/2/2021`` and ``April 2, 2021``."""
    end = text.rpartition("A:")[2]
    found = re.search(r"(\d{1,2})/(\d{1,2})/(\d{4})|([A-Z][a-z]{2})[a-z]* (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})", end)
    if not found:
        return None
    month, day, year = found.group(1, 2, 3) if found[1] else (MONTHS.find(found[4]) // 3 + 1, found[5], found[6])
    return f"{int(month):02}/{int(day):02}/{year}"


def ratings(path: str) -> Data:
    """The ratings as in benchmarks/votes.py: above 50 of 100 (Mistral: above 5, one digit) is answer 1."""
    problems = list(record.read(path))
    models = ["Mistral-7B-Instruct-v0.3-GPTQ-4bit", "Meta-Llama-3.1-8B-Instruct-GPTQ-INT4", "gpt-4o-mini"]

    def answer(text: str, model: str) -> str | None:
        digits = text.strip()
        return str(int(int(digits) > (5 if "Mistral" in model else 50))) if digits.isdigit() else None

    answers = [
        [[answer(draw.text, model) for draw in problem.draws if draw.model == model] for model in models]
        for problem in problems
    ]
    labels, right = labelled(answers, [str(problem.answer) for problem in problems], "text")
    return Data("Ratings", labels, right, (10, 10, 10), (1.0, 1.0, 1.0))


def tiers(path: str) -> Data:
    """The 42 models: five of a size are taken for five draws of one."""
    problems, gold, answers = list(record.read(path)), [], []
    for problem in problems:
        by_model = {draw.model: draw for draw in problem.draws}
        if all(model in by_model for models in TIERS.values() for model in models):
            gold.append(str(problem.answer))
            answers.append([[answer_of(by_model[m], "number") for m in models] for models in TIERS.values()])
    labels, right = labelled(answers, gold, "number")
    return Data("GSM8K, tiers of five models", labels, right, (5, 5, 5), (1.0, 9.0, 50.0))


def letters(path: str) -> Data:
    """The last-letters questions."""
    problems = list(record.read(path))
    answers = [[[answer_of(draw, problem.kind) for draw in problem.draws]] for problem in problems]
    labels, right = labelled(answers, [str(problem.answer) for problem in problems], problems[0].kind)
    return Data("Last letters", labels, right, (40,))


def simulated(name: str, count: int, hard: float, seed: int) -> Data:
    """Questions whose share of right draws is Beta(2, hard); wrong draws are spread over three to six answers."""
    generator = np.random.default_rng(seed)
    share = generator.beta(2.0, hard, size=count)
    labels = np.where(generator.random((count, 40)) < share[:, None], 0, 1).astype(np.int32)
    wrong = labels == 1
    kinds = np.broadcast_to(generator.integers(3, 7, size=(count, 1)), labels.shape)
    labels[wrong] = 1 + np.floor(generator.random(int(wrong.sum())) ** 2 * kinds[wrong]).astype(np.int32)
    return Data(name, labels[:, None], (labels == 0)[:, None], (40,))


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Measured:
    """One policy on one data set, means over orders: right, cost, waves [problems]; draws [problems, arms]."""

    name: str
    right: np.ndarray
    cost: np.ndarray
    draws: np.ndarray
    waves: np.ndarray
    agrees: np.ndarray


def drive(rule: Rule, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The draws a rule judges, [problems, arms], and in how many waves (prompts sent), [problems]."""
    drawn, waves = np.zeros_like(view.drawn), np.zeros(len(view.drawn))
    rows = np.arange(len(drawn))
    while rows.size:
        part = {name: values[rows] for name, values in view.traits.items()}
        step = np.minimum(rule.want(View(view.answers[rows], drawn[rows], {}, part)), (view.drawn - drawn)[rows])
        if not step.any():
            break
        drawn[rows] += step.astype(np.int32)
        waves[rows] += (step > 0).sum(1)
        rows = rows if rule.coupled else rows[step.any(1)]
    return drawn, waves


def measure(
    data: Data,
    name: str,
    rule: Rule,
    options: argparse.Namespace,
    arms: Sequence[int] | None = None,
    difficulty: Callable[[int], np.ndarray] | None = None,
) -> Measured:
    """A rule over ``options.repeats`` orders; ``arms`` are the data's arms it draws from, in its order."""
    chosen = list(arms if arms is not None else range(rule.arms))
    have, prices = [data.have[arm] for arm in chosen], np.array([data.prices[arm] for arm in chosen])
    cut = Data(data.name, data.labels[:, chosen], data.right[:, chosen], tuple(have))
    sums: list[list[np.ndarray]] = []
    for repeat in range(options.repeats):
        labels, right = cut.shuffled(options.seed, repeat, have)
        available = np.tile(np.array(have, np.int32), (len(labels), 1))
        traits = {"difficulty": difficulty(repeat)} if difficulty else {}
        drawn, waves = drive(rule, View(labels, available, {}, traits))
        won, _ = rule.decide(View(labels, drawn))
        full, _ = Plurality().decide(View(labels, available))
        hit = ((labels == won[:, None, None]) & right).any((1, 2)) & (won >= 0)
        sums.append([hit, drawn @ prices, drawn, waves, won == full])
    means = [np.mean([one[place] for one in sums], axis=0) for place in range(5)]
    print(f"{data.name}: {name}", file=sys.stderr)
    return Measured(name, *means)


def gain(own: np.ndarray, base: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean difference of two figures by problem [problems], and its 95 % percentile bootstrap interval."""
    differences = own - base
    draws = np.random.default_rng(seed).integers(0, len(differences), size=(BOOTSTRAPS, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)


def report(data: Data, rows: Sequence[Measured], base: Measured, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a table."""
    return {
        "name": data.name,
        "problems": len(data.labels),
        "base": base.name,
        "rows": [
            {
                "policy": row.name,
                "accuracy": float(row.right.mean()),
                "gain": gain(row.right, base.right, options.seed),
                "draws": row.draws.mean(0).tolist(),
                "cost": float(row.cost.mean()),
                "waves": float(row.waves.mean()),
                "agrees": float(row.agrees.mean()),
            }
            for row in rows
        ],
    }


def rule_of(stop: Any, vote: Any = None) -> Rule:
    return Rule("", stop, vote or Plurality())


# ------------------------------------------------------------------------------------------------------- parts


def part_models(data: Data, names: Sequence[str], draws: int, options: argparse.Namespace) -> dict[str, Any]:
    """Each model alone, all pooled, switching and cascading, three models with ``draws`` draws of each."""

    def one(name: str, stop: Any, vote: Any = None, arms: Sequence[int] | None = None) -> Measured:
        return measure(data, name, rule_of(stop, vote), options, arms)

    last = len(data.have) - 1
    rows = [one(f"{names[arm]}, {draws} draws", SelfConsistency(n=draws), arms=[arm]) for arm in range(last + 1)]
    switch = ModelSwitch(models=last + 1, draws=draws)
    pair = ModelSwitch(models=2, draws=draws)
    prior = accuracies(data)
    rows.append(one(f"{names[last]}, 1 draw", SelfConsistency(n=1), arms=[last]))
    rows += [
        one("all pooled", Everything(last + 1, draws)),
        one("`modelswitch`, all", switch),
        one("`modelswitch`, all, `entropy-weighted`", switch, EntropyWeighted()),
        one("the same, prior = accuracy", switch, EntropyWeighted(prior=",".join(f"{share:.2f}" for share in prior))),
        one(f"`modelswitch`, {names[last - 1]} then {names[last]}", pair, arms=[last - 1, last]),
        one("the same, `entropy-weighted`", pair, EntropyWeighted(), arms=[last - 1, last]),
    ]
    different = {votes_for(float(text), draws): text for text in ("0.6", "0.8", "1.0")}
    for threshold in different.values():
        whole, two = (Cascade(count, str(draws), threshold) for count in (last + 1, 2))
        rows.append(one(f"`cascade`, all, {threshold}", whole, LastArm()))
        pair_name = f"`cascade`, {names[last - 1]} then {names[last]}, {threshold}"
        rows.append(one(pair_name, two, LastArm(), [last - 1, last]))
    for threshold in ("0.6", "0.8", "1.0"):
        few = Cascade(2, "5,1", threshold)
        rows.append(one(f"the same, 5 draws then 1, {threshold}", few, LastArm(), [last - 1, last]))
    return report(data, rows, rows[last], options) | {"pairs": compared(rows, names, options)}


def compared(rows: Sequence[Measured], names: Sequence[str], options: argparse.Namespace) -> list[list[Any]]:
    """Policies against each other: the two names, the paired difference with its interval, the ratio of costs."""
    by = {row.name: row for row in rows}
    before, last = names[-2:]
    two, few = f"`cascade`, {before} then {last}, 1.0", "the same, 5 draws then 1, 1.0"
    pairs = [
        ("`cascade`, all, 1.0", "`modelswitch`, all"),
        (two, f"`modelswitch`, {before} then {last}"),
        (few, f"`modelswitch`, {before} then {last}"),
        (few, f"{last}, 1 draw"),
        ("`modelswitch`, all, `entropy-weighted`", "`modelswitch`, all"),
    ]
    return [
        [own, other, gain(by[own].right, by[other].right, options.seed), by[own].cost.mean() / by[other].cost.mean()]
        for own, other in pairs
    ]


@dataclass(frozen=True)
class Everything:
    """All draws of all models, whatever they say."""

    arms: int
    draws: int
    needs: tuple[str, ...] = ()

    @property
    def max(self) -> int:
        return self.arms * self.draws

    def want(self, view: View) -> np.ndarray:
        return (self.draws - view.drawn).clip(min=0).astype(np.int32)


def accuracies(data: Data) -> list[float]:
    """The share of right draws of each arm (of the record itself: the best prior there can be)."""
    return [float(data.right[:, arm, : data.have[arm]].mean()) for arm in range(len(data.have))]


def cascade_arrays(data: Data, draws: Sequence[int], arms: Sequence[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The agreement within ``draws`` draws of each arm, and whether its leading answer is right; [problems, arms]."""
    labels, right = data.shuffled(seed, 0, data.have)
    share = np.zeros((len(labels), len(arms)))
    correct = np.zeros(share.shape)
    for place, (arm, count) in enumerate(zip(arms, draws, strict=True)):
        own = labels[:, arm, :count]
        won, _ = Plurality().decide(View.single(own))
        share[:, place] = (own == won[:, None]).mean(1) * (won >= 0)
        correct[:, place] = ((own == won[:, None]) & right[:, arm, :count]).any(1)
    return share, correct


def chosen_thresholds(
    data: Data, draws: Sequence[int], arms: Sequence[int], part: float, options: argparse.Namespace
) -> list[str]:
    """Thresholds chosen on a random half of the questions for ``part`` of the last model's cost, used on the other.

    Means over 100 splits; the interval is that of the difference to the last model over splits.
    """
    share, correct = cascade_arrays(data, draws, arms, options.seed)
    cost = np.array([data.prices[arm] * count for arm, count in zip(arms, draws, strict=True)])
    figures = []
    for split in range(100):
        order = np.random.default_rng([options.seed, split]).permutation(len(share))
        train, test = order[: len(order) // 2], order[len(order) // 2 :]
        best = choose_thresholds(share[train], correct[train], cost, budget=part * cost[-1])
        spent_each = np.tile(cost, (len(test), 1))
        got, spent = outcome(share[test], correct[test], spent_each, best.thresholds)
        figures.append((best.accuracy, got, spent / cost[-1], correct[test, -1].mean()))
    mean = np.mean(figures, axis=0)
    low, high = np.quantile([got - alone for _, got, _, alone in figures], [0.025, 0.975])
    return [data.name, percent(part), *(percent(value) for value in mean), between(low, high)]


def part_budget(data: Data, means: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """For each mean: equal shares, the shared budget, and the best of 60 settings of `asc` at most 2 % dearer."""
    tuned = [
        (f"`asc:threshold={threshold},max={most}`", rule_of(AdaptiveConsistency(threshold, most)))
        for threshold in (0.6, 0.76, 0.85, 0.88, 0.92, 0.94, 0.97, 0.985, 0.995, 0.999)
        for most in (4, 6, 10, 16, 24, 40)
    ]
    measured = [measure(data, name, rule, options) for name, rule in tuned]
    blocks = []
    for mean in means:
        equal = measure(data, f"`sc:n={mean}`", rule_of(SelfConsistency(n=mean)), options)
        shared = measure(data, f"`knowledge-gradient:mean={mean}`", rule_of(KnowledgeGradient(mean=mean)), options)
        affordable = [one for one in measured if one.cost.mean() <= 1.02 * mean]
        near = max(affordable, key=lambda one: one.right.mean())  # with hindsight, which no user has
        blocks.append(report(data, [equal, near, shared], equal, options))
        blocks[-1]["over_asc"] = gain(shared.right, near.right, options.seed)
    return {"name": data.name, "problems": len(data.labels), "means": list(means), "blocks": blocks}


def part_difficulty(data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """`dsc` under ranks of falling quality, beside the rules that know no difficulty."""
    agreement = np.sort(np.stack([(data.labels[:, 0] == label).mean(1) for label in range(data.labels.max() + 1)]), 0)[
        -1
    ]

    def noisy(spread: float) -> Callable[[int], np.ndarray]:
        return lambda repeat: (
            spread * np.random.default_rng([options.seed, 9, repeat]).normal(size=len(agreement)) - agreement
        )

    rows = [
        measure(data, "`sc:n=40`", rule_of(SelfConsistency()), options),
        measure(data, "`esc`", rule_of(EarlyStopping()), options),
        measure(data, "`asc`", rule_of(AdaptiveConsistency()), options),
    ]
    for spread, words in ((0.0, "perfect ranks"), (0.1, "noise 0.1"), (0.3, "noise 0.3"), (100.0, "useless ranks")):
        name = f"`dsc`, {words}"
        rows.append(measure(data, name, rule_of(DifficultyAdaptive()), options, difficulty=noisy(spread)))
    return report(data, rows, rows[2], options)


# ------------------------------------------------------------------------------------------------------- output


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def between(low: float, high: float) -> str:
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def models_table(found: dict[str, Any]) -> str:
    """Accuracy, difference to the last model alone, draws of each model and the cost."""
    head = ["policy", "right %", f"over {found['base']}", "95 % interval", "draws by model", "cost"]
    rows = [
        [row["policy"], percent(row["accuracy"]), f"{100 * row['gain'][0]:+.1f}", between(*row["gain"][1:]),
         " + ".join(f"{draws:.2f}" for draws in row["draws"]), f"{row['cost']:.1f}"]
        for row in found["rows"]
    ]  # fmt: skip
    pairs = [
        [own, other, f"{100 * difference[0]:+.1f}", between(*difference[1:]), f"{ratio:.2f}"]
        for own, other, difference, ratio in found["pairs"]
    ]
    against = table(["policy", "against", "difference", "95 % interval", "ratio of costs"], pairs)
    return f"**{found['name']}**, {found['problems']} questions.\n\n{table(head, rows)}\n\n{against}"


def budget_table(found: dict[str, Any]) -> str:
    """For each mean: accuracy, difference to equal shares, and how often the vote is that of all 40 draws."""
    head = ["policy", "mean draws", "right %", "over `sc`", "95 % interval", "as with 40 draws %"]
    rows = [
        [row["policy"], f"{row['cost']:.2f}", percent(row["accuracy"]), f"{100 * row['gain'][0]:+.1f}",
         between(*row["gain"][1:]), percent(row["agrees"])]
        for block in found["blocks"]
        for row in block["rows"]
    ]  # fmt: skip
    over = [
        f"{mean}: {100 * b['over_asc'][0]:+.2f} ({between(*b['over_asc'][1:])})"
        for mean, b in zip(found["means"], found["blocks"], strict=True)
    ]
    after = f"`knowledge-gradient` over that `asc`, in points by mean: {'; '.join(over)}."
    return f"**{found['name']}**, {found['problems']} questions.\n\n{table(head, rows)}\n\n{after}"


def difficulty_table(found: dict[str, Any]) -> str:
    """Draws, prompts sent, accuracy and the difference to `asc`."""
    head = ["policy", "mean draws", "prompts sent", "right %", "over `asc`", "95 % interval"]
    rows = [
        [row["policy"], f"{row['cost']:.2f}", f"{row['waves']:.2f}", percent(row["accuracy"]),
         f"{100 * row['gain'][0]:+.1f}", between(*row["gain"][1:])]
        for row in found["rows"]
    ]  # fmt: skip
    return f"**{found['name']}**, {found['problems']} questions.\n\n{table(head, rows)}"


def draw_picture(result: dict[str, Any], path: str) -> None:
    """Accuracy against cost: the models of the date questions, and budgets on the last data set measured."""
    panels = [*result["models"][:1], *result["budget"]]
    with picture(path, 8.6, 3.4) as figure:
        axes = np.atleast_1d(figure.subplots(1, max(len(panels), 1)))
        for axis, found in zip(axes, panels, strict=False):
            (budget_panel if "blocks" in found else models_panel)(axis, found)


def models_panel(axis: Any, found: dict[str, Any]) -> None:
    """One mark a policy, by what it does."""
    kinds = {"alone": [], "modelswitch": [], "cascade": [], "cascade, 5 draws then 1": []}  # type: dict[str, list[Any]]
    for row in found["rows"]:
        name = row["policy"]
        if "then 1" in name:
            kinds["cascade, 5 draws then 1"].append(row)
        elif "`" in name or "the same" in name:
            kinds["cascade" if "cascade" in name else "modelswitch"].append(row)
        elif "draw" in name:
            kinds["alone"].append(row)
    for colour, (label, rows) in zip(COLOURS, kinds.items(), strict=False):
        shares = [100 * row["accuracy"] for row in rows]
        axis.plot([row["cost"] for row in rows], shares, "o", ms=4, color=colour, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("cost per question")
    axis.set_ylabel("right %")
    axis.set_title(found["name"], fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def budget_panel(axis: Any, found: dict[str, Any]) -> None:
    """One line a policy over the mean draws."""
    for place, label in enumerate(["sc", "asc", "knowledge-gradient"]):
        rows = [block["rows"][place] for block in found["blocks"]]
        axis.plot(
            [row["cost"] for row in rows],
            [100 * row["accuracy"] for row in rows],
            "o-",
            ms=3,
            lw=1,
            color=COLOURS[place],
            label=label,
        )
    axis.set_xlabel("mean draws per question")
    axis.set_title(found["name"], fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, repeats=20, seed=0, questions=1000)
    shown.add_argument("--date", nargs=3, metavar=("LLAMA", "GPT35", "GPT4"), help="date_cot1.json of three models")
    shown.add_argument("--prices", nargs=3, type=float, default=(0.3, 1.0, 25.0), help="cost of a draw, date questions")
    for name in ("ratings", "models", "letters"):
        shown.add_argument(f"--{name}", metavar="FILE")
    shown.add_argument("--picture", help="also write accuracy against cost as this PNG")
    options = shown.parse_args()
    result, blocks = run(options)
    if options.picture:
        draw_picture(result, str(Path(options.picture)))
    emit(options, result, "\n\n".join([*blocks, environment()]))


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """All parts whose record is there, as figures and as tables."""
    models, chosen = [], []
    if options.date:
        data = dates(options.date, options.prices)
        models.append(part_models(data, ["Llama-2-13B", "GPT-3.5", "GPT-4"], 3, options))
        chosen += [chosen_thresholds(data, (20, 3), (1, 2), part, options) for part in (0.5, 0.7, 0.9)]
    if options.models:
        data = tiers(options.models)
        models.append(
            part_models(data, ["small", "middle", "large"], 5, argparse.Namespace(**{**vars(options), "repeats": 1}))
        )
        chosen += [chosen_thresholds(data, (5, 5, 5), (0, 1, 2), part, options) for part in (0.1, 0.2, 0.4)]
    if options.ratings:
        models.append(part_models(ratings(options.ratings), ["Mistral", "Llama", "gpt-4o-mini"], 5, options))
    easy = simulated("Simulated, mostly easy", options.questions, 0.2, 1)
    mixed = simulated("Simulated, mixed", options.questions, 1.0, 2)
    sets = ([letters(options.letters)] if options.letters else []) + [mixed]
    budget = [part_budget(data, (3, 4, 6, 10), options) for data in sets]
    difficulty = [part_difficulty(data, options) for data in [*sets[:-1], easy, mixed]]
    blocks = [models_table(found) for found in models]
    if chosen:
        head = [
            "thresholds chosen on one half",
            "budget, % of the last model's",
            "right there %",
            "right on the other half %",
            "cost there, %",
            "last model alone %",
            "difference, middle 95 % of splits",
        ]
        blocks.append(table(head, chosen))
    blocks += [budget_table(found) for found in budget] + [difficulty_table(found) for found in difficulty]
    return {"models": models, "chosen": chosen, "budget": budget, "difficulty": difficulty}, blocks


if __name__ == "__main__":
    main()
