"""Replay: the rules of the live driver over recorded draws, in many random orders, without a further draw."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Problem, Verdict
from consilience.errors import InputError
from consilience.montecarlo.estimators import proportion_interval
from consilience.rules import Float, Int, Rule, View
from consilience.text import answers
from consilience.text.voting.plurality import Plurality
from consilience.views import Prefix, kind_of, label_all, right_answer, view_of

ROWS = 100_000
"""Problems times orders that are simulated together: bounds the memory."""


@dataclass(frozen=True)
class Table:
    """A record as arrays: P problems, D draws at most.

    labels int32 [P, D], -1 = no answer or no draw; counts int32 [P], the draws of each problem; right bool [P, D],
    whether a draw's answer is right; known bool [P], whether that can be told at all; tokens and cost float64
    [P, D], nan = not recorded; fields float64 [P, D] each; undecided counts answers whose equality with the gold
    answer could not be settled (taken as wrong).
    """

    labels: Int
    counts: Int
    right: NDArray[np.bool_]
    known: NDArray[np.bool_]
    tokens: Float
    cost: Float
    fields: dict[str, Float]
    undecided: int = 0


@dataclass(frozen=True)
class Replayed:
    """One policy over all problems and orders: arrays [repeats, problems]."""

    rule: Rule
    draws: Int
    decided: NDArray[np.bool_]
    answered: NDArray[np.bool_]
    right: NDArray[np.bool_]
    agrees: NDArray[np.bool_]
    confidence: Float
    tokens: Float
    cost: Float
    known: NDArray[np.bool_]
    short: float

    def accuracy_per_problem(self) -> Float:
        """Share of orders in which the verdict is right, float64 [problems whose gold answer is known]."""
        shares: Float = self.right[:, self.known].mean(0)
        return shares

    def summary(self) -> dict[str, Any]:
        """The figures of the command-line contract; what cannot be computed is None."""
        accurate = self.accuracy_per_problem()
        interval = proportion_interval(accurate) if accurate.size else None
        wrong = (self.decided & ~self.right)[:, self.known]
        return {
            "policy": self.rule.name,
            "accuracy": float(accurate.mean()) if accurate.size else None,
            "accuracy_ci": None if interval is None else [float(interval[0]), float(interval[1])],
            "mean_draws": float(self.draws.mean()),
            "mean_tokens": _mean_or_none(self.tokens),
            "mean_cost": _mean_or_none(self.cost),
            "agreement_with_full_vote": float(self.agrees.mean()),
            "decided": float(self.decided.mean()),
            "decided_wrong": float(wrong.mean()) if wrong.size else None,
            "short": self.short,
            "problems": self.draws.shape[1],
            "repeats": self.draws.shape[0],
        }


def tabulate(
    problems: Sequence[Problem],
    *,
    kind: str | None = None,
    pattern: re.Pattern[str] | None = None,
    needs: Sequence[str] = (),
) -> Table:
    """The record as arrays; raises InputError for an empty record or a kind without a vote rule."""
    if not problems:
        raise InputError("the record holds no problems")
    rows = [_row(problem, kind_of(problem, kind), pattern) for problem in problems]
    draws = [problem.draws for problem in problems]
    view = view_of([row[0] for row in rows], draws, ("prompt_tokens", "completion_tokens", "cost", *needs))
    if view.answers.shape[2] == 0:
        raise InputError("the record holds no draws: `solve` writes them, with --out")
    right = np.zeros(view.answers[:, 0].shape, bool)
    for line, (labels, by_draw, _, _) in zip(right, rows, strict=True):
        line[: len(labels)] = by_draw
    fields = {name: values[:, 0] for name, values in view.fields.items()}
    return Table(
        labels=view.answers[:, 0],
        counts=view.drawn[:, 0],
        right=right,
        known=np.array([row[2] for row in rows]),
        tokens=_total_tokens(fields),
        cost=fields["cost"],
        fields={name: fields[name] for name in needs},
        undecided=sum(row[3] for row in rows),
    )


def _row(problem: Problem, kind: str, pattern: re.Pattern[str] | None) -> tuple[list[int], list[bool], bool, int]:
    """Labels, right or wrong by draw, whether that is known, and how many answers could not be settled."""
    labels, classes = label_all(problem, kind, pattern)
    gold = problem.answer
    by_class = [None if gold is None else answers.equal_to_gold(name, gold, kind) for name in classes.representatives]
    passed = [draw.passed for draw in problem.draws]
    known = gold is not None or any(p is not None for p in passed)
    right = [
        bool(p) if p is not None else label >= 0 and bool(by_class[label])
        for p, label in zip(passed, labels, strict=True)
    ]
    undecided = sum(verdict is None for verdict in by_class) if gold is not None else 0
    return labels, right, known, undecided


def _total_tokens(fields: dict[str, Float]) -> Float:
    prompt, completion = fields["prompt_tokens"], fields["completion_tokens"]
    return np.where(np.isnan(completion), np.nan, np.nan_to_num(prompt) + completion)


def order(table: Table, seed: int, repeat: int) -> NDArray[np.intp]:
    """The order of repeat r: a permutation of each problem's own draws first, then the padding; [P, D].

    ``numpy.random.default_rng([seed, r]).random((P, D)).argsort(1)`` with indices beyond a problem's draws dropped.
    """
    shuffled = np.random.default_rng([seed, repeat]).random(table.labels.shape).argsort(1)
    absent = shuffled >= table.counts[:, None]
    return np.take_along_axis(shuffled, absent.argsort(1, kind="stable"), axis=1)


def replay(table: Table, rule: Rule, *, repeats: int = 100, seed: int = 0) -> Replayed:
    """One rule over every problem in ``repeats`` random orders. Raises InputError if a field it needs is absent."""
    return replay_orders(table, rule, (order(table, seed, r) for r in range(repeats)))


def replay_orders(table: Table, rule: Rule, orders: Iterable[NDArray[np.intp]]) -> Replayed:
    """One rule over every problem in the given orders, each a permutation [P, D] with a problem's own draws first."""
    for name in rule.needs:
        if np.isnan(table.fields[name]).all():
            raise InputError(f"policy {rule.name}: the record's draws hold no {name!r}")
    per_chunk = max(1, ROWS // len(table.labels))
    iterator, chunks = iter(orders), []
    while chosen := list(islice(iterator, per_chunk)):
        chunks.append(_replay_orders(table, rule, chosen))
    joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    short = float((table.counts < rule.max).mean())
    return Replayed(rule=rule, known=table.known, short=short, **joined)


def _replay_orders(table: Table, rule: Rule, orders: list[NDArray[np.intp]]) -> dict[str, Any]:
    problems = len(table.labels)
    index = np.concatenate(orders)

    def permuted(values: NDArray[Any]) -> NDArray[Any]:
        return np.take_along_axis(np.tile(values, (len(orders), 1)), index, axis=1)

    labels = permuted(table.labels)
    available = np.tile(table.counts, len(orders))
    fields = {name: permuted(table.fields[name])[:, None] for name in rule.needs}
    draws, stopped = _stop(rule, labels, available, fields)
    view = View(labels[:, None], draws[:, None], fields)
    winner, confidence = rule.decide(view)
    full, _ = Plurality().decide(View(labels[:, None], available[:, None]))
    first = ((labels == winner[:, None]) & (labels >= 0)).argmax(1)
    right = permuted(table.right)[np.arange(len(labels)), first] & (winner >= 0)
    used = np.arange(labels.shape[1]) < draws[:, None]
    results = {
        "draws": draws,
        "decided": stopped & (draws < rule.max),
        "answered": winner >= 0,
        "right": right,
        "agrees": winner == full,
        "confidence": confidence,
        "tokens": np.where(used, permuted(table.tokens), 0).sum(1),
        "cost": np.where(used, permuted(table.cost), 0).sum(1),
    }
    return {name: values.reshape(len(orders), problems) for name, values in results.items()}


def _stop(rule: Rule, labels: Int, available: Int, fields: dict[str, Float]) -> tuple[Int, NDArray[np.bool_]]:
    """Draws judged and whether the rule stopped, [rows] each: ask, take what it wants, ask again."""
    drawn = np.zeros(len(labels), np.int32)
    stopped = np.zeros(len(labels), bool)
    open_rows = np.arange(len(labels))
    while open_rows.size:
        width = int(drawn[open_rows].max())
        part = {name: values[open_rows, :, :width] for name, values in fields.items()}
        view = View(labels[open_rows, None, :width], drawn[open_rows, None], part)
        want = rule.want(view).sum(1)
        stopped[open_rows] = want == 0
        step = np.minimum(want, (available - drawn)[open_rows])
        drawn[open_rows] += step.astype(np.int32)
        open_rows = open_rows[step > 0]
    return drawn, stopped


def judge(
    problem: Problem, rule: Rule, kind: str, pattern: re.Pattern[str] | None = None
) -> tuple[Verdict, bool | None]:
    """The verdict of a rule on a problem's recorded draws in their order, and whether it is right (if known)."""
    prefix = Prefix(kind)
    reason = "rule"
    while want := prefix.want(rule):
        draws = problem.draws[len(prefix.draws) :][:want]
        if not draws:
            reason = "source exhausted"
            break
        for draw in draws:
            prefix.add(draw, pattern)
    if reason == "rule" and len(prefix.draws) >= rule.max:
        reason = "max"
    verdict, first = prefix.verdict(rule, reason)
    return verdict, right_answer(verdict.answer, first, problem, kind)


def _mean_or_none(values: Float) -> float | None:
    mean = float(values.mean())
    return None if np.isnan(mean) else mean


def stopped_early(problems: Sequence[Problem]) -> str | None:
    """The policy that stopped the recorded draws early, if one did: random orders of such a record are biased."""
    for problem in problems:
        by = problem.collected_by
        if by and not by.startswith(("sc:", "one")) and problem.verdict is not None and problem.verdict.decided:
            return by
    return None
