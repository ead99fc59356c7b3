"""What a policy is: two pure functions of a `View`, used unchanged by the live driver and by replay.

``want`` says how many further draws are certainly needed before the rule can change its mind about stopping
(all zero: stop), ``decide`` says which answer wins and with what confidence. A rule sees class labels, not texts;
the labels carry no meaning but equality. What has to read the texts, or to ask a model, is a `Procedure` instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

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
    ``completion_tokens``, ...). traits: float64 [problems] each, nan = unknown: what is known of a problem before
    anything is drawn (``difficulty``). closed: bool [problems], of which no further draw can be had (None: of none);
    a rule that couples its problems must want nothing of these, or the others wait for them in vain.
    """

    answers: Int
    drawn: Int
    fields: Mapping[str, Float] = field(default_factory=dict)
    traits: Mapping[str, Float] = field(default_factory=dict)
    closed: NDArray[np.bool_] | None = None

    @property
    def open(self) -> NDArray[np.bool_]:
        """The problems of which further draws can be had; bool [problems]."""
        return np.ones(len(self.drawn), np.bool_) if self.closed is None else ~self.closed

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
    """Says how many further draws are certainly needed.

    A rule may also have these attributes, read through `Rule` with the defaults given there: ``arms`` (int, how many
    arms it draws from), ``counts`` (the most draws of each of several arms), ``settings`` (sampling parameters per
    arm, where the arms are settings of one model), ``coupled`` (bool: a problem's ``want`` depends on the other
    problems of the run), ``traits`` (numbers per problem it reads), ``prepare`` (gets those numbers from a model),
    ``stopping_index`` (the whole of replay in one call), ``vote`` (the vote that belongs to it, where that is not the
    plurality), ``remarks(view)`` (numbers for the verdict, float64 [problems] each, named in ``remarked``) and
    ``statement`` (a sentence on a run, from those numbers).
    """

    @property
    def max(self) -> int:
        """The most draws the rule may ask for per problem, all arms together."""

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


@runtime_checkable
class Procedure(Protocol):
    """Concludes from the judged draws' texts, or by asking a model about them, in place of a vote.

    Called with (session, problem, draws): a `consilience.text.asking.Asker` to ask with, the problem, and its judged
    draws with their ``answer`` read. Returns a Verdict with ``answer``, ``confidence`` and what it has to add; whoever
    calls it fills in the counts. Raises BudgetSpent when the asking could not be paid for.
    """

    @property
    def asks(self) -> bool:
        """Whether it asks a model; one that does not can be replayed without one."""

    @property
    def needs(self) -> tuple[str, ...]:
        """The numeric draw fields that it reads."""

    def __call__(self, session: Any, problem: Any, draws: Sequence[Any], /) -> Awaitable[Any]:
        """The verdict; see the class."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A stopping rule with a vote: what a policy specification stands for. ``name`` is its canonical form.

    With a ``procedure`` it has the last word, and ``vote`` what is said when it cannot be asked. ``calibration`` maps
    the confidences to shares of right answers: two increasing sequences, the raw values and what they became.
    """

    name: str
    stop: StopRule
    vote: VoteRule
    procedure: Procedure | None = None
    calibration: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def max(self) -> int:
        """The most draws the rule may ask for per problem, all arms together."""
        return self.stop.max

    @property
    def arms(self) -> int:
        """How many arms (models or settings) the rule draws from; 1 unless it says otherwise."""
        return int(getattr(self.stop, "arms", 1))

    @property
    def max_by_arm(self) -> tuple[int, ...]:
        """The most draws the rule may ask for of each arm."""
        return tuple(getattr(self.stop, "counts", (self.max,) * self.arms))

    @property
    def settings(self) -> tuple[Mapping[str, Any], ...] | None:
        """Sampling parameters per arm where the arms are settings of one model; None where they are models."""
        return getattr(self.stop, "settings", None)

    @property
    def coupled(self) -> bool:
        """Whether the problems of a run share something, so that all are judged together, round by round."""
        return bool(getattr(self.stop, "coupled", False))

    @property
    def traits(self) -> tuple[str, ...]:
        """The numbers per problem that the rule reads (``View.traits``)."""
        return tuple(getattr(self.stop, "traits", ()))

    @property
    def needs(self) -> tuple[str, ...]:
        """The numeric draw fields that the rule reads."""
        more = self.procedure.needs if self.procedure is not None else ()
        return tuple(dict.fromkeys((*self.stop.needs, *self.vote.needs, *more)))

    def want(self, view: View) -> Int:
        """See `StopRule.want`."""
        return self.stop.want(view)

    def decide(self, view: View) -> tuple[Int, Float]:
        """See `VoteRule.decide`; the confidence is calibrated where the rule has a calibration."""
        answer, confidence = self.vote.decide(view)
        if self.calibration is None:
            return answer, confidence
        return answer, np.where(answer >= 0, np.interp(confidence, *self.calibration), confidence)

    @property
    def remarked(self) -> tuple[str, ...]:
        """The names of what `remarks` gives."""
        return tuple(getattr(self.stop, "remarked", ()))

    def remarks(self, view: View) -> dict[str, Float]:
        """What the stopping rule has to say on each problem beside the verdict, float64 [problems] each."""
        return dict(self.stop.remarks(view)) if self.remarked else {}  # type: ignore[attr-defined]

    def statement(self, remarks: Mapping[str, Sequence[float]]) -> str | None:
        """What the stopping rule has to say on a run, from its remarks on every problem of it."""
        return str(self.stop.statement(remarks)) if any(remarks.values()) else None  # type: ignore[attr-defined]

    def stopping_index(self, view: View) -> tuple[Int, NDArray[np.bool_]]:
        """How many draws are judged when they come one by one, int32 [problems, arms], and whether the rule stopped.

        ``view`` holds all draws there are, ``drawn`` their number: a rule that wants more than there is has not
        stopped. Rules that know a closed form have their own ``stopping_index(view) -> (int32 [problems], bool
        [problems])`` for one arm; the others are asked, given what they want, and asked again.
        """
        closed_form = getattr(self.stop, "stopping_index", None)
        if closed_form is not None and view.answers.shape[1] == 1:
            index, stopped = cast("tuple[Int, NDArray[np.bool_]]", closed_form(view))
            return index[:, None], stopped
        return _ask_all(self, view) if self.coupled else _ask_and_give(self, view)


def _ask_and_give(rule: Rule, view: View) -> tuple[Int, NDArray[np.bool_]]:
    """`Rule.stopping_index` by asking."""
    drawn = np.zeros_like(view.drawn)
    stopped = np.zeros(len(drawn), bool)
    rows = np.arange(len(drawn))
    while rows.size:
        width = int(drawn[rows].max(initial=0))
        want = rule.want(_rows(view, rows, drawn, width))
        stopped[rows] = (want == 0).all(1)
        step = np.minimum(want, (view.drawn - drawn)[rows]).astype(np.int32)
        drawn[rows] += step
        given = step.any(1)
        if not given.any():
            break
        rows = rows[given]
    return drawn, stopped


def _ask_all(rule: Rule, view: View) -> tuple[Int, NDArray[np.bool_]]:
    """`Rule.stopping_index` of a coupled rule: all problems are asked about together, to the end."""
    every = np.arange(len(view.drawn))
    drawn, closed = np.zeros_like(view.drawn), np.zeros(len(every), bool)
    while True:
        seen = _rows(view, every, drawn, int(drawn.max(initial=0)))
        want = rule.want(replace(seen, closed=closed))
        left = view.drawn - drawn
        short = (want > left).any(1)
        if not (np.minimum(want, left).any() or (short & ~closed).any()):
            return drawn, ~closed & (want == 0).all(1)
        drawn = drawn + np.minimum(want, left).astype(np.int32)
        closed = closed | short


def _rows(view: View, rows: NDArray[np.intp], drawn: Int, width: int) -> View:
    return View(
        view.answers[rows, :, :width],
        drawn[rows],
        {name: values[rows, :, :width] for name, values in view.fields.items()},
        {name: values[rows] for name, values in view.traits.items()},
    )


def vote_counts(view: View) -> Int:
    """Votes per class, int32 [problems, classes], all arms together; draws without an answer count nowhere."""
    judged = view.judged().reshape(len(view.answers), view.answers.shape[1] * view.answers.shape[2])
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
