"""What the guidance methods share: making a denoiser of denoisers, and shifting a score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, Prediction, weights
from consilience.diffusion.processes import Process, expand

Function = Callable[..., Tensor]


def wrap(
    build: Callable[..., Function],
    *parts: Denoiser,
    prediction: Prediction | None = None,
    cost: Callable[[float], int] | None = None,
) -> Denoiser:
    """The denoiser ``build(*parts)`` on the first part's process, with fresh parts in each run.

    ``prediction`` is what the built function returns, by default what the first part does; ``cost`` is by default
    the sum of the parts' costs.
    """
    first = parts[0]

    def fresh() -> Function:
        return build(*(part.run() for part in parts))

    return Denoiser(
        build(*parts),
        first.process,
        prediction or first.prediction,
        cost or (lambda t: sum(part.cost(t) for part in parts)),
        fresh if any(part.fresh is not None for part in parts) else None,
        first.two_times,
    )


def on_process_of(model: Denoiser, other: Denoiser) -> Denoiser:
    """``other`` on the process of ``model``."""
    return other if other.process == model.process else other.on(model.process)


def add_to_score(
    value: Tensor, gradient: Tensor, x: Tensor, t: Tensor, process: Process, prediction: Prediction
) -> Tensor:
    """A ``prediction`` at x [batch, ...] and t after ``gradient``, of the shape of x, is added to the score.

    Where no signal is left (alpha = 0) nothing is added: x tells nothing of the data there.
    """
    t = expand(t, x)
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = weights(prediction, process, t)
    factor = sigma * (p * sigma / alpha - q)
    return value + torch.where(alpha > 0, factor, torch.zeros_like(factor)) * gradient
