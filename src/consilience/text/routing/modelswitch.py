"""ModelSwitch: ask the next model only where the one before it contradicts itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Int, View
from consilience.text.routing.arms import arm_top_two, votes_for


@dataclass(frozen=True, slots=True)
class ModelSwitch:
    """Draw ``draws`` replies from the first model; stop if they are consistent, else draw as many from the next.

    Consistency is the share of the model's draws that give its leading answer; a draw without an answer agrees with
    none. All draws made so far are pooled in the vote: ``plurality`` is the authors' released variant, and
    ``entropy-weighted`` the one that weighs each model. Arms are the models in the order they are asked.

    Raises ValueError unless 1 <= models <= 100, 1 <= draws <= 10000 and 0 < threshold <= 1. Source: Chen et al. 2025,
    arXiv 2504.00762; defaults (5 draws, all equal) as in the code at JianhaoChen-nju/ModelSwitch.
    """

    models: int = 2
    draws: int = 5
    threshold: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.models <= 100:
            raise ValueError(f"models must lie between 1 and 100, got {self.models}")
        if not 1 <= self.draws <= 10_000:
            raise ValueError(f"draws must lie between 1 and 10000, got {self.draws}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")

    @property
    def arms(self) -> int:
        """The number of models."""
        return self.models

    @property
    def counts(self) -> tuple[int, ...]:
        """The draws of each model."""
        return (self.draws,) * self.models

    @property
    def max(self) -> int:
        """The draws made where no model is consistent."""
        return self.models * self.draws

    def want(self, view: View) -> Int:
        """What the model whose turn it is has yet to draw; int32 [problems, arms]."""
        missing = (self.draws - view.drawn).clip(min=0)
        leader, _ = arm_top_two(view)
        consistent = (missing == 0) & (leader >= votes_for(self.threshold, self.draws))
        waiting = np.cumsum(missing > 0, axis=1) - (missing > 0) > 0  # an earlier model is not done
        stopped = np.cumsum(consistent, axis=1) > 0
        return np.where(waiting | stopped, 0, missing).astype(np.int32)
