"""What a policy is: two pure functions of a `View`, used unchanged by the live driver and by replay.

``want`` says how many further draws are certainly needed before the rule can change its mind about stopping
(all zero: stop), ``decide`` says which answer wins and with what confidence. A rule sees class labels, not texts;
the labels carry no meaning but equality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int32]
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class View:
    """What a rule may look at.

    answers: int32 [problems, arms, draws], the class of each draw's answer, -1 = none; an arm is one model or
    setting. drawn: int32 [problems, arms], how many leading draws of each arm are to be judged: entries past it
    hold no information. fields: float64 [problems, arms, draws] each, nan = absent (``logprob``, ``reward``,
    ``completion_tokens``, ...).
    """

    answers: Int
    drawn: Int
    fields: Mapping[str, Float] = field(default_factory=dict)

    @classmethod
    def single(cls, answers: NDArray[np.integer], drawn: NDArray[np.integer] | None = None) -> View:
        """A view of one arm from ``answers`` [problems, draws] and ``drawn`` [problems] (default: all)."""
        table = np.asarray(answers, dtype=np.int32)
        if table.ndim != 2:
            raise ValueError(f"answers must be [problems, draws], got shape {table.shape}")
        count = np.full(len(table), table.shape[1]) if drawn is None else np.asarray(drawn)
        return cls(table[:, None, :], count.astype(np.int32)[:, None])

    def judged(self) -> Int:
        """``answers`` with every draw that is not to be judged set to -1; int32 [problems, arms, draws]."""
        past = np.arange(self.answers.shape[2]) >= self.drawn[:, :, None]
        return np.where(past, np.int32(-1), self.answers)


@runtime_checkable
class StopRule(Protocol):
    """Says how many further draws are certainly needed."""

    @property
    def max(self) -> int:
        """The most draws the rule may ask for per problem."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The numeric draw fields that the rule reads."""

    def want(self, view: View) -> Int:
        """int32 [problems, arms]; all zero = stopped. More draws never un-stop a stopped problem."""


@runtime_checkable
class VoteRule(Protocol):
    """Says which answer wins."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The numeric draw fields that the vote reads."""

    def decide(self, view: View) -> tuple[Int, Float]:
        """The winning class, int32 [problems], -1 = no answer, and its confidence, float64 [problems]."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A stopping rule with a vote: what a policy specification stands for. ``name`` is its canonical form."""

    name: str
    stop: StopRule
    vote: VoteRule

    @property
    def max(self) -> int:
        """The most draws the rule may ask for per problem."""
        return self.stop.max

    @property
    def needs(self) -> tuple[str, ...]:
        """The numeric draw fields that the rule reads."""
        return tuple(dict.fromkeys((*self.stop.needs, *self.vote.needs)))

    def want(self, view: View) -> Int:
        """See `StopRule.want`."""
        return self.stop.want(view)

    def decide(self, view: View) -> tuple[Int, Float]:
        """See `VoteRule.decide`."""
        return self.vote.decide(view)


def vote_counts(view: View) -> Int:
    """Votes per class, int32 [problems, classes], all arms together; draws without an answer count nowhere."""
    judged = view.judged().reshape(len(view.answers), -1)
    classes = int(judged.max(initial=-1)) + 1
    flat = (judged + np.arange(len(judged))[:, None] * classes)[judged >= 0]
    counts = np.bincount(flat, minlength=len(judged) * classes) if classes else np.zeros(0, np.int64)
    return counts.reshape(len(judged), classes).astype(np.int32)


def top_two(view: View) -> tuple[Int, Int]:
    """The two largest vote counts of each problem, int32 [problems] each, zero where there is none."""
    counts = vote_counts(view)
    padded = np.concatenate([counts, np.zeros((len(counts), 2), np.int32)], axis=1)
    last_two = np.partition(padded, -2, axis=1)[:, -2:]
    return last_two[:, 1], last_two[:, 0]
