"""Samplers that put noise back: ancestral steps, SDE-DPM-Solver++ and EDM's churn.

All take the noise they add as an argument of the run, so that a Brownian path (`brownian`) makes them comparable
across step counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.grids import karras_grid, on_process
from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import Adams, Points, at_no_noise, lagrange
from consilience.diffusion.solvers.plan import Plan, Solver, Stage


@dataclass(frozen=True, slots=True)
class Ancestral:
    """One reverse step of the Markov chain per evaluation; ``eta`` 0 is DDIM and 1 is DDPM's posterior.

    Denoising diffusion implicit models (arXiv:2010.02502), equations 12 and 16, on any process.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}")

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """One stage per step."""
        points = Points(grid, process)
        stages = []
        for i in range(len(grid) - 1):
            high, low = points.ratio[i], points.ratio[i + 1]
            up = self.eta * low * math.sqrt(1 - (low / high) ** 2)
            down = math.sqrt(max(low**2 - up**2, 0.0))
            alpha = float(points.alpha[i + 1])
            keep = alpha * down / float(points.sigma[i])
            weight = alpha - keep * float(points.alpha[i])
            noise = alpha * up
            stages.append(Stage(float(grid[i]), float(grid[i + 1]), keep, (weight,), noise=noise))
        return Plan(tuple(stages), "x0")


@dataclass(frozen=True, slots=True)
class SDEDPM:
    """SDE-DPM-Solver++: the exponential integrator of the reverse SDE, of ``order`` 1, 2 or 3 (multistep).

    With lambda = log(alpha / sigma) and ``eta`` the share of the SDE's noise, x0's polynomial in lambda is integrated
    exactly against (1 + eta^2) exp((1 + eta^2) lambda); ``eta`` 0 is the exponential integrator of the ODE, order 1
    with ``eta`` 1 the equation for SDE-DPM-Solver++1 of arXiv:2211.01095 (appendix on SDE solvers).
    """

    order: int = 2
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 3:
            raise ValueError(f"orders 1 to 3, got {self.order}")
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """One stage per step."""
        points = Points(grid, process)
        stages = []
        for i in range(len(grid) - 1):
            used = [j for j in range(i, max(i - self.order, -1), -1) if np.isfinite(points.ratio[j]) or i == j]
            keep, weights, noise = self._step(points, i, used)
            stages.append(Stage(float(grid[i]), float(grid[i + 1]), keep, weights, noise=noise))
        return Plan(tuple(stages), "x0")

    def _step(self, points: Points, i: int, used: Sequence[int]) -> tuple[float, tuple[float, ...], float]:
        alpha, high, low = float(points.alpha[i + 1]), points.ratio[i], points.ratio[i + 1]
        nodes = points.ratio[list(used)]
        if low == 0:  # all noise is gone: x is the extrapolated x0
            return 0.0, tuple(float(alpha * w) for w in at_no_noise(nodes)), 0.0
        power = 1 + self.eta**2
        decay = float((low / high) ** power)  # exp(-(1 + eta^2) h)
        noise = alpha * low * math.sqrt(max(1 - float((low / high) ** (2 * self.eta**2)), 0.0))
        # sigma_s/sigma_t exp(-eta^2 h) x, written without sigma_t / alpha_t so that it holds from pure noise too
        keep = alpha * low / float(points.sigma[i]) * float((low / high) ** (self.eta**2))
        if len(used) == 1:
            return keep, (alpha * (1 - decay),), noise
        return keep, tuple(float(alpha * w) for w in _exponential(nodes, high, low, power)), noise


def _exponential(nodes: np.ndarray, high: float, low: float, power: float) -> np.ndarray:
    """The integral of each basis polynomial in lambda against power exp(-power (lambda_end - lambda)): [k]."""
    gauss_x, gauss_w = np.polynomial.legendre.leggauss(32)
    start, end = -math.log(high), -math.log(low)
    at = start + (end - start) * (gauss_x + 1) / 2
    weight = power * np.exp(power * (at - end)) * gauss_w * (end - start) / 2
    found: np.ndarray = (lagrange(-np.log(nodes), at) * weight).sum(1)
    return found


@dataclass(frozen=True, slots=True)
class Churn:
    """EDM's stochastic sampler: raise sigma by a factor, with fresh noise, then take a Heun step (algorithm 2).

    ``churn``, ``low``, ``high`` and ``inflation`` are S_churn, S_tmin, S_tmax and S_noise of Karras et al.,
    arXiv:2206.00364; sigma is sigma / alpha on other processes. ``churn`` 0 is Heun's method.
    """

    churn: float = 40.0
    low: float = 0.05
    high: float = 50.0
    inflation: float = 1.003
    evaluations_per_step = 2

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """Two evaluations per step, one for the last step to sigma 0."""
        points = Points(grid, process)
        steps = len(grid) - 1
        most = min(self.churn / steps, math.sqrt(2) - 1)
        stages: list[Stage] = []
        for i in range(steps):
            ratio = float(points.ratio[i])
            gamma = most if self.low <= ratio <= self.high else 0.0
            stages += _churned(points, i, ratio * (1 + gamma), self.inflation, process)
        return Plan(tuple(stages), "eps")


def _churned(points: Points, i: int, ratio: float, inflation: float, process: Process) -> list[Stage]:
    """The stages of one step: noise up to sigma / alpha = ``ratio``, Euler, and the trapezoid where sigma stays > 0."""
    start = float(points.ratio[i])
    time, alpha = float(points.t[i]), float(points.alpha[i])
    stages: list[Stage] = []
    if ratio > start:
        raised = process.time(torch.tensor(ratio, dtype=torch.float64))
        high_alpha = float(process.alpha(raised))
        added = inflation * math.sqrt(ratio**2 - start**2)
        stages.append(Stage(None, float(raised), high_alpha / alpha, noise=high_alpha * added))
        time, alpha = float(raised), high_alpha
    end, alpha_end, low = float(points.t[i + 1]), float(points.alpha[i + 1]), float(points.ratio[i + 1])
    keep, step = alpha_end / alpha, alpha_end * (low - ratio)
    stages.append(Stage(time, end, keep, (step,)))
    if low > 0:
        stages.append(Stage(end, end, keep, (step / 2, step / 2), anchor=1))
    return stages


@dataclass(frozen=True, slots=True)
class Interval:
    """One place of restarts: ``times`` times from sigma / alpha = ``low`` up to ``high``, back in ``steps`` steps."""

    low: float = 0.06
    high: float = 0.3
    times: int = 1
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ValueError(f"need 0 < low < high, got {self.low} and {self.high}")
        if self.times < 0 or self.steps < 1:
            raise ValueError(f"need times >= 0 and steps >= 1, got {self.times} and {self.steps}")


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart sampling: in an interval noise is added and the ODE solved back, several times over.

    Xu et al., arXiv:2306.14878, algorithm 1: the noise contracts the error made so far, the ODE keeps its own small.
    The restarts of an interval begin at the grid's time nearest to its ``low`` and follow Karras' grid (rho 7), one
    interval after the other where they begin at the same time;
    ``inflation`` is S_noise, and ``solver`` goes through the main grid and the restarts.
    """

    intervals: tuple[Interval, ...] = (Interval(),)
    inflation: float = 1.003
    solver: Solver = field(default_factory=lambda: Adams(2, "eps", "sigma"))

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The main grid with its restarts; raises ValueError where an interval does not lie inside it."""
        ratio = Points(grid, process).ratio
        places: dict[int, list[Interval]] = {}
        for one in self.intervals:
            at = int(np.abs(ratio - one.low).argmin())
            if one.times and (not 0 < at < len(grid) - 1 or one.high <= ratio[at]):
                raise ValueError(f"the restart from {one.low} to {one.high} has no place inside the grid")
            if one.times:
                places.setdefault(at, []).append(one)
        cuts = [0, *sorted(places), len(grid) - 1]
        plans = [self.solver.plan(grid[a : b + 1], process) for a, b in itertools.pairwise(cuts)]
        stages = list(plans[0].stages)
        for at, plan in zip(cuts[1:], plans[1:], strict=False):
            for one in places[at]:
                stages += self._again(grid[at], float(ratio[at]), one, process) * one.times
            stages += plan.stages
        return Plan(tuple(stages), plans[0].prediction)

    def _again(self, t: Tensor, base: float, one: Interval, process: Process) -> list[Stage]:
        """Noise from time ``t`` up to the interval's ``high``, and the way back."""
        top = process.time(torch.tensor(one.high, dtype=torch.float64))
        scale, added = process.alpha(top) / process.alpha(t), math.sqrt(one.high**2 - base**2)
        up = Stage(None, float(top), float(scale), noise=float(process.alpha(top)) * added * self.inflation)
        back = on_process(karras_grid(one.steps + 1, base, one.high)[:-1], process)
        back[0], back[-1] = top, t
        return [up, *self.solver.plan(back, process).stages]
