"""Minimum Bayes risk: the reply that is on average most like all the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from consilience.draws import Draw, Problem, Verdict
from consilience.errors import InputError
from consilience.rules import Float
from consilience.text.voting.candidates import Candidates, abstained, candidates_of
from consilience.text.voting.similarity import METRICS, cosine, similarity
from consilience.text.voting.weighted import ROUNDING

if TYPE_CHECKING:
    from consilience.text.asking import Asker


@dataclass(frozen=True, slots=True)
class MinimumBayesRisk:
    """The candidate with the largest mean utility against all judged draws that have an answer, itself included.

    As every utility of a text with itself is 1, leaving the candidate itself out would choose the same. A tie goes to
    the candidate seen first. ``metric``: ``exact`` (the answers' own equality: the plurality), ``token-f1``,
    ``rouge-l``, ``chrf``, ``edit``, or ``embedding`` (cosine of the draws' field ``embedding``, where one is missing of
    vectors that the model is asked for). ``over``: the replies' ``text``, or their ``answer``. ``arm``: with -1 every
    draw may win; with a number only draws of that arm (their field ``arm``), and the others are evidence alone, which
    is X-MBR where they are in another language. Confidence is the winner's mean utility, in [0, 1]: for ``exact`` the
    share of its votes. ``chosen`` is the winner's index; ``fallback`` says why it is the plurality's instead.

    Raises ValueError for an unknown ``metric`` or ``over``; with ``embedding`` BudgetSpent and EndpointError. Source:
    Kumar and Byrne 2004 (HLT-NAACL), with samples as evidence as in Eikema and Aziz 2020, arXiv 2005.10283; X-MBR:
    Khairi et al. 2025, arXiv 2506.20544.
    """

    metric: str = "chrf"
    over: str = "text"
    arm: int = -1
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.metric not in (*METRICS, "embedding"):
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, embedding, got {self.metric!r}")
        if self.over not in ("text", "answer"):
            raise ValueError(f"over must be text or answer, got {self.over!r}")

    @property
    def asks(self) -> bool:
        """Only embeddings may have to be asked for."""
        return self.metric == "embedding"

    async def __call__(self, session: Asker | None, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The reply of minimum Bayes risk among the judged draws."""
        candidates = await candidates_of(problem, draws)
        if not len(candidates):
            return abstained()
        eligible = [n for n, draw in enumerate(candidates.draws) if self.arm in (-1, _field(draw, "arm"))]
        if not eligible:
            return candidates.fall_back(f"no draw of arm {self.arm} has an answer")
        utility = await self._utility(session, candidates)
        if utility is None:
            return candidates.fall_back("an embedding could not be had")
        means = utility[eligible].mean(1)
        winner = first_best(means)
        return candidates.verdict(eligible[winner], confidence=float(np.clip(means[winner], 0.0, 1.0)))

    async def _utility(self, session: Asker | None, candidates: Candidates) -> Float | None:
        """float64 [candidates, candidates], a row per candidate, a column per piece of evidence."""
        if self.metric == "exact":
            labels = np.array(candidates.labels)
            return (labels[:, None] == labels[None, :]).astype(np.float64)
        texts = candidates.texts if self.over == "text" else candidates.answers
        if self.metric != "embedding":
            return similarity(texts, self.metric)
        vectors = _recorded(candidates.draws) if self.over == "text" else None
        if vectors is None:
            if session is None:
                raise InputError("mbr: the draws have no field `embedding`, and there is no model to ask for one")
            vectors = await session.embed(texts)
        return cosine(vectors) if np.isfinite(vectors).all() else None


def first_best(scores: Float) -> int:
    """The index of the largest score; scores that differ by rounding alone are a tie, which goes to the first."""
    return int(np.flatnonzero(scores >= scores.max() - ROUNDING * len(scores))[0])


def _recorded(draws: Sequence[Draw]) -> Float | None:
    """The draws' own embeddings, float64 [draws, dims], None where one is missing; InputError where they do not fit."""
    given = [_field(draw, "embedding") for draw in draws]
    if any(vector is None for vector in given):
        return None
    try:
        vectors = np.array(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"the draws' field 'embedding' must hold lists of equally many numbers: {error}") from error
    if vectors.ndim != 2:
        raise InputError("the draws' field 'embedding' must hold a list of numbers each")
    return vectors


def _field(draw: Draw, name: str) -> Any:
    return (draw.model_extra or {}).get(name)
