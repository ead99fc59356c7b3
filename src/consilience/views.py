"""From draws to what a rule sees: class labels and numeric fields; and from a class back to right or wrong."""

from __future__ import annotations

import math
import re

from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.text import answers
from consilience.text.answers import BEHAVIOUR_KINDS, Classes, classes_of
from consilience.text.voting.token_statistics import FIELDS, token_statistics


def answer_of(
    draw: Draw, kind: str, pattern: re.Pattern[str] | None = None, entry_point: str | None = None
) -> str | None:
    """A draw's answer: its own ``answer`` unless a pattern is given, else what is extracted from its text.

    A reply that calls tools has the calls for an answer, whatever text is beside them. ``entry_point``: see
    `entry_point_of`; without it a reply's last block of code is taken, were it only a test of the one before.
    """
    if draw.failed:
        return None
    if draw.answer is not None and pattern is None:
        return draw.answer
    if calls := (draw.model_extra or {}).get("tool_calls"):
        return answers.call_answer(calls)
    reason = draw.finish_reason
    return answers.extract(draw.text, kind, pattern=pattern, finish_reason=reason, entry_point=entry_point)


def entry_point_of(problem: Problem, kind: str) -> str | None:
    """The function that a reply to a problem of kind ``code`` is to define; None for the other kinds."""
    if kind != "code":
        return None
    from consilience.text.answers.behaviour import entry_point_of as named

    return named(problem) or None


def kind_of(problem: Problem, override: str | None = None) -> str:
    """The answer kind of a problem; raises InputError naming the problem when no vote rule exists for it."""
    kind = override or problem.kind
    try:
        answers.check_kind(kind)
    except ValueError as error:
        raise InputError(f"problem {problem.id!r}: {error}; choose one with --kind") from error
    return kind


def is_gold(answer: str, problem: Problem, kind: str) -> bool | None:
    """Whether an answer equals the problem's gold answer, None where that cannot be settled."""
    if problem.answer is None:
        return None
    if kind in BEHAVIOUR_KINDS:
        from consilience.text.answers.behaviour import BehaviourClasses

        return BehaviourClasses(problem, kind).equal_to_gold(answer, problem.answer)
    return answers.equal_to_gold(answer, problem.answer, kind)


def trait_of(problem: Problem, name: str) -> float:
    """A number that is known of a problem before anything is drawn, nan where it is not; InputError if it is none."""
    value = (problem.model_extra or {}).get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"problem {problem.id!r}: field {name!r} must be a number, got {str(value)[:40]!r}")
    return _float(value)


def number_of(draw: Draw, name: str) -> float:
    """A numeric field of a draw, nan where it has none; token statistics are made from its ``token_logprobs``.

    Raises InputError where the field is there but is no number.
    """
    value = getattr(draw, name, None)
    if value is None and name in FIELDS:
        value = _likelihood(draw, name)
    if value is None:
        return float("nan")
    if not isinstance(value, (int, float)):
        raise InputError(f"the draws' field {name!r} must be a number, got {str(value)[:40]!r}")
    return _float(value)


def _float(value: float) -> float:
    """As ``float``, a whole number beyond all floats as infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _likelihood(draw: Draw, name: str) -> float | None:
    logprobs = (draw.model_extra or {}).get("token_logprobs")
    if logprobs:
        try:
            return token_statistics(logprobs)[name]
        except (ValueError, TypeError) as error:
            raise InputError(f"the draws' field 'token_logprobs': {error}") from error
    if name == "mean_logprob" and draw.logprob is not None and draw.completion_tokens:
        return draw.logprob / draw.completion_tokens
    return None


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
    return is_gold(answer, problem, kind)


def label_all(problem: Problem, kind: str, pattern: re.Pattern[str] | None = None) -> tuple[list[int], Classes]:
    """The class of every draw of a problem, in order, and the classes."""
    classes = classes_of(problem, kind)
    entry_point = entry_point_of(problem, kind)
    found = [answer_of(draw, kind, pattern, entry_point) for draw in problem.draws]
    if (run_all := getattr(classes, "run_all", None)) is not None:  # programs run side by side
        run_all([answer for answer in found if answer is not None])
    return [classes.add(answer) for answer in found], classes
