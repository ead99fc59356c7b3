"""Self-guided minority sampling: guide to where the model's own restoration fails, without data or classifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, as_time, convert
from consilience.diffusion.guidance.minority import Distance, euclidean
from consilience.diffusion.guidance.wrapping import Function, add_to_score, wrap
from consilience.diffusion.processes import expand


def self_minority(
    model: Denoiser,
    scale: float,
    t_renoise: float,
    generator: torch.Generator | None = None,
    active: Callable[[float], bool] = lambda t: True,
    distance: Distance = euclidean,
) -> Denoiser:
    """score + scale / hypot(alpha, sigma) * g / max|g|, g the gradient of how far x0(x, t) is from its restoration.

    The restoration noises x0(x, t) to the time ``t_renoise`` and denoises it; no gradient goes through it. ``active``
    says at which times to guide (see `every`; the whole batch is at one time): two evaluations there, one elsewhere. In
    an ancestral step the shift of the score moves the mean by the step's variance times it, which is what the paper
    does. Source: Um and Ye 2024, arXiv:2407.11555, and their code (compute_mg_grad; t_renoise at 0.8 of the steps,
    scale 0.2 to 0.4, every 2 or 5 steps).
    """
    if scale == 0:
        return model
    process = model.process

    def restored(model: Denoiser, x0: Tensor, cond: dict[str, Any]) -> Tensor:
        at = as_time(t_renoise, x0)
        noise = process.noise(tuple(x0.shape), at, generator).to(x0.dtype)
        with torch.no_grad():
            return model.x0(process.add_noise(x0, noise, at), at, **cond)

    def build(model: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            if not active(float(t.flatten()[0])):
                return model.function(x, t, **cond)
            with torch.enable_grad():
                state = x.detach().requires_grad_()
                value = model.function(state, t, **cond)
                x0 = convert(value, state, t, process, model.prediction, "x0")
                score = distance(x0, restored(model, x0.detach(), cond))
                gradient = torch.autograd.grad(score.sum(), state)[0]
            largest = gradient.abs().amax(tuple(range(1, x.ndim)), keepdim=True)
            unit = gradient / largest.clamp(min=torch.finfo(x.dtype).tiny)
            by = scale / expand(torch.hypot(process.alpha(t), process.sigma(t)), x)
            return add_to_score(value.detach(), by * unit, x, t, process, model.prediction)

        return function

    def cost(t: float) -> int:
        return model.cost(t) + (model.cost(t_renoise) if active(t) else 0)

    return wrap(build, model, cost=cost)


def every(grid: Tensor, count: int) -> Callable[[float], bool]:
    """Whether a time is at, or nearest to, every ``count``-th point of ``grid``, the first one included."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    times = grid.detach().double().cpu()
    return lambda t: int((times - t).abs().argmin()) % count == 0
