"""What a report shows, as plain rows: the caller fills them from runs, replays and the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from consilience.montecarlo.estimators import plurality_curve

Origin = Literal["live", "replay"]


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy over all questions.

    ``draws_used``, ``confidence`` and ``right`` have one value per question, in one order; for a replay over
    repeated orders they may be means over the orders. ``right`` is a share in [0, 1], None without a gold
    answer. ``mean_tokens`` and ``mean_cost`` (USD) are per question; ``decided`` and ``abstained`` are shares of
    the questions in [0, 1]. None = cannot be computed.
    """

    name: str
    origin: Origin
    accuracy: float | None
    accuracy_ci: tuple[float, float] | None
    mean_draws: float
    mean_tokens: float | None = None
    mean_cost: float | None = None
    decided: float | None = None
    abstained: float | None = None
    draws_used: Sequence[float] = ()
    confidence: Sequence[float] = ()
    right: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class ReplyRow:
    """One draw: its text, the answer extracted from it, or why the call failed. ``judged``: it could vote."""

    text: str
    answer: str | None = None
    error: str | None = None
    judged: bool = True


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """One question with its verdict. ``decided`` False: the rule reached its limit without deciding."""

    id: str
    question: str
    gold: str | None = None
    answer: str | None = None
    right: bool | None = None
    confidence: float = 0.0
    draws: int = 0
    votes: Mapping[str, float] = field(default_factory=dict)
    stopped_because: str = ""
    replies: Sequence[ReplyRow] = ()
    decided: bool = True


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy of the plurality vote of k draws with a band: four sequences of one length, shares in [0, 1]."""

    ks: Sequence[int]
    accuracy: Sequence[float]
    lo: Sequence[float]
    hi: Sequence[float]

    @classmethod
    def estimate(
        cls,
        answers: ArrayLike,
        right: ArrayLike,
        *,
        drawn: ArrayLike | None = None,
        generator: np.random.Generator | None = None,
        level: float = 0.95,
    ) -> Curve:
        """The curve for k = 1 .. draws from recorded draws; arguments as `plurality_curve`."""
        ks = range(1, np.asarray(answers).shape[1] + 1)
        curve = plurality_curve(answers, right, ks, drawn=drawn, generator=generator)
        lo, hi = curve.band(level)
        return cls(list(ks), curve.accuracy.tolist(), lo.tolist(), hi.tolist())


@dataclass(frozen=True, slots=True)
class Page:
    """Everything on the page.

    ``totals`` are counts of the live run: known keys are questions, answered, abstained, undecided, draws,
    failed, requests, tokens, prompt_tokens, completion_tokens, cost (USD), seconds; others are shown under
    their own name. ``duplicate_share`` is the share of draws whose text repeats another draw of its question.
    ``verdicts_of`` names the policy whose verdicts the table of questions shows, ``fixed_draws`` the fixed vote
    that savings are measured against (default: the most draws any policy spent on a question).
    """

    title: str
    model: str
    command: str
    created: str
    policies: Sequence[PolicyRow] = ()
    questions: Sequence[QuestionRow] = ()
    curve: Curve | None = None
    totals: Mapping[str, int | float | None] = field(default_factory=dict)
    duplicate_share: float | None = None
    notes: Sequence[str] = ()
    ledger: str | None = None
    verdicts_of: str | None = None
    fixed_draws: int | None = None
