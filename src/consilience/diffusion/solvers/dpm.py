"""DPM-Solver++: exponential integrators for the x0 prediction in lambda = log(alpha / sigma) (arXiv:2211.01095).

Between two times the exact solution is x_t = sigma_t / sigma_s x_s + sigma_t int exp(lambda) x0 dlambda (equation 8);
the methods differ in how they expand x0 around the step's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import Points, at_no_noise
from consilience.diffusion.solvers.plan import Plan, Stage


class Lambdas(Points):
    """The points of a grid with lambda = log(alpha / sigma), infinite in pure noise and in pure data."""

    def __init__(self, grid: Tensor, process: Process) -> None:
        super().__init__(grid, process)
        with np.errstate(divide="ignore"):
            self.lam = -np.log(self.ratio)

    def seen(self, i: int, order: int) -> list[int]:
        """The last ``order`` points up to i, newest first; pure noise only where it is i itself."""
        return [j for j in range(i, max(i - order, -1), -1) if j == i or np.isfinite(self.lam[j])]

    def hold(self, start: int, end: int) -> tuple[float, float]:
        """(keep, gain) of the step with x0 held constant: DDIM; gain is -alpha_t (exp(-h) - 1)."""
        keep = self.sigma[end] / self.sigma[start]
        return float(keep), float(self.alpha[end] - keep * self.alpha[start])

    def to_data(self, end: int, seen: Sequence[int]) -> tuple[float, ...]:
        """Weights of the step to sigma = 0, where h is infinite: x0 extrapolated by `at_no_noise`."""
        return floats(self.alpha[end] * at_no_noise(self.ratio[list(seen)]))


def floats(row: np.ndarray) -> tuple[float, ...]:
    """A row as a tuple."""
    return tuple(float(value) for value in row)


def phis(h: float) -> tuple[float, float, float]:
    """phi_1 = exp(-h) - 1, phi_2 = phi_1 / h + 1 and phi_3 = phi_2 / h - 1/2."""
    first = float(np.expm1(-h))
    second = first / h + 1
    return first, second, second / h - 0.5


@dataclass(frozen=True, slots=True)
class Multistep:
    """DPM-Solver++ of ``order`` 1 to 3 from the last evaluations: algorithm 2 (2M) and its third order (3M).

    One evaluation per step. The step to sigma = 0 extrapolates x0 at the same order. 3M, of which the paper gives no
    formula, takes twice the second derivative that the authors' code takes, which thereby loses an order.
    """

    order: int

    def __post_init__(self) -> None:
        _check(self.order)

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid."""
        points = Lambdas(grid, process)
        stages = []
        for i in range(len(grid) - 1):
            keep, weights = multistep(points, i, self.order)
            stages.append(Stage(float(grid[i]), float(grid[i + 1]), keep, weights))
        return Plan(tuple(stages), "x0")


def multistep(points: Lambdas, i: int, order: int) -> tuple[float, tuple[float, ...]]:
    """(keep, weights) of the multistep step from point i to i + 1, as far as points before it allow."""
    seen = points.seen(i, order)
    if points.sigma[i + 1] == 0:
        return 0.0, points.to_data(i + 1, seen)
    keep, gain = points.hold(i, i + 1)
    if len(seen) == 1:
        return keep, (gain,)
    h = points.lam[i + 1] - points.lam[i]
    if len(seen) == 2:
        r = (points.lam[i] - points.lam[i - 1]) / h
        return keep, (gain * (1 + 1 / (2 * r)), -gain / (2 * r))
    m0, m1, m2 = np.eye(3)
    r0, r1 = (points.lam[i] - points.lam[i - 1]) / h, (points.lam[i - 1] - points.lam[i - 2]) / h
    newer, older = (m0 - m1) / r0, (m1 - m2) / r1
    d1 = newer + r0 / (r0 + r1) * (newer - older)
    d2 = 2 * (newer - older) / (r0 + r1)  # the second derivative
    _, phi2, phi3 = phis(h)
    return keep, floats(gain * m0 + points.alpha[i + 1] * (phi2 * d1 - phi3 * d2))


@dataclass(frozen=True, slots=True)
class Singlestep:
    """DPM-Solver++ of ``order`` 2 or 3 with stages inside each step: algorithm 1 (2S) and its third order (3S).

    Every grid point is an evaluation: ``order`` successive intervals make one step, whose inner times (the paper's s_i)
    are the points between. Intervals left over at the end are taken by multistep steps of the same order, where the
    authors' DPM-Solver-fast takes singlestep ones of lower order. The step to sigma = 0 extrapolates x0 through the
    last ``order`` evaluations.
    """

    order: int

    def __post_init__(self) -> None:
        _check(self.order)

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid."""
        points, last = Lambdas(grid, process), len(grid) - 1
        stages: list[Stage] = []
        while (i := len(stages)) < last:
            whole = i + self.order <= last and np.isfinite(points.lam[i])
            updates = _singlestep(points, i, self.order) if whole else [multistep(points, i, self.order)]
            for inner, (keep, weights) in enumerate(updates):
                here = i + inner
                stages.append(Stage(float(grid[here]), float(grid[here + 1]), keep, weights, anchor=inner))
        return Plan(tuple(stages), "x0")


def _singlestep(points: Lambdas, i: int, order: int) -> list[tuple[float, tuple[float, ...]]]:
    """(keep, weights) of each stage of the step from point i to i + order, all counted from the state at i."""
    keep, gain = points.hold(i, i + 1)
    updates: list[tuple[float, tuple[float, ...]]] = [(keep, (gain,))]
    if order == 3:
        updates.append(_inner(points, i))
    if points.sigma[i + order] == 0:
        updates.append((0.0, points.to_data(i + order, points.seen(i + order - 1, order))))
    elif order > 1:
        updates.append(_second(points, i) if order == 2 else _third(points, i))
    return updates[-order:]


def _second(points: Lambdas, i: int) -> tuple[float, tuple[float, ...]]:
    """2S's update from x0 at i and i + 1: D = (1 - 1 / 2r) m0 + m1 / 2r."""
    keep, gain = points.hold(i, i + 2)
    r = (points.lam[i + 1] - points.lam[i]) / (points.lam[i + 2] - points.lam[i])
    return keep, (gain / (2 * r), gain * (1 - 1 / (2 * r)))


def _inner(points: Lambdas, i: int) -> tuple[float, tuple[float, ...]]:
    """The second inner state of 3S: exact for x0 linear in lambda."""
    keep, gain = points.hold(i, i + 2)
    first, second = points.lam[i + 1] - points.lam[i], points.lam[i + 2] - points.lam[i]
    slope = points.alpha[i + 2] * phis(second)[1] * second / first
    return keep, (slope, gain - slope)


def _third(points: Lambdas, i: int) -> tuple[float, tuple[float, ...]]:
    """3S's update: exact for x0 quadratic in lambda, through i, i + 1 and i + 2."""
    m2, m1, m0 = np.eye(3)  # newest evaluation first
    keep, gain = points.hold(i, i + 3)
    h = points.lam[i + 3] - points.lam[i]
    r1, r2 = (points.lam[i + 1] - points.lam[i]) / h, (points.lam[i + 2] - points.lam[i]) / h
    near, far = (m1 - m0) / r1, (m2 - m0) / r2
    d1, d2 = (r2 * near - r1 * far) / (r2 - r1), 2 * (far - near) / (r2 - r1)
    _, phi2, phi3 = phis(h)
    return keep, floats(gain * m0 + points.alpha[i + 3] * (phi2 * d1 - phi3 * d2))


def _check(order: int) -> None:
    if not 1 <= order <= 3:
        raise ValueError(f"DPM-Solver++ has orders 1 to 3, got {order}")
