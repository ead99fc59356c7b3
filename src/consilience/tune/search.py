"""Measure every candidate once, then choose on one half of the problems and look at the other."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience import policy
from consilience.draws import Draw, Problem
from consilience.errors import InputError
from consilience.montecarlo.estimators import expected_calibration_error, proportion_interval
from consilience.montecarlo.isotonic import isotonic
from consilience.replay import Replayed, replay, replay_many
from consilience.rules import Float, Rule
from consilience.table import Table, tabulate
from consilience.tune.families import candidates
from consilience.tune.results import LEVEL, Calibration, Candidate, Cost, Figures, Measure, Tuned
from consilience.views import number_of

Rows = NDArray[np.intp]

LEAST = 20
"""Problems in the search half below which no policy is chosen: a bound from fewer is not worth its name."""

SHORT = 0.05
"""Candidates ask for at most as many draws as all but this share of the problems have."""

RECORDED = 0.9
"""A weighted vote is tried where at least this share of the draws holds the field that it reads."""

TOGETHER = 8
"""Policies that are replayed between two reports of progress: they share the work of shuffling the draws."""


def tune(
    problems: Sequence[Problem],
    *,
    max_drop: float = 0.01,
    cost: Cost = "draws",
    families: Iterable[str] | None = None,
    own: Sequence[Rule] = (),
    repeats: int = 50,
    seed: int = 0,
    kind: str | None = None,
    pattern: re.Pattern[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """The cheapest policy that loses at most ``max_drop`` (a share) against the plurality of all recorded draws.

    It is `survey` and then `Survey.choose`, which see; both use ``seed``, one for the orders of the draws, one for the
    halves. Raises InputError as they do.
    """
    check_max_drop(max_drop)
    found = survey(
        problems,
        cost=cost,
        families=families,
        own=own,
        repeats=repeats,
        seed=seed,
        kind=kind,
        pattern=pattern,
        progress=progress,
    )
    return found.choose(max_drop, seed)


def check_max_drop(max_drop: float) -> None:
    """Raises InputError unless it is a share."""
    if not 0 <= max_drop <= 1:
        raise InputError(f"max-drop must lie between 0 and 100 points, got {100 * max_drop:g}")


def survey(
    problems: Sequence[Problem],
    *,
    cost: Cost = "draws",
    families: Iterable[str] | None = None,
    own: Sequence[Rule] = (),
    repeats: int = 50,
    seed: int = 0,
    kind: str | None = None,
    pattern: re.Pattern[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Survey:
    """Replay the full vote and every candidate over all problems, in ``repeats`` random orders that all share.

    ``families`` are those of `FAMILIES` to try (default: all), ``own`` further candidates. Where no problem has a gold
    answer, accuracy is agreement with the full vote, and weighted votes are left out, as agreement with a count says
    nothing of them. ``progress(done, total)`` is called after each policy.

    Raises InputError for fewer than two problems with draws, a cost that is not recorded, a candidate that couples
    problems (the halves could not be kept apart), has several arms or ends in a procedure, and as `tabulate`.
    """
    if unfit := [rule.name for rule in own if rule.procedure is not None or rule.arms > 1]:
        raise InputError(f"policy {unfit[0]}: tune compares policies of one model that vote; `replay` runs this one")
    if coupled := [rule.name for rule in own if rule.coupled]:
        raise InputError(f"policy {coupled[0]}: its problems share their draws, so halves of them cannot be compared")
    used, measure, notes = _usable(problems)
    counts = [len(problem.draws) for problem in used]
    own = [dataclasses.replace(rule, calibration=None) for rule in own]  # it is fitted anew, to the raw confidence
    grid = candidates(int(np.quantile(counts, SHORT, method="lower")), families)
    full, tried = policy.parse(f"sc:n={max(counts)}"), _applicable(grid, used, measure)
    rules = list({rule.name: rule for rule in (full, *tried, *own)}.values())
    table = tabulate(
        used,
        kind=kind,
        pattern=pattern,
        needs=_distinct(name for rule in rules for name in rule.needs),
        traits=_distinct(name for rule in rules for name in rule.traits),
    )
    means: list[dict[str, Float]] = []
    for start in range(0, len(rules), TOGETHER):
        results = replay_many(table, rules[start : start + TOGETHER], repeats=repeats, seed=seed)
        means += [_means(result, measure, cost) for result in results]
        _check_cost(means[0]["spent"], cost)
        progress(len(means), len(rules))
    joined = {name: np.array([one[name] for one in means]) for name in means[0]}
    notes += _notes(table, [rule for rule in own if rule.max > max(counts)], max(counts))
    return Survey(tuple(rules), table, measure, cost, repeats, seed, tuple(notes), **joined)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Survey:
    """Every candidate measured on every problem, the full vote first; all that a choice needs.

    right, differs, draws, spent: float64 [policies, problems], means over the orders: right (without gold answers:
    equal to the full vote's answer), another answer than the full vote's, draws, and cost in the unit chosen.
    """

    rules: tuple[Rule, ...]
    table: Table
    measure: Measure
    cost: Cost
    repeats: int
    seed: int
    notes: tuple[str, ...]
    right: Float
    differs: Float
    draws: Float
    spent: Float

    def choose(self, max_drop: float, seed: int = 0) -> Tuned:
        """Split the problems in two halves by a permutation from ``seed``, choose on one, measure on the other.

        On the *search* half a policy is eligible if the upper confidence bound of its drop (`drop_figures`) is at most
        ``max_drop`` (a share) and it costs less than the full vote; of these the cheapest is chosen, of equals the one
        with the smaller drop, then with the smaller max. The *held-out* half has no part in it. Raises InputError
        unless 0 <= max_drop <= 1.
        """
        check_max_drop(max_drop)
        search, held = self.halves(seed)
        listed = mark_frontier(
            [
                Candidate(rule, self._figures(index, search), self._figures(index, held))
                for index, rule in enumerate(self.rules)
            ]
        )
        best = cheapest_within(listed, max_drop)
        notes = list(self.notes)
        if len(search) < LEAST:
            notes.append(f"the search half has {len(search)} problems: from fewer than {LEAST} nothing is promised")
        if best is not None and not self.differs[self.rules.index(best.rule), search].any():
            notes.append(
                f"{best.rule.name} never differed from the full vote on the {len(search)} problems searched: losses on "
                f"fewer than about {3 / len(search):.1%} of all problems could not be seen there"
            )
        chosen = best or listed[0]
        return Tuned(
            chosen=chosen,
            found=best is not None,
            full=listed[0],
            candidates=tuple(listed),
            calibration=self._calibrate(chosen.rule, search, held) if self.measure == "accuracy" else None,
            measure=self.measure,
            cost=self.cost,
            max_drop=max_drop,
            repeats=self.repeats,
            seed=seed,
            notes=tuple(notes),
        )

    def halves(self, seed: int) -> tuple[Rows, Rows]:
        """The problems of the search half (one more, if their number is odd) and of the held-out half."""
        order = np.random.default_rng(seed).permutation(self.right.shape[1])
        middle = (len(order) + 1) // 2
        return np.sort(order[:middle]), np.sort(order[middle:])

    def _figures(self, index: int, rows: Rows) -> Figures:
        """A policy on the problems ``rows``."""
        own = self.right[index, rows]
        drop, interval, bound = drop_figures(self.right[0, rows] - own, self.differs[index, rows], len(self.rules))
        cost, full_cost = float(self.spent[index, rows].mean()), float(self.spent[0, rows].mean())
        return Figures(
            problems=len(rows),
            accuracy=float(own.mean()),
            accuracy_ci=proportion_interval(own, LEVEL),
            drop=drop,
            drop_ci=interval,
            drop_bound=bound,
            draws=float(self.draws[index, rows].mean()),
            cost=cost,
            saved=1 - cost / full_cost if full_cost > 0 else 0.0,
        )

    def _calibrate(self, rule: Rule, search: Rows, held: Rows) -> Calibration | None:
        """See `Calibration`; None where no verdict of one half has an answer."""
        result = replay(self.table, rule, repeats=self.repeats, seed=self.seed)
        seen, kept = (_verdicts(result, rows) for rows in (search, held))
        if not len(seen[0]) or not len(kept[0]):
            return None
        knots, values = isotonic(*seen)
        before = expected_calibration_error(*kept)
        after = expected_calibration_error(np.interp(kept[0], knots, values), kept[1])
        return Calibration(tuple(knots.tolist()), tuple(values.tolist()), before, after)


def _verdicts(result: Replayed, rows: Rows) -> tuple[Float, Float]:
    """Confidence of every verdict with an answer, all orders, and whether it is right; float64 [verdicts] each."""
    answered = result.answered[:, rows]
    return result.confidence[:, rows][answered].clip(0, 1), result.right[:, rows][answered].astype(np.float64)


def _usable(problems: Sequence[Problem]) -> tuple[list[Problem], Measure, list[str]]:
    """The problems to tune on (those with draws and, where any has one, a gold answer), the measure, and notes."""
    if not problems:
        raise InputError("the record holds no problems")
    drawn = [problem for problem in problems if problem.draws]
    known = [p for p in drawn if p.answer is not None or any(draw.passed is not None for draw in p.draws)]
    used, notes = known or drawn, []
    if missing := len(problems) - len(drawn):
        notes.append(f"{missing} problems without draws are left out")
    if known and (missing := len(drawn) - len(known)):
        notes.append(f"{missing} problems without a gold answer are left out")
    if not known:
        notes.append("no problem has a gold answer: accuracy is agreement with the vote of all draws")
    if len(used) < 2:
        raise InputError(
            f"tune compares two halves of the problems, and {len(used)} of the {len(problems)} can be used: "
            "at least 2 need draws (`solve --out` records them)"
        )
    return used, "accuracy" if known else "agreement", notes


def _applicable(rules: Sequence[Rule], problems: Sequence[Problem], measure: Measure) -> list[Rule]:
    """The rules whose fields the draws hold; without gold answers, those that read none."""
    draws = [draw for problem in problems for draw in problem.draws]
    recorded = set()
    if measure == "accuracy":
        names = _distinct(name for rule in rules for name in rule.needs)
        recorded = {name for name in names if sum(_has(draw, name) for draw in draws) >= RECORDED * len(draws)}
    return [rule for rule in rules if recorded.issuperset(rule.needs)]


def _has(draw: Draw, name: str) -> bool:
    try:
        return math.isfinite(number_of(draw, name))
    except InputError:  # a field of that name that is no number is not ours
        return False


def _means(result: Replayed, measure: Measure, cost: Cost) -> dict[str, Float]:
    """Means over the orders by the names that `Survey` has, float64 [problems] each."""
    spent: dict[Cost, NDArray[Any]] = {"draws": result.draws, "tokens": result.tokens, "usd": result.cost}
    values: dict[str, NDArray[Any]] = {
        "right": result.right if measure == "accuracy" else result.agrees,
        "differs": ~result.agrees,
        "draws": result.draws,
        "spent": spent[cost],
    }
    return {name: value.mean(0, dtype=np.float64) for name, value in values.items()}


def _check_cost(spent: Float, cost: Cost) -> None:
    """Raises InputError where the full vote's cost is not known."""
    if missing := int(np.isnan(spent).sum()):
        field = {"tokens": "completion_tokens", "usd": "cost"}[cost]
        raise InputError(
            f"cost {cost!r}: {missing} of {len(spent)} problems have draws without {field!r}; use --cost draws"
        )


def _notes(table: Table, asking: Sequence[Rule], most: int) -> list[str]:
    """What the user should know about the record."""
    notes = []
    if by := table.stopped_by:
        notes.append(
            f"this record was collected by {by}, which stopped early: its full vote is what that rule drew, and random "
            "orders of it are biased; collect with sc"
        )
    if most == 1:
        notes.append("each problem has a single draw: there is nothing to save")
    if table.undecided:
        notes.append(f"{table.undecided} answers could not be compared with the gold answer and count as wrong")
    notes += [f"{rule.name} may ask for {rule.max} draws, the record has {most} at most" for rule in asking]
    return notes


def drop_figures(drops: Float, differs: Float, tried: int = 1) -> tuple[float, tuple[float, float], float]:
    """The mean of paired drops over problems, its 95 % interval and its one-sided upper bound (`LEVEL`).

    drops: float64 [problems] in [-1, 1], the full vote's share of right orders minus the policy's. differs: float64
    [problems], the share of orders in which the two answers are different ones. Both sides are Student's t with
    ``problems - 1`` degrees of freedom and a variance that is never below the mean of ``differs^2``: no drop is larger
    than its ``differs``, which does not depend on which of two different answers happened to be right. So a policy is
    not chosen because its gains and losses did not show in the search half; docs/results/tune.md has what that is
    worth. Of ``tried`` policies some seem better than the full vote by luck: there a gain counts only in a bound that
    holds for all of them at once (Bonferroni), else it is taken as no loss.

    No bound sees what the problems do not show: a loss that fewer than about ``3 / problems`` of all problems suffer
    may be missing altogether, and a policy that differed nowhere has bound 0. Of a single problem nothing is known.
    """
    from scipy.special import stdtrit  # type: ignore[import-untyped,unused-ignore]

    count, mean = len(drops), float(drops.mean())
    if count < 2:
        return mean, (-1.0, 1.0), 1.0
    variance = max(float(drops.var(ddof=1)), float((differs**2).mean()))
    error = float(np.sqrt(variance / count))
    half = float(stdtrit(count - 1, (1 + LEVEL) / 2)) * error
    alone, of_all = (float(stdtrit(count - 1, 1 - (1 - LEVEL) / share)) * error for share in (1, tried))
    bound = min(1.0, max(mean, 0.0) + alone, mean + of_all)
    return mean, (max(-1.0, mean - half), min(1.0, mean + half)), bound


def mark_frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with ``frontier`` set: on the search half, none is right as often for less or more often for as
    much. Of several with the same cost and accuracy the first stands for all."""
    order = sorted(range(len(found)), key=lambda i: (found[i].search.cost, -found[i].search.accuracy, i))
    best, marked = -np.inf, set()
    for index in order:
        if found[index].search.accuracy > best:
            best = found[index].search.accuracy
            marked.add(index)
    return [dataclasses.replace(one, frontier=index in marked) for index, one in enumerate(found)]


def cheapest_within(found: Sequence[Candidate], max_drop: float) -> Candidate | None:
    """The cheapest candidate whose bound on the search half is at most ``max_drop``, if it is cheaper than the first,
    the full vote. None where there is none, or the search half has fewer than `LEAST` problems."""
    full = found[0].search
    if full.problems < LEAST:
        return None
    eligible = [c for c in found[1:] if c.search.drop_bound <= max_drop + 1e-12 and c.search.cost < full.cost]
    return min(eligible, key=lambda c: (c.search.cost, c.search.drop, c.rule.max, c.rule.name), default=None)
