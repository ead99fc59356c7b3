"""Early stopping by the model's own confidence in its draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consilience.rules import Int, View
from consilience.text.stopping.counts import Bool, Rows, by_draw, field_by_draw, first_stop, running_max, running_sums

_OF = ("draw", "vote")
SLACK = 1e-12
"""What a share of the confidences may lose to rounding and still reach the threshold."""


@dataclass(frozen=True, slots=True)
class SelfCalibration:
    """Stop with the first draw, or the first vote, whose confidence reaches ``threshold``, at the latest at ``max``.

    ``of=draw`` looks at each draw's confidence (early stopping for best-of-N: vote ``best-of-n:field=confidence``),
    ``of=vote`` at the leading answer's share of all confidence given so far, from the second draw on (adaptive
    self-consistency with confidence: vote ``reward-weighted:field=confidence``). The confidence is the number
    ``field`` of a draw, such as the model's probability of "Yes" to "Is the answer correct?"; below 0 it counts as 0.
    A draw without an answer or without the field stops nothing and adds nothing.

    Raises ValueError unless ``of`` is draw or vote, threshold is positive (and at most 1 for a vote), and
    1 <= max <= 10000. Source: Huang et al. 2025, arXiv 2503.00031 (early stopping for best-of-N; adaptive
    self-consistency with confidence), checked against sampling_methods/sample.py of the authors' code, whose threshold
    (0.8) and number of draws (16) are the defaults.
    """

    threshold: float = 0.8
    max: int = 16
    of: str = "draw"
    field: str = "confidence"

    def __post_init__(self) -> None:
        if self.of not in _OF:
            raise ValueError(f"of must be one of {', '.join(_OF)}, got {self.of!r}")
        if not (self.threshold > 0 and np.isfinite(self.threshold)) or (self.of == "vote" and self.threshold > 1):
            raise ValueError(f"threshold must be positive, and at most 1 for a vote, got {self.threshold}")
        if not 1 <= self.max <= 10_000:
            raise ValueError(f"max must lie between 1 and 10000, got {self.max}")

    @property
    def needs(self) -> tuple[str, ...]:
        """The field that holds the confidence."""
        return (self.field,)

    def want(self, view: View) -> Int:
        """One draw while no confidence was high enough, two before the first for a vote; int32 [problems, 1]."""
        drawn, width = view.drawn[:, 0], view.answers.shape[2]
        left = (self.max - drawn).clip(min=0)
        judged = np.arange(width)[:, None] < drawn
        stopped = (self._stops(view, slice(None), width) & judged).any(0)
        first = np.where(drawn == 0, 2, 1) if self.of == "vote" else 1
        return np.where(stopped, 0, np.minimum(left, first)).astype(np.int32)[:, None]

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """Draws judged when they come one by one, int32 [problems], and whether the rule stopped; see `first_stop`."""
        return first_stop(view, self.max, lambda rows, width: self._stops(view, rows, width), cells=9)

    def _stops(self, view: View, rows: Rows, width: int) -> Bool:
        """Whether the confidence is high enough with each of the first ``width`` draws; bool [width, rows]."""
        labels, values = by_draw(view, rows, width), field_by_draw(view, self.field, rows, width)
        usable = (labels >= 0) & np.isfinite(values)
        if self.of == "draw":
            return usable & (values >= self.threshold)
        weights = np.where(usable, values, 0.0).clip(min=0)
        total = weights.cumsum(0)
        leading = running_max(running_sums(np.where(usable, labels, labels.dtype.type(-1)), weights))
        return (usable.cumsum(0) > 1) & (total > 0) & (leading >= (self.threshold - SLACK) * total)
