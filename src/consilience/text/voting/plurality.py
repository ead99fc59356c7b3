"""The most frequent answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Float, Int, View, vote_counts


@dataclass(frozen=True, slots=True)
class Plurality:
    """The most frequent answer wins, a tie goes to the answer seen first (by draw index, then by arm).

    Confidence is Laplace's rule of succession, (leader's votes + 1) / (draws with an answer + 2), and 0 where no
    draw has one. Source: Wang et al. 2022, arXiv 2203.11171, section 2.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no answer at all, and its confidence, float64 [problems]."""
        counts = vote_counts(view)
        if not counts.shape[1]:
            return np.full(len(counts), -1, np.int32), np.zeros(len(counts))
        leader = _first_seen_among(view, counts == counts.max(1, keepdims=True))
        votes, parsed = counts.max(1), counts.sum(1)
        return leader, np.where(parsed > 0, (votes + 1) / (parsed + 2), 0.0)


def _first_seen_among(view: View, tied: np.ndarray) -> Int:
    """The class of the first draw whose class is ``tied`` (bool [problems, classes]); int32 [problems], -1 = none."""
    order = view.judged().transpose(0, 2, 1).reshape(len(view.answers), -1)
    eligible = (order >= 0) & np.take_along_axis(tied, order.clip(min=0), axis=1)
    first = eligible.argmax(1)
    rows = np.arange(len(order))
    return np.where(eligible[rows, first], order[rows, first], -1).astype(np.int32)
