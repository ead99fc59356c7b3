"""UniPC: a predictor and a corrector of one form and any order (arXiv:2302.04867), on the x0 prediction.

The corrector takes the evaluation that the next step makes anyway, so that it raises the order by one at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.dpm import Lambdas
from consilience.diffusion.solvers.plan import Plan, Stage

Variant = Literal["bh1", "bh2"]
Update = tuple[float, np.ndarray]
"""What a state keeps of the step's start, and its weights on the outputs of the points in use, newest first."""


@dataclass(frozen=True, slots=True)
class UniPC:
    """UniP-``order`` (1 to 3), by default with the corrector UniC-``order``.

    ``variant`` is B(h) = h or exp(h) - 1. One evaluation per step; the last state is not corrected,
    which would take one more. The step to sigma = 0, where h is infinite, extrapolates x0 at the same order.
    """

    order: int
    variant: Variant = "bh2"
    corrector: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ValueError(f"UniPC is offered in orders 1 to 3, got {self.order}")
        if self.variant not in ("bh1", "bh2"):
            raise ValueError(f"B(h) is bh1 or bh2, got {self.variant!r}")

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid."""
        points, n = Lambdas(grid, process), len(grid) - 1
        outputs = np.eye(n)
        stages: list[Stage] = []
        for i in range(n):
            stages += stages_of(self, points, i, outputs)
        return Plan(tuple(stages), "x0")

    def predict(self, points: Lambdas, i: int) -> Update:
        """UniP from point i to i + 1: weights on `Lambdas.seen`."""
        seen = points.seen(i, self.order)
        if points.sigma[i + 1] == 0:
            return 0.0, np.array(points.to_data(i + 1, seen))
        keep, gain = points.hold(i, i + 1)
        weights = gain * np.eye(len(seen))[0]
        if len(seen) == 1:
            return keep, weights
        rs, right, b_h = self._system(points, i, seen)
        rhos = np.array([0.5]) if len(seen) == 2 else _solve(rs[:-1], right[:-1])
        return keep, weights - points.alpha[i + 1] * b_h * _differences(rhos, rs[:-1])

    def correct(self, points: Lambdas, i: int) -> Update:
        """UniC of the step from point i to i + 1: weights on i + 1, then on `Lambdas.seen`."""
        seen = points.seen(i, self.order)
        keep, gain = points.hold(i, i + 1)
        rs, right, b_h = self._system(points, i, seen)
        rhos = np.array([0.5]) if len(seen) == 1 else _solve(rs, right)
        differences = _differences(rhos[:-1], rs[:-1])
        weights = gain * np.eye(len(seen))[0] - points.alpha[i + 1] * b_h * (
            differences - rhos[-1] * np.eye(len(seen))[0]
        )
        return keep, np.append(-points.alpha[i + 1] * b_h * rhos[-1], weights)

    def corrects(self, points: Lambdas, i: int) -> bool:
        """Whether the state at point i is corrected once the model was evaluated there: not one reached from noise."""
        return self.corrector and i > 0 and bool(np.isfinite(points.lam[i - 1]))

    def _system(self, points: Lambdas, i: int, seen: Sequence[int]) -> tuple[np.ndarray, np.ndarray, float]:
        """r_1 .. r_p with r_p = 1, the right side of the system and B(h); h is -h, as for the x0 prediction."""
        step = points.lam[i + 1] - points.lam[i]
        rs = np.array([*((points.lam[j] - points.lam[i]) / step for j in seen[1:]), 1.0])
        h = -step
        b_h = h if self.variant == "bh1" else np.expm1(h)
        right, phi, factorial = [], np.expm1(h) / h - 1, 1.0
        for k in range(1, len(seen) + 1):
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / h - 1 / factorial
        return rs, np.array(right), float(b_h)


def stages_of(solver: UniPC, points: Lambdas, i: int, outputs: np.ndarray) -> list[Stage]:
    """The evaluation at point i, the correction of the state there, and the prediction of i + 1.

    Row j of ``outputs`` [n, n] says how the output used for point j is made of the evaluations at points 0 .. n - 1.
    """
    here, to = float(points.t[i]), float(points.t[i + 1])
    keep, weights = solver.predict(points, i)
    forward = _on_evaluations(weights, points.seen(i, solver.order), outputs, i)
    if not solver.corrects(points, i):
        return [Stage(here, to, keep, forward)]
    kept, corrected = solver.correct(points, i - 1)
    back = corrected[0] * np.eye(len(outputs))[i]
    used = points.seen(i - 1, solver.order)
    combined = back + corrected[1:] @ outputs[used]
    return [
        Stage(here, here, kept, _newest_first(combined, i), anchor=1),
        Stage(None, to, keep, forward),
    ]


def _on_evaluations(weights: np.ndarray, seen: Sequence[int], outputs: np.ndarray, i: int) -> tuple[float, ...]:
    return _newest_first(weights @ outputs[list(seen)], i)


def _newest_first(row: np.ndarray, i: int) -> tuple[float, ...]:
    """Weights on the evaluations at 0 .. i as a stage has them, without trailing zeros."""
    return tuple(np.trim_zeros(row[i::-1], "b").tolist())


def _solve(rs: np.ndarray, right: np.ndarray) -> np.ndarray:
    """rho of sum_m rho_m r_m^(k - 1) = right_k."""
    return np.linalg.solve(np.vander(rs, increasing=True).T, right)


def _differences(rhos: np.ndarray, rs: np.ndarray) -> np.ndarray:
    """Weights of sum_m rho_m (g_m - g_0) / r_m on g_0, g_1, ..."""
    parts = rhos / rs
    return np.append(-parts.sum(), parts)
