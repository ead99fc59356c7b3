"""Runge-Kutta methods on a straightened probability-flow ODE: EDM's Heun, midpoint and the classical rule.

With y = x / c(t) and u as in `multistep.Adams`, the ODE is dy/du = g, g a prediction of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import PREDICTED, Points, from_noise
from consilience.diffusion.solvers.plan import Plan, Stage

Rule = Literal["euler", "midpoint", "heun", "heun3", "rk4"]

TABLEAUX: dict[Rule, tuple[tuple[float, ...], ...]] = {
    "euler": ((1.0,),),
    "midpoint": ((1 / 2,), (0.0, 1.0)),
    "heun": ((1.0,), (1 / 2, 1 / 2)),
    "heun3": ((1 / 3,), (0.0, 2 / 3), (1 / 4, 0.0, 3 / 4)),
    "rk4": ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
"""Butcher's rows: what each inner state, and last the step's end, takes of the slopes so far."""

OPEN: dict[Rule, Rule] = {"heun": "euler", "midpoint": "midpoint", "rk4": "heun3"}
"""What takes the step to no noise, where eps cannot be told from x0: a rule that does not evaluate the end.

Its local error is of the order of the method's global one.
"""


@dataclass(frozen=True, slots=True)
class RungeKutta:
    """``heun``, ``midpoint`` (order 2) or ``rk4`` on the path ``eps`` or ``flow``.

    ``heun`` on ``eps`` is EDM's algorithm 1 without its noise (arXiv:2206.00364): Euler's method is its last step, so
    that n steps take 2 n - 1 evaluations. Pure noise is left by a step of order 1 on the path ``eps``.
    """

    rule: Rule = "heun"
    path: Literal["eps", "flow"] = "eps"

    def __post_init__(self) -> None:
        if self.rule not in OPEN:
            raise ValueError(f"no rule {self.rule!r}; there are: {', '.join(OPEN)}")

    @property
    def evaluations_per_step(self) -> int:
        """How many evaluations a step takes."""
        return len(TABLEAUX[self.rule])

    @property
    def evaluations_saved(self) -> int:
        """How many fewer the last step takes."""
        return len(TABLEAUX[self.rule]) - len(TABLEAUX[OPEN[self.rule]])

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid."""
        points = Points(grid, process)
        first = int(self.path == "eps" and points.pure_noise)
        stages = [from_noise(points)] if first else []
        for i in range(first, len(grid) - 1):
            rule = OPEN[self.rule] if points.sigma[i + 1] == 0 else self.rule
            stages += self._step(points, i, rule)
        return Plan(tuple(stages), PREDICTED[self.path])

    def _step(self, points: Points, i: int, rule: Rule) -> list[Stage]:
        low, high = (self._u(points.ratio[j]) for j in (i, i + 1))
        tableau, scale = TABLEAUX[rule], points.scale(self.path)
        ends = [low + (high - low) * sum(row) for row in tableau[:-1]]
        inner = self._times(ends, points.process)
        times = [float(points.t[i]), *inner.tolist(), float(points.t[i + 1])]
        scales = [*self._scales(inner, points.process), scale[i + 1]]
        stages = []
        for k, (row, end) in enumerate(zip(tableau, scales, strict=True)):
            weights = tuple(float(end * (high - low) * part) for part in reversed(row))
            stages.append(Stage(times[k], times[k + 1], float(end / scale[i]), weights, anchor=k))
        return stages

    def _u(self, ratio: float) -> float:
        if self.path == "eps":
            return float(ratio)
        return 1.0 if np.isinf(ratio) else float(ratio / (1 + ratio))

    def _times(self, u: list[float], process: Process) -> Tensor:
        value = torch.tensor(u, dtype=torch.float64)
        return process.time(value if self.path == "eps" else value / (1 - value))

    def _scales(self, t: Tensor, process: Process) -> list[float]:
        alpha, sigma = process.alpha(t), process.sigma(t)
        scale: list[float] = (alpha if self.path == "eps" else alpha + sigma).tolist()
        return scale
