"""Thresholds of a cascade, chosen from what its models did on a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Choice:
    """Thresholds [models - 1] with the accuracy and the mean cost per problem that they had on the record."""

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


def choose_thresholds(
    agreement: ArrayLike,
    right: ArrayLike,
    cost: ArrayLike,
    *,
    accuracy: float | None = None,
    budget: float | None = None,
    candidates: Sequence[float] = (),
) -> Choice:
    """The best thresholds for a target: the cheapest of at least ``accuracy``, or the most accurate within ``budget``.

    agreement: float [problems, models], the share of each model's draws that give its leading answer; right: [problems,
    models] in [0, 1], whether that answer is right; cost: float [models] or [problems, models], what asking the model
    costs. A question goes up until a model's agreement is at least its threshold; the last model answers what is left.
    ``candidates`` are the thresholds tried for every model, by default all agreements above 1/2 that were seen and 1;
    all combinations are tried. Equals are settled by the other figure, then by the smaller thresholds. The figures are
    those of the record itself: expect a little less on new questions.

    Raises ValueError for shapes that do not fit, unless exactly one target is given, and where none can reach it.
    """
    if (accuracy is None) == (budget is None):
        raise ValueError("give either accuracy or budget")
    shares, correct, spent = _checked(agreement, right, cost)
    levels = sorted(set(candidates) or {*np.unique(shares[:, :-1][shares[:, :-1] > 0.5]).tolist(), 1.0})
    every = product(levels, repeat=shares.shape[1] - 1)
    tried = [Choice(each, *outcome(shares, correct, spent, each)) for each in every]
    return _cheapest(tried, accuracy) if accuracy is not None else _most_accurate(tried, float(budget or 0.0))


def _cheapest(tried: list[Choice], accuracy: float) -> Choice:
    able = [choice for choice in tried if choice.accuracy >= accuracy - 1e-12]
    if not able:
        best = max(choice.accuracy for choice in tried)
        raise ValueError(f"no thresholds reach an accuracy of {accuracy:g}: the best is {best:g}")
    return min(able, key=lambda choice: (choice.cost, -choice.accuracy, choice.thresholds))


def _most_accurate(tried: list[Choice], budget: float) -> Choice:
    able = [choice for choice in tried if choice.cost <= budget + 1e-12]
    if not able:
        least = min(choice.cost for choice in tried)
        raise ValueError(f"no thresholds cost {budget:g} or less: the least is {least:g}")
    return min(able, key=lambda choice: (-choice.accuracy, choice.cost, choice.thresholds))


def outcome(agreement: Float, right: Float, cost: Float, thresholds: Sequence[float]) -> tuple[float, float]:
    """Accuracy and mean cost of a cascade with the given ``thresholds`` [models - 1]; arrays [problems, models]."""
    passed = np.concatenate([agreement[:, :-1] >= np.array(thresholds) - 1e-9, np.ones((len(agreement), 1), bool)], 1)
    chosen = passed.argmax(1)
    asked = np.arange(agreement.shape[1]) <= chosen[:, None]
    return float(right[np.arange(len(right)), chosen].mean()), float((cost * asked).sum(1).mean())


def _checked(agreement: ArrayLike, right: ArrayLike, cost: ArrayLike) -> tuple[Float, Float, Float]:
    shares, correct = np.asarray(agreement, float), np.asarray(right, float)
    if shares.ndim != 2 or shares.shape != correct.shape or shares.shape[1] < 2 or not len(shares):
        raise ValueError(f"agreement and right must be [problems, models], got {shares.shape} and {correct.shape}")
    try:
        spent = np.broadcast_to(np.asarray(cost, float), shares.shape)
    except ValueError:
        raise ValueError(f"cost must be [models] or [problems, models], got {np.shape(cost)}") from None
    if not (np.isfinite(shares).all() and np.isfinite(correct).all() and np.isfinite(spent).all()):
        raise ValueError("agreement, right and cost must be finite numbers")
    return shares, correct, spent
