"""DC-Solver: UniPC whose stored outputs are compensated, by ratios fitted to a few trajectories (arXiv:2409.03755).

A corrected state and the output computed before its correction do not belong together. The output of step i is
therefore replaced, for all later use, by the polynomial through the last outputs at time
rho_i t_i + (1 - rho_i) t_(i-1); rho_i = 1 keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.dpm import Lambdas
from consilience.diffusion.solvers.multistep import Adams, lagrange
from consilience.diffusion.solvers.plan import Plan, Stage, run
from consilience.diffusion.solvers.unipc import UniPC, stages_of

UNIPC = UniPC(2)
"""The solver that the authors compensate."""

DEGREE = 2
"""Of the polynomial through the outputs, the authors' choice; the first outputs up to it are kept as they are."""

POWERS = [(a, b, c) for a in range(4) for b in range(3) for c in range(3)]
"""Of the share of steps done, the guidance scale and the number of steps, in `Regression`."""


@dataclass(frozen=True, slots=True)
class DCSolver:
    """UniPC ``base`` with a compensation ratio for each step, from `fit` or `Regression`; ones give ``base`` itself."""

    ratios: tuple[float, ...]
    base: UniPC = UNIPC

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid of as many steps as there are ratios; raises ValueError for another."""
        n = len(grid) - 1
        if n != len(self.ratios):
            raise ValueError(
                f"these ratios are for {len(self.ratios)} steps, the grid has {n}: fit or predict them anew"
            )
        points, outputs = Lambdas(grid, process), np.eye(n)
        stages: list[Stage] = []
        for i, ratio in enumerate(self.ratios):
            outputs[i] = compensated(points, i, outputs, ratio)
            stages += stages_of(self.base, points, i, outputs)
        return Plan(tuple(stages), "x0")


def compensated(points: Lambdas, i: int, outputs: np.ndarray, ratio: float) -> np.ndarray:
    """Row i of ``outputs`` (see `unipc.stages_of`) at the time that ``ratio`` says."""
    if i < DEGREE:
        return outputs[i]
    at = ratio * points.t[i] + (1 - ratio) * points.t[i - 1]
    nodes = np.arange(i, i - DEGREE - 1, -1)
    row: np.ndarray = lagrange(points.t[nodes], at) @ outputs[nodes]
    return row


def fit(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    base: UniPC = UNIPC,
    *,
    bounds: tuple[float, float] = (0.0, 2.0),
    substeps: int = 100,
    progress: Callable[[int, float, float], None] | None = None,
    **cond: Any,
) -> DCSolver:
    """The ratios that keep ``base`` closest to a many-step trajectory, found step after step.

    ``x`` [batch, ...] stands at the grid's first time; ten samples are enough. The trajectory takes ``substeps`` steps
    in each of the grid's. Each ratio minimises the mean squared distance to it after the step, over ``bounds``, by a
    scan and Brent's method (the authors: gradient descent), at some 25 evaluations a step. ``progress`` is told the
    step, its ratio and the distance. Raises ValueError for a model that remembers between evaluations.
    """
    if model.fresh is not None:
        raise ValueError("ratios cannot be fitted to a model that remembers its last evaluations: each is tried often")
    if not bounds[0] <= 1 <= bounds[1]:
        raise ValueError(f"the bounds must hold 1, the ratio of no compensation, got {bounds}")
    targets = _trajectory(model, x, grid, substeps, cond)
    search = _Search(model, x, grid, base, cond)
    for i, target in enumerate(targets):
        ratio, distance = search.best(i, target, bounds)
        if progress is not None:
            progress(i, ratio, distance)
    return DCSolver(tuple(search.ratios), base)


class _Search:
    """A run of the solver that stands at a grid point and tries ratios for the step from there."""

    def __init__(self, model: Denoiser, x: Tensor, grid: Tensor, base: UniPC, cond: dict[str, Any]) -> None:
        self.model, self.base, self.cond = model, base, cond
        self.points = Lambdas(grid, model.process)
        self.n = len(grid) - 1
        self.outputs = np.eye(self.n)
        self.ratios: list[float] = []
        self.x = x  # corrected, at the point reached
        self.evaluations = [self._evaluate(x, 0)]  # newest first

    def best(self, i: int, target: Tensor, bounds: tuple[float, float]) -> tuple[float, float]:
        """Take the step from point i with the best ratio; returns it and the distance to the target."""
        from scipy.optimize import minimize_scalar  # type: ignore[import-untyped,unused-ignore]

        def distance(ratio: float) -> float:
            return float((self._step(i, ratio)[0] - target).square().mean())

        ratio = 1.0
        if i >= DEGREE:
            scan = np.unique([*np.linspace(*bounds, 11), 1.0])
            values = [distance(float(candidate)) for candidate in scan]
            at = int(np.argmin(values))
            around = (scan[max(at - 1, 0)], scan[min(at + 1, len(scan) - 1)])
            found = minimize_scalar(distance, bounds=around, method="bounded", options={"maxiter": 12})
            ratio = float(found.x if found.fun < values[at] else scan[at])
        self.x, evaluation = self._step(i, ratio)
        if evaluation is not None:
            self.evaluations.insert(0, evaluation)
        self.outputs[i] = compensated(self.points, i, self.outputs, ratio)
        self.ratios.append(ratio)
        return ratio, float((self.x - target).square().mean())

    def _step(self, i: int, ratio: float) -> tuple[Tensor, Tensor | None]:
        """The state at point i + 1, corrected where the solver does so, and the evaluation made there."""
        outputs = self.outputs.copy()
        outputs[i] = compensated(self.points, i, outputs, ratio)
        predict = stages_of(self.base, self.points, i, outputs)[-1]
        predicted = _combine(predict, self.x, self.evaluations)
        if i + 1 == self.n:
            return predicted, None
        evaluation = self._evaluate(predicted, i + 1)
        if not self.base.corrects(self.points, i + 1):
            return predicted, evaluation
        correct = stages_of(self.base, self.points, i + 1, outputs)[0]
        return _combine(correct, self.x, [evaluation, *self.evaluations]), evaluation

    def _evaluate(self, x: Tensor, i: int) -> Tensor:
        return self.model.x0(x, float(self.points.t[i]), **self.cond)


def _combine(stage: Stage, anchor: Tensor, evaluations: Sequence[Tensor]) -> Tensor:
    pairs = zip(stage.weights, evaluations, strict=False)
    return sum((weight * evaluation for weight, evaluation in pairs), stage.keep * anchor)


def _trajectory(model: Denoiser, x: Tensor, grid: Tensor, substeps: int, cond: dict[str, Any]) -> list[Tensor]:
    """The states at the grid's times after the first, by steps of order 2."""
    if substeps < 1:
        raise ValueError(f"the trajectory needs at least one step in each of the grid's, got {substeps}")
    grid = grid.detach().double().cpu()
    share = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.cat([*(start + (end - start) * share for start, end in pairwise(grid)), grid[-1:]])
    plan = Adams(2, "flow", "flow").plan(fine, model.process)
    states = [state for _, state in run(plan, model, x, lambda z, *_: torch.zeros_like(z), float(fine[0]), **cond)]
    return states[substeps - 1 :: substeps]


@dataclass(frozen=True, slots=True)
class Regression:
    """Ratios for unseen numbers of steps and guidance scales: the paper's cascade polynomial regression.

    A ratio is a cubic in the share of steps done, whose coefficients are quadratics in the guidance scale, whose
    coefficients are quadratics in the number of steps, as in the authors' code: ``coefficients`` [36], in the order of
    `POWERS`.
    """

    coefficients: tuple[float, ...]
    base: UniPC = UNIPC

    @classmethod
    def of(cls, fitted: Sequence[tuple[float, DCSolver]]) -> Regression:
        """The least-squares fit to solvers from `fit` with their guidance scales; raises ValueError without any."""
        if not fitted:
            raise ValueError("a regression needs solvers from `fit`, each with its guidance scale")
        rows = [
            (_powers(step, scale, len(solver.ratios)), ratio)
            for scale, solver in fitted
            for step, ratio in enumerate(solver.ratios)
            if step >= DEGREE
        ]
        if not rows:
            raise ValueError(f"solvers of at most {DEGREE} steps have no ratios to learn from")
        inputs, ratios = np.array([row for row, _ in rows]), np.array([ratio for _, ratio in rows])
        found = np.linalg.lstsq(inputs, ratios, rcond=1e-8)[0]
        return cls(tuple(found.tolist()), fitted[0][1].base)

    def predict(self, scale: float, steps: int) -> DCSolver:
        """The solver for a guidance scale and a number of steps."""
        rows = [_powers(step, scale, steps) @ np.array(self.coefficients) for step in range(steps)]
        return DCSolver(tuple(1.0 if step < DEGREE else float(row) for step, row in enumerate(rows)), self.base)


def _powers(step: int, scale: float, steps: int) -> np.ndarray:
    share = (step + 1) / steps
    return np.array([share**a * (scale / 10) ** b * (steps / 10) ** c for a, b, c in POWERS])
