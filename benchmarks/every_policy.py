"""Every policy that a recorded set of draws allows, beside a single draw, the full vote, and any draw being right.

Each record is read once (HumanEval twice: programs by their text and by what they do; the ratings by model and pooled)
and every registered stopping rule and vote whose needs it meets runs at its paper's parameters, fitted to the number of
draws, over the same random orders. For each: accuracy, draws, the difference to the full vote and to plain
self-consistency at the same mean number of draws, both paired by question, and a permutation test against the full
vote, adjusted for the number of policies (Holm). Then who wins, and what the methods' papers report beside it.

    python benchmarks/every_policy.py RECORD.jsonl.gz ... [--labels FILE.json] [--repeats 50] [--picture FILE]

``--labels`` keeps the classes of programs by behaviour, which take minutes to find; it is written where it is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table
from _papers import CLAIMS, NOT_COMPARABLE
from behaviour import by_behaviour
from repeated_sampling import ENDS_PROGRAM, exact_answers
from routing import TIERS
from votes import rated

from consilience import policy, record
from consilience.draws import Problem
from consilience.errors import InputError
from consilience.montecarlo.estimators import proportion_interval
from consilience.montecarlo.resampling import bootstrap_interval, paired_permutation_test
from consilience.replay import Replayed, Table, replay, replay_procedure, tabulate
from consilience.rules import View
from consilience.text.voting.plurality import Plurality
from consilience.tune import drop_figures
from consilience.views import kind_of

FIELDS = ("reward", "confidence", "logprob", "mean_logprob", "mean_token_prob", "min_token_logprob")
MODELS = ("Mistral-7B-Instruct-v0.3-GPTQ-4bit", "Meta-Llama-3.1-8B-Instruct-GPTQ-INT4", "gpt-4o-mini")
GROUPS = ("baseline", "stopping", "vote", "models", "procedure")
MARGIN = 0.01
"""What a cheaper policy may lose, as a bound, to be called as good: one point."""


@dataclass(frozen=True)
class Reading:
    """A record with its answers read in one way; ``texts``: the replies are long enough for a text metric."""

    name: str
    problems: list[Problem]
    arms: tuple[str, ...] = ()
    texts: bool = True


# ------------------------------------------------------------------------------------------------------- readings


def readings(path: str, options: argparse.Namespace) -> Iterator[Reading]:
    """The readings of one record: by its name for those that need a word said about them, else as its kind has it."""
    problems, stem = list(record.read(path)), Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
    if problems[0].kind == "rating":
        yield from by_model(problems)
    elif problems[0].kind == "code" and "entry_point" in (problems[0].model_extra or {}):
        cut = [as_run(problem) for problem in problems]
        yield Reading(f"{stem}, by text", [exact_answers(problem) for problem in cut])
        yield Reading(f"{stem}, by behaviour", behaving(problems, options.labels))
    elif problems[0].kind == "code":  # a literal to be predicted: the text is the answer
        yield Reading(stem, [literal(problem) for problem in problems])
    elif any(draw.model in TIERS["five of the largest"] for draw in problems[0].draws):
        yield Reading(stem, [in_tiers(problem) for problem in problems], arms=tuple(TIERS))
    else:
        kind_of(problems[0])  # a kind without a vote is refused in the library's own words
        yield Reading(stem, [exact_answers(with_difficulty(problem)) for problem in problems])


def by_model(problems: list[Problem]) -> Iterator[Reading]:
    """Ratings: each model alone, and the three together, from the weakest to the last."""
    for model in MODELS:
        yield Reading(f"ratings, {model.partition('-Instruct')[0]}", [rated(p, model) for p in problems], texts=False)
    yield Reading("ratings, three models", [rated(p, None) for p in problems], arms=MODELS, texts=False)


def as_run(problem: Problem) -> Problem:
    """Programs cut where the record cut them to run the tests."""
    cut = [draw.model_copy(update={"text": ENDS_PROGRAM.split(draw.text, maxsplit=1)[0]}) for draw in problem.draws]
    return problem.model_copy(update={"draws": cut})


def behaving(problems: list[Problem], labels: str | None) -> list[Problem]:
    """Programs whose answer is the number of their class by behaviour, read from the file or found by running them."""
    file = Path(labels) if labels else None
    if file is not None and file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
    else:
        known, label = {}, by_behaviour("signature", {})
        for problem in problems:
            known[problem.id] = label(problem)
            print(f"programs of {problem.id}: {len(set(known[problem.id]))} behaviours", file=sys.stderr)
        if file is not None:
            file.write_text(json.dumps(known), encoding="utf-8")
    return [labelled(problem, known[problem.id]) for problem in problems]


def labelled(problem: Problem, labels: Sequence[int]) -> Problem:
    """Each draw with its class as the answer; a program without one does not run and counts as failed."""
    draws = [
        draw.model_copy(update={"answer": f"class {label}"} if label >= 0 else {"error": "does not run"})
        for draw, label in zip(as_run(problem).draws, labels, strict=True)
    ]
    return problem.model_copy(update={"kind": "text", "draws": draws})


def literal(problem: Problem) -> Problem:
    """The whole text is the answer, compared sign by sign."""
    plain = exact_answers(problem.model_copy(update={"answer": None, "draws": [
        draw.model_copy(update={"answer": draw.text.strip() or None}) for draw in problem.draws
    ], "kind": "text"}))  # fmt: skip
    return plain.model_copy(update={"answer": problem.answer})


def in_tiers(problem: Problem) -> Problem:
    """Five models of a size are taken for five draws of one arm, as in benchmarks/routing.py."""
    tier = {model: name for name, models in TIERS.items() for model in models}
    draws = [draw.model_copy(update={"arm": tier.get(draw.model or "", draw.model)}) for draw in problem.draws]
    return problem.model_copy(update={"draws": draws})


def with_difficulty(problem: Problem) -> Problem:
    """A level that the source states ("Level 3") is the problem's difficulty."""
    found = re.search(r"\d+", str((problem.model_extra or {}).get("level") or ""))
    return problem.model_copy(update={"difficulty": float(found[0])}) if found else problem


# ------------------------------------------------------------------------------------------------------- policies


def policies(data: Table, reading: Reading) -> dict[str, str]:
    """Every policy whose needs are met, with its group; parameters of the papers, fitted to the draws there are."""
    most = int(data.counts.max())
    has = {name for name, values in data.fields.items() if not np.isnan(values).all()}
    wanted = {"one": "baseline", **dict.fromkeys(stopping(most), "stopping")}
    if not np.isnan(data.traits["difficulty"]).any():
        wanted[f"dsc:max={most}"] = "stopping"
    wanted |= dict.fromkeys(weighted(most, has), "vote")
    if reading.arms:
        wanted |= dict.fromkeys(switching(len(reading.arms)), "models")
    if reading.texts:
        wanted[f"sc:n={most}+mbr:metric=token-f1"] = "procedure"
    return {spec: group for spec, group in wanted.items() if possible(spec)}


def possible(spec: str) -> bool:
    """Whether a rule can be made with these parameters: eight draws may be too few for a window or a certificate."""
    try:
        return bool(policy.parse(spec).max)
    except InputError as error:
        print(f"left out: {error}", file=sys.stderr)
        return False


def stopping(most: int) -> list[str]:
    """The stopping rules of one model that read answers alone."""
    return [
        f"esc:window=5,max={most}",
        *(f"{name}:max={most}" for name in ("asc", "asc-dirichlet", "asc-entropy", "asc-majority")),
        f"certified:error=0.05,max={most}",
        f"knowledge-gradient:mean={max(4.0, most / 4):g},min=2,max={most}",
    ]


def weighted(most: int, has: set[str]) -> list[str]:
    """The votes by a field, and the stopping rule that reads one; the authors' own variants and no others."""
    votes = ["selective-ensembles:alpha=0.05"]
    if "reward" in has:
        votes += ["reward-weighted", "reward-weighted:weights=softmax", "best-of-n", "self-certainty:field=reward"]
    if "mean_token_prob" in has:
        votes += ["logprob-weighted", "logprob-weighted:normalised=false", "best-of-n:field=logprob"]
        votes += [f"soft-sc:aggregate={name}" for name in ("mean", "min", "product")]
        votes += ["rpc", "rpc:pruning=false", "self-certainty:field=mean_logprob"]
    specs = [f"sc:n={most}+{vote}" for vote in votes]
    if "mean_token_prob" in has:
        specs += [f"sc:n={most // 2}+{vote}" for vote in ("soft-sc:aggregate=mean", "rpc")]
    for field in ("confidence", "mean_token_prob"):
        if field in has:
            rule = f"self-calibration:max={most},field={field}"
            specs += [f"{rule}+best-of-n:field={field}", f"{rule},of=vote+reward-weighted:field={field}"]
    return specs


def switching(models: int) -> list[str]:
    """The rules of several models, five draws each, from the first arm to the last."""
    switch = f"modelswitch:models={models},draws=5"
    return [switch, f"{switch}+entropy-weighted", *(f"cascade:models={models},threshold={t}" for t in (0.8, 1.0))]


# ------------------------------------------------------------------------------------------------------- measuring


def replayed(spec: str, data: Table, reading: Reading, options: argparse.Namespace) -> Replayed:
    """One policy; a procedure that reads all draws once, since their order can only break ties."""
    rule = policy.parse(spec)
    print(f"{reading.name}: {spec}", file=sys.stderr)
    if rule.procedure is None:
        return replay(data, rule, repeats=options.repeats, seed=options.seed)
    once = replay_procedure(
        reading.problems, data, rule, lambda: None, seed=options.seed, kind_of=lambda problem: problem.kind
    )
    return asyncio.run(once)


def measure(reading: Reading, options: argparse.Namespace) -> dict[str, Any]:
    """Every policy on one reading."""
    data = tabulate(reading.problems, needs=FIELDS, traits=["difficulty"], arms=reading.arms or None)
    most = int(data.counts.max())
    groups = policies(data, reading)
    full = f"sc:n={most}"
    found = {spec: replayed(spec, data, reading, options) for spec in (full, *groups)}
    exact = {"one": single_draw(data)}
    plain = {**equal_cost(found, data, reading, options), 1: exact["one"]}
    return {
        "name": reading.name,
        "problems": len(reading.problems),
        "draws": most,
        "mean_draws": float(found[full].draws.mean()),
        **recorded_order(data),
        "curve": {str(count): float(shares.mean()) for count, shares in plain.items()},
        "rows": rows(found, exact, {full: "baseline", **groups}, full, plain, options),
    }


def there(data: Table) -> np.ndarray:
    """Which places of the table hold a draw; bool [problems, draws]."""
    return np.arange(data.labels.shape[1]) < data.counts[:, None]


def single_draw(data: Table) -> np.ndarray:
    """The share of right draws of each problem with a gold answer: a single draw over all orders, exactly."""
    shares: np.ndarray = ((data.right & there(data)).sum(1) / np.maximum(data.counts, 1))[data.known]
    return shares


def recorded_order(data: Table) -> dict[str, float]:
    """A draw, the vote in recorded order (a tie to the answer seen first), any draw; as the records state them."""
    winner, _ = Plurality().decide(View.single(data.labels, data.counts))
    first = (there(data) & (data.labels == winner[:, None])).argmax(1)
    right = data.right[np.arange(len(winner)), first] & (winner >= 0)
    return {
        "single": float(single_draw(data).mean()),
        "recorded_vote": float(right[data.known].mean()),
        "any": float((data.right & there(data)).any(1)[data.known].mean()),
    }


def equal_cost(
    found: Mapping[str, Replayed], data: Table, reading: Reading, options: argparse.Namespace
) -> dict[int, np.ndarray]:
    """Right shares by problem of plain self-consistency, at the whole numbers of draws around each policy's mean."""
    means = [float(one.draws.mean()) for one in found.values()]
    most = int(data.counts.max())
    counts = sorted({*(count for mean in means for count in (int(mean), int(np.ceil(mean)))), 2, 3, 5} - {0})
    return {
        count: replayed(f"sc:n={count}", data, reading, options).accuracy_per_problem()
        for count in counts
        if count <= most
    }


def at_cost(plain: Mapping[int, np.ndarray], mean: float) -> np.ndarray:
    """Self-consistency at ``mean`` draws: the whole numbers around it, mixed so that they cost as much."""
    low, high = int(mean), int(np.ceil(mean))
    return plain[low] + (mean - low) * (plain[high] - plain[low]) if high > low else plain[low]


def rows(
    found: Mapping[str, Replayed],
    exact: Mapping[str, np.ndarray],
    groups: Mapping[str, str],
    full: str,
    plain: Mapping[int, np.ndarray],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The figures of every policy, the intervals from the same resamples of the problems; exact shares where known."""
    shares = {spec: exact.get(spec, one.accuracy_per_problem()) for spec, one in found.items()}
    means = {spec: float(one.draws.mean()) for spec, one in found.items()}
    over_full = np.array([own - shares[full] for own in shares.values()])
    over_plain = np.array([own - at_cost(plain, means[spec]) for spec, own in shares.items()])
    generator = np.random.default_rng(options.seed)
    both = bootstrap_interval(np.stack([over_full, over_plain], 2).transpose(1, 0, 2), generator)
    tests = [paired_permutation_test(own, shares[full], generator, resamples=20_000).p_value for own in shares.values()]
    adjusted = holm(tests[1:])
    result = []
    for place, (spec, one) in enumerate(found.items()):
        known = one.known
        _, _, bound = drop_figures(-over_full[place], 1 - one.agrees[:, known].mean(0))
        row = {
            "policy": policy.parse(spec).name,
            "group": groups[spec],
            "accuracy": float(shares[spec].mean()),
            "interval": proportion_interval(shares[spec]),
            "draws": means[spec],
            "saved": 1 - means[spec] / means[full],
            "over_full": triple(both, place, 0),
            "over_plain": triple(both, place, 1),
            "p": None if spec == full else adjusted[place - 1],
            "drop_bound": bound,
            "agrees": float(one.agrees.mean()),
            "answered": float(one.answered.mean()),
        }
        result.append(row)
    return result


def triple(interval: Any, place: int, which: int) -> tuple[float, float, float]:
    return tuple(float(side[place, which]) for side in (interval.estimate, interval.low, interval.high))  # type: ignore[return-value]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): the chance of any false rejection stays below the level."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def best(data: Mapping[str, Any]) -> dict[str, Any]:
    """The most accurate policy, of equals the cheapest."""
    return min(data["rows"], key=lambda row: (-round(row["accuracy"], 9), row["draws"]))


def cheapest(data: Mapping[str, Any], good: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
    """The cheapest policy that is good, of equals the most accurate; the full vote always is."""
    kept = [row for row in data["rows"] if row["p"] is None or good(row)]
    return min(kept, key=lambda row: (round(row["draws"], 9), -row["accuracy"]))


# ------------------------------------------------------------------------------------------------------- output


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: Sequence[float]) -> list[str]:
    """A difference and its interval in points; no minus before a zero."""
    shown = [f"{100 * number:+.1f}".replace("-0.0", "+0.0") for number in value]
    return [shown[0], f"{shown[1]} to {shown[2]}"]


def chance(p_value: float) -> str:
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"


def short(name: str) -> str:
    """A policy without the parameters that say nothing here."""
    name = name.replace("weights=raw,temperature=1.0,", "").replace(",temperature=1.0", "")
    for rest in (",field=reward", ":field=reward", ",over=text,arm=-1", ",neighbours=16,window=4,threshold=0.95"):
        name = name.replace(rest, "")
    return f"`{name}`"


def block(data: Mapping[str, Any]) -> str:
    """The table of one reading."""
    head = ["policy", "right %", "95 % interval", "draws", "saved %", "over full vote", "95 % interval", "p (Holm)"]
    head += ["over `sc` at this cost", "95 % interval", "as full vote %"]
    lines = []
    for row in data["rows"]:
        low, high = row["interval"]
        line = [short(row["policy"]), percent(row["accuracy"]), f"{percent(low)} to {percent(high)}"]
        line += [f"{row['draws']:.2f}", percent(row["saved"])]
        line += ["", "", ""] if row["p"] is None else [*points(row["over_full"]), chance(row["p"])]
        plain = row["group"] == "baseline"
        line += ["", ""] if plain else points(row["over_plain"])
        lines.append([*line, percent(row["agrees"])])
    said = f"{data['problems']} questions, {data['draws']} draws; any draw right {percent(data['any'])} %."
    return f"**{data['name']}**: {said}\n\n{table(head, lines)}"


def reference(found: Sequence[Mapping[str, Any]]) -> str:
    """What the records themselves say, computed in their own order."""
    head = ["record and reading", "questions", "draws", "single %", "vote, recorded order %", "vote, all orders %"]
    lines = []
    for data in found:
        shares = (data["single"], data["recorded_vote"], data["rows"][0]["accuracy"], data["any"])
        lines.append([data["name"], data["problems"], data["draws"], *map(percent, shares)])
    return table([*head, "any right %"], lines)


def winners(found: Sequence[Mapping[str, Any]]) -> str:
    """Who wins, by how much, and the cheapest that is as good."""
    head = ["record and reading", "policies", "single %", "full vote %", "any right %", "most accurate", "right %"]
    head += ["over full vote", "95 % interval", "p (Holm)"]
    lines = []
    for data in found:
        top = best(data)
        shares = (data["single"], data["rows"][0]["accuracy"], data["any"])
        line = [data["name"], len(data["rows"]), *map(percent, shares), short(top["policy"]), percent(top["accuracy"])]
        lines.append([*line, *(["", "", ""] if top["p"] is None else [*points(top["over_full"]), chance(top["p"])])])
    return table(head, lines)


def thrift(found: Sequence[Mapping[str, Any]]) -> str:
    """The cheapest policies that are as good as the full vote, by a weak and by a strict reading of that."""
    head = ["record and reading", "full vote, draws", "cheapest, interval reaches the full vote", "draws"]
    head += ["over full vote", "95 % interval", "cheapest, bound at most 1 point below", "draws", "saved %"]
    lines = []
    for data in found:
        near = cheapest(data, lambda row: row["over_full"][2] >= 0)
        sure = cheapest(data, lambda row: row["drop_bound"] <= MARGIN)
        line = [data["name"], f"{data['mean_draws']:.1f}", short(near["policy"]), f"{near['draws']:.2f}"]
        line += [*points(near["over_full"]), short(sure["policy"]), f"{sure['draws']:.2f}", percent(sure["saved"])]
        lines.append(line)
    return table(head, lines)


def equal_cost_counts(found: Sequence[Mapping[str, Any]]) -> str:
    """Over all readings: how often a policy is above or below plain self-consistency at its own cost."""
    kinds: dict[str, list[tuple[float, float, float]]] = {}
    for data in found:
        for row in data["rows"]:
            if row["group"] == "stopping":
                kinds.setdefault(row["policy"].partition(":")[0], []).append(row["over_plain"])
    head = ["stopping rule", "readings", "mean difference", "smallest", "largest", "interval above 0", "below 0"]
    lines = []
    for name, values in kinds.items():
        middle, low, high = np.array(values).T
        shown = [f"{100 * value:+.1f}".replace("-0.0", "+0.0") for value in (middle.mean(), middle.min(), middle.max())]
        lines.append([f"`{name}`", len(values), *shown, int((low > 0).sum()), int((high < 0).sum())])
    return table(head, lines)


def beside_papers(found: Sequence[Mapping[str, Any]]) -> str:
    """What a method's paper reports, and the same quantity here."""
    lines = []
    for claim in CLAIMS:
        here = [f"{data['name']}: {text}" for data in found if (text := claim.here(data))]
        shown = "<br>".join(here) + claim.note if here else "no record here allows it"
        lines.append([f"`{claim.method}`", link(claim.arxiv), claim.reported, shown])
    for names, arxiv, reported, why in NOT_COMPARABLE:
        listed = ", ".join(f"`{name}`" for name in names)
        lines.append([listed, link(arxiv), reported, f"not comparable: {why}"])
    head = "| method | paper | what it reports | the same quantity here |\n|---|---|---|---|\n"
    return head + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def link(arxiv: str) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})"


def markdown(found: Sequence[Mapping[str, Any]], refused: Sequence[str]) -> str:
    """The tables of the page, in its order."""
    parts = [
        "## Who wins",
        winners(found),
        "## The cheapest that is as good",
        thrift(found),
        "## At the same cost",
        equal_cost_counts(found),
    ]
    parts += ["## The papers, and here", beside_papers(found), "## The records as read", reference(found)]
    parts += [f"No policy: {line}" for line in refused]
    return "\n\n".join([*parts, "## Every policy", *(block(data) for data in found)])


def draw_picture(found: Sequence[Mapping[str, Any]], path: str) -> None:
    """Accuracy against mean draws, a panel for each reading, the frontier as a line."""
    across = min(3, len(found))
    down = -(-len(found) // across)
    with picture(path, 3.4 * across, 2.4 * down + 0.4) as figure:
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes, data in zip(panels, found, strict=False):
            draw_panel(axes, data)
        for axes in panels[len(found) :]:
            axes.set_visible(False)
        figure.supxlabel("mean draws per question", fontsize=9)
        figure.supylabel("right %", fontsize=9)
        handles: dict[str, Any] = {}
        for axes in panels[: len(found)]:
            drawn, names = axes.get_legend_handles_labels()
            handles = dict(zip(names, drawn, strict=True)) | handles
        place = "outside upper center"
        figure.legend(handles.values(), handles, loc=place, ncols=len(handles), fontsize=8, frameon=False)


def draw_panel(axes: Any, data: Mapping[str, Any]) -> None:
    """One reading: self-consistency as a grey line, the policies as dots, the frontier as steps."""
    curve = sorted((int(count), 100 * share) for count, share in data["curve"].items())
    axes.plot(*zip(*curve, strict=True), color=COLOURS[5], lw=1, ls=":", label="sc, any n")
    answering = [row for row in data["rows"] if "selective" not in row["policy"]]  # what abstains is no less able
    ordered = sorted(answering, key=lambda row: (row["draws"], -row["accuracy"]))
    frontier, top = [], -1.0
    for row in ordered:
        if row["accuracy"] > top:
            top = row["accuracy"]
            frontier.append((row["draws"], 100 * top))
    frontier.append((max(row["draws"] for row in ordered), 100 * top))
    axes.step(*zip(*frontier, strict=True), where="post", color="#1F2933", lw=0.9, label="frontier")
    for colour, group in zip(COLOURS, GROUPS, strict=False):
        chosen = [row for row in ordered if row["group"] == group]
        if chosen:
            xs, ys = [row["draws"] for row in chosen], [100 * row["accuracy"] for row in chosen]
            axes.plot(xs, ys, "o", ms=3.5, alpha=0.8, color=colour, label=group)
    axes.set_xscale("log")
    ticks = [count for count in (1, 2, 5, 10, 20, 40, 100) if count <= data["draws"]]
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.minorticks_off()
    axes.set_title(f"{data['name']} (any {percent(data['any'])})", fontsize=7.5)
    axes.tick_params(labelsize=7)


def main() -> None:
    """Print the tables."""
    shown = parser(__doc__, repeats=50, seed=0)
    shown.add_argument("records", nargs="*", help="recorded draws, .jsonl or .jsonl.gz")
    shown.add_argument("--labels", help="the classes of programs by behaviour; written where it is missing")
    shown.add_argument("--picture", help="also write accuracy against draws as this PNG")
    options = shown.parse_args()
    if not options.records:
        print("left out: it needs recorded files, named on the command line")
        return
    found, refused = [], []
    for path in options.records:
        try:
            found += [measure(reading, options) for reading in readings(path, options)]
        except InputError as error:
            refused.append(f"{Path(path).name}: {error}.")
            print(refused[-1], file=sys.stderr)
    if options.picture and found:
        draw_picture(found, options.picture)
    result = {"readings": found, "refused": refused}
    emit(options, result, markdown(found, refused) + "\n\n" + environment())


if __name__ == "__main__":
    main()
