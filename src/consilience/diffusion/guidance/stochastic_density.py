"""Density guidance with noise: paths that differ, and log-density that changes along each at the chosen rate.

Noise is added across the score alone, where log p does not change to first order; what it changes by its curvature is
put right by the drift (Karczewski et al. 2025, arXiv:2502.05807, section on stochastic sampling).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, as_time, convert
from consilience.diffusion.guidance.density import Rate, growth
from consilience.diffusion.processes import expand, standard_normal

Amount = Callable[[float], float]
"""The noise at a time, in units of the forward process's own: 1 is as much as the reverse SDE adds, 0 none."""


@torch.no_grad()
def stochastic_density_guidance(
    model: Denoiser,
    x: Tensor,
    grid: Tensor,
    excess: Rate,
    amount: Amount,
    generator: torch.Generator,
    *,
    probes: int | None = 1,
    **cond: Any,
) -> Tensor:
    """Where x [batch, ...] at ``grid[0]`` is taken by Euler-Maruyama steps along ``grid``, decreasing: [batch, ...].

    ``excess`` is how much faster than naturally log p changes: `quantile_excess`, or a rate plus `divergence`. With
    the velocity u, the score s, its projection P = I - s s' / |s|^2 and phi = amount g it is
    dx = (u + s (excess + phi^2 / 2 tr(P H)) / |s|^2) dt + phi P dw, H the Hessian of log p. The paper takes tr(H) there
    and leaves out the rest as small; it costs nothing here. The trace takes ``probes`` random directions, or all with
    None: each a forward-mode derivative, none where the amount is 0. Raises ValueError for a grid that does not
    decrease to a time with noise left.
    """
    times = [float(t) for t in grid.double()]
    process = model.process
    low = float(process.sigma(grid[-1:].double())[0]) if len(times) else 0.0
    if len(times) < 2 or any(t <= s for t, s in pairwise(times)) or low <= 0:
        raise ValueError("the grid must be two times or more that decrease and end above zero noise")
    model = model.run()
    for here, there in pairwise(times):
        t, h = as_time(here, x), there - here
        phi = torch.sqrt(2 * growth(process, t)) * process.sigma(t) * amount(here)
        velocity, score, trace = _parts(model, x, t, generator, probes if float(phi) else 0, cond)
        length = (score * score).flatten(1).sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        drift = velocity + score * expand((excess(x, t) + phi**2 / 2 * trace) / length, x)
        noise = standard_normal(x.shape, x, generator)
        x = x + h * drift + phi * abs(h) ** 0.5 * across(noise, score)
    return x


def across(v: Tensor, score: Tensor) -> Tensor:
    """The part of v [batch, ...] at right angles to the score."""
    length = (score * score).flatten(1).sum(1).clamp(min=torch.finfo(score.dtype).tiny)
    return v - score * expand((v * score).flatten(1).sum(1) / length, v)


def _parts(
    model: Denoiser, x: Tensor, t: Tensor, generator: torch.Generator, probes: int | None, cond: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The velocity and the score at x, and tr(P H) [batch], by ``probes`` directions (None: all, 0: not at all)."""

    def score_of(y: Tensor) -> Tensor:
        return model.score(y, t, **cond)

    value = model.function(x, t, **cond)
    velocity, score = (convert(value, x, t, model.process, model.prediction, want) for want in ("velocity", "score"))
    trace = x.new_zeros(len(x))
    size = x[0].numel()
    for i in range(size if probes is None else probes):
        v = torch.zeros_like(x)
        if probes is None:
            v.flatten(1)[:, i] = 1
        else:
            v = standard_normal(x.shape, x, generator)
        v = across(v, score)
        curved = torch.func.jvp(score_of, (x,), (v,))[1]
        trace = trace + (v * curved).flatten(1).sum(1) / (1 if probes is None else probes)
    return velocity, score, trace
