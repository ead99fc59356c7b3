"""What all weighted votes share: ballots in the order of sight, sums of weights per answer, the winner and its share.

A *ballot* is a judged draw that has an answer and a finite value of the field a rule reads. A draw without that value
does not vote: no rule guesses a weight. A problem without any ballot has no winner.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Float, Int, View

Scalar = TypeVar("Scalar", bound=np.generic)

ROUNDING = 1e-12
"""Sums of weights that differ by less than this share of all weights are a tie: sums depend on their order so far."""


def sighted(view: View, name: str) -> tuple[Int, Float]:
    """Classes and values of the field ``name``, [problems, arms x draws] each, by draw index, then by arm.

    The class is -1 where a draw has no answer or is not to be judged; the value is nan where it is absent, not finite
    or not to be judged.
    """
    past = np.arange(view.answers.shape[2]) >= view.drawn[:, :, None]
    values = view.fields[name]
    usable = np.where(past | ~np.isfinite(values), np.nan, values)
    return _in_order(view.judged()), _in_order(usable)


def ballots(view: View, name: str) -> tuple[Int, Float]:
    """As `sighted`, with class -1 also where the value is nan: a class of 0 or more is a ballot."""
    labels, values = sighted(view, name)
    return np.where(np.isnan(values), np.int32(-1), labels), values


def elect(labels: Int, weights: Float) -> tuple[Int, Float]:
    """The answer with the largest sum of weights, and its share of them; a tie goes to the answer seen first.

    labels: int32 [problems, votes] in the order of sight, -1 = no vote; weights: float64 [problems, votes], finite
    where there is a vote, of either sign. Returns the winner, int32 [problems], -1 = no vote at all, and its `share`.
    """
    classes = int(labels.max(initial=-1)) + 1
    if not classes:
        return np.full(len(labels), -1, np.int32), np.zeros(len(labels))
    rows, columns = np.nonzero(labels >= 0)
    cells, cast = rows * classes + labels[rows, columns], weights[rows, columns]
    sums = np.bincount(cells, cast, minlength=len(labels) * classes).reshape(-1, classes)
    given = np.bincount(cells, minlength=len(labels) * classes).reshape(-1, classes) > 0
    best = np.where(given, sums, -np.inf).max(1)
    slack = ROUNDING * np.bincount(rows, np.abs(cast), minlength=len(labels))
    answer = first_seen(labels, given & (sums >= (best - slack)[:, None]))
    return answer, share(labels, weights, answer)


def first_seen(labels: Int, tied: NDArray[np.bool_]) -> Int:
    """The first class in sight that is ``tied`` (bool [problems, classes]); int32 [problems], -1 = none."""
    eligible = (labels >= 0) & np.take_along_axis(tied, labels.clip(min=0), axis=1)
    chosen = np.take_along_axis(labels, eligible.argmax(1)[:, None], axis=1)[:, 0]
    return np.where(eligible.any(1), chosen, -1).astype(np.int32)


def share(labels: Int, weights: Float, answer: Int) -> Float:
    """The sum of the weights for ``answer``, at least 0, over the sum of all absolute weights; float64 [problems].

    For weights of one sign it is the answer's share of the weights. It lies in [0, 1]; 0 without weights.
    """
    rows, columns = np.nonzero(labels >= 0)
    cast = weights[rows, columns]
    own = labels[rows, columns] == answer[rows]
    won = np.bincount(rows[own], cast[own], minlength=len(labels))
    total = np.bincount(rows, np.abs(cast), minlength=len(labels))
    return np.divide(won.clip(min=0), total, out=np.zeros(len(labels)), where=total > 0)


def best_ballot(labels: Int, values: Float) -> Int:
    """The class of the ballot with the largest value, the first of equals; int32 [problems], -1 = no ballot."""
    if not labels.shape[1]:
        return np.full(len(labels), -1, np.int32)
    best = np.where(labels >= 0, values, -np.inf).argmax(1)[:, None]
    chosen: Int = np.take_along_axis(labels, best, axis=1)[:, 0]
    return np.where((labels >= 0).any(1), chosen, np.int32(-1))


def relative(labels: Int, logs: Float, temperature: float = 1.0) -> Float:
    """exp(logs / temperature) over its largest value among a problem's ballots, 0 elsewhere; float64 like ``logs``.

    The largest weight is exactly 1, so nothing overflows however small the probabilities or the temperature are.
    """
    cast = np.where(labels >= 0, logs, -np.inf)
    top = cast.max(1, initial=-np.inf, keepdims=True)
    with np.errstate(over="ignore"):
        scaled: Float = np.exp((cast - np.where(np.isfinite(top), top, 0.0)) / temperature)
    return scaled


def _in_order(values: NDArray[Scalar]) -> NDArray[Scalar]:
    return values.transpose(0, 2, 1).reshape(len(values), -1)
