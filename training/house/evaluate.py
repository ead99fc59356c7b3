"""Measure the house model on a fixed set of problems, with the NumPy inference: a table for people, JSON for tools.

Columns, in percent of the problems: `one` draw (the mean over all draws), `greedy`, `plurality` of the draws (a tie
goes to the answer seen first), `any` draw right, and adaptive consistency (Aggarwal et al. 2023, arXiv:2305.11860,
Beta criterion): its accuracy, averaged over random orders of the draws, and its mean number of draws.

    python training/house/evaluate.py --problems examples/house-test.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import betainc

from consilience.text.sources.house import HouseModel

ANSWER = re.compile(r"The answer is ([^.]*)\.")
COLUMNS = ("one", "greedy", "plurality", "any", "adaptive")


def answer_of(text: str) -> str | None:
    """What stands after the last "The answer is", or None."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


@cache
def majority_certainty(first: int, second: int) -> float:
    """P(share of the leader > 1/2) under Beta(first + 1, second + 1)."""
    return float(1 - betainc(first + 1, second + 1, 0.5))


def plurality(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, on a tie the one seen first; None never votes."""
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.__getitem__) if counts else None


def adaptive(answers: Sequence[str | None], threshold: float = 0.95) -> tuple[str | None, int]:
    """The vote, and the draws used, when drawing stops as soon as the leader is certain enough."""
    counts: Counter[str] = Counter()
    for used, answer in enumerate(answers, start=1):
        if answer is not None:
            counts[answer] += 1
        top = [count for _, count in counts.most_common(2)] + [0, 0]
        if majority_certainty(top[0], top[1]) >= threshold:
            return plurality(answers[:used]), used
    return plurality(answers), len(answers)


def measure(
    model: HouseModel,
    items: Sequence[dict],
    draws: int = 40,
    seed: int = 0,
    temperature: float = 1.0,
    orders: int = 20,
    max_tokens: int = 128,
) -> list[dict]:
    """One record a problem: its task and difficulty, the shares named in `COLUMNS`, and `draws` used."""
    shuffles = np.random.default_rng(seed).random((orders, draws)).argsort(axis=1)
    records = []
    for number, item in enumerate(items):
        seeds = [(seed * len(items) + number) * draws + draw for draw in range(draws)]
        made = model.generate([item["question"]] * draws, seeds, temperature=temperature, max_tokens=max_tokens)
        greedy = model.generate([item["question"]], [0], temperature=0.0, max_tokens=max_tokens)[0]
        answers = [answer_of(draw.text) for draw in made]
        gold = item["answer"]
        runs = [adaptive([answers[index] for index in order]) for order in shuffles]
        records.append(
            {
                "task": item["task"],
                "difficulty": item["difficulty"],
                "one": float(np.mean([answer == gold for answer in answers])),
                "greedy": float(answer_of(greedy.text) == gold),
                "plurality": float(plurality(answers) == gold),
                "any": float(gold in answers),
                "adaptive": float(np.mean([answer == gold for answer, _ in runs])),
                "draws": float(np.mean([used for _, used in runs])),
                "tokens": sum(draw.completion_tokens for draw in made) / draws,
            }
        )
    return records


def table(records: Sequence[dict]) -> str:
    """The records as a Markdown table, by task, by task and difficulty, and over all."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["task"], []).append(record)
    for record in records:
        groups.setdefault(f"{record['task']} {record['difficulty']}", []).append(record)
    groups["all"] = list(records)
    lines = ["| problems | n | " + " | ".join(COLUMNS) + " | draws | tokens |", "|---|" + "---:|" * (len(COLUMNS) + 3)]
    for name, group in groups.items():
        shares = " | ".join(f"{100 * np.mean([record[column] for record in group]):.1f}" for column in COLUMNS)
        used = " | ".join(f"{np.mean([record[column] for record in group]):.1f}" for column in ("draws", "tokens"))
        lines.append(f"| {name} | {len(group)} | {shares} | {used} |")
    return "\n".join(lines)


def speed(model: HouseModel, question: str, draws: int = 40, repeats: int = 10) -> float:
    """Generated tokens a second, `draws` parallel draws of one prompt."""
    model.generate([question] * draws, range(draws), temperature=1.0)
    tokens, began = 0, time.perf_counter()
    for repeat in range(repeats):
        made = model.generate([question] * draws, range(repeat * draws, (repeat + 1) * draws), temperature=1.0)
        tokens += sum(draw.completion_tokens for draw in made)
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the house model on a set of problems.")
    parser.add_argument("--problems", type=Path, default=Path("examples/house-test.jsonl"))
    parser.add_argument("--model", type=Path, help="a weights folder; default: the shipped one")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--limit", type=int, help="only the first problems")
    parser.add_argument("--json", action="store_true", help="print the records instead of the table")
    args = parser.parse_args()
    model = HouseModel.load(args.model)
    items = [json.loads(line) for line in args.problems.read_text(encoding="utf-8").splitlines()][: args.limit]
    records = measure(model, items, args.draws, args.seed, args.temperature)
    if args.json:
        print(json.dumps(records))
        return
    print(table(records))
    print(f"\n{speed(model, items[0]['question']):.0f} generated tokens/s at 40 parallel draws of one prompt")


if __name__ == "__main__":
    main()
