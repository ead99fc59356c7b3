"""Every figure of `consilience replay --json` beside a plain-Python computation over the same orders.

The plain side reads the record with gzip and json, extracts and votes with the rules written anew as their papers say
them, and knows nothing of the library but the contract of the orders. Prints the command's JSON, the plain figures and
the largest difference, which must be rounding.

    python benchmarks/replay_check.py esc-last-letters-a.jsonl.gz [--repeats 500]
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from math import comb
from pathlib import Path

import numpy as np

POLICIES = ("one", "sc:n=40", "esc:window=5,max=40", "asc:threshold=0.95,max=40")
FIGURES = ("accuracy", "mean_draws", "agreement_with_full_vote", "decided", "decided_wrong")
Answers = list[str | None]


def answer(text: str) -> str | None:
    """What follows the last 'the answer is' (else the last line), its first sentence, letters and digits only."""
    found = list(re.finditer(r"the answer is|answer:", text, re.IGNORECASE))
    tail = text[found[-1].end() :] if found else next((x for x in reversed(text.splitlines()) if x.strip()), "")
    return key(tail.strip().split(". ")[0]) or None


def key(text: str) -> str:
    """Case-folded letters and digits."""
    return "".join(c for c in text.casefold() if c.isalnum())


def stop(policy: str, answers: Answers) -> int:
    """How many of these draws a policy judges."""
    if policy == "one":
        return 1
    if policy.startswith("sc"):
        return len(answers)
    if policy.startswith("esc"):
        for start in range(0, 40, 5):
            window = answers[start : start + 5]
            if len(set(window)) == 1 and window[0] is not None:
                return start + 5
        return 40
    for drawn in range(1, 41):
        votes = Counter(a for a in answers[:drawn] if a is not None)
        first, second = [*(n for _, n in votes.most_common(2)), 0, 0][:2]
        n = first + second + 1
        if sum(comb(n, j) for j in range(first + 1)) / 2**n >= 0.95:
            return drawn
    return 40


def vote(answers: Answers) -> str | None:
    """The most frequent answer, the first seen among equals."""
    votes = Counter(a for a in answers if a is not None)
    return max(votes, key=lambda a: votes[a]) if votes else None


def plain(path: Path, policy: str, repeats: int, seed: int) -> dict[str, float]:
    """The figures of one policy, draw by draw."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream]
    answers = [[answer(draw["text"]) for draw in problem["draws"]] for problem in problems]
    gold = [key(problem["answer"]) for problem in problems]
    most = 1 if policy == "one" else 40
    sums = dict.fromkeys(FIGURES, 0)
    for r in range(repeats):
        orders = np.random.default_rng([seed, r]).random((len(problems), 40)).argsort(1)
        for number, order in enumerate(orders):
            shuffled = [answers[number][index] for index in order]
            used = stop(policy, shuffled)
            winner = vote(shuffled[:used])
            early = used < most
            sums["accuracy"] += winner == gold[number]
            sums["mean_draws"] += used
            sums["agreement_with_full_vote"] += winner == vote(shuffled)
            sums["decided"] += early
            sums["decided_wrong"] += early and winner != gold[number]
    return {name: total / (repeats * len(problems)) for name, total in sums.items()}


def main() -> None:
    """Print both sides and the largest difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.record is None:
        print("left out: it needs the recorded draws, named on the command line")
        return
    command = [sys.executable, "-m", "consilience", "replay", str(options.record), "--json"]
    command += ["--repeats", str(options.repeats), "--seed", str(options.seed)]
    command += [part for policy in POLICIES for part in ("--policy", policy)]
    printed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["policies"]
    worst = 0.0
    print("| policy | " + " | ".join(FIGURES) + " | 95 % interval |\n" + "|---" * (len(FIGURES) + 2) + "|")
    for row in printed:
        expected = plain(options.record, row["policy"], options.repeats, options.seed)
        worst = max(worst, *(abs(row[name] - expected[name]) for name in FIGURES))
        figures = " | ".join(f"{row[name]:.6g}" for name in FIGURES)
        low, high = row["accuracy_ci"]
        print(f"| {row['policy']} | {figures} | {low:.4f} - {high:.4f} |")
    print(f"\nlargest difference from the plain computation: {worst:.1e}")


if __name__ == "__main__":
    main()
