"""Adaptive consistency: draw until the leading answer has won, by one of four criteria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Int, View, vote_counts
from consilience.text.stopping.counts import Bool, Rows, by_draw, first_stop
from consilience.text.stopping.criteria import Beta, Criteria, Criterion, Dirichlet, Entropy, Majority


@dataclass(frozen=True, slots=True)
class AdaptiveConsistency:
    """Stop once the leader is ahead of the runner-up with posterior probability at least ``threshold``.

    With v1 >= v2 votes for the two most frequent answers and a uniform prior on their share, that probability is
    P(Beta(v1 + 1, v2 + 1) > 1/2) = P(Bin(v1 + v2 + 1, 1/2) <= v1), so the rule is an integer table.

    Raises ValueError unless 1/2 < threshold < 1 and 1 <= max <= 10000. Source: Aggarwal et al. 2023, arXiv 2305.11860,
    section 2.2 (threshold .95, max 40).
    """

    threshold: float = 0.95
    max: int = 40
    needs: ClassVar[tuple[str, ...]] = ()
    criterion: ClassVar[type[Criteria]] = Beta

    def __post_init__(self) -> None:
        least = self.criterion.least
        if not least < self.threshold < 1:
            raise ValueError(f"threshold must lie strictly between {least:g} and 1, got {self.threshold}")
        if not 1 <= self.max <= 10_000:
            raise ValueError(f"max must lie between 1 and 10000, got {self.max}")

    def want(self, view: View) -> Int:
        """How many further draws the criterion needs at least, at most up to ``max``; int32 [problems, 1]."""
        counts = vote_counts(view)
        padded = np.concatenate([counts, np.zeros((len(counts), Dirichlet.places), np.int32)], axis=1)
        ordered = np.sort(padded, axis=1)[:, ::-1]
        left = self.max - view.drawn[:, 0]
        return np.clip(np.minimum(self._judge().missing(ordered), left), 0, None).astype(np.int32)[:, None]

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """Draws judged when they come one by one, int32 [problems], and whether the rule stopped; see `first_stop`."""
        judge = self._judge()

        def stops(rows: Rows, width: int) -> Bool:
            return judge.stops(by_draw(view, rows, width))

        return first_stop(view, self.max, stops)

    def _judge(self) -> Criterion:
        return self.criterion(self.threshold, self.max)


@dataclass(frozen=True, slots=True)
class DirichletConsistency(AdaptiveConsistency):
    """Stop once the leader is ahead of all other answers with posterior probability at least ``threshold``.

    The shares of the five most frequent answers have a uniform prior; with one or two it is the Beta criterion. Raises
    as `AdaptiveConsistency`. Source: Aggarwal et al. 2023, arXiv 2305.11860, and their package AdaptiveConsistency
    1.0.0 (threshold .95).
    """

    criterion: ClassVar[type[Criteria]] = Dirichlet


@dataclass(frozen=True, slots=True)
class EntropyConsistency(AdaptiveConsistency):
    """Stop once the entropy of the answers' shares, over its largest for that many answers, is at most ``threshold``.

    A single answer is taken together with one vote for another; nothing stops before the second vote. Raises
    ValueError unless 0 < threshold < 1 and 1 <= max <= 10000. Source: Aggarwal et al. 2023, arXiv 2305.11860, and
    their package AdaptiveConsistency 1.0.0 (threshold .75).
    """

    threshold: float = 0.75
    criterion: ClassVar[type[Criteria]] = Entropy


@dataclass(frozen=True, slots=True)
class MajorityConsistency(AdaptiveConsistency):
    """Stop once the leader's share of the votes is at least ``threshold``, not before the second vote.

    Raises ValueError unless 0 < threshold < 1 and 1 <= max <= 10000. Source: Aggarwal et al. 2023, arXiv 2305.11860,
    and their package AdaptiveConsistency 1.0.0 (threshold .8).
    """

    threshold: float = 0.8
    criterion: ClassVar[type[Criteria]] = Majority


BY_CRITERION: dict[str, type[AdaptiveConsistency]] = {
    "beta": AdaptiveConsistency,
    "dirichlet": DirichletConsistency,
    "entropy": EntropyConsistency,
    "majority": MajorityConsistency,
}
"""The rule for each criterion."""
