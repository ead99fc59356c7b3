"""What the charts and tables show of a page, computed once: bounds, bins, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from consilience.montecarlo.estimators import (
    ReliabilityBin,
    brier,
    expected_calibration_error,
    reliability,
)
from consilience.report.rows import Curve, Page, PolicyRow
from consilience.report.words import known

MOST_BINS = 40


@dataclass(frozen=True, slots=True)
class Calibration:
    """The reliability of one policy's confidence over the questions with a gold answer."""

    bins: list[ReliabilityBin]
    ece: float
    brier: float
    count: int


@dataclass(frozen=True, slots=True)
class Spent:
    """Draws used per question: ``counts`` per bin of ``step`` draws, ``(0, step], (step, 2 step], ...``, and how
    many questions had ``none``."""

    step: int
    counts: list[int]
    mean: float
    median: float
    ninety: float
    none: int

    @property
    def total(self) -> int:
        """Questions in all."""
        return sum(self.counts) + self.none


def calibration(policy: PolicyRow) -> Calibration | None:
    """None where no question has both a confidence and a gold answer."""
    pairs = [
        (min(1.0, max(0.0, sure)), float(hit))
        for sure, hit in zip(policy.confidence, policy.right, strict=True)
        if hit is not None and known(hit) and known(sure)
    ]
    if not pairs:
        return None
    sure, hit = np.array(pairs).T
    return Calibration(reliability(sure, hit), expected_calibration_error(sure, hit), brier(sure, hit), len(pairs))


def most_draws(page: Page) -> int:
    """The right end of every axis of draws."""
    used = [draws for policy in page.policies for draws in _finite(policy.draws_used)]
    means = [policy.mean_draws for policy in page.policies if known(policy.mean_draws)]
    steps = list(page.curve.ks) if page.curve else []
    return max(1, math.ceil(max([*used, *means, *steps], default=1)))


def fixed_draws(page: Page) -> int:
    """The fixed vote that savings are measured against."""
    if page.fixed_draws:
        return page.fixed_draws
    used = [draws for policy in page.policies for draws in _finite(policy.draws_used)]
    means = [policy.mean_draws for policy in page.policies if known(policy.mean_draws)]
    return max(1, math.ceil(max([*used, *means], default=1)))


def spent(policy: PolicyRow, most: int) -> Spent | None:
    """None where the policy has no question."""
    used = np.array(_finite(policy.draws_used))
    if not len(used):
        return None
    step = bin_step(most)
    place = np.ceil(used[used > 0] / step - 1e-9).astype(int) - 1
    counts = np.bincount(place, minlength=math.ceil(most / step)).tolist()
    median, ninety = np.quantile(used, [0.5, 0.9])
    return Spent(step, counts, float(used.mean()), float(median), float(ninety), int((used <= 0).sum()))


def bin_step(most: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that needs at most `MOST_BINS` bins."""
    step = 1
    while math.ceil(most / step) > MOST_BINS:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step


def usable(curve: Curve | None) -> bool:
    """True when there is a curve to draw."""
    return curve is not None and len(curve.ks) > 0 and all(known(value) for value in curve.accuracy)


def bounds(page: Page) -> tuple[float, float] | None:
    """The range of accuracies to show, with some air; None where no accuracy is known."""
    values = list(page.curve.accuracy) if page.curve and usable(page.curve) else []
    if page.curve and usable(page.curve):
        values += [*page.curve.lo, *page.curve.hi]
    for policy in page.policies:
        if policy.accuracy is not None and known(policy.accuracy):
            values += [policy.accuracy, *(policy.accuracy_ci or ())]
    values = [value for value in values if known(value)]
    if not values:
        return None
    air = max(0.02, 0.06 * (max(values) - min(values)))
    return max(0.0, min(values) - air), min(1.0, max(values) + air)


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values if known(value)]
