"""The most frequent answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

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
        order = view.judged().transpose(0, 2, 1).reshape(len(view.answers), -1)
        if not order.shape[1]:
            return np.full(len(order), -1, np.int32), np.zeros(len(order))
        votes = _votes_of_own_answer(order) if order.shape[1] <= NARROW else _votes_by_class(view, order)
        first, rows = votes.argmax(1), np.arange(len(order))
        leader, most = order[rows, first], votes[rows, first]
        parsed = (order >= 0).sum(1)
        return np.where(most > 0, leader, np.int32(-1)), np.where(parsed > 0, (most + 1) / (parsed + 2), 0.0)


NARROW = 16
"""Up to so many draws their answers are compared pair by pair, which is quicker than counting classes."""


def _votes_of_own_answer(order: Int) -> NDArray[np.integer]:
    """How many draws of its row have each draw's answer, [problems, draws], 0 for a draw without one."""
    votes = np.zeros(order.shape, np.int8)
    for other in range(order.shape[1]):
        votes += order == order[:, other : other + 1]
    return np.where(order >= 0, votes, np.int8(0))


def _votes_by_class(view: View, order: Int) -> NDArray[np.integer]:
    """As `_votes_of_own_answer`, by way of the votes of each class."""
    counts = vote_counts(view)
    if not counts.shape[1]:
        return np.zeros(order.shape, np.int32)
    return np.where(order >= 0, np.take_along_axis(counts, order.clip(min=0), axis=1), 0)
