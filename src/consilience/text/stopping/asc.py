"""Adaptive consistency with the Beta criterion, by its closed form."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import numpy as np

from consilience.rules import Int, View, top_two


@dataclass(frozen=True, slots=True)
class AdaptiveConsistency:
    """Stop once the leader is ahead of the runner-up with posterior probability at least ``threshold``.

    With v1 >= v2 votes for the two most frequent answers and a uniform prior on their share, that probability is
    P(Beta(v1 + 1, v2 + 1) > 1/2) = P(Bin(v1 + v2 + 1, 1/2) <= v1), so the rule is an integer table. Raises
    ValueError unless 1/2 < threshold < 1 and 1 <= max <= 10000. Source: Aggarwal et al. 2023, arXiv 2305.11860,
    section 2.2 (threshold .95, max 40).
    """

    threshold: float = 0.95
    max: int = 40
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold < 1:
            raise ValueError(f"threshold must lie strictly between 0.5 and 1, got {self.threshold}")
        if not 1 <= self.max <= 10_000:
            raise ValueError(f"max must lie between 1 and 10000, got {self.max}")

    def want(self, view: View) -> Int:
        """How many further votes the leader would need in a row, at most up to ``max``; int32 [problems, 1]."""
        first, second = top_two(view)
        missing = votes_needed(self.threshold, self.max)[second] - first
        return np.clip(np.minimum(missing, self.max - view.drawn[:, 0]), 0, None).astype(np.int32)[:, None]


@lru_cache(maxsize=64)
def votes_needed(threshold: float, most: int) -> np.ndarray:
    """Votes the leader needs against a runner-up with 0, 1, ..., ``most`` votes; int64 [most + 1], increasing.

    Exact integer arithmetic: with n = v1 + v2 + 1 and S(n, k) = sum of C(n, j) over j <= k, the criterion is
    S(n, v1) >= threshold * 2^n, and S(n + 1, k) = 2 S(n, k) - C(n, k) walks to the next table entry. Entries
    beyond ``most`` draws are out of reach and set to most + 1.
    """
    bound = Fraction(threshold)
    table = np.full(most + 1, most + 1, dtype=np.int64)
    first, n, below, term = 0, 1, 1, 1  # S(1, 0) = 1, C(1, 0) = 1: no votes at all
    for second in range(most + 1):
        while below * bound.denominator < bound.numerator << n:
            # one more vote for the leader: S(n+1, k+1) = 2 S(n, k) - C(n, k) + C(n+1, k+1)
            after = term * (n + 1) // (first + 1)
            below, term, first, n = 2 * below - term + after, after, first + 1, n + 1
            if first + second > most:
                return table
        table[second] = first
        # one more vote for the runner-up: S(n+1, k) = 2 S(n, k) - C(n, k), C(n+1, k) = C(n, k) (n+1) / (n+1-k)
        below, term, n = 2 * below - term, term * (n + 1) // (n + 1 - first), n + 1
    return table
