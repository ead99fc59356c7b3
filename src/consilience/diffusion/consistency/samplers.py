"""Sampling from flow maps in few steps: jumps along a decreasing grid, with more or less of the noise put back.

A grid is a tensor of the process's own times as everywhere: its first entry is where x stands, the last where the
sample ends, and a grid of n + 1 times takes n evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.processes import Process, standard_normal
from consilience.diffusion.solve import solve
from consilience.diffusion.solvers.plan import Noise, Solution, Solver


def one_step(model: FlowMap, x: Tensor, **cond: Any) -> Solution:
    """The data that the map takes x [batch, ...] at ``t_max`` to: one evaluation."""
    grid = torch.tensor([model.process.t_max, _end(model.process)], dtype=torch.float64)
    return _jumps(model, x, grid, lambda ratio, time: time, "one step", None, cond)


def multistep(
    model: FlowMap,
    x: Tensor,
    grid: Tensor,
    *,
    sigma_min: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    **cond: Any,
) -> Solution:
    """Multistep consistency sampling: go to the data and noise them to the grid's next time, in turn.

    With the exact map every time of the grid has its exact law. ``sigma_min`` is the sigma / alpha at which a
    consistency model's value lies: it is noised by what is missing to the next level. Algorithm 1 of Consistency
    Models (arXiv:2303.01469). Raises ValueError for a grid that is not decreasing.
    """
    end = _end(model.process)
    return _jumps(model, x, grid, lambda _ratio, _time: end, "multistep", normal(generator, noise), cond, sigma_min)


def phased(model: FlowMap, x: Tensor, grid: Tensor, **cond: Any) -> Solution:
    """Jump from time to time of the grid without new noise: the chain of phased and multistep consistency models.

    For these the grid is made of their phases' edges (`phase_grid`). Algorithm 2 of arXiv:2403.06807. Raises
    ValueError for a grid that is not decreasing.
    """
    return _jumps(model, x, grid, lambda _ratio, time: time, "phased", None, cond)


def segmented(
    model: FlowMap, x: Tensor, grid: Tensor, segments: int, method: str | Solver = "euler", **cond: Any
) -> Solution:
    """Solve the ODE of the model's own flow in each of ``segments`` equal parts of the grid's steps.

    Consistency flow matching learns in each segment a flow that is straight to its end, which the model is told for s:
    one step of Euler's method there is `phased`, and more of them (its code takes any number; arXiv:2407.02398), or a
    ``method`` of `solve` of a higher order, make up for what is not straight yet. ``flow-midpoint`` does not ask for
    the flow at a segment's end, where the next one's begins. Raises ValueError unless each has as many steps.
    """
    grid = grid.detach().double().cpu()
    each, rest = divmod(len(grid) - 1, segments) if segments > 0 else (0, 1)
    if rest or not each:
        raise ValueError(f"{len(grid) - 1} steps cannot be shared by {segments} segments equally")
    nfe, states = 0, []
    for first in range(0, len(grid) - 1, each):
        part = grid[first : first + each + 1]
        found = solve(_towards(model, float(part[-1])), x, part, method, **cond)
        x, nfe = found.x, nfe + found.nfe
        states.append(x)
    return Solution(x, nfe, grid, "segmented", "", tuple(states))


def _towards(model: FlowMap, end: float) -> Denoiser:
    """The model's prediction for the way to ``end``, as a denoiser."""

    def predict(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return model.function(x, t, torch.full_like(t, end), **cond)

    return Denoiser(predict, model.process, model.prediction)


def phase_grid(grid: Tensor, phases: int) -> Tensor:
    """The edges [phases + 1] of the phases that the objectives `pcm` and `multistepcm` cut a training grid into.

    Raises ValueError unless the grid has a step for each.
    """
    steps = len(grid) - 1
    if not 1 <= phases <= steps:
        raise ValueError(f"need 1 <= phases <= steps of the grid, got {phases} and {steps}")
    return grid[[steps - m * steps // phases for m in range(phases, -1, -1)]]


def gamma_sample(
    model: FlowMap,
    x: Tensor,
    grid: Tensor,
    gamma: float,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    **cond: Any,
) -> Solution:
    """Jump to sqrt(1 - gamma^2) of the next sigma / alpha and put back the rest as fresh noise.

    ``gamma`` 0 is the deterministic chain (`phased`), 1 is `multistep`. Gamma-sampling of consistency trajectory
    models (arXiv:2310.02279). Raises ValueError for gamma outside [0, 1] or a grid that
    is not decreasing.
    """
    _check_gamma(gamma)
    process = model.process
    share = math.sqrt(1 - gamma**2)

    def via(ratio: float, time: float) -> float:
        return time if share == 1 else float(process.time(torch.tensor(share * ratio, dtype=torch.float64)))

    return _jumps(model, x, grid, via, f"gamma {gamma:g}", normal(generator, noise), cond)


def tcd_sample(
    model: FlowMap,
    x: Tensor,
    grid: Tensor,
    gamma: float,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    **cond: Any,
) -> Solution:
    """Jump to (1 - gamma) of the next time and noise from there to it.

    ``gamma`` 0 is the deterministic chain (`phased`), 1 is `multistep`; between them it is `gamma_sample` with another
    share. Strategic stochastic sampling of arXiv:2402.19159 (algorithm 4). Raises ValueError for gamma
    outside [0, 1] or a grid that is not decreasing.
    """
    _check_gamma(gamma)
    end = _end(model.process)

    def via(_ratio: float, time: float) -> float:
        return end + (1 - gamma) * (time - end)

    return _jumps(model, x, grid, via, f"tcd {gamma:g}", normal(generator, noise), cond)


@dataclass(frozen=True, slots=True)
class Levels:
    """A grid, what the metric says of it, and how often the metric was asked."""

    grid: Tensor
    score: float
    evaluations: int


def search_levels(
    metric: Callable[[Tensor], float], process: Process, steps: int, *, iterations: int = 12, top: float | None = None
) -> Levels:
    """The decreasing grid of ``steps`` steps that a metric (smaller is better) likes, found one time after the other.

    With the times found so far kept, the next is between the last of them and t_min, where golden-section search with
    ``iterations`` + 2 evaluations in the logarithm of sigma / alpha finds ``metric`` smallest of the grid that
    ends after it: exact to 0.62^iterations of the range where the metric has one valley, as the greedy ternary
    search of Consistency Models assumes (arXiv:2303.01469, section 3 and appendix). ``top`` bounds sigma / alpha where
    the process's is infinite. Raises ValueError unless steps and iterations are at least 1.
    """
    if steps < 1 or iterations < 1:
        raise ValueError(f"need steps >= 1 and iterations >= 1, got {steps} and {iterations}")
    first, last = process.ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).tolist()
    high = math.log(first if top is None else top)
    if not math.isfinite(high):
        raise ValueError("sigma / alpha is infinite at t_max: give the search a top")
    times, asked = [process.t_max], 0

    def grid(inner: list[float]) -> Tensor:
        return torch.tensor([*inner, _end(process)], dtype=torch.float64)

    def ask(log: float) -> float:
        nonlocal asked
        asked += 1
        return float(metric(grid([*times, _time(process, log)])))

    score = math.nan
    for _ in range(steps - 1):
        high, score = golden(ask, math.log(last), high, iterations)
        times.append(_time(process, high))
    if steps == 1:
        score, asked = float(metric(grid(times))), 1
    return Levels(grid(times), score, asked)


def golden(f: Callable[[float], float], low: float, high: float, iterations: int) -> tuple[float, float]:
    """(x, f(x)), the smallest value met by golden-section search between low and high: iterations + 2 evaluations."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at = {left: f(left), right: f(right)}
    for _ in range(iterations):
        if at[left] < at[right]:
            high, right = right, left
            left = high - share * (high - low)
            at[left] = f(left)
        else:
            low, left = left, right
            right = low + share * (high - low)
            at[right] = f(right)
    best = min(at, key=at.__getitem__)
    return best, at[best]


def _time(process: Process, log_ratio: float) -> float:
    return float(process.time(torch.tensor(math.exp(log_ratio), dtype=torch.float64)))


def _jumps(
    model: FlowMap,
    x: Tensor,
    grid: Tensor,
    via: Callable[[float, float], float],
    name: str,
    noise: Noise | None,
    cond: dict[str, Any],
    sigma_min: float = 0.0,
) -> Solution:
    """Jump to ``via(ratio, time)`` of each next time, no later than it, and renoise to it; to the last one jump."""
    process, grid = model.process, grid.detach().double().cpu()
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid[1:] < grid[:-1]).all()):
        raise ValueError("a grid must be a strictly decreasing row of at least two times")
    states = []
    for i in range(len(grid) - 1):
        here, there = float(grid[i]), float(grid[i + 1])
        last = i == len(grid) - 2
        middle = there if last else via(float(process.ratio(grid[i + 1])), there)
        x = model(x, here, middle, **cond)
        if not last and noise is not None and middle < there:
            x = renoise(x, middle, there, process, noise(x, middle, there), sigma_min)
        states.append(x)
    return Solution(x, len(grid) - 1, grid, name, "", tuple(states))


def renoise(x: Tensor, s: float, t: float, process: Process, noise: Tensor, sigma_min: float = 0.0) -> Tensor:
    """x [batch, ...] at time s, with normal ``noise`` of its shape, as a state at the later time t.

    Of the process's own law: alpha_t / alpha_s x + alpha_t sqrt(r_t^2 - r_s^2) noise with r = sigma / alpha, and r_s
    at least ``sigma_min``. Raises ValueError where that leaves nothing to add.
    """
    times = torch.tensor([s, t], dtype=torch.float64)
    (alpha_s, alpha_t), (r_s, r_t) = process.alpha(times).tolist(), process.ratio(times).tolist()
    r_s = max(r_s, sigma_min)
    if not r_s <= r_t < math.inf:
        raise ValueError(f"cannot noise from sigma / alpha {r_s} to {r_t}")
    return x * (alpha_t / alpha_s) + noise * (alpha_t * math.sqrt(r_t**2 - r_s**2))


def _end(process: Process) -> float:
    return float(process.time(torch.zeros((), dtype=torch.float64)))


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be between 0 and 1, got {gamma}")


def normal(generator: torch.Generator | None, given: Noise | None = None) -> Noise:
    """The noise given, or the generator's."""

    def draw(x: Tensor, _s: float, _t: float) -> Tensor:
        return standard_normal(x.shape, x, generator)

    return given or draw
