"""A fixed total of draws, given round by round to the questions where a further draw is worth most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Float, Int, View, top_two

ROUND = 0.05
"""The share of the draws left that one round gives away: smaller is better informed and slower."""


@dataclass(frozen=True, slots=True)
class KnowledgeGradient:
    """Spend ``mean`` draws per question in all, each where it promises most for the answer being the model's likeliest.

    Every question gets ``min`` draws; then, round after round, the questions of the largest `marginal_values` get one
    more each, until the total of floor(mean x problems) is spent or all have ``max``. The total is never passed. All
    problems of a run are judged together; there is one arm.

    Raises ValueError unless 1 <= min <= mean <= max <= 300. Sources: the allocation by marginal value is that of
    Damani et al. 2024, arXiv 2410.04707, with a posterior in place of a learned predictor; the value is the knowledge
    gradient with look-ahead of Frazier and Powell 2010 (Decision Analysis 7). Its optimistic relative, on the same
    posterior, is used for self-consistency in PETS, Liu et al. 2026, arXiv 2602.16745.
    """

    mean: float = 10.0
    min: int = 2
    max: int = 40
    coupled: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.mean <= self.max <= 300:
            given = f"min={self.min}, mean={self.mean}, max={self.max}"
            raise ValueError(f"min, mean and max must be in this order between 1 and 300, got {given}")

    def want(self, view: View) -> Int:
        """The draws of the next round; int32 [problems, 1], none when the total is spent."""
        drawn = view.drawn[:, 0].astype(np.int64)
        left = int(np.floor(self.mean * len(drawn) + 1e-9)) - int(drawn.sum())
        missing = np.where(view.open, (self.min - drawn).clip(min=0), 0)
        if missing.any():
            return _within(missing, left).astype(np.int32)[:, None]
        worth = np.where(view.open & (drawn < self.max), marginal_values(view, self.max), -1.0)
        chosen = np.argsort(-worth, kind="stable")[: max(0, min(left, int(np.ceil(ROUND * max(left, 0)))))]
        want = np.zeros(len(drawn), np.int32)
        want[chosen[worth[chosen] >= 0]] = 1
        return want[:, None]


def marginal_values(view: View, most: int) -> Float:
    """What a further draw is worth to each question, float64 [problems], at least 0.

    With the votes a >= b of the two leading answers, the probability that the leader is the likelier of the two has a
    Beta(a + 1, b + 1) posterior (see ``asc``). No single draw may be able to turn the leader, so the value is the
    largest expected gain of that probability *per draw* over all numbers of further votes (`gains`), times the share
    (a + b + 2) / (draws + 3) of the draws that are expected to go to one of the two.
    """
    first, second = top_two(view)
    share = (first + second + 2) / (view.drawn.sum(1) + 3)
    worth: Float = gains(most)[np.minimum(first, most), np.minimum(second, most)] * share
    return worth


@lru_cache(maxsize=16)
def gains(most: int) -> Float:
    """The largest expected gain per vote after a and b votes, float64 [most + 1, most + 1]; 0 from ``most`` votes on.

    h(a, b) = max(P, 1 - P), P = P(Beta(a + 1, b + 1) > 1/2), is the probability of naming the likelier of two
    answers. Its expectation after m more votes is V_m(a, b) = (a + 1) / (a + b + 2) V_{m-1}(a + 1, b) + the same
    for b, V_0 = h; the gain is the maximum of (V_m - h) / m over 1 <= m <= most - a - b.
    """
    size = most + 1
    ahead = beta_above_half(size)
    start = np.maximum(ahead, 1 - ahead)
    votes = np.arange(size)
    total = votes[:, None] + votes
    to_first = (votes[:, None] + 1) / (total + 2)
    value, best = start, np.zeros((size, size))
    for ahead_by in range(1, most + 1):
        grown = np.zeros((size, size))
        grown[:-1, :-1] = to_first[:-1, :-1] * value[1:, :-1] + (1 - to_first[:-1, :-1]) * value[:-1, 1:]
        value = grown
        reach = total <= most - ahead_by
        best = np.where(reach, np.maximum(best, (value - start) / ahead_by), best)
    best.setflags(write=False)
    return best


def beta_above_half(size: int) -> Float:
    """P(Beta(a + 1, b + 1) > 1/2) for a, b < ``size``, float64 [size, size].

    It is the mean of its neighbours: P(a, b) = (P(a - 1, b) + P(a, b - 1)) / 2, with P = 1 beyond b = 0 and 0 beyond
    a = 0.
    """
    table = np.zeros((size, size))
    below = np.zeros(size)
    for first in range(size):
        run = 1.0
        for second in range(size):
            run = 0.5 * (below[second] + run)
            table[first, second] = run
        below = table[first]
    return table


def _within(wanted: NDArray[np.int64], left: int) -> NDArray[np.int64]:
    """``wanted`` cut, from the last problem on, to a sum of at most ``left``."""
    before = np.cumsum(wanted) - wanted
    return np.clip(left - before, 0, wanted)
