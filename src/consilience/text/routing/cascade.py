"""A cascade of models: the cheap one answers where it agrees with itself, else the question goes up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Int, View
from consilience.text.routing.arms import arm_top_two, numbers, votes_for


@dataclass(frozen=True, slots=True)
class Cascade:
    """Models from cheap to dear; the first whose draws agree in a share of at least its threshold answers alone.

    Its vote is ``last-arm``, the answer of the model that was accepted: unlike in ``modelswitch`` a
    model's draws are forgotten when the question goes up. The last model is never tested. A test ends with the draw
    that settles it (enough votes for one answer, or too few left; for the last model, a leader out of reach), which
    changes no verdict and saves draws. A draw without an answer agrees with none. ``draws`` and ``threshold`` are
    one number, or one for each model (each but the last): ``cascade:models=2,draws="20,1",threshold=0.6``.

    Raises ValueError unless 2 <= models <= 100, draws are whole numbers in [1, 10000] and thresholds lie in
    (0.5, 1]: only a majority cannot be overtaken. Source: Yue et al. 2023, arXiv 2310.03094 (vote-based decision);
    a learned score in place of the agreement is FrugalGPT, Chen et al. 2023, arXiv 2305.05176.
    """

    models: int = 2
    draws: str = "5"
    threshold: str = "0.8"
    vote: ClassVar[str] = "last-arm"
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.models <= 100:
            raise ValueError(f"models must lie between 2 and 100, got {self.models}")
        draws = numbers(self.draws, "draws", self.models)
        if not all(value.is_integer() and 1 <= value <= 10_000 for value in draws):
            raise ValueError(f"draws must be whole numbers between 1 and 10000, got {self.draws!r}")
        if not all(0.5 < value <= 1 for value in numbers(self.threshold, "threshold", self.models - 1)):
            raise ValueError(f"threshold must lie in (0.5, 1], got {self.threshold!r}")

    @property
    def arms(self) -> int:
        """The number of models."""
        return self.models

    @property
    def counts(self) -> tuple[int, ...]:
        """The draws of each model."""
        return tuple(int(value) for value in numbers(self.draws, "draws", self.models))

    @property
    def max(self) -> int:
        """The draws made where no model is accepted."""
        return sum(self.counts)

    def want(self, view: View) -> Int:
        """The least number of draws that could settle the open test; int32 [problems, arms], one arm at most."""
        leader, second = arm_top_two(view)
        left = (np.array(self.counts) - view.drawn).clip(min=0)
        accepted, missing = self._tested(leader, left)
        missing[:, -1] = _to_win(leader[:, -1], second[:, -1], left[:, -1])
        earlier = np.cumsum(missing > 0, axis=1) - (missing > 0) > 0
        done = np.cumsum(accepted, axis=1) > 0
        return np.where(earlier | done, 0, missing).astype(np.int32)

    def _tested(self, leader: Int, left: NDArray[np.integer]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Which arms are accepted, and how many draws at least until each arm's test is settled; [problems, arms]."""
        shares = (*numbers(self.threshold, "threshold", self.models - 1), 1.0)
        needed = np.array([votes_for(share, draws) for share, draws in zip(shares, self.counts, strict=True)])
        lacking = needed - leader
        accepted = (lacking <= 0) & (np.arange(self.models) < self.models - 1)
        spare = left - lacking  # so many draws may go to other answers before the test is failed
        missing = np.where((lacking <= 0) | (spare < 0), 0, np.minimum(lacking, spare + 1))
        return accepted, missing.astype(np.int64)


def _to_win(leader: Int, second: Int, left: NDArray[np.integer]) -> NDArray[np.int64]:
    """How many draws in a row for the leader put it out of reach of the runner-up and all that is left; [problems].

    A tie would go to the answer seen first, which nothing here knows, so being level is not out of reach.
    """
    open_ = leader - second <= left
    return np.where(open_ & (left > 0), (left - (leader - second)) // 2 + 1, 0).astype(np.int64)
