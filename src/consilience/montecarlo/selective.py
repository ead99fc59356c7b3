"""Answering only where the confidence is high enough: risk against coverage.

Verdicts of equal confidence cannot be told apart by a threshold, so no number here depends on the order in which they
are given: below a class of ties only the average over its orders is meant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Risk (share wrong) among the verdicts with a confidence of at least a threshold, for each useful threshold.

    threshold: float64 [thresholds], the distinct confidences, falling; coverage: the share of verdicts answered
    there; risk: the share wrong among them; count: how many verdicts there are; best_aurc: the area of the best order
    there is, right verdicts before wrong ones.
    """

    threshold: Float
    coverage: Float
    risk: Float
    count: int
    best_aurc: float

    def risk_at(self, coverage: ArrayLike) -> Float:
        """Risk of the most confident share of the verdicts; float64, the shape of coverage, each in (0, 1].

        Verdicts are whole, so it is that of the least number that reaches the coverage; a class of ties that is cut
        by it counts with its mean. Raises ValueError outside (0, 1] and without any verdict.
        """
        share = np.asarray(coverage, dtype=np.float64)
        if not ((share > 0) & (share <= 1)).all() or self.count == 0:
            raise ValueError("coverage must be above 0 and at most 1, and there must be verdicts")
        return self._by_count()[np.ceil(share * self.count - 1e-9).astype(np.int64).clip(1) - 1]

    def accuracy_at(self, coverage: ArrayLike) -> Float:
        """Selective accuracy at a coverage: 1 - `risk_at`."""
        return 1 - self.risk_at(coverage)

    def coverage_at(self, risk: ArrayLike) -> Float:
        """The largest coverage that some threshold reaches with a risk of at most ``risk``; 0 where none does.

        float64, the shape of risk. The threshold is chosen on the very verdicts it is judged by: on new ones the risk
        will be somewhat higher. Raises ValueError on nan.
        """
        bound = np.asarray(risk, dtype=np.float64)
        if np.isnan(bound).any():
            raise ValueError("risk must be a number")
        kept = self.risk <= bound[..., None] + 1e-12
        return np.where(kept, self.coverage, 0.0).max(axis=-1, initial=0.0)

    def aurc(self) -> float:
        """Area under the curve: the mean over m = 1 .. n of the risk of the m most confident verdicts; nan if empty.

        In expectation over the orders of ties. Source: Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206.
        """
        return float(self._by_count().mean()) if self.count else float("nan")

    def excess_aurc(self) -> float:
        """`aurc` minus that of the best order, so that the accuracy itself does not count; at least 0, nan if empty.

        The best area is the exact one for n verdicts; for many it tends to ``r + (1 - r) log(1 - r)`` at risk r, the
        form in the paper. Source: Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206.
        """
        return self.aurc() - self.best_aurc

    def _by_count(self) -> Float:
        """Expected risk of the m most confident verdicts, m = 1 .. n; float64 [n]."""
        ends = np.rint(self.coverage * self.count)
        wrong = np.interp(np.arange(1, self.count + 1), np.r_[0, ends], np.r_[0, self.risk * ends])
        return wrong / np.arange(1, self.count + 1)


def risk_coverage(confidence: ArrayLike, right: ArrayLike) -> RiskCoverage:
    """The risk-coverage curve of a confidence.

    confidence: float [verdicts], any real scale, -inf for an abstention, larger is surer; right: bool, or the share
    of repeats that were right, [verdicts]; a verdict whose ``right`` is nan (no gold answer) is left out. Raises
    ValueError on shapes that do not fit, nan confidence and values of right outside [0, 1].

    Source: El-Yaniv and Wiener 2010 (J. Mach. Learn. Res. 11); Geifman and El-Yaniv 2017, arXiv 1705.08500.
    """
    sure, hit = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if sure.ndim != 1 or sure.shape != hit.shape:
        raise ValueError(f"confidence and right must be [verdicts] both, got {sure.shape} and {hit.shape}")
    known = ~np.isnan(hit)
    sure, hit = sure[known], hit[known]
    if np.isnan(sure).any() or not ((hit >= 0) & (hit <= 1)).all():
        raise ValueError("confidence must not be nan, and right must lie between 0 and 1")
    levels, place, size = np.unique(-sure, return_inverse=True, return_counts=True)
    ends = size.cumsum()
    wrong = np.bincount(place, weights=1 - hit, minlength=len(levels)).cumsum()
    total = max(1, len(sure))
    best = (np.sort(1 - hit).cumsum() / np.arange(1, len(hit) + 1)).mean() if len(hit) else np.nan
    return RiskCoverage(-levels, ends / total, wrong / np.maximum(ends, 1), len(sure), float(best))
