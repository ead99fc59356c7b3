"""What the rules of several arms share: the votes within each arm, and a list of numbers in a policy."""

from __future__ import annotations

import numpy as np

from consilience.rules import Int, View


def arm_counts(view: View) -> Int:
    """Votes per class within each arm, int32 [problems, arms, classes]; draws without an answer count nowhere."""
    judged = view.judged()
    problems, arms, _ = judged.shape
    flat = judged.reshape(problems * arms, -1)
    classes = int(judged.max(initial=-1)) + 1
    cells = (flat + np.arange(len(flat))[:, None] * classes)[flat >= 0]
    counts = np.bincount(cells, minlength=len(flat) * classes) if classes else np.zeros(0, np.int64)
    return counts.reshape(problems, arms, classes).astype(np.int32)


def arm_top_two(view: View) -> tuple[Int, Int]:
    """The two largest vote counts within each arm, int32 [problems, arms] each, zero where there is none."""
    counts = arm_counts(view)
    padded = np.concatenate([counts, np.zeros((*counts.shape[:2], 2), np.int32)], axis=2)
    last_two = np.partition(padded, -2, axis=2)[:, :, -2:]
    return last_two[:, :, 1], last_two[:, :, 0]


def votes_for(share: float, draws: int) -> int:
    """The least number of ``draws`` votes that is a share of at least ``share``, rounding errors forgiven."""
    return int(np.ceil(share * draws - 1e-9))


def numbers(text: str, name: str, count: int) -> tuple[float, ...]:
    """The ``count`` numbers of a comma-separated list; a single one stands for all. Raises ValueError otherwise."""
    parts = text.split(",")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"{name} must be numbers separated by commas, got {text!r}") from None
    if len(values) not in (1, count):
        each = f"or one for each of {count}" if count > 1 else "for a single one"
        raise ValueError(f"{name} must be one number {each}, got {len(values)}: {text!r}")
    return tuple(values * count if len(values) == 1 else values)
