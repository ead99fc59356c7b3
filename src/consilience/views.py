"""From draws to what a rule sees: class labels and numeric fields; and from a class back to right or wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Draw, Problem, Usage, Verdict
from consilience.errors import InputError
from consilience.rules import Rule, View
from consilience.text import answers
from consilience.text.answers import AnswerClasses
from consilience.text.voting.token_statistics import FIELDS, token_statistics


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
            row[index] = number_of(draw, name)
    return table


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
    return float(value)


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
    return None if problem.answer is None else answers.equal_to_gold(answer, problem.answer, kind)


def label_all(problem: Problem, kind: str, pattern: re.Pattern[str] | None = None) -> tuple[list[int], AnswerClasses]:
    """The class of every draw of a problem, in order, and the classes."""
    classes = AnswerClasses(kind)
    return [classes.add(answer_of(draw, kind, pattern)) for draw in problem.draws], classes


class Prefix:
    """The draws of one problem that a rule has judged, in order: what it sees of them and what it concludes."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.draws: list[Draw] = []
        self.answers: list[str | None] = []
        self.labels: list[int] = []
        self.classes = AnswerClasses(kind)

    def want(self, rule: Rule) -> int:
        """How many further draws the rule certainly needs."""
        return int(rule.want(view_of([self.labels], [self.draws], rule.needs)).sum())

    def add(self, draw: Draw, pattern: re.Pattern[str] | None = None) -> None:
        """One more draw; may block for symbolic work (kind ``math``)."""
        answer = answer_of(draw, self.kind, pattern)
        self._append(draw, answer, self.classes.add(answer))

    async def take(self, draws: Iterable[Draw], pattern: re.Pattern[str] | None = None) -> None:
        """More draws, without blocking the event loop."""
        for draw in draws:
            answer = answer_of(draw, self.kind, pattern)
            symbolic = answer is not None and self.classes.needs_symbolic(answer)
            self._append(draw, answer, await self.classes.add_async(answer) if symbolic else self.classes.add(answer))

    def _append(self, draw: Draw, answer: str | None, label: int) -> None:
        self.draws.append(draw)
        self.answers.append(answer)
        self.labels.append(label)

    def with_answers(self, draws: Sequence[Draw], shared: bool) -> list[Draw]:
        """``draws`` with the answers that were read from the judged ones.

        ``shared`` draws are copied: another problem with the same request may read another kind of answer from them.
        """
        answered = list(draws)
        for index, (draw, answer) in enumerate(zip(draws, self.answers, strict=False)):
            if draw.answer != answer:
                if shared:
                    answered[index] = draw.model_copy(update={"answer": answer})
                else:
                    draw.answer = answer
        return answered

    def verdict(self, rule: Rule, reason: str) -> tuple[Verdict, Draw | None]:
        """What the judged draws agree on, and the first draw that supports it; the usage is left to the driver."""
        winners, confidences = rule.decide(view_of([self.labels], [self.draws], rule.needs))
        winner = int(winners[0])
        names = self.classes.representatives
        counts = {names[label]: float(self.labels.count(label)) for label in dict.fromkeys(self.labels) if label >= 0}
        unknown = {"unknown_pairs": self.classes.unknown_pairs} if self.classes.unknown_pairs else {}
        verdict = Verdict(
            answer=names[winner] if winner >= 0 else None,
            confidence=float(confidences[0]),
            votes=dict(sorted(counts.items(), key=lambda item: -item[1])),
            draws=len(self.draws),
            failed=sum(draw.failed for draw in self.draws),
            usage=Usage(),
            cost=0.0,
            stopped_because=reason,
            decided=reason == "rule",
            abstained=winner < 0,
            **unknown,
        )
        return verdict, self.draws[self.labels.index(winner)] if winner >= 0 else None
