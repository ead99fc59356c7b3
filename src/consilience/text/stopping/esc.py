"""Early-stopping self-consistency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Int, View
from consilience.text.stopping.counts import Bool, Rows, by_draw, first_stop


@dataclass(frozen=True, slots=True)
class EarlyStopping:
    """Draw in windows of ``window``; stop as soon as all answers of one window agree, at the latest at ``max``.

    The vote then counts everything drawn. A window in which a draw has no answer is not unanimous; the last window
    may be shorter. Raises ValueError unless 1 <= window <= max <= 10000. Source: Li et al. 2024, arXiv 2401.10480,
    algorithm 1 (window 5, max 40).
    """

    window: int = 5
    max: int = 40
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.max > 10_000:
            raise ValueError(f"max must be at most 10000, got {self.max}")
        if not 1 <= self.window <= self.max:
            raise ValueError(f"window must lie between 1 and max={self.max}, got {self.window}")

    def want(self, view: View) -> Int:
        """What is missing of the open window, zero once a whole window agreed; int32 [problems, 1]."""
        drawn = view.drawn[:, 0]
        rest = np.minimum(self.window - drawn % self.window, self.max - drawn)
        return np.where(self._agreed(view) | (drawn >= self.max), 0, rest).astype(np.int32)[:, None]

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """Draws judged when they come one by one, int32 [problems], and whether the rule stopped; see `first_stop`."""

        def stops(rows: Rows, width: int) -> Bool:
            labels = by_draw(view, rows, width)
            hits = np.zeros(labels.shape, bool)
            whole = labels[: width - width % self.window].reshape(-1, self.window, labels.shape[1])
            hits[self.window - 1 :: self.window] = (whole == whole[:, :1]).all(1) & (whole[:, 0] >= 0)
            return hits

        return first_stop(view, self.max, stops, self.window)

    def _agreed(self, view: View) -> np.ndarray:
        """Whether some complete window (or the shorter last one) is unanimous; bool [problems]."""
        answers, drawn = view.judged()[:, 0], view.drawn[:, 0]
        agreed = np.zeros(len(answers), bool)
        for start in range(0, min(answers.shape[1], self.max), self.window):
            stop = min(start + self.window, self.max)
            part = answers[:, start:stop]
            same = (part == part[:, :1]).all(1) & (part[:, 0] >= 0)
            agreed |= same & (drawn >= stop)
        return agreed
