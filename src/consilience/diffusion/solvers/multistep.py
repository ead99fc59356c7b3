"""Adams-Bashforth on any straightening of the probability-flow ODE: Euler/DDIM, exponential integrators, DEIS.

Divide the state by a scale c(t) and measure time by u, and the ODE becomes dy/du = g, where g is one of the model's
predictions (Zhang and Chen, arXiv:2204.13902; Lu et al., arXiv:2211.01095). Each step integrates the polynomial through
the last predictions exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import Prediction
from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.plan import Plan, Stage

Path = Literal["eps", "x0", "flow", "v"]
Named = Literal["sigma", "lambda", "flow", "angle", "time"]


@dataclass(frozen=True, slots=True)
class Soft:
    """log (r + low) / (1 + r / high) at r = sigma / alpha: minus lambda, made finite at both ends.

    Between ``low`` and ``high`` it is logarithmic; below and above it runs like r and like -1 / r, as the predictions
    of a smooth density do.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise ValueError(f"need 0 < low < high, got {self.low} and {self.high}")

    def value(self, ratio: np.ndarray) -> np.ndarray:
        """At sigma / alpha = ``ratio``, which may be 0 or infinite."""
        with np.errstate(invalid="ignore"):
            inside = np.log((ratio + self.low) / (1 + ratio / self.high))
        return np.where(np.isinf(ratio), np.log(self.high), inside)

    def ratio(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `value`."""
        grown = np.exp(value)
        with np.errstate(divide="ignore"):
            return (grown - self.low) / (1 - grown / self.high)

    def slope(self, ratio: np.ndarray) -> np.ndarray:
        """d ratio / d value."""
        return 1 / (1 / (ratio + self.low) - 1 / (self.high + ratio))


Variable = Named | Soft

_NODES, _GAUSS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, slots=True)
class Adams:
    """Adams-Bashforth of ``order`` 1 to 4: ``path`` names the prediction g that is integrated.

    ``eps``: y = x / alpha, u = sigma / alpha. ``x0``: y = x / sigma, u = alpha / sigma, the exponential integrator of
    DPM-Solver++. ``flow``: y = x / (alpha + sigma), u = sigma / (alpha + sigma). ``v``: y = x / hypot(alpha, sigma),
    u = arctan(sigma / alpha). The polynomial is one in ``variable``: ``sigma`` (the ratio), ``lambda``
    (log alpha / sigma), ``flow``, ``angle``, ``time``, the process's own, or a `Soft` logarithm.
    """

    order: int
    path: Path = "eps"
    variable: Variable = "sigma"

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise ValueError(f"orders 1 to 4 are stable enough to offer, got {self.order}")

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages on a grid; on the path eps, `from_noise` leaves pure noise, and its evaluation is used once."""
        points = Points(grid, process)
        first = int(self.path == "eps" and points.pure_noise)
        stages = [from_noise(points)] if first else []
        for i in range(first, len(grid) - 1):
            used = min(self.order, i + 1 - first)
            keep, weights = step(points, i, range(i, i - used, -1), self.path, self.variable)
            stages.append(Stage(float(grid[i]), float(grid[i + 1]), keep, weights))
        return Plan(tuple(stages), PREDICTED[self.path])


PREDICTED: dict[Path, Prediction] = {"eps": "eps", "x0": "x0", "flow": "flow", "v": "v"}


class Points:
    """alpha, sigma and their ratio at the times of a grid, as float64 arrays."""

    def __init__(self, grid: Tensor, process: Process) -> None:
        grid = grid.detach().double().cpu()
        self.process = process
        self.t = grid.numpy()
        self.alpha, self.sigma = (part(grid).numpy() for part in (process.alpha, process.sigma))
        with np.errstate(divide="ignore"):
            self.ratio = self.sigma / self.alpha

    @property
    def pure_noise(self) -> bool:
        """Whether so little signal is left at the first point that x / alpha cannot be computed with."""
        return bool(self.alpha[0] < 1e-4 * self.sigma[0])

    def scale(self, path: Path) -> np.ndarray:
        """c(t), with y = x / c(t)."""
        alpha, sigma = self.alpha, self.sigma
        return {"eps": alpha, "x0": sigma, "flow": alpha + sigma, "v": np.hypot(alpha, sigma)}[path]


def from_noise(points: Points) -> Stage:
    """The first step, of order 1, where alpha may be 0: x_s = alpha_s x0 + sigma_s eps, from the prediction eps - x0.

    A step of order 1 is this one on every path; the prediction eps alone would not tell x0 there.
    """
    keep, weights = step(points, 0, (0,), "flow", "flow")
    return Stage(float(points.t[0]), float(points.t[1]), keep, weights, prediction="flow")


def step(
    points: Points, i: int, seen: Sequence[int], path: Path, variable: Variable
) -> tuple[float, tuple[float, ...]]:
    """(keep, weights) of the step from grid point i to i + 1 by the polynomial through the predictions at ``seen``."""
    start, end = points.ratio[i], points.ratio[i + 1]
    nodes = points.ratio[list(seen)]
    if not np.isfinite(value(variable, np.append(nodes, end), points.process)).all():
        variable = "sigma" if np.isfinite(nodes).all() else "angle"
    if path == "x0" and end == 0:  # y is infinite there: x is alpha times the polynomial's value
        return 0.0, tuple(float(points.alpha[i + 1] * w) for w in at_no_noise(nodes))
    scale = points.scale(path)
    if len(seen) == 1:
        integrals = np.array([_u(path, end) - _u(path, start)])
    else:
        integrals = _integrals(nodes, start, end, path, variable, points.process)
    unit = scale[list(seen)] if path == "v" else np.ones(len(seen))  # v is the slope times hypot(alpha, sigma)
    return float(scale[i + 1] / scale[i]), tuple(float(w) for w in scale[i + 1] * integrals / unit)


def lagrange(nodes: np.ndarray, at: np.ndarray | float) -> np.ndarray:
    """The Lagrange basis on ``nodes`` [k] at ``at`` [...]: [k, ...]."""
    at = np.asarray(at, dtype=np.float64)
    basis = [np.ones_like(at) for _ in nodes]
    for i, node in enumerate(nodes):
        for j, other in enumerate(nodes):
            if j != i:
                basis[i] = basis[i] * (at - other) / (node - other)
    return np.stack(basis)


def at_no_noise(ratios: np.ndarray) -> np.ndarray:
    """The weights [k] that extrapolate x0 from sigma / alpha = ``ratios`` to 0.

    In the square of the ratio: x0 = x + sigma^2 score has no term linear in sigma, so that k evaluations leave an error
    of order 2 k there.
    """
    return lagrange((ratios if np.isfinite(ratios).all() else np.arctan(ratios)) ** 2, 0.0)


def _integrals(
    nodes: np.ndarray, start: float, end: float, path: Path, variable: Variable, process: Process
) -> np.ndarray:
    """The integral over u, from ratio ``start`` to ``end``, of each basis polynomial on ``nodes``: [k]."""
    by = variable
    if variable == "time":  # not integrated over: du / dt is infinite where the noise of a VP process ends
        by = "flow" if np.isinf(start) else "sigma"
    low, high = value(by, np.array([start, end]), process)
    w = low + (high - low) * (_NODES + 1) / 2
    ratio, slope = _ratio(by, w)
    basis = lagrange(value(variable, nodes, process), value(variable, ratio, process))
    return (basis * _u_slope(path, ratio) * slope * _GAUSS).sum(1) * (high - low) / 2


def _u(path: Path, ratio: float) -> float:
    with np.errstate(divide="ignore"):
        flow = 1.0 if np.isinf(ratio) else ratio / (1 + ratio)
        return float({"eps": ratio, "x0": 1 / np.float64(ratio), "flow": flow, "v": np.arctan(ratio)}[path])


def _u_slope(path: Path, ratio: np.ndarray) -> np.ndarray:
    """du / d(ratio)."""
    match path:
        case "eps":
            return np.ones_like(ratio)
        case "x0":
            return -1 / ratio**2
        case "flow":
            return 1 / (1 + ratio) ** 2
        case "v":
            return 1 / (1 + ratio**2)


def value(variable: Variable, ratio: np.ndarray, process: Process) -> np.ndarray:
    """The variable at sigma / alpha = ``ratio``."""
    if isinstance(variable, Soft):
        return variable.value(ratio)
    with np.errstate(divide="ignore", invalid="ignore"):
        match variable:
            case "sigma":
                return ratio
            case "lambda":
                return -np.log(ratio)
            case "flow":
                return np.where(np.isinf(ratio), 1.0, ratio / (1 + ratio))
            case "angle":
                return np.arctan(ratio)
            case "time":
                return process.time(torch.from_numpy(np.asarray(ratio))).numpy()


def _ratio(variable: Variable, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sigma / alpha at a value of the variable, and its derivative."""
    if isinstance(variable, Soft):
        ratio = variable.ratio(w)
        return ratio, variable.slope(ratio)
    match variable:
        case "lambda":
            return np.exp(-w), -np.exp(-w)
        case "flow":
            return w / (1 - w), 1 / (1 - w) ** 2
        case "angle":
            return np.tan(w), 1 + np.tan(w) ** 2
    return w, np.ones_like(w)
