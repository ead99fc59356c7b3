"""The model reads all replies and says which agrees most with the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from consilience.draws import Draw, Problem, Verdict
from consilience.text.voting.candidates import Candidates, fenced, named_by_model

if TYPE_CHECKING:
    from consilience.text.asking import Asker

_STATED = re.compile(r"most consistent (?:response|one) is\W{0,3}response\W{0,3}([0-9]{1,6})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class UniversalSelfConsistency:
    """One prompt shows all replies, numbered, and the model names the one that is most consistent with the majority.

    The selection is greedy (temperature 0). It needs no answers that can be counted, so it serves free text as well;
    where all replies have the same answer nothing is asked. No reply is shortened or left out: where the prompt is too
    long for the model, the call fails. A failed call, or a reply that does not name exactly one response, leaves the
    plurality, and the verdict's ``fallback`` says why. ``chosen`` is the index of the reply named. Confidence: see
    `Candidates.verdict`.

    Raises BudgetSpent and EndpointError. Source: Chen et al. 2023, arXiv 2311.17311 (the prompt's structure;
    the wording is this project's).
    """

    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The reply that the model names among the judged draws."""
        return await named_by_model(session, problem, draws, selection_prompt, _STATED)


def selection_prompt(problem: Problem, candidates: Candidates) -> str:
    """The question, all responses, and what to say about them."""
    responses = [(f"Response {number}", text) for number, text in enumerate(candidates.texts, 1)]
    return (
        f"A question was answered {len(candidates)} times.\n{fenced([('Question', problem.question), *responses])}\n\n"
        "Compare the responses and find the one that agrees best with what most of them say. "
        'Begin your reply with "The most consistent response is Response X", X being its number.'
    )
