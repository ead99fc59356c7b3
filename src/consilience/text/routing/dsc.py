"""Difficulty-adaptive self-consistency: one draw for what is easy, a predicted number for what is hard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Int, View
from consilience.text.routing.ranking import rank_difficulty
from consilience.text.stopping.criteria import votes_needed


@dataclass(frozen=True, slots=True)
class DifficultyAdaptive:
    """Rank the questions by difficulty, draw once for the easy ones and adaptively for the hard ones.

    From the hardest down every question gets ``presample`` draws, until ``run`` questions one after another are
    answered alike in all of theirs. Those and all easier ones are *easy*: one draw with an answer is enough. The *hard*
    ones are then solved from the easiest up. What the first draws settle is done; for the rest the number of draws is
    predicted as the mean of what the ``neighbours`` questions before needed, rounded to windows of ``window``, and
    grows by a window at a time until the criterion of ``asc`` (``threshold``) has been met, at the latest at ``max``.

    ``difficulty`` is a number per problem, larger = harder, nan = unknown and taken for the hardest; without one the
    model is asked (`rank_difficulty`). Two things differ from the paper's loop over single questions: the search for
    the run draws for all questions it certainly has to look at together, which changes nothing, and hard questions
    are solved in blocks of ``neighbours``, each predicted from the block before, so that a block is drawn at once.

    Raises ValueError unless 1 <= presample <= max <= 10000, run, window and neighbours lie between 1 and 10000, and
    1/2 < threshold < 1. Source: Wang et al. 2024, arXiv 2408.13457, with the parameters of its released code
    (WangXinglin/DSC, cmp_cal.py: 4 draws, a run of 32, 16 neighbours, windows of 4, threshold .95, 40 draws).
    """

    presample: int = 4
    run: int = 32
    neighbours: int = 16
    window: int = 4
    threshold: float = 0.95
    max: int = 40
    coupled: ClassVar[bool] = True
    traits: ClassVar[tuple[str, ...]] = ("difficulty",)
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("run", "neighbours", "window", "max"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise ValueError(f"{name} must lie between 1 and 10000, got {getattr(self, name)}")
        if not 1 <= self.presample <= self.max:
            raise ValueError(f"presample must lie between 1 and max={self.max}, got {self.presample}")
        if not 0.5 < self.threshold < 1:
            raise ValueError(f"threshold must lie strictly between 0.5 and 1, got {self.threshold}")

    async def prepare(self, session: Any, problems: Sequence[Any]) -> dict[str, list[float]]:
        """The difficulty of each problem, as the model ranks them."""
        return {"difficulty": await rank_difficulty(session, problems)}

    def want(self, view: View) -> Int:
        """The draws of the open step; int32 [problems, 1]. All problems of the run must be in the view."""
        drawn = view.drawn[:, 0].astype(np.int64)
        order = hardest_first(view.traits["difficulty"])
        want = np.zeros(len(drawn), np.int64)
        agreed = self._agreed(view)[order]
        looked = _leading((~view.open | (drawn >= self.presample))[order])
        easy_from = self._easy_from(agreed[:looked])
        if easy_from is None and looked < len(order):
            trailing = _leading(agreed[:looked][::-1])
            ahead = order[looked : looked + self.run - trailing]
            want[ahead] = np.where(view.open[ahead], self.presample - drawn[ahead], 0).clip(min=0)
            return want.astype(np.int32)[:, None]
        hard = order if easy_from is None else order[:easy_from]
        easy = order[len(hard) :]
        silent = (view.judged()[easy, 0] < 0).all(1)
        want[easy] = silent & (drawn[easy] < self.presample) & view.open[easy]
        self._solve(view, hard[::-1], drawn, want)
        return want.astype(np.int32)[:, None]

    def _agreed(self, view: View) -> NDArray[np.bool_]:
        """Whether the first ``presample`` draws are there and all give one answer; bool [problems]."""
        first = view.judged()[:, 0, : self.presample]
        if first.shape[1] < self.presample:
            return np.zeros(len(first), bool)
        return (first == first[:, :1]).all(1) & (first[:, 0] >= 0)

    def _easy_from(self, agreed: NDArray[np.bool_]) -> int | None:
        """Where in the order (hardest first) the first run of ``run`` agreeing questions begins; None: nowhere."""
        if len(agreed) < self.run:
            return None
        lengths = np.convolve(agreed, np.ones(self.run, np.int64))[self.run - 1 : len(agreed)]
        found = np.flatnonzero(lengths == self.run)
        return int(found[0]) if found.size else None

    def _solve(self, view: View, hard: NDArray[np.intp], drawn: NDArray[np.int64], want: NDArray[np.int64]) -> None:
        """Fill in what the first block of hard questions (easiest first) that is not solved yet wants."""
        begun = np.flatnonzero(drawn[hard] > self.presample)
        last = int(begun[-1]) // self.neighbours if begun.size else 0  # the blocks before it are solved
        predicted = self.presample
        for start in range(max(last - 1, 0) * self.neighbours, len(hard), self.neighbours):
            block = hard[start : start + self.neighbours]
            needed = needed_draws(view.judged()[block, 0], self.threshold, self.max)
            if start >= last * self.neighbours:
                want[block] = np.where(view.open[block], self._missing(drawn[block], needed, predicted), 0)
                if want[block].any():
                    return
            windows = round(float(np.where(needed > 0, needed, self.max).mean()) / self.window)
            predicted = min(max(windows * self.window, self.presample), self.max)

    def _missing(self, drawn: NDArray[np.int64], needed: NDArray[np.int64], predicted: int) -> NDArray[np.int64]:
        """What each question of a block lacks: up to its predicted size, then window by window; int64 [problems]."""
        settled = (needed > 0) & (needed <= self.presample)
        size = np.where(settled, self.presample, predicted)
        windows = -(-(drawn - size).clip(min=0) // self.window)
        windows = windows + ((needed == 0) & (drawn >= size + windows * self.window))
        return (np.minimum(size + windows * self.window, self.max) - drawn).clip(min=0)


def hardest_first(difficulty: NDArray[np.float64]) -> NDArray[np.intp]:
    """The problems from the hardest to the easiest, unknown ones first; ties in the order of the problems."""
    return np.argsort(-np.where(np.isnan(difficulty), np.inf, difficulty), kind="stable")


def needed_draws(labels: Int, threshold: float, most: int) -> NDArray[np.int64]:
    """After how many draws the criterion of ``asc`` is met first, int64 [problems]; 0 = not within ``labels``.

    labels: int32 [problems, draws], -1 = no answer or not to be judged.
    """
    table = votes_needed(threshold, most)
    rows = np.arange(len(labels))
    votes = np.zeros((len(labels), int(labels.max(initial=-1)) + 1), np.int64)
    leader = np.full(len(labels), -1)
    first, second, needed = (np.zeros(len(labels), np.int64) for _ in range(3))
    for draw in range(min(labels.shape[1], most)):
        voting = rows[(labels[:, draw] >= 0) & (needed == 0)]
        label = labels[voting, draw]
        votes[voting, label] += 1
        own = votes[voting, label]
        same, ahead = label == leader[voting], own > first[voting]
        second[voting] = np.where(same, second[voting], np.minimum(np.maximum(second[voting], own), first[voting]))
        first[voting] = np.maximum(first[voting], own)
        leader[voting] = np.where(ahead, label, leader[voting])
        met = voting[first[voting] >= table[second[voting]]]
        needed[met] = draw + 1
    return needed


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many flags in a row are set from the start."""
    return len(flags) if flags.all() else int(flags.argmin())
