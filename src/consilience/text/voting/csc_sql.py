"""The two most frequent results are put before the model again, and its revisions are voted on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from consilience.draws import Draw, Problem, Verdict
from consilience.errors import SourceExhausted
from consilience.text.voting.candidates import Candidates, abstained, answer_in, candidates_of, concluded, fenced

if TYPE_CHECKING:
    from consilience.text.asking import Asker


@dataclass(frozen=True, slots=True)
class CorrectiveSelfConsistency:
    """The ``top`` most frequent results go back to the model, which merges or corrects them; its revisions vote.

    Draws are grouped by their answers' classes, for kinds ``sql`` and ``code`` by what they do when run. If there is
    one group only, it is the verdict. Else the first draft of each of the ``top`` largest groups (for ``sql`` with the
    rows it gives) is shown with the question, ``revisions`` replies are drawn at ``temperature``, and the
    plurality of *their* answers wins, a tie to the revision seen first. Replies without an answer do not vote; where
    none has one, the draws' own plurality stands and ``fallback`` says why. Confidence: (revisions for the winner + 1)
    / (revisions with an answer + 2); ``revision_votes`` are those votes.

    Raises ValueError unless top >= 2, 1 <= revisions <= 1000 and temperature >= 0; BudgetSpent and EndpointError.
    Source: Sheng and Xu 2025, arXiv 2505.13271, with the settings of the authors' code (8 revisions at temperature
    0.8, broken queries left out). The paper's generator and reviser are trained for it; here both are the run's model.
    """

    top: int = 2
    revisions: int = 8
    temperature: float = 0.8
    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.top < 2:
            raise ValueError(f"top must be at least 2, got {self.top}")
        if not 1 <= self.revisions <= 1000:
            raise ValueError(f"revisions must lie between 1 and 1000, got {self.revisions}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The answer that most revisions give."""
        candidates = await candidates_of(problem, draws)
        if not len(candidates):
            return abstained()
        if candidates.agree:
            return candidates.verdict(0)
        prompt = await revision_prompt(problem, candidates, candidates.ranked()[: self.top])
        try:
            replies = await session.ask(prompt, n=self.revisions, temperature=self.temperature)
        except SourceExhausted as error:
            return candidates.fall_back(f"no reply: {error}")
        revised = [reply.model_copy(update={"answer": revision_of(reply, problem)}) for reply in replies]
        votes = await candidates_of(problem, revised)
        if not len(votes):
            failed = all(reply.failed for reply in replies)
            reason = f"the calls failed: {replies[0].error}" if failed else "no revision has an answer"
            return candidates.fall_back(reason)
        ranked = votes.ranked()
        counts = {votes.answers[first]: votes.labels.count(votes.labels[first]) for first in ranked}
        answer = votes.answers[ranked[0]]
        return concluded(answer, (counts[answer] + 1) / (len(votes) + 2), revision_votes=counts)


def revision_of(reply: Draw, problem: Problem) -> str | None:
    """The answer of a revision, None where it failed or gives none."""
    return None if reply.failed else answer_in(reply, problem)


async def revision_prompt(problem: Problem, candidates: Candidates, firsts: Sequence[int]) -> str:
    """The question and the drafts, for ``sql`` each with the rows that it gives."""
    blocks = [("Question", problem.question)]
    for number, first in enumerate(firsts, 1):
        draft = candidates.answers[first]
        blocks.append((f"Draft {number}", draft))
        if problem.kind == "sql":
            blocks.append((f"Result of draft {number}", await asyncio.to_thread(rows_of, problem, draft)))
    return (
        f"Below are a question and {len(firsts)} drafts of its answer, which do not agree.\n{fenced(blocks)}\n\n"
        "Compare the drafts, find what is wrong in them, and give the corrected answer to the question. "
        f"{_ENDINGS.get(problem.kind, 'End with: The answer is ...')}"
    )


def rows_of(problem: Problem, query: str) -> str:
    """What a query that works gives: the number of its rows, and the first `SHOWN_ROWS` (and `SHOWN_CHARACTERS`).

    Blocks while it runs in the sandbox.
    """
    from consilience.sandbox import run_sql
    from consilience.text.answers.code import read_sql

    rows = run_sql((problem.model_extra or {})["database"], read_sql(query) or "").rows
    shown = "\n".join(repr(row) for row in rows[:SHOWN_ROWS])[:SHOWN_CHARACTERS]
    return f"{len(rows)} rows, beginning with:\n{shown}" if rows else "no rows"


SHOWN_ROWS, SHOWN_CHARACTERS = 20, 2000

_ENDINGS = {
    "sql": "End with the whole query in one ```sql block.",
    "code": "End with the whole program in one code block.",
    "math": "End with the final answer in \\boxed{}.",
    "json": 'Reply with a JSON object whose field "answer" holds the final answer.',
}
