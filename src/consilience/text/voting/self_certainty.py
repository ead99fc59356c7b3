"""Borda voting by self-certainty, and the score itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from consilience.rules import Float, Int, View
from consilience.text.voting.weighted import elect, relative, sighted


@dataclass(frozen=True, slots=True)
class SelfCertainty:
    """Draws are ranked by certainty, the draw of rank r of N votes with (N - r + 1)^power, the largest sum wins.

    ``power`` 0 is the plurality, a large one the answer of the most certain draw. N counts every draw that has the
    score; one without an answer keeps its rank and does not vote, as in the authors' code, whose default power is
    0.5. Of equal scores the draw seen first ranks first; a tie of sums goes
    to the answer seen first. Confidence is the winner's share of the votes.

    The score, `mean_divergence_from_uniform`, needs the whole next-token distribution, which endpoints do not give: it
    is read from the draw field ``self_certainty``; another field (``reward``, ``mean_logprob``) makes it Borda voting
    by that. Raises ValueError for a negative or infinite power. Source: Kang et al. 2025, arXiv 2502.18581.
    """

    power: float = 0.5
    field: str = "self_certainty"

    def __post_init__(self) -> None:
        if not (self.power >= 0 and np.isfinite(self.power)):
            raise ValueError(f"power must be at least 0 and finite, got {self.power}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The field that ranks the draws, larger = more certain."""
        return (self.field,)

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = no ballot, and its share of the votes, float64 [problems]."""
        labels, scores = sighted(view, self.field)
        scored = ~np.isnan(scores)
        order = np.where(scored, -scores, np.inf).argsort(1, kind="stable")
        rank = order.argsort(1)  # 0 = most certain; draws without a score come last
        beaten = np.where(scored, scored.sum(1, keepdims=True) - rank, 1)
        voters = np.where(scored, labels, np.int32(-1))
        return elect(voters, relative(voters, self.power * np.log(beaten)))


def mean_divergence_from_uniform(logprobs: ArrayLike) -> float:
    """Self-certainty: the mean over tokens of KL(uniform || next-token distribution), in nats; 0 for uniform.

    logprobs: float [tokens, vocabulary], the natural log-probabilities of *every* token of the vocabulary, all finite.
    Raises ValueError on another shape, an empty one, or values that are not finite. Source: Kang et al. 2025,
    arXiv 2502.18581: ``-(1 / (n V)) sum_i sum_j log(V p(j | x, y_<i))``.
    """
    table = np.asarray(logprobs, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise ValueError(f"logprobs must be finite [tokens, vocabulary] and not empty, got shape {table.shape}")
    return float(-table.mean() - np.log(table.shape[1]))
