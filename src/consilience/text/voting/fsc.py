"""The model integrates what the replies have in common, segment by segment, into a new text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from consilience.draws import Draw, Problem, Verdict
from consilience.rules import Float
from consilience.text.voting.candidates import abstained, answer_in, ask_once, candidates_of, concluded, fenced
from consilience.text.voting.similarity import METRICS, similarity

if TYPE_CHECKING:
    from consilience.text.asking import Asker


@dataclass(frozen=True, slots=True)
class FineGrainedSelfConsistency:
    """The model is shown the replies and writes one final text from the segments that most of them share.

    ``keep`` is the share of the replies that pass the filter, those that are most alike among themselves
    (`most_alike`; 1 keeps all). ``merge`` is the number of replies shown after near-duplicates are merged into their
    medoid (`medoids`; 0 merges none); a medoid is shown with the number of replies it stands for. Both compare texts by
    ``metric`` (see `similarity`). The answer is a new text, read from the reply like that of a draw, and the whole
    reply is the verdict's ``text``; ``used`` are the indices of the draws that were shown. Confidence is the mean
    similarity of the new text to the replies that passed the filter. A failed call, a cut reply or one without an
    answer leaves the plurality, and ``fallback`` says why; a single reply is the verdict itself.

    Raises ValueError unless 0 < keep <= 1, merge >= 0 and the metric is known; BudgetSpent and EndpointError. Source:
    Wang et al. 2024, arXiv 2407.02056 (integration at temperature 0 as in the authors' code; filtering, and merging by
    k-medoids). How the filter eliminates, and the prompt's wording, are this project's.
    """

    keep: float = 1.0
    merge: int = 0
    metric: str = "rouge-l"
    asks: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")
        if self.merge < 0:
            raise ValueError(f"merge must be a number of texts, or 0 for no merging, got {self.merge}")
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")

    async def __call__(self, session: Asker, problem: Problem, draws: Sequence[Draw], /) -> Verdict:
        """The text that the model integrates from the judged draws."""
        candidates = await candidates_of(problem, draws)
        if not len(candidates):
            return abstained()
        if len(candidates) == 1:
            return candidates.verdict(0)
        texts = candidates.texts
        kept, shown = self.shown(texts)
        reply, failure = await ask_once(session, integration_prompt(problem, texts, shown), temperature=0.0)
        if reply is None:
            return candidates.fall_back(failure)
        if reply.finish_reason == "length":
            return candidates.fall_back("the integrated text was cut at max_tokens")
        answer = answer_in(reply, problem)
        if answer is None:
            return candidates.fall_back("the integrated text has no answer")
        alike = similarity([reply.text, *(texts[number] for number in kept)], self.metric)[0, 1:]
        used = [candidates.places[number] for number in shown]
        return concluded(answer, float(alike.mean()), text=reply.text, used=used)

    def shown(self, texts: Sequence[str]) -> tuple[list[int], dict[int, int]]:
        """The texts that pass the filter, and those that are shown with the number that each stands for."""
        table = similarity(texts, self.metric)
        table = (table + table.T) / 2
        kept = most_alike(table, math.ceil(self.keep * len(texts)))
        if not 0 < self.merge < len(kept):
            return kept, dict.fromkeys(kept, 1)
        centres, members = medoids(table[np.ix_(kept, kept)], self.merge)
        return kept, {kept[centre]: members.count(centre) for centre in centres}


def integration_prompt(problem: Problem, texts: Sequence[str], shown: dict[int, int]) -> str:
    """The question, the responses, and what to make of them."""
    blocks = [("Question", problem.question)]
    for number, (place, stands_for) in enumerate(shown.items(), 1):
        name = f"Response {number}" + (f" (stands for {stands_for} much alike)" if stands_for > 1 else "")
        blocks.append((name, texts[place]))
    return (
        f"A question was answered {sum(shown.values())} times.\n{fenced(blocks)}\n\n"
        "Write one final response. Take over, part by part, what most of the responses have in common, leave out what "
        "only few of them say, and keep to the form in which they answer. Reply with the final response alone."
    )


def most_alike(table: Float, size: int) -> list[int]:
    """The ``size`` texts that are most alike among themselves, in their order, by backward elimination.

    ``table`` is a symmetric table of similarities [texts, texts]. Time and again the text with the smallest sum of
    similarities to the others left is removed; of equals the last. Raises ValueError unless 1 <= size <= texts.
    """
    if not 1 <= size <= len(table):
        raise ValueError(f"size must lie between 1 and {len(table)}, got {size}")
    left = list(range(len(table)))
    while len(left) > size:
        sums = table[np.ix_(left, left)].sum(1) - np.diagonal(table)[left]
        del left[max(n for n, value in enumerate(sums) if value <= sums.min() + 1e-12 * len(table))]
    return left


def medoids(table: Float, clusters: int) -> tuple[list[int], list[int]]:
    """K-medoids: the texts that stand for all, in their order, and for each text the one that stands for it.

    ``table`` is a symmetric table of similarities [texts, texts]; the sum over texts of the similarity to the nearest
    medoid is made as large as building up and then swapping single medoids can make it (PAM, Kaufman and Rousseeuw
    1987). Deterministic; ties go to the first. Raises ValueError unless 1 <= clusters <= texts.
    """
    if not 1 <= clusters <= len(table):
        raise ValueError(f"clusters must lie between 1 and {len(table)}, got {clusters}")
    chosen: list[int] = []
    while len(chosen) < clusters:
        chosen.append(_best_addition(table, chosen)[0])
    improved = True
    while improved:
        improved = False
        for medoid in sorted(chosen):
            rest = [other for other in chosen if other != medoid]
            other, gain = _best_addition(table, rest)
            if gain > _fit(table, chosen) + 1e-9:
                chosen, improved = [*rest, other], True
    chosen.sort()
    nearest = [n if n in chosen else chosen[int(table[n, chosen].argmax())] for n in range(len(table))]
    return chosen, nearest


def _best_addition(table: Float, chosen: list[int]) -> tuple[int, float]:
    """The text whose addition to the medoids fits best, and how well they fit then."""
    now = table[:, chosen].max(1) if chosen else np.full(len(table), -np.inf)
    fits = np.maximum(now[:, None], table).sum(0)
    fits[chosen] = -np.inf
    best = int(np.flatnonzero(fits >= fits.max() - 1e-9)[0])
    return best, float(fits[best])


def _fit(table: Float, chosen: list[int]) -> float:
    return float(table[:, chosen].max(1).sum())
