"""The model writes a checklist for the task and picks the best of all replies by it, in one pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from consilience.draws import Draw, Problem, Verdict
from consilience.text.voting.candidates import Candidates, fenced, named_by_model

if TYPE_CHECKING:
    from consilience.text.asking import Asker

_STATED = re.compile(r"best response is\W{0,5}(?:response\W{0,3})?([0-9]{1,6})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ChecklistedSelection:
    """CHOPS: one prompt has the model write a checklist for the task, hold all replies against it, and name the best.

    One call whatever the number of replies, greedy (temperature 0); all are seen together, so their marks need not be
    comparable between calls. Goes with ``hedged``, which puts the greedy reply among the sampled ones. Nothing is asked
    where all replies have the same answer, and no reply is shortened or left out. A failed call, or a reply that does
    not name exactly one response, leaves the plurality, and the verdict's ``fallback`` says why. ``chosen`` is the
    index of the reply named. Confidence: see `Candidates.verdict`.

    Raises BudgetSpent and EndpointError. Source: Khairi et al. 2025, arXiv 2506.20544 (hedged sampling, CHOPS); the
    prompt is this project's, and the judge is the run's own model.
    """

    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The reply that the model finds best among the judged draws."""
        return await named_by_model(session, problem, draws, checklist_prompt, _STATED)


def checklist_prompt(problem: Problem, candidates: Candidates) -> str:
    """The task, all responses, and how to judge them."""
    responses = [(f"Response {number}", text) for number, text in enumerate(candidates.texts, 1)]
    return (
        f"Below are a task and {len(candidates)} responses to it.\n"
        f"{fenced([('Task', problem.question), *responses])}\n\n"
        "First write a short checklist of what a good response to this very task has to fulfil. "
        "Then hold each response against the checklist. "
        'Last, write the line "The best response is Response X", X being the number of the one that fulfils it best.'
    )
