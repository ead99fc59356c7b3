"""`auto`: the grid and the coefficients of a multistep method, fitted for each number of evaluations.

A solver of n evaluations that uses its old slopes has some 5 n free numbers, and those that are best for few steps are
not the ones that are best in the limit of many (Shaul et al., arXiv:2403.01329). Here they are an Adams-Bashforth
method on the straight path plus corrections whose sum is zero in each step, fitted once on Gaussian mixtures and small
networks (benchmarks/auto_tuning.py); they depend on sigma / alpha alone, so one fit serves every process. Where many
evaluations are spent from sigma / alpha near 80, where EDM's begin, a fit for that start alone is taken.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import Adams, Points, Soft, step
from consilience.diffusion.solvers.plan import Plan, Solver, Stage

EDM_START = 80.0
"""Sigma / alpha that some fits begin from alone; the others serve starts from 14.6 to infinity."""

SOFT = Soft(0.03, 9.0)
"""The polynomials' variable on a grid that `auto` is given."""


class Choice(NamedTuple):
    """A method, the grid it goes through, and the reason in one sentence."""

    name: str
    solver: Solver
    grid: Tensor
    why: str


@dataclass(frozen=True, slots=True)
class Fitted:
    """Adams-Bashforth of ``order`` on the straight path, and ``corrections`` [n][k] of its coefficients.

    Step i adds corrections[i][j] times its length in sigma / (alpha + sigma) to the coefficient of the slope j steps
    back. They are meant for the grid that `grid_of` gives and its last part, which image-to-image runs take: the last
    step has the last row, and a step whose row reaches back before the start has none.
    """

    order: int
    variable: Soft
    corrections: tuple[tuple[float, ...], ...]

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid."""
        n, points = len(grid) - 1, Points(grid, process)
        with np.errstate(invalid="ignore"):
            time = np.where(np.isinf(points.ratio), 1.0, points.ratio / (1 + points.ratio))
        scale, stages = points.scale("flow"), []
        for i in range(n):
            used, row = min(self.order, i + 1), len(self.corrections) - n + i
            extra = self.corrections[row] if row >= 0 and len(self.corrections[row]) <= i + 1 else ()
            keep, plain = step(points, i, range(i, i - used, -1), "flow", self.variable)
            weights = np.zeros(max(used, len(extra)))
            weights[:used] += plain
            weights[: len(extra)] += scale[i + 1] * (time[i + 1] - time[i]) * np.array(extra)
            stages.append(Stage(float(points.t[i]), float(points.t[i + 1]), keep, tuple(weights.tolist())))
        return Plan(tuple(stages), "flow")


def choose(process: Process, steps: int | Tensor, sigma_max: float, sigma_min: float) -> Choice:
    """What `solve` takes for ``method="auto"``: with a count the grid too, with a grid the method alone."""
    if isinstance(steps, Tensor):
        order = order_for(len(steps) - 1)
        why = f"Adams-Bashforth of order {order} on the straight path: a grid of {len(steps) - 1} steps carries no more"
        if order == 4:
            why = "Adams-Bashforth of order 4 on the straight path, the highest that is stable enough"
        return Choice(f"soft-ab{order}", Adams(order, "flow", SOFT), steps, why)
    fit, of = nearest(steps, sigma_max)
    grid = process.time(grid_of(fit, steps, sigma_max))
    if steps > 1.5 * of:
        why = f"Adams-Bashforth of order 4 on a fitted grid: {steps} evaluations are more than any fit is for"
        return Choice("soft-ab4", Adams(4, "flow", Soft(*fit["variable"])), grid, why)
    solver = Fitted(int(fit["order"]), Soft(*fit["variable"]), _rows(fit["corrections"], steps, of))
    why = f"grid and coefficients fitted for {of} evaluations on Gaussian mixtures and small networks"
    if "start" in fit:
        why += f", from sigma = {fit['start']:g} alone"
    if of != steps:
        why += f", the nearest count that was fitted to {steps}"
    return Choice(f"fitted-ab{solver.order}", solver, grid, why)


def order_for(steps: int) -> int:
    """The order of Adams-Bashforth that a number of steps carries: 1, 2 from 3, 3 from 6, 4 from 24 steps."""
    return 1 + sum(steps >= least for least in (3, 6, 24))


def grid_of(fit: dict[str, Any], n: int, sigma_max: float) -> Tensor:
    """n + 1 values of sigma / alpha from ``sigma_max``, which may be infinite, to 0."""
    soft = Soft(*fit["ends"])
    at = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(fit["at"]) + 2), [0.0, *fit["at"], 1.0])
    ends = soft.value(np.array([sigma_max, 0.0]))
    grid = soft.ratio(ends[0] + at * (ends[1] - ends[0]))
    grid[0], grid[-1] = sigma_max, 0.0
    return torch.from_numpy(grid)


def nearest(n: int, sigma_max: float = math.inf) -> tuple[dict[str, Any], int]:
    """The fit whose count is nearest to ``n`` in ratio, and that count; for the start near ``sigma_max`` if there is.

    A start is near 80 within a factor of two: EDM's own, and the ranges of its relatives.
    """
    count = min(fits(), key=lambda have: abs(math.log(have / n)))
    near = EDM_START / 2 <= sigma_max <= 2 * EDM_START
    special = fits(EDM_START).get(count) if near else None
    return special or fits()[count], count


@cache
def fits(start: float | None = None) -> dict[int, dict[str, Any]]:
    """What benchmarks/auto_tuning.py wrote, by number of evaluations: for every start, or for one alone."""
    text = files("consilience.diffusion.solvers").joinpath("auto.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return {int(key.split()[0]): fit for key, fit in table.items() if fit.get("start") == start}


def _rows(rows: list[list[float]], n: int, of: int) -> tuple[tuple[float, ...], ...]:
    """The corrections for n steps from a fit for ``of``: the first and last steps keep theirs, the middle repeats."""
    places = [min(i, of // 2) if i < n / 2 else max(of - (n - i), of // 2) for i in range(n)]
    chosen = (rows[place] if len(rows[place]) <= i + 1 else [0.0] for i, place in enumerate(places))
    return tuple(tuple(row) for row in chosen)
