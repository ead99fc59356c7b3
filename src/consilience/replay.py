"""Replay: the rules of the live driver over recorded draws, in many random orders, without a further draw."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilience.draws import Draw, Problem, Verdict
from consilience.errors import InputError
from consilience.montecarlo.estimators import proportion_interval
from consilience.prefix import Prefix
from consilience.rules import Float, Int, Rule, View
from consilience.table import Table, order, stopped_early, tabulate
from consilience.views import right_answer

if TYPE_CHECKING:
    from consilience.text.asking import Asker

__all__ = [
    "Replayed",
    "Table",
    "judge",
    "order",
    "replay",
    "replay_many",
    "replay_orders",
    "replay_procedure",
    "stopped_early",
    "tabulate",
]

HINTS = {"mean_logprob": " (nor 'token_logprobs', nor 'logprob' with 'completion_tokens')"}
"""Where else a field of a draw may come from."""

CELLS = 1_000_000
"""Draws (problems times orders times draws) that are simulated together: bounds the memory, fits the caches."""


@dataclass(frozen=True)
class Replayed:
    """One policy over all problems and orders: arrays [repeats, problems].

    ``fell_back``: whether a procedure had to leave it at the vote; None where the policy has none.
    """

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
    fell_back: NDArray[np.bool_] | None = None

    def accuracy_per_problem(self) -> Float:
        """Share of orders in which the verdict is right, float64 [problems whose gold answer is known]."""
        shares: Float = self.right[:, self.known].mean(0)
        return shares

    def summary(self) -> dict[str, Any]:
        """The figures of the command-line contract; what cannot be computed is None."""
        accurate = self.accuracy_per_problem()
        interval = proportion_interval(accurate) if accurate.size else None
        wrong = (self.decided & ~self.right)[:, self.known]
        fallback = {} if self.fell_back is None else {"fallback": float(self.fell_back.mean())}
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
            **fallback,
        }


def replay(table: Table, rule: Rule, *, repeats: int = 100, seed: int = 0) -> Replayed:
    """One rule over every problem in ``repeats`` random orders.

    Raises InputError if a field it needs is absent, the record has too few or too many arms for it, or it ends in a
    procedure (`replay_procedure` runs those).
    """
    return replay_many(table, [rule], repeats=repeats, seed=seed)[0]


def replay_many(
    table: Table,
    rules: Sequence[Rule],
    *,
    repeats: int = 100,
    seed: int = 0,
    on_orders: Callable[[int], None] = lambda _: None,
) -> list[Replayed]:
    """Several rules over the same random orders, which are drawn once; see `replay`.

    ``on_orders`` is called with the number of orders that all rules have been through.
    """
    return _replay(table, rules, (order(table, seed, r) for r in range(repeats)), on_orders)


def replay_orders(table: Table, rule: Rule, orders: Iterable[NDArray[np.intp]]) -> Replayed:
    """One rule over every problem in the given orders, each a permutation [P, D] with a problem's own draws first."""
    return _replay(table, [rule], orders)[0]


def _replay(
    table: Table,
    rules: Sequence[Rule],
    orders: Iterable[NDArray[np.intp]],
    on_orders: Callable[[int], None] = lambda _: None,
) -> list[Replayed]:
    for rule in rules:
        _check(table, rule)
        if rule.procedure is not None:
            raise InputError(f"policy {rule.name}: ends in a procedure, which reads texts; use `replay_procedure`")
    if not rules:
        return []
    full, through = _FullVote(table), 0
    chunks: list[list[dict[str, Any]]] = [[] for _ in rules]
    for chosen in _batches(orders, max(1, CELLS // table.labels.size)):
        shuffled = _Shuffled(table, chosen)
        expected = full.winners(shuffled)
        for rule, done in zip(rules, chunks, strict=True):
            done.append(_judge_all(shuffled, rule, expected, len(chosen)))
        through += len(chosen)
        on_orders(through)
    return [
        Replayed(rule=rule, known=table.known, short=_short(table, rule), **_joined(done))
        for rule, done in zip(rules, chunks, strict=True)
    ]


def _short(table: Table, rule: Rule) -> float:
    """The share of problems with fewer draws than the rule may ask for, of any arm."""
    if rule.arms == 1:
        return float((table.counts < rule.max).mean())
    return float((table.counts_by_arm() < np.array(rule.max_by_arm)).any(1).mean())


def _batches(orders: Iterable[NDArray[np.intp]], size: int) -> Iterator[list[NDArray[np.intp]]]:
    iterator = iter(orders)
    while chosen := list(islice(iterator, size)):
        yield chosen


def _joined(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _check(table: Table, rule: Rule) -> None:
    """Raises InputError where the record lacks what the rule reads."""
    for name in rule.needs:
        if np.isnan(table.fields[name]).all():
            raise InputError(f"policy {rule.name}: the record's draws hold no {name!r}{HINTS.get(name, '')}")
    for name in rule.traits:
        if np.isnan(table.traits[name]).any():
            raise InputError(f"policy {rule.name}: the record's problems hold no {name!r} (--model can be asked)")
    if rule.arms > 1 and rule.arms != len(table.arms):
        there = ", ".join(table.arms[:5]) + (", ..." if len(table.arms) > 5 else "")
        raise InputError(
            f"policy {rule.name}: draws from {rule.arms} arms, the record holds {len(table.arms)} ({there}); "
            "name them in order with --arm"
        )


class _Shuffled:
    """A table with its draws in new orders, one row per order and problem; reads no more columns than are asked for."""

    def __init__(self, table: Table, orders: Sequence[NDArray[np.intp]]) -> None:
        problems, self.width = table.labels.shape
        self.table = table
        self.repeats = len(orders)
        self.counts = np.tile(table.counts, self.repeats)
        self._index = np.concatenate(orders)
        self._first = np.tile(np.arange(problems) * self.width, self.repeats)[:, None]

    def places(self, rows: NDArray[np.intp] | slice = slice(None), width: int | None = None) -> NDArray[np.intp]:
        """Where the first ``width`` draws of these rows stand in the table's arrays, read row by row; [rows, width]."""
        return self._index[rows, :width] + self._first[rows]

    def traits(self, rule: Rule, rows: NDArray[np.intp] | slice = slice(None)) -> dict[str, Float]:
        """The rule's numbers per problem, float64 [rows] each."""
        return {name: np.tile(self.table.traits[name], self.repeats)[rows] for name in rule.traits}

    @cached_property
    def arm(self) -> NDArray[np.int16]:
        """The arm of each draw, int16 [rows, D], -1 past a problem's draws."""
        past = np.arange(self.width) >= self.counts[:, None]
        return np.where(past, np.int16(-1), self.table.arm.ravel().take(self.places()))


class _FullVote:
    """The plurality of all draws of each problem: only a tie depends on the order."""

    def __init__(self, table: Table) -> None:
        problems, classes = len(table.labels), int(table.labels.max(initial=0)) + 1
        rows, columns = np.nonzero(table.labels >= 0)
        cells = rows * classes + table.labels[rows, columns]
        votes = np.bincount(cells, minlength=problems * classes).reshape(problems, classes)
        most = votes.max(1)
        self.leads = (votes == most[:, None]) & (most > 0)[:, None]
        self.leader = np.where(most > 0, self.leads.argmax(1), -1).astype(np.int32)
        self.tied = np.flatnonzero(self.leads.sum(1) > 1)

    def winners(self, shuffled: _Shuffled) -> Int:
        """The winner of each row, int32 [rows], -1 = no answer."""
        winner = np.tile(self.leader, shuffled.repeats)
        if len(self.tied):
            rows = (self.tied + np.arange(shuffled.repeats)[:, None] * len(self.leader)).ravel()
            labels = shuffled.table.labels.ravel().take(shuffled.places(rows))
            leads = self.leads[np.tile(self.tied, shuffled.repeats)]
            eligible = (labels >= 0) & np.take_along_axis(leads, labels.clip(min=0), axis=1)
            winner[rows] = labels[np.arange(len(rows)), eligible.argmax(1)]
        return winner


def _judge_all(shuffled: _Shuffled, rule: Rule, full: Int, repeats: int) -> dict[str, Any]:
    judged = _judge_arms(shuffled, rule) if rule.arms > 1 else _judge_one_arm(shuffled, rule)
    judged["agrees"] = judged.pop("winner") == full
    return {name: values.reshape(repeats, -1) for name, values in judged.items()}


def _judge_one_arm(shuffled: _Shuffled, rule: Rule) -> dict[str, Any]:
    """All draws of a problem as one arm: rows are looked at a few draws wide, those that go on twice as wide."""
    rows = len(shuffled.counts)
    found: dict[str, Any] = {
        "draws": np.zeros(rows, np.int32),
        "decided": np.zeros(rows, bool),
        "winner": np.full(rows, -1, np.int32),
        "confidence": np.zeros(rows),
        "right": np.zeros(rows, bool),
        "tokens": np.full(rows, np.nan),
        "cost": np.full(rows, np.nan),
    }
    left: NDArray[np.intp] | slice = slice(None)
    for width in _widths(rule, shuffled.width):
        places = shuffled.places(left, width)
        view = _one_arm(shuffled, rule, left, places)
        index, stopped = _each_order(rule, view, shuffled.repeats)
        done = stopped | (shuffled.counts[left] <= width)
        if done.all():
            _conclude(shuffled, rule, found, left, places, view, index, stopped)
            break
        if done.any():
            part = np.flatnonzero(done)
            chosen = part if isinstance(left, slice) else left[part]
            _conclude(shuffled, rule, found, chosen, places[part], _part(view, part), index[part], stopped[part])
        left = np.flatnonzero(~done) if isinstance(left, slice) else left[~done]
    found["answered"] = found["winner"] >= 0
    return found


def _widths(rule: Rule, most: int) -> Iterator[int]:
    """As many draws as the rule certainly needs (at least 4), twice that, ..., ``most``; at once if it couples rows."""
    empty = View(
        np.zeros((1, 1, 0), np.int32), np.zeros((1, 1), np.int32), {n: np.zeros((1, 1, 0)) for n in rule.needs}
    )
    width = most if rule.coupled or rule.traits else max(4, int(rule.want(empty).max()))
    while width < most:
        yield width
        width *= 2
    yield most


def _one_arm(shuffled: _Shuffled, rule: Rule, rows: NDArray[np.intp] | slice, places: NDArray[np.intp]) -> View:
    """What the rule sees of these rows, their draws at ``places`` [rows, width]."""
    table = shuffled.table
    return View(
        table.labels.ravel().take(places)[:, None],
        np.minimum(shuffled.counts[rows], places.shape[1])[:, None],
        {name: table.fields[name].ravel().take(places)[:, None] for name in rule.needs},
        shuffled.traits(rule, rows),
    )


def _part(view: View, rows: NDArray[np.intp] | slice) -> View:
    return View(
        view.answers[rows],
        view.drawn[rows],
        {name: values[rows] for name, values in view.fields.items()},
        {name: values[rows] for name, values in view.traits.items()},
    )


def _conclude(
    shuffled: _Shuffled,
    rule: Rule,
    found: dict[str, Any],
    rows: NDArray[np.intp] | slice,
    places: NDArray[np.intp],
    view: View,
    index: Int,
    stopped: NDArray[np.bool_],
) -> None:
    """Write the verdicts of ``rows``, judged on ``index`` draws, into ``found``."""
    table, draws = shuffled.table, index[:, 0]
    winner, confidence = rule.decide(View(view.answers, index, view.fields, view.traits))
    first = (view.answers[:, 0] == winner[:, None]).argmax(1)
    right = table.right.ravel().take(places[np.arange(len(places)), first])
    found["draws"][rows], found["decided"][rows] = draws, stopped & (draws < rule.max)
    found["winner"][rows], found["confidence"][rows] = winner, confidence
    found["right"][rows] = right & (winner >= 0)
    for name, amounts in (("tokens", table.tokens), ("cost", table.cost)):
        if table.recorded[name]:
            used = np.arange(places.shape[1]) < draws[:, None]
            found[name][rows] = np.where(used, amounts.ravel().take(places), 0.0).sum(1)


def _each_order(rule: Rule, view: View, repeats: int) -> tuple[Int, NDArray[np.bool_]]:
    """`Rule.stopping_index`; the problems of a coupled rule are those of one order."""
    if not rule.coupled or repeats == 1:
        return rule.stopping_index(view)
    size = len(view.drawn) // repeats
    parts = []
    for start in range(0, len(view.drawn), size):
        parts.append(rule.stopping_index(_part(view, slice(start, start + size))))
    return np.concatenate([index for index, _ in parts]), np.concatenate([stopped for _, stopped in parts])


def _judge_arms(shuffled: _Shuffled, rule: Rule) -> dict[str, Any]:
    """Each problem's draws split by arm, every arm's in the order they have among all."""
    places = _split(shuffled.places(), shuffled.arm, rule.arms)
    there = places >= 0

    def split(values: NDArray[Any], empty: Any) -> NDArray[Any]:
        return np.where(there, values.ravel().take(places.clip(min=0)), empty)

    table = shuffled.table
    fields = {name: split(table.fields[name], np.nan) for name in rule.needs}
    labels, traits = split(table.labels, np.int32(-1)), shuffled.traits(rule)
    available = there.sum(2).astype(np.int32)
    index, stopped = _each_order(rule, View(labels, available, fields, traits), shuffled.repeats)
    winner, confidence = rule.decide(View(labels, index, fields, traits))
    used = np.arange(labels.shape[2]) < index[:, :, None]
    supports = used & (labels == winner[:, None, None]) & (labels >= 0)
    first = supports.transpose(0, 2, 1).reshape(len(labels), -1).argmax(1)
    right = split(table.right, False).transpose(0, 2, 1).reshape(len(labels), -1)
    draws = index.sum(1).astype(np.int32)
    return {
        "draws": draws,
        "decided": stopped & (draws < rule.max),
        "winner": winner,
        "confidence": confidence,
        "right": right[np.arange(len(right)), first] & (winner >= 0),
        "tokens": np.where(used, split(table.tokens, 0.0), 0.0).sum((1, 2)),
        "cost": np.where(used, split(table.cost, 0.0), 0.0).sum((1, 2)),
        "answered": winner >= 0,
    }


def _split(places: NDArray[np.intp], arm: NDArray[np.int16], arms: int) -> NDArray[np.intp]:
    """The places of each arm's draws, in order, [rows, arms, most of one arm], -1 = none."""
    own = [arm == number for number in range(arms)]
    most = max(int(mask.sum(1).max(initial=0)) for mask in own)
    found = np.full((len(places), arms, most), -1, np.intp)
    for number, mask in enumerate(own):
        rows, columns = np.nonzero(mask)
        found[rows, number, mask.cumsum(1)[rows, columns] - 1] = places[rows, columns]
    return found


async def replay_procedure(
    problems: Sequence[Problem],
    table: Table,
    rule: Rule,
    asker: Callable[[], Asker | None],
    *,
    repeats: int = 1,
    seed: int = 0,
    kind_of: Callable[[Problem], str],
    pattern: re.Pattern[str] | None = None,
    concurrency: int = 8,
    on_done: Callable[[int], None] = lambda _: None,
) -> Replayed:
    """A rule that ends in a procedure: the draws are the recorded ones, what it asks is asked for.

    ``table`` is `tabulate` of ``problems``; ``asker`` gives each conclusion its line to a model, None for a procedure
    that asks nothing; ``on_done`` is called with the number of conclusions reached. Raises InputError as `replay`
    does, BudgetSpent when the asking could not be paid for.
    """
    _check(table, rule)
    full = _FullVote(table)
    room = asyncio.Semaphore(concurrency)
    done = 0

    async def one(number: int, prefix: Prefix, reason: str) -> tuple[Verdict, Draw | None, list[Draw]]:
        nonlocal done
        from consilience.driver import conclude

        async with room:
            vote, first = prefix.verdict(rule, reason)
            line = asker()
            if prefix.draws:
                vote, first = await conclude(rule, line, problems[number], prefix, vote)
        done += 1
        on_done(done)
        return vote, first, [] if line is None else line.asked

    parts = []
    for repeat in range(repeats):
        shuffled = _Shuffled(table, [order(table, seed, repeat)])
        taken, stopped = _taken(shuffled, rule)
        prefixes = [
            _prefix(problem, rule, kind_of(problem), pattern, places - number * table.labels.shape[1])
            for number, (problem, places) in enumerate(zip(problems, taken, strict=True))
        ]
        reasons = ["rule" if end else "source exhausted" for end in stopped]
        said = await asyncio.gather(*(one(number, prefix, reasons[number]) for number, prefix in enumerate(prefixes)))
        parts.append(_concluded(problems, table, rule, full.winners(shuffled), prefixes, stopped, said, kind_of))
    return Replayed(rule=rule, known=table.known, short=_short(table, rule), **_joined(parts))


def _taken(shuffled: _Shuffled, rule: Rule) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The places of the judged draws, [rows, arms, draws], -1 = not judged, and whether the rule stopped, [rows]."""
    arm = shuffled.arm
    if rule.arms == 1:
        arm = np.where(np.arange(arm.shape[1]) < shuffled.counts[:, None], np.int16(0), np.int16(-1))
    places = _split(shuffled.places(), arm, rule.arms)
    there = places >= 0
    values = {name: shuffled.table.fields[name].ravel() for name in rule.needs}
    fields = {name: np.where(there, flat.take(places.clip(min=0)), np.nan) for name, flat in values.items()}
    labels = np.where(there, shuffled.table.labels.ravel().take(places.clip(min=0)), np.int32(-1))
    view = View(labels, there.sum(2).astype(np.int32), fields, shuffled.traits(rule))
    index, stopped = rule.stopping_index(view)
    return np.where(np.arange(places.shape[2]) < index[:, :, None], places, -1), stopped


def _prefix(
    problem: Problem, rule: Rule, kind: str, pattern: re.Pattern[str] | None, taken: NDArray[np.intp]
) -> Prefix:
    """The judged prefix that holds the recorded draws at ``taken`` [arms, draws] (negative = none)."""
    prefix = Prefix(problem, kind, rule.arms)
    for arm, indices in enumerate(taken):
        for index in indices[indices >= 0]:
            prefix.add(problem.draws[index], pattern, arm)
    return prefix


def _concluded(
    problems: Sequence[Problem],
    table: Table,
    rule: Rule,
    full: Int,
    prefixes: Sequence[Prefix],
    stopped: NDArray[np.bool_],
    said: Sequence[tuple[Verdict, Draw | None, list[Draw]]],
    kind_of: Callable[[Problem], str],
) -> dict[str, Any]:
    """One order's conclusions as arrays [1, problems]."""
    columns: dict[str, list[Any]] = {}
    for number, (problem, prefix, (verdict, first, asked)) in enumerate(zip(problems, prefixes, said, strict=True)):
        chosen = (verdict.model_extra or {}).get("chosen")  # of these `first` is a copy
        original = first if chosen is None else [draw for draw, _ in prefix.sighted()][chosen]
        same = [index for index, draw in enumerate(problem.draws) if draw is original]
        label = int(table.labels[number, same[0]]) if same else -1
        used = [*prefix.draws, *asked]
        row = {
            "draws": len(prefix.draws),
            "decided": bool(stopped[number]) and len(prefix.draws) < rule.max,
            "answered": verdict.answer is not None,
            "right": bool(right_answer(verdict.answer, first, problem, kind_of(problem))),
            "agrees": label == full[number] and (label >= 0 or verdict.answer is None),
            "confidence": verdict.confidence,
            "fell_back": "fallback" in (verdict.model_extra or {}),
            "tokens": _sum_or_nan([_tokens(draw) for draw in used]),
            "cost": _sum_or_nan([draw.cost for draw in used]),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array([values]) for name, values in columns.items()}


def _tokens(draw: Draw) -> float | None:
    return None if draw.completion_tokens is None else (draw.prompt_tokens or 0) + draw.completion_tokens


def _sum_or_nan(values: Sequence[float | None]) -> float:
    return float(sum(value for value in values if value is not None)) if None not in values else float("nan")


def judge(
    problem: Problem, rule: Rule, kind: str, pattern: re.Pattern[str] | None = None
) -> tuple[Verdict, bool | None]:
    """The verdict of a rule of one arm on a problem's recorded draws in their order, and whether it is right."""
    prefix = Prefix(problem, kind)
    reason = "rule"
    while want := int(prefix.want(rule)[0]):
        draws = problem.draws[prefix.judged() :][:want]
        if not draws:
            reason = "source exhausted"
            break
        for draw in draws:
            prefix.add(draw, pattern)
    if reason == "rule" and prefix.judged() >= rule.max:
        reason = "max"
    verdict, first = prefix.verdict(rule, reason)
    return verdict, right_answer(verdict.answer, first, problem, kind)


def _mean_or_none(values: Float) -> float | None:
    mean = float(values.mean())
    return None if np.isnan(mean) else mean
