"""A fixed number of draws: self-consistency, and the single draw it is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.rules import Int, View
from consilience.text.stopping.counts import Bool


@dataclass(frozen=True, slots=True)
class SelfConsistency:
    """Draw ``n`` replies whatever they say, then vote over all of them.

    Raises ValueError unless 1 <= n <= 10000. Source: Wang et al. 2022, arXiv 2203.11171, section 2 (the paper uses
    n = 40).
    """

    n: int = 40
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.n <= 10_000:
            raise ValueError(f"n must lie between 1 and 10000, got {self.n}")

    @property
    def max(self) -> int:
        """The number of draws."""
        return self.n

    def want(self, view: View) -> Int:
        """All draws that are missing; int32 [problems, arms]."""
        return (self.n - view.drawn).clip(min=0)

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """The draws there are, at most ``n``, int32 [problems], and whether they are ``n``; for one arm."""
        return _at_most(view, self.n)


@dataclass(frozen=True, slots=True)
class One:
    """A single draw, the baseline of every comparison."""

    max: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()

    def want(self, view: View) -> Int:
        """One draw where there is none; int32 [problems, arms]."""
        return (1 - view.drawn).clip(min=0)

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """One draw where there is one, int32 [problems], and whether there is; for one arm."""
        return _at_most(view, 1)


def _at_most(view: View, most: int) -> tuple[Int, Bool]:
    drawn = view.drawn[:, 0]
    return np.minimum(drawn, np.int32(most)), drawn >= most
