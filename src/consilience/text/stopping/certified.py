"""Stopping with a certificate: the leading answer is, at a chosen error, a most probable answer of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from consilience.montecarlo.betting import (
    Bets,
    Bool,
    Float,
    anytime_level,
    blocks,
    certified,
    e_bh,
    e_values,
    place_bets,
    wins_needed,
)
from consilience.rules import Int, View
from consilience.text.stopping.counts import Rows, by_draw, first_stop, renumbered, running_counts

NEVER = np.int32(2**30)
"""More draws than any rule may ask for."""


@dataclass(frozen=True, slots=True)
class Certified:
    """Stop once the leading answer is certified, at ``error``, to be a plurality answer of the model.

    Against every other answer, also those never given, a bet on the leader is placed before each draw; an answer
    whose opponent has multiplied his stake by 1/error is eliminated for good, and the leader is certified when it is
    the only one left. However often one looks and however many answers there are, the probability of certifying an
    answer that is not a most probable one is at most ``error`` per question. At ``max`` without a certificate the
    question stays undecided and the vote gives the leader. Unanimous draws are certified with draw 7, 6 and 10 at
    error 0.05, 0.1 and 0.01.

    A draw without an answer neither wins nor loses a bet: the certificate is about the answers that could be read.
    Several arms are judged by draw index, arm by arm, up to the first draw that is missing; then the same answer has
    to be most probable in each arm. A call costs O(problems x draws x classes), without a loop over draws.

    Raises ValueError unless 0 < error < 1, max <= 10000, and ``max`` unanimous draws would be certified. Source: the
    theorem and proof in docs/guide/certified.md; Ville's inequality (Ville 1939); related stopping rules: Anand Jain
    et al. 2022 (PPR-1v1), arXiv 2109.05047, and arXiv 2510.17472.
    """

    error: float = 0.05
    max: int = 40
    needs: ClassVar[tuple[str, ...]] = ()
    remarked: ClassVar[tuple[str, ...]] = ("level", "e_value")

    def __post_init__(self) -> None:
        if not 0 < self.error < 1:
            raise ValueError(f"error must lie strictly between 0 and 1, got {self.error}")
        if not 1 <= self.max <= 10_000:
            raise ValueError(f"max must lie between 1 and 10000, got {self.max}")
        least = int(wins_needed(self.error, self.max)[0]) + 1
        if least > self.max:
            raise ValueError(
                f"max must allow for a certificate: {self.max} unanimous draws are too few at error={self.error}"
            )

    def want(self, view: View) -> Int:
        """Draws that are certainly missing to a certificate, at most up to ``max``; int32 [problems, arms]."""
        answers, length = in_order(view, self.max)
        missing = np.empty(len(answers), np.int32)
        for rows in blocks(answers):
            missing[rows] = self._missing(answers[rows])
        return _share_out(np.minimum(missing, self.max - length), length, view.drawn)

    def stopping_index(self, view: View) -> tuple[Int, Bool]:
        """Draws judged when they come one by one, int32 [problems], and whether the rule stopped; see `first_stop`."""
        needed = wins_needed(self.error, self.max)

        def stops(rows: Rows, width: int) -> Bool:
            labels = renumbered(by_draw(view, rows, width))
            own = running_counts(labels)
            sure = own > needed[0]  # unanimous: each draw after the first wins against all answers never given
            several = labels.max(0) > 0
            sure[:, several] = False
            near = np.flatnonzero(several & (own.max(0) > needed[0]))  # the others have not won so often yet
            if near.size:
                bets = place_bets(labels[:, near].T)
                sure[:, near] = certified(bets, bets.eliminated(needed)).T
            return sure

        return first_stop(view, self.max, stops, cells=2)

    def level(self, view: View) -> Float:
        """The least error at which the leader is certified after the judged draws; float64 [problems].

        An anytime-valid p-value, 1 where nothing is known: what can still be said where ``max`` came first.
        """
        return anytime_level(in_order(view, self.max)[0])

    def select(self, view: View, alpha: float) -> Bool:
        """Questions of the run to rely on: in expectation a share of at most ``alpha`` has no plurality answer.

        ``view`` holds all questions of the run at their stopping points; bool [problems]. See `e_bh`.
        """
        return e_bh(e_values(in_order(view, self.max)[0]), alpha)

    def remarks(self, view: View) -> dict[str, Float]:
        """For the verdict: the anytime-valid ``level`` of the leader and the ``e_value`` that `select` goes by."""
        answers = in_order(view, self.max)[0]
        return {"level": anytime_level(answers), "e_value": e_values(answers)}

    def statement(self, remarks: Mapping[str, Sequence[float]]) -> str:
        """On a run: how many wrong certificates are to be expected, and how many answers `select` keeps.

        Certificates stop at stakes of just 1/error, so the selection is made for a share of twice ``error``.
        """
        level, stakes = np.array(remarks["level"]), np.array(remarks["e_value"])
        sure, wrong = int(np.count_nonzero(level <= self.error)), self.error * len(level)
        said = (
            f"{sure} of {len(level)} answers are certified; in expectation at most {wrong:.3g} of the certificates are "
            "wrong"
        )
        if (share := 2 * self.error) >= 1:
            return said
        kept = int(np.count_nonzero(e_bh(stakes, share)))
        return (
            f"{said}. Of the {kept} answers with the best certificates, in expectation at most {100 * share:g} % are "
            "not a plurality answer of the model (e-BH)"
        )

    def _missing(self, answers: Int) -> Int:
        """Draws certainly missing, 0 = certified, int32 [rows]; answers [rows, draws], at least one draw."""
        needed = wins_needed(self.error, self.max)
        bets = place_bets(answers)
        eliminated = bets.eliminated(needed)
        missing = fewest_draws(bets, needed, eliminated[:, -1])
        return np.where(certified(bets, eliminated).any(1), np.int32(0), missing)


def in_order(view: View, most: int) -> tuple[Int, Int]:
    """The judged draws as one sequence, by draw index and then by arm, up to the first one missing or ``most``.

    int32 [problems, longest, at least 1], filled with -1, and the length of each, int32 [problems]. So a sequence
    only ever grows at its end.
    """
    problems, arms, draws = view.answers.shape
    length = (view.drawn * arms + np.arange(arms)).min(1).clip(max=most).astype(np.int32)
    width = max(1, int(length.max(initial=0)))
    sequence = view.answers.transpose(0, 2, 1).reshape(problems, arms * draws)[:, :width]
    if not sequence.shape[1]:
        sequence = np.full((problems, 1), -1, np.int32)
    past = np.arange(sequence.shape[1]) >= length[:, None]
    return np.where(past, np.int32(-1), sequence), length


def fewest_draws(bets: Bets, needed: Int, eliminated: Bool) -> Int:
    """A lower bound on the draws before any certificate, int32 [rows], `NEVER` where none can come.

    eliminated: bool [rows, classes + 1], after the last draw.

    An answer not yet eliminated lacks ``gap = needed[losses] - wins`` wins, and a draw brings it one at most, so with
    the leader unanimous from here on it takes the largest gap of the others. For another answer c to be certified,
    it first has to overtake the leader; the draws of c until then bring no win against anybody but the leader.
    """
    votes, leader = bets.votes[:, -1], bets.leader[:, -1]
    left = ~eliminated
    gap = np.where(left, needed[bets.losses[:, -1]] - bets.wins[:, -1], 0)
    leads = np.arange(gap.shape[1]) == leader[:, None]
    ahead, own_gap = np.where(leads, votes, 0).sum(1), np.where(leads, gap, 0).sum(1)
    others = np.where(leads, 0, gap)
    widest = others.max(1)
    stays = np.where((left & leads).any(1), widest, NEVER)
    overtaken = np.maximum((ahead[:, None] - votes + 1) + _largest_of_the_others(others), own_gap[:, None])
    overtaken = np.where(left & ~leads & (votes > 0), overtaken, NEVER).min(1)
    newcomer = np.where(left[:, -1], np.maximum(ahead + 1 + widest, own_gap), NEVER)
    return np.minimum(stays, np.minimum(overtaken, newcomer)).astype(np.int32)


def _largest_of_the_others(values: Int) -> Int:
    """For each column the largest value of all other columns, at least 0; int32 [rows, columns]."""
    largest = values.argmax(1)[:, None]
    result = np.repeat(values.max(1, keepdims=True), values.shape[1], axis=1)
    rest = values.copy()
    np.put_along_axis(rest, largest, 0, axis=1)
    np.put_along_axis(result, largest, rest.max(1, keepdims=True), axis=1)
    return result


def _share_out(want: Int, length: Int, drawn: Int) -> Int:
    """The next ``want`` draws of the sequence as further draws per arm; int32 [problems, arms]."""
    arms = drawn.shape[1]
    target = -((np.arange(arms) - (length + want)[:, None]) // arms)  # ceil((length + want - arm) / arms)
    return np.where(want[:, None] > 0, (target - drawn).clip(min=0), 0).astype(np.int32)


def run_statement(selected: Bool, alpha: float) -> str:
    """What `Certified.select` says about a run, in one sentence."""
    return (
        f"of the {int(np.count_nonzero(selected))} certified answers, in expectation at most {100 * alpha:g} % are not "
        f"a plurality answer of the model ({len(selected)} questions in the run)"
    )
