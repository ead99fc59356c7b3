"""Which questions are hard: the model ranks small random batches, and the ranks are averaged."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

BATCH = 8
"""Questions that the model ranks at a time."""

SHUFFLINGS = 5
"""How many times all questions are dealt anew into batches."""

PROMPT = """Rank the following questions by how difficult they are.

{questions}

Reply with one line that holds the labels of all {count} questions from the easiest to the hardest, separated by \
commas, and nothing else. A line for three questions would look like this: Q2, Q3, Q1"""

_LINE = re.compile(r"\s*\[?\s*Q\d+(?:\s*[,>]\s*Q\d+)*\s*\]?\s*\.?\s*", re.IGNORECASE)


async def rank_difficulty(session: Any, problems: Sequence[Any]) -> list[float]:
    """The mean rank of each problem among its batches in [0, 1], 1 = hardest, also where no reply could be read.

    All problems are shuffled ``SHUFFLINGS`` times (by ``session.seed``) and cut into batches of ``BATCH``, the last
    one filled up from the one before; the model ranks each batch once, at temperature 0. A reply that does not name
    every question of its batch exactly once counts for nothing, and what is not known to be easy is taken for hard.
    Raises what asking raises (BudgetSpent and others).

    ``session`` is a `consilience.text.asking.Asker`. Source: Wang et al. 2024, arXiv 2408.13457, algorithm 1; batches
    of 8, dealt 5 times, as in the files of its released code (WangXinglin/DSC).
    """
    generator = np.random.default_rng(session.seed)
    batches = [batch for _ in range(SHUFFLINGS) for batch in deal(len(problems), generator)]
    replies = await asyncio.gather(
        *(session.ask(prompt([problems[i].question for i in batch]), temperature=0.0) for batch in batches),
        return_exceptions=True,
    )
    places: list[list[float]] = [[] for _ in problems]
    for batch, reply in zip(batches, replies, strict=True):
        if isinstance(reply, BaseException):
            raise reply
        for place, index in enumerate(read_ranking(reply[0].text, len(batch)) or ()):
            places[batch[index]].append(place / (len(batch) - 1))
    return [float(np.mean(given)) if given else 1.0 for given in places]


def deal(count: int, generator: np.random.Generator) -> list[list[int]]:
    """``count`` problems in random batches of ``BATCH`` (of all, if fewer); none for fewer than two problems."""
    shuffled = generator.permutation(count).tolist()
    if count < 2:
        return []
    batches = [shuffled[start : start + BATCH] for start in range(0, count, BATCH)]
    if len(batches) > 1:
        batches[-1] = batches[-1] + batches[-2][: BATCH - len(batches[-1])]
    return batches


def prompt(questions: Sequence[str]) -> str:
    """What the model is asked about one batch."""
    listed = "\n\n".join(f"Q{number}: {question}" for number, question in enumerate(questions, 1))
    return PROMPT.format(questions=listed, count=len(questions))


def read_ranking(reply: str, count: int) -> list[int] | None:
    """The questions from the easiest to the hardest, counted from 0, by the reply's last line that is a ranking.

    A ranking is nothing but the labels Q1 to Q``count``, each exactly once, between commas; None if there is none.
    """
    for line in reversed(reply.splitlines()):
        _, colon, tail = line.rpartition(":")
        if _LINE.fullmatch(given := tail if colon else line):
            labels = [int(label) for label in re.findall(r"\d+", given)]
            return [label - 1 for label in labels] if sorted(labels) == list(range(1, count + 1)) else None
    return None
