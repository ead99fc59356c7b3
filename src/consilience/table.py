"""A record as arrays: what replay works on. The problems are read one at a time, so only the arrays stay in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.rules import Float, Int
from consilience.views import is_gold, kind_of, label_all, number_of, trait_of

AMOUNTS = ("prompt_tokens", "completion_tokens", "cost")


@dataclass(frozen=True)
class Table:
    """A record as arrays: P problems, D draws at most.

    labels int32 [P, D], -1 = no answer or no draw; counts int32 [P], the draws of each problem; right bool [P, D],
    whether a draw's answer is right; known bool [P], whether that can be told at all; tokens and cost float64
    [P, D], nan = not recorded; fields float64 [P, D] each; traits float64 [P] each; arm int16 [P, D], the place of
    the draw's arm in ``arms`` (-1 = none of them); undecided counts answers whose equality with the gold answer could
    not be settled (taken as wrong); stopped_by names the policy that stopped the recorded draws early, if one did.
    """

    labels: Int
    counts: Int
    right: NDArray[np.bool_]
    known: NDArray[np.bool_]
    tokens: Float
    cost: Float
    fields: dict[str, Float]
    undecided: int = 0
    traits: dict[str, Float] = field(default_factory=dict)
    arm: NDArray[np.int16] = field(default_factory=lambda: np.zeros((0, 0), np.int16))
    arms: tuple[str, ...] = ()
    stopped_by: str | None = None

    def counts_by_arm(self) -> Int:
        """The draws of each arm, int32 [P, arms]."""
        return np.stack([(self.arm == number).sum(1) for number in range(len(self.arms))], axis=1).astype(np.int32)

    @cached_property
    def recorded(self) -> dict[str, bool]:
        """Whether any draw tells its tokens and its cost."""
        return {"tokens": not np.isnan(self.tokens).all(), "cost": not np.isnan(self.cost).all()}


def tabulate(
    problems: Iterable[Problem],
    *,
    kind: str | None = None,
    pattern: re.Pattern[str] | None = None,
    needs: Sequence[str] = (),
    traits: Sequence[str] = (),
    arms: Sequence[str] | None = None,
) -> Table:
    """The record as arrays; the problems are read once and not kept.

    ``needs`` and ``traits`` name the numbers to keep per draw and per problem, ``arms`` the arms in their order (the
    draws' ``arm`` where that is recorded, else their ``model``; default: in order of appearance). Raises InputError
    for an empty record, one without draws, an unknown arm, or a kind without a vote rule.
    """
    rows = _Rows(tuple(dict.fromkeys((*AMOUNTS, *needs))), tuple(traits), None if arms is None else tuple(arms))
    for problem in problems:
        rows.add(problem, kind_of(problem, kind), pattern)
    return rows.table(tuple(needs))


class _Rows:
    """Collects the arrays of a record, problem by problem."""

    def __init__(self, names: tuple[str, ...], traits: tuple[str, ...], arms: tuple[str, ...] | None) -> None:
        self.arms = {} if arms is None else {name: number for number, name in enumerate(arms)}
        self.open_arms = arms is None
        self.seen_arms: set[str] = set()
        self.labels: list[NDArray[np.int32]] = []
        self.right: list[NDArray[np.bool_]] = []
        self.arm: list[NDArray[np.int16]] = []
        self.known: list[bool] = []
        self.fields: dict[str, list[Float | None]] = {name: [] for name in names}
        self.traits: dict[str, list[float]] = {name: [] for name in traits}
        self.undecided = 0
        self.stopped_by: str | None = None

    def add(self, problem: Problem, kind: str, pattern: re.Pattern[str] | None) -> None:
        labels, right, known, undecided = _row(problem, kind, pattern)
        self.labels.append(np.array(labels, np.int32))
        self.right.append(np.array(right, bool))
        self.arm.append(np.array([self._arm(draw) for draw in problem.draws], np.int16))
        self.known.append(known)
        self.undecided += undecided
        for name, values in self.fields.items():
            numbers = np.array([number_of(draw, name) for draw in problem.draws])
            values.append(None if np.isnan(numbers).all() else numbers)
        for name, of_problem in self.traits.items():
            of_problem.append(trait_of(problem, name))
        self.stopped_by = self.stopped_by or stopped_early([problem])

    def _arm(self, draw: Draw) -> int:
        recorded = (draw.model_extra or {}).get("arm")
        names = [draw.model or ""] if recorded is None else [str(recorded), draw.model or ""]
        self.seen_arms.update(names)
        if self.open_arms:
            return self.arms.setdefault(names[0], len(self.arms))
        return next((self.arms[name] for name in names if name in self.arms), -1)

    def table(self, needs: tuple[str, ...]) -> Table:
        counts = np.array([len(labels) for labels in self.labels], np.int32)
        if not len(counts):
            raise InputError("the record holds no problems")
        if not counts.any():
            raise InputError("the record holds no draws: `solve` writes them, with --out")
        if absent := [name for name in self.arms if name not in self.seen_arms]:
            there = ", ".join(sorted(self.seen_arms)[:20]) or "none"
            raise InputError(f"the record holds no draws of {absent[0]!r} (there are: {there})")
        width = int(counts.max())
        fields = {name: _padded(values, width, np.nan, np.float64) for name, values in self.fields.items()}
        return Table(
            labels=_padded(self.labels, width, -1, np.int32),
            counts=counts,
            right=_padded(self.right, width, False, np.bool_),
            known=np.array(self.known),
            tokens=_total_tokens(fields),
            cost=fields["cost"],
            fields={name: fields[name] for name in needs},
            undecided=self.undecided,
            traits={name: np.array(values) for name, values in self.traits.items()},
            arm=_padded(self.arm, width, -1, np.int16),
            arms=tuple(self.arms),
            stopped_by=self.stopped_by,
        )


def _padded(rows: Sequence[NDArray[np.generic] | None], width: int, empty: float, dtype: type[np.generic]) -> NDArray:  # type: ignore[type-arg]
    table = np.full((len(rows), width), empty, dtype)
    for line, row in zip(table, rows, strict=True):
        if row is not None:
            line[: len(row)] = row
    return table


def _row(problem: Problem, kind: str, pattern: re.Pattern[str] | None) -> tuple[list[int], list[bool], bool, int]:
    """Labels, right or wrong by draw, whether that is known, and how many answers could not be settled."""
    labels, classes = label_all(problem, kind, pattern)
    passed = [draw.passed for draw in problem.draws]
    told = all(p is not None for p in passed)
    by_class = [None if told else is_gold(name, problem, kind) for name in classes.representatives]
    known = problem.answer is not None or any(p is not None for p in passed)
    right = [
        bool(p) if p is not None else label >= 0 and bool(by_class[label])
        for p, label in zip(passed, labels, strict=True)
    ]
    undecided = sum(verdict is None for verdict in by_class) if problem.answer is not None and not told else 0
    return labels, right, known, undecided


def _total_tokens(fields: dict[str, Float]) -> Float:
    prompt, completion = fields["prompt_tokens"], fields["completion_tokens"]
    return np.where(np.isnan(completion), np.nan, np.nan_to_num(prompt) + completion)


def stopped_early(problems: Iterable[Problem]) -> str | None:
    """The policy that stopped the recorded draws early, if one did: random orders of such a record are biased."""
    for problem in problems:
        by = problem.collected_by
        if by and not by.startswith(("sc:", "one")) and problem.verdict is not None and problem.verdict.decided:
            return by
    return None


def order(table: Table, seed: int, repeat: int) -> NDArray[np.intp]:
    """The order of repeat r: a permutation of each problem's own draws first, then the padding; [P, D].

    ``numpy.random.default_rng([seed, r]).random((P, D)).argsort(1)`` with indices beyond a problem's draws dropped.
    """
    shuffled = np.random.default_rng([seed, repeat]).random(table.labels.shape).argsort(1)
    if (table.counts == table.labels.shape[1]).all():
        return shuffled
    absent = shuffled >= table.counts[:, None]
    return np.take_along_axis(shuffled, absent.argsort(1, kind="stable"), axis=1)
