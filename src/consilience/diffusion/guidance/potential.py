"""Guidance by the gradient of a potential: classifiers, and whatever else is a log-weight of x or of x0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, convert
from consilience.diffusion.guidance.wrapping import Function, add_to_score, wrap

LogPotential = Callable[[Tensor, Tensor], Tensor]
"""log G of a state [batch, ...] and its time, [batch], differentiable in the state."""


def potential_guidance(
    model: Denoiser, log_potential: LogPotential, scale: float = 1.0, on: Literal["x", "x0"] = "x0"
) -> Denoiser:
    """score + scale * grad_x log G, with G a potential of the prediction x0(x, t) or of the noisy x itself.

    On ``x0`` the gradient goes through the model: one evaluation and its backward pass. On ``x`` the model is only
    evaluated. If log G(x, t) is the log-probability of an event given x_t, ``on="x"`` at scale 1 is exactly the
    score given the event.
    """
    if on not in ("x", "x0"):
        raise ValueError(f"a potential is one of x or of x0, got {on!r}")
    if scale == 0:
        return model

    def build(model: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            value = model.function(x, t, **cond) if on == "x" else x
            with torch.enable_grad():
                seen = state = x.detach().requires_grad_()
                if on == "x0":
                    value = model.function(state, t, **cond)
                    seen = convert(value, state, t, model.process, model.prediction, "x0")
                gradient = torch.autograd.grad(log_potential(seen, t).sum(), state)[0]
            return add_to_score(value.detach(), scale * gradient, x, t, model.process, model.prediction)

        return function

    return wrap(build, model)


def classifier_guidance(model: Denoiser, log_probability: LogPotential, scale: float = 1.0) -> Denoiser:
    """score + scale * grad_x log p(event | x_t), with ``log_probability`` (x, t) -> [batch] trained on noisy x.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, section 4.2 (algorithm 2).
    """
    return potential_guidance(model, log_probability, scale, on="x")
