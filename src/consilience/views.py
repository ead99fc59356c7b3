"""From draws to what a rule sees: class labels and numeric fields; and from a class back to right or wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.rules import View
from consilience.text import answers
from consilience.text.answers import AnswerClasses


def answer_of(draw: Draw, kind: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """A draw's answer: its own ``answer`` unless a pattern is given, else what is extracted from its text."""
    if draw.failed:
        return None
    if draw.answer is not None and pattern is None:
        return draw.answer
    calls = (draw.model_extra or {}).get("tool_calls")
    if calls and not draw.text:
        return None
    return answers.extract(draw.text, kind, pattern=pattern, finish_reason=draw.finish_reason)


def kind_of(problem: Problem, override: str | None = None) -> str:
    """The answer kind of a problem; raises InputError naming the problem when no vote rule exists for it."""
    kind = override or problem.kind
    try:
        answers.check_kind(kind)
    except ValueError as error:
        raise InputError(f"problem {problem.id!r}: {error}; choose one with --kind") from error
    return kind


def view_of(labels: Sequence[Sequence[int]], draws: Sequence[Sequence[Draw]], needs: Iterable[str] = ()) -> View:
    """The view of one arm: ``labels`` and ``draws`` hold one sequence per problem, of any lengths."""
    width = max((len(row) for row in labels), default=0)
    table = np.full((len(labels), width), -1, dtype=np.int32)
    for row, given in zip(table, labels, strict=True):
        row[: len(given)] = given
    drawn = np.array([len(row) for row in labels], dtype=np.int32)
    fields = {name: _field(draws, name, width)[:, None, :] for name in needs}
    return View(table[:, None, :], drawn[:, None], fields)


def _field(draws: Sequence[Sequence[Draw]], name: str, width: int) -> NDArray[np.float64]:
    table = np.full((len(draws), width), np.nan)
    for row, given in zip(table, draws, strict=True):
        for index, draw in enumerate(given):
            value = getattr(draw, name, None)
            row[index] = np.nan if value is None else value
    return table


def right_answer(answer: str | None, first: Draw | None, problem: Problem, kind: str) -> bool | None:
    """Whether an answer is right: by ``passed`` of its first supporting draw, else by equality with the gold answer.

    None where neither is known or the equality cannot be settled; without an answer it is wrong.
    """
    known = first is not None and first.passed is not None
    if not known and problem.answer is None and not any(d.passed is not None for d in problem.draws):
        return None
    if answer is None:
        return False
    if known:
        return first.passed  # type: ignore[union-attr]
    return None if problem.answer is None else answers.equal_to_gold(answer, problem.answer, kind)


def label_all(problem: Problem, kind: str, pattern: re.Pattern[str] | None = None) -> tuple[list[int], AnswerClasses]:
    """The class of every draw of a problem, in order, and the classes."""
    classes = AnswerClasses(kind)
    return [classes.add(answer_of(draw, kind, pattern)) for draw in problem.draws], classes
