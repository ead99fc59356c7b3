"""The vote of generated programs by what they do, beside the vote by their text and a single draw.

The record is HumanEval with recorded draws and flags: each problem has a `prompt`, an `entry_point`, and draws that
continue the prompt, with `passed` as the recorded outcome of the hidden tests. The flags score the winner and nothing
else; the hidden tests are not read. Programs are called on inputs made from the problem alone (`signature`), from the
examples of HumanEval's published prompts (`examples`, with --examples; the record's own prompts have none), or from the
calls that the draws themselves go on to write (`draws`); `+ outputs` also asks for the examples' own values.

    python benchmarks/behaviour.py humaneval-codegen16b.jsonl.gz [--examples HumanEval.jsonl.gz] [--limit 30]
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _common import COLOURS, emit, environment, parser, picture, table

from consilience import record
from consilience.draws import Problem
from consilience.montecarlo.estimators import proportion_interval
from consilience.text.answers.behaviour import BehaviourClasses
from consilience.text.answers.code import program_of
from consilience.text.answers.inputs import derive_inputs, enlarge, examples_in

BOOTSTRAPS = 10_000
Labeller = Callable[[Problem], list[int]]


def field(problem: Problem, name: str) -> Any:
    """A field of the record that the library does not know."""
    return (problem.model_extra or {}).get(name)


def by_text(problem: Problem) -> list[int]:
    """The class of every draw by its text up to the next top-level def or class, white space folded."""
    cut = [re.split(r"\n(?:def |class )", draw.text)[0] for draw in problem.draws]
    return _numbered([" ".join(text.split()) for text in cut])


def by_program(problem: Problem) -> list[int]:
    """The class of every draw by the program that is run, word for word."""
    entry, prompt = field(problem, "entry_point"), field(problem, "prompt")
    return _numbered([program_of(draw.text, entry, prompt).strip() for draw in problem.draws])


def _numbered(names: Sequence[str]) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def by_behaviour(source: str, prompts: dict[str, str]) -> Labeller:
    """The class of every draw when programs are compared by what they do on the inputs of this source."""

    def label(problem: Problem) -> list[int]:
        shown = prompts.get(problem.id, "")
        asked = problem.model_copy(update={"question": shown or problem.question})
        inputs = inputs_from(source, problem, shown)
        extra = {**(asked.model_extra or {}), "inputs": inputs}
        asked = Problem(**{**asked.model_dump(include={"id", "question", "kind"}), **extra})
        if not inputs:
            return [-1] * len(problem.draws)
        classes = BehaviourClasses(asked, "code", example_outputs=source.endswith("outputs"))
        answers = [draw.text or None for draw in problem.draws]
        classes.run_all(answers)
        return [classes.add(answer) for answer in answers]

    return label


def inputs_from(source: str, problem: Problem, shown: str) -> list[list[Any]]:
    """The argument lists of one source; where it has none, those of the signature."""
    prompt, entry = field(problem, "prompt"), field(problem, "entry_point")
    if source == "draws":
        counted = collections.Counter[str]()
        calls: dict[str, list[Any]] = {}
        for draw in problem.draws:
            for example in examples_in(draw.text, entry):
                counted[repr(example.args)] += 1
                calls[repr(example.args)] = example.args
        if calls:
            return enlarge([calls[key] for key, _ in counted.most_common(15)])
    return derive_inputs(shown if source.startswith("examples") else "", entry, prompt)


def scored(problem: Problem, labels: Sequence[int]) -> dict[str, float]:
    """How the plurality of these classes does: a tie to the first seen, and averaged over the tied classes."""
    counts = collections.Counter(label for label in labels if label >= 0)
    most = max(counts.values(), default=0)
    tied = [label for label in dict.fromkeys(labels) if label >= 0 and counts[label] == most]
    right = [bool(problem.draws[labels.index(label)].passed) for label in tied]
    inside = [bool(draw.passed) for draw, label in zip(problem.draws, labels, strict=True) if tied and label == tied[0]]
    return {
        "right": float(right[0]) if right else 0.0,
        "tied": float(np.mean(right)) if right else 0.0,
        "answered": float(bool(tied)),
        "working": float(np.mean([label >= 0 for label in labels])),
        "support": most / len(labels),
        "pure": float(all(inside) or not any(inside)),
        "classes": float(len(counts)),
    }


def gain(own: np.ndarray, base: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Mean difference of two shares by problem [problems], and its 95 % percentile bootstrap interval."""
    gains = own - base
    resampled = np.random.default_rng(seed).integers(0, len(gains), size=(BOOTSTRAPS, len(gains)))
    low, high = np.quantile(gains[resampled].mean(1), [0.025, 0.975])
    return float(gains.mean()), float(low), float(high)


def measure(problems: list[Problem], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a vote."""
    prompts = published(options.examples) if options.examples else {}
    sources = ["signature", "draws"] + (["examples", "examples + outputs"] if prompts else [])
    labellers: list[tuple[str, Labeller]] = [("text", by_text), ("text of the program as run", by_program)]
    labellers += [
        (source, by_behaviour(source, prompts)) for source in sources if source in options.inputs or not options.inputs
    ]
    rows: list[dict[str, Any]] = []
    base = np.zeros(len(problems))
    for name, label in labellers:
        start = time.perf_counter()
        found = [scored(problem, label(problem)) for problem in problems]
        means = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        shares = np.array([one["right"] for one in found])
        base = shares if name == "text" else base
        seconds = time.perf_counter() - start
        row = {"vote": name, **means, "interval": proportion_interval(shares), "seconds": seconds}
        rows.append({**row, "gain": gain(shares, base, options.seed), "shares": shares.tolist()})
        print(f"{name}: {100 * means['right']:.1f} % in {seconds:.0f} s", file=sys.stderr)
    return rows


def published(path: str) -> dict[str, str]:
    """HumanEval's published prompts, by problem."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return {row["task_id"]: row["prompt"] for row in map(json.loads, lines)}


def markdown(rows: list[dict[str, Any]], problems: list[Problem]) -> str:
    """The table under a line of reference figures."""
    draws = len(problems[0].draws)
    single = np.mean([np.mean([bool(draw.passed) for draw in problem.draws]) for problem in problems])
    best = np.mean([any(draw.passed for draw in problem.draws) for problem in problems])
    head = ["plurality of", "right %", "95 % interval", "ties averaged %", "over text", "95 % interval"]
    head += ["draws that work %", "classes", "winner's share %", "s"]
    cells = []
    for row in rows:
        points, low, high = (100 * value for value in row["gain"])
        low_right, high_right = (100 * value for value in row["interval"])
        name = row["vote"] if row["vote"].startswith("text") else f"behaviour: {row['vote']}"
        line = [name, f"{100 * row['right']:.1f}", f"{low_right:.1f} to {high_right:.1f}", f"{100 * row['tied']:.1f}"]
        line += ["", ""] if row["vote"] == "text" else [f"{points:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        line += [f"{100 * row['working']:.0f}", f"{row['classes']:.1f}", f"{100 * row['support']:.0f}"]
        cells.append([*line, f"{row['seconds']:.0f}"])
    first = f"{len(problems)} problems, {draws} draws; a single draw {100 * single:.1f} %, any draw {100 * best:.1f} %."
    return f"{first}\n\n{table(head, cells)}"


def draw_picture(rows: list[dict[str, Any]], path: str) -> None:
    """The accuracies with their intervals, one bar a vote."""
    with picture(path, 7.0, 1.0 + 0.45 * len(rows)) as figure:
        axes = figure.subplots()
        right = np.array([row["right"] for row in rows])
        sides = np.abs(np.array([row["interval"] for row in rows]).T - right)
        axes.barh(range(len(rows)), 100 * right, xerr=100 * sides, color=COLOURS[0], ecolor=COLOURS[5], height=0.6)
        axes.set_yticks(range(len(rows)), [row["vote"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("right answers of the plurality, %")


def main() -> None:
    """Print the table."""
    shown = parser(__doc__, seed=0)
    shown.add_argument("record", nargs="?", help="humaneval-codegen16b.jsonl.gz")
    shown.add_argument("--examples", help="HumanEval.jsonl.gz as published, for the examples of its prompts")
    shown.add_argument("--inputs", nargs="*", default=[], help="measure these sources alone")
    shown.add_argument("--limit", type=int, help="evenly spaced problems of the record, so many")
    shown.add_argument("--picture", help="also write the accuracies as this PNG")
    options = shown.parse_args()
    if options.record is None:
        print("left out: it needs the recorded file, named on the command line")
        return
    problems = list(record.read(options.record))
    if options.limit:
        problems = [problems[place] for place in np.linspace(0, len(problems) - 1, options.limit).astype(int)]
    rows = measure(problems, options)
    if options.picture:
        draw_picture(rows, options.picture)
    emit(options, {"votes": rows}, markdown(rows, problems) + "\n\n" + environment())


if __name__ == "__main__":
    main()
