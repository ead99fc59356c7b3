"""The greedy reply beside sampled ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from consilience.rules import Int, View


@dataclass(frozen=True, slots=True)
class HedgedSampling:
    """``greedy`` of ``n`` draws come at temperature 0, the rest at the run's own temperature.

    Two arms of one model: arm 0 is the greedy one. It hedges against a temperature that is too high for a language or
    task, at the price of some diversity. The paper has one greedy among five draws.

    Raises ValueError unless 0 <= greedy <= n and 1 <= n <= 10000; `want` for a view without exactly two arms. Source:
    Khairi et al. 2025, arXiv 2506.20544 (hedged sampling).
    """

    n: int = 5
    greedy: int = 1
    arms: ClassVar[int] = 2
    settings: ClassVar[tuple[Mapping[str, Any], ...]] = ({"temperature": 0.0}, {})
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 10_000:
            raise ValueError(f"n must lie between 1 and 10000, got {self.n}")
        if not 0 <= self.greedy <= self.n:
            raise ValueError(f"greedy must lie between 0 and n = {self.n}, got {self.greedy}")

    @property
    def counts(self) -> tuple[int, ...]:
        """The greedy and the sampled draws."""
        return self.greedy, self.n - self.greedy

    @property
    def max(self) -> int:
        """The number of draws, both arms together."""
        return self.n

    def want(self, view: View) -> Int:
        """All draws that are missing of each arm; int32 [problems, 2]."""
        if view.drawn.shape[1] != 2:
            raise ValueError(f"hedged draws from two arms, greedy and sampled; the view has {view.drawn.shape[1]}")
        return (np.array(self.counts, np.int32) - view.drawn).clip(min=0).astype(np.int32)
