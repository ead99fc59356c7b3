"""The model chooses among its own distinct answers; and how consistent such answers are to begin with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from consilience.draws import Draw, Problem, Verdict
from consilience.text.voting.candidates import abstained, ask_once, candidates_of, fenced, stated
from consilience.text.voting.similarity import similarity

if TYPE_CHECKING:
    from consilience.text.asking import Asker

_STATED = re.compile(r"(?i:answer|choice) (?i:is)\W{0,3}(?:(?i:option)\W{0,3})?([A-Z]{1,3})\b(?!')")
_ALONE = re.compile(r"\W*(?:(?i:option)\W{0,3})?([A-Z]{1,3})\W*")


@dataclass(frozen=True, slots=True)
class AskToChoose:
    """The distinct answers become lettered options of a second question, and the model chooses one, greedily.

    Options stand in the order in which the answers were first seen, without their numbers of votes; where there is one
    answer only nothing is asked. A failed call, or a reply that does not choose exactly one option, leaves the
    plurality, and the verdict's ``fallback`` says why. ``chosen`` is the first draw with the answer, ``consistency``
    the share of pairs of draws that agree (`semantic_consistency` with the answers' own equality; absent for a single
    draw). Confidence: see `Candidates.verdict`.

    Raises BudgetSpent and EndpointError. Source: Raj et al. 2023, arXiv 2308.09138 (the two steps and the measure);
    the prompt is this project's.
    """

    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The answer that the model chooses among those of the judged draws."""
        candidates = await candidates_of(problem, draws)
        if not len(candidates):
            return abstained()
        more = {}
        if len(candidates) > 1:
            labels = candidates.labels
            more["consistency"] = semantic_consistency([str(label) for label in labels], "exact")
        firsts = [candidates.labels.index(label) for label in dict.fromkeys(candidates.labels)]
        if candidates.agree:
            return candidates.verdict(0, **more)
        options = {option_letter(number): first for number, first in enumerate(firsts)}
        prompt = choice_prompt(problem, {letter: candidates.answers[first] for letter, first in options.items()})
        reply, failure = await ask_once(session, prompt, temperature=0.0)
        letter = stated(reply.text, _STATED, _ALONE) if reply is not None else None
        if letter not in options:
            failure = failure or "the reply does not choose one of the options"
            return candidates.fall_back(failure).model_copy(update=more)
        return candidates.verdict(options[letter], **more)


def choice_prompt(problem: Problem, options: dict[str, str]) -> str:
    """The question with lettered options."""
    shown = fenced([("Question", problem.question), *((f"Option {letter}", text) for letter, text in options.items())])
    return (
        f"Several answers were proposed to a question.\n{shown}\n\nWhich option answers the question correctly? "
        'Reply with "The answer is option X", X being its letter.'
    )


def option_letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ...: no option is left out, however many there are."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters


def semantic_consistency(texts: Sequence[str], agreement: str | Callable[[str, str], float]) -> float:
    """Cons: the mean of agreement(texts[i], texts[j]) over all ordered pairs of different places i, j.

    ``agreement`` is a metric of `consilience.text.voting.similarity` (``exact``, ``token-f1``, ``rouge-l``, ``chrf``,
    ``edit``), or any function of two texts, such as a model of entailment. Raises ValueError for fewer than two texts.
    Source: Raj et al. 2022, arXiv 2211.05853, and 2023, arXiv 2308.09138 (the definition of semantic consistency).
    """
    n = len(texts)
    if n < 2:
        raise ValueError(f"consistency needs at least two texts, got {n}")
    if callable(agreement):
        return sum(agreement(a, b) for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j) / (n * (n - 1))
    table = similarity(texts, agreement)
    return float((table.sum() - np.trace(table)) / (n * (n - 1)))
