"""The plurality, or no answer where the votes do not establish one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from consilience.rules import Float, Int, View, top_two
from consilience.text.voting.plurality import Plurality


@dataclass(frozen=True, slots=True)
class SelectiveEnsembles:
    """The plurality wins if its lead over the runner-up is significant, else the vote abstains (winner -1).

    The test is the two-sided exact binomial test of the leader's votes among those for the two leading answers
    against 1/2; it passes at a p-value of at most ``alpha``. Whatever the model's distribution, an answer that is not
    its most likely one is then returned with probability at most ``alpha``. With ``alpha=0.05`` fewer than 6 votes
    always abstain. It holds for a number of draws fixed beforehand: after a rule that looks at the votes to stop
    (`esc`, `asc`) it does not. Confidence is 1 - p-value, 0 where it abstains.

    Raises ValueError unless 0 < alpha < 1. Source: Black, Leino and Fredrikson 2022, arXiv 2111.08230, algorithm 2 and
    theorem 4.1; the test of winner against runner-up is that of Hung and Fithian 2019 (Ann. Stat. 47).
    """

    alpha: float = 0.05
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {self.alpha}")

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winner, int32 [problems], -1 = abstains or no answer, and its confidence, float64 [problems]."""
        leader, _ = Plurality().decide(view)
        p = lead_p_value(*top_two(view))
        passes = (leader >= 0) & (p <= self.alpha * (1 + 1e-9))  # the factor is for rounding alone
        return np.where(passes, leader, np.int32(-1)), np.where(passes, 1 - p, 0.0)


def lead_p_value(first: ArrayLike, second: ArrayLike) -> Float:
    """Two-sided exact p-value of a lead of ``first`` over ``second`` votes against even odds; 1 without a lead.

    first >= second >= 0: int [...]; returns float64 [...], ``min(1, 2 P(X >= first))``, X ~ Bin(first + second, 1/2).
    """
    from scipy.special import betainc  # type: ignore[import-untyped,unused-ignore]

    ahead, behind = np.asarray(first, np.float64), np.asarray(second, np.float64)
    tail = np.where(ahead > behind, betainc(np.maximum(ahead, 1), behind + 1, 0.5), 1.0)
    return np.minimum(2 * tail, 1.0)
