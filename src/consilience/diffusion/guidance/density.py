"""Density guidance: change the drift so that the log-density along a sample's way changes at a chosen rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from scipy.special import ndtri  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, as_time, convert
from consilience.diffusion.guidance.wrapping import Function, wrap
from consilience.diffusion.processes import Process, expand

Rate = Callable[[Tensor, Tensor], Tensor]
"""d log p_t(x_t) / dt at a state [batch, ...] and its time (0-d or [batch]): [batch]."""


def density_guidance(model: Denoiser, rate: Rate) -> Denoiser:
    """The drift nearest to the model's under which d log p_t(x_t) / dt is ``rate`` along every path.

    With the velocity u and the score s it is u + s (rate + div u) / |s|^2, since log p_t changes by s . dx - (div u +
    u . s) dt along a path. The natural rate is -div u. The divergence is exact, a second evaluation and a backward pass
    per dimension: for images use `quantile_guidance`, which needs none. Unbounded where the score vanishes. Source:
    Karczewski et al. 2025, arXiv:2502.05807.
    """

    def excess(model: Denoiser, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        return rate(x, t) + divergence(model, x, t, **cond)

    return _with_excess(model, excess, 2)


def quantile_guidance(model: Denoiser, quantile: float) -> Denoiser:
    """Density guidance at the ``quantile`` of natural changes of log-density: 0.5 is none, above it is more density.

    In high dimension sigma^2 (|s|^2 + Laplacian of log p) / sqrt(2 D) is about standard normal, so that the drift's
    score is multiplied by 1 + sqrt(2 D) z / |sigma s|^2 with z the normal quantile; no divergence is needed. Low values
    give detail, high ones smoothness. That holds while sigma / alpha is above the finest scale of the data: confine it
    by `interval`, and start where some signal is left. Raises ValueError unless 0 < quantile < 1. Source: as
    `density_guidance`; the authors also scale the starting noise to the median norm of a normal vector.
    """
    above = quantile_excess(model.process, quantile)

    def excess(_model: Denoiser, x: Tensor, t: Tensor, _cond: dict[str, Any]) -> Tensor:
        return above(x, t)

    return model if quantile == 0.5 else _with_excess(model, excess, 1)


def quantile_excess(process: Process, quantile: float) -> Rate:
    """How much faster than naturally log p changes in time at a ``quantile`` of its natural changes.

    -g^2 / (2 sigma^2) sqrt(2 D) z, with z the normal quantile and g the noise of the forward process. Raises ValueError
    unless 0 < quantile < 1.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"a quantile lies between 0 and 1, got {quantile}")
    z = float(ndtri(quantile))

    def excess(x: Tensor, t: Tensor) -> Tensor:
        return (-growth(process, t) * math.sqrt(2 * math.prod(x.shape[1:])) * z).expand(len(x))

    return excess


def growth(process: Process, t: Tensor) -> Tensor:
    """d log(sigma / alpha) / dt = g^2 / (2 sigma^2) at times t, and 0 where no signal is left."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    found = process.sigma_dot(t) / sigma - process.alpha_dot(t) / alpha
    return torch.where(alpha > 0, found, torch.zeros_like(found))


def _with_excess(
    model: Denoiser, excess: Callable[[Denoiser, Tensor, Tensor, dict[str, Any]], Tensor], calls: int
) -> Denoiser:
    """Adds s excess / |s|^2 to the velocity, so that d log p / dt is the natural rate plus ``excess``.

    ``calls`` is how often that calls the model.
    """

    def build(model: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            value = model.function(x, t, **cond)
            velocity, score = (
                convert(value, x, t, model.process, model.prediction, want) for want in ("velocity", "score")
            )
            length = (score * score).flatten(1).sum(1).clamp(min=torch.finfo(score.dtype).tiny)
            return velocity + score * expand(excess(model, x, t, cond) / length, x)

        return function

    return wrap(build, model, prediction="velocity", cost=lambda t: calls * model.cost(t))


def divergence(model: Denoiser, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
    """The divergence of the model's velocity at x [batch, ...] and t: [batch], exact, a backward pass per dimension."""
    with torch.enable_grad():
        state = x.detach().requires_grad_()
        velocity = model.velocity(state, t, **cond).flatten(1)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for i in range(velocity.shape[1]):
            gradient = torch.autograd.grad(velocity[:, i].sum(), state, retain_graph=True)[0]
            total = total + gradient.flatten(1)[:, i]
    return total.detach()


def score_alignment(model: Denoiser, x: Tensor, grid: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """Where the ODE takes x [batch, ...] along ``grid``, and how its score there aligns with the first score, [batch].

    The alignment is the inner product of the last score with the first one pushed forward by the ODE's Jacobian:
    where it is positive, scaling the starting noise down raises the log-density of the sample (prior guidance).
    Runge-Kutta steps of order 4 with forward-mode derivatives; ``grid`` decreases and must end above zero noise.
    Source: Karczewski et al. 2025, arXiv:2502.05807.
    """
    times = [float(t) for t in grid.double()]
    tangent = model.score(x, times[0], **cond)

    def slope(t: float, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.func.jvp(lambda y: model.velocity(y, as_time(t, y), **cond), (x,), (v,))
        return found[0], found[1]

    for t, s in pairwise(times):
        x, tangent = _runge_kutta(slope, t, s - t, x, tangent)
    return x, (tangent * model.score(x, times[-1], **cond)).flatten(1).sum(1)


def _runge_kutta(
    slope: Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]], t: float, h: float, x: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    a = slope(t, x, v)
    b = slope(t + h / 2, x + h / 2 * a[0], v + h / 2 * a[1])
    c = slope(t + h / 2, x + h / 2 * b[0], v + h / 2 * b[1])
    d = slope(t + h, x + h * c[0], v + h * c[1])
    new_x, new_v = (y + h / 6 * (a[i] + 2 * b[i] + 2 * c[i] + d[i]) for i, y in enumerate((x, v)))
    return new_x, new_v
