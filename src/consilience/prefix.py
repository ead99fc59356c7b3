"""The judged draws of a problem: what a rule sees of them, and what it concludes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from consilience.draws import Draw, Problem, Usage, Verdict
from consilience.rules import Int, Rule, View
from consilience.text.answers import classes_of
from consilience.views import answer_of, entry_point_of, number_of, trait_of


@dataclass(slots=True)
class Arm:
    """The judged draws of one arm, in order, with their answers and classes."""

    draws: list[Draw] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


class Prefix:
    """The draws of one problem that a rule has judged: a leading part of each arm's draws."""

    def __init__(self, problem: Problem, kind: str, arms: int = 1) -> None:
        self.problem = problem
        self.kind = kind
        self.arms = [Arm() for _ in range(arms)]
        self.classes = classes_of(problem, kind)
        self._entry_point = entry_point_of(problem, kind)

    @property
    def draws(self) -> list[Draw]:
        """All judged draws, arm after arm."""
        return [draw for arm in self.arms for draw in arm.draws]

    def judged(self, arm: int = 0) -> int:
        """How many draws of an arm have been judged."""
        return len(self.arms[arm].draws)

    def want(self, rule: Rule) -> Int:
        """How many further draws of each arm the rule certainly needs; int32 [arms]."""
        return rule.want(view_of([self], rule))[0]

    def add(self, draw: Draw, pattern: re.Pattern[str] | None = None, arm: int = 0) -> None:
        """One more draw; may block (symbolic work, running code)."""
        answer = answer_of(draw, self.kind, pattern, self._entry_point)
        self._append(draw, answer, self.classes.add(answer), arm)

    async def take(self, draws: Iterable[Draw], pattern: re.Pattern[str] | None = None, arm: int = 0) -> None:
        """More draws, without blocking the event loop."""
        for draw in draws:
            answer = answer_of(draw, self.kind, pattern, self._entry_point)
            slow = answer is not None and self.classes.needs_symbolic(answer)
            label = await self.classes.add_async(answer) if slow else self.classes.add(answer)
            self._append(draw, answer, label, arm)

    def _append(self, draw: Draw, answer: str | None, label: int, arm: int) -> None:
        into = self.arms[arm]
        into.draws.append(draw)
        into.answers.append(answer)
        into.labels.append(label)

    def with_answers(self, draws: Sequence[Draw], shared: bool, arm: int = 0) -> list[Draw]:
        """``draws`` of an arm with the answers read from the judged ones; where there are several arms, also ``arm``.

        ``shared`` draws are copied: another problem with the same request may read another kind of answer from them.
        """
        answered = list(draws)
        for index, (draw, answer) in enumerate(zip(draws, self.arms[arm].answers, strict=False)):
            if draw.answer != answer:
                if shared:
                    answered[index] = draw.model_copy(update={"answer": answer})
                else:
                    draw.answer = answer
        if len(self.arms) == 1:
            return answered
        return [draw.model_copy(update={"arm": arm}) for draw in answered]

    def answered(self) -> list[Draw]:
        """Copies of the judged draws in the order of sight, with their answers and, of several arms, their ``arm``."""
        copies = []
        for index in range(max(len(arm.draws) for arm in self.arms)):
            for number, arm in enumerate(self.arms):
                if index < len(arm.draws):
                    own = {"arm": number} if len(self.arms) > 1 else {}
                    copies.append(arm.draws[index].model_copy(update={"answer": arm.answers[index], **own}))
        return copies

    def sighted(self) -> Iterator[tuple[Draw, int]]:
        """Judged draws with their classes in the order of sight: by index, then by arm."""
        for index in range(max(len(arm.draws) for arm in self.arms)):
            for arm in self.arms:
                if index < len(arm.draws):
                    yield arm.draws[index], arm.labels[index]

    def tally(self) -> dict[str, int]:
        """Votes per answer, all arms together, the most votes first."""
        labels = Counter(label for arm in self.arms for label in arm.labels if label >= 0)
        return {self.classes.representatives[label]: count for label, count in labels.most_common()}

    def supporter(self, answer: str | None) -> Draw | None:
        """The first judged draw whose answer is of the same class; may block."""
        if answer is None:
            return None
        label = self.classes.add(answer)
        return next((draw for draw, own in self.sighted() if own == label >= 0), None)

    def verdict(self, rule: Rule, reason: str) -> tuple[Verdict, Draw | None]:
        """What the judged draws agree on, and the first draw that supports it; the usage is left to the driver."""
        view = view_of([self], rule)
        winners, confidences = rule.decide(view)
        remarks = {name: float(values[0]) for name, values in rule.remarks(view).items()}
        winner = int(winners[0])
        names = self.classes.representatives
        sight = list(self.sighted())
        labels = [label for _, label in sight]
        counts = {names[label]: float(labels.count(label)) for label in dict.fromkeys(labels) if label >= 0}
        unknown = {"unknown_pairs": self.classes.unknown_pairs} if self.classes.unknown_pairs else {}
        verdict = Verdict(
            answer=names[winner] if winner >= 0 else None,
            confidence=float(confidences[0]),
            votes=dict(sorted(counts.items(), key=lambda item: -item[1])),
            draws=len(sight),
            failed=sum(draw.failed for draw, _ in sight),
            usage=Usage(),
            cost=0.0,
            stopped_because=reason,
            decided=reason == "rule",
            abstained=winner < 0,
            **unknown,
            **remarks,
        )
        return verdict, next((draw for draw, label in sight if label == winner), None) if winner >= 0 else None


def view_of(prefixes: Sequence[Prefix], rule: Rule) -> View:
    """What the rule may look at of these problems, one row each."""
    arms = len(prefixes[0].arms)
    drawn = np.array([[len(arm.labels) for arm in prefix.arms] for prefix in prefixes], dtype=np.int32)
    width = int(drawn.max(initial=0))
    labels = np.full((len(prefixes), arms, width), -1, dtype=np.int32)
    fields = {name: np.full(labels.shape, np.nan) for name in rule.needs}
    for row, prefix in enumerate(prefixes):
        for number, arm in enumerate(prefix.arms):
            labels[row, number, : len(arm.labels)] = arm.labels
            for name, values in fields.items():
                values[row, number, : len(arm.draws)] = [number_of(draw, name) for draw in arm.draws]
    traits = {name: np.array([trait_of(prefix.problem, name) for prefix in prefixes]) for name in rule.traits}
    return View(labels, drawn, fields, traits)
