"""Guidance in an interval of noise levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.wrapping import Function, on_process_of, wrap
from consilience.diffusion.processes import expand


def interval(guided: Denoiser, plain: Denoiser, low: float, high: float) -> Denoiser:
    """``guided`` where low < sigma / alpha <= high, ``plain`` elsewhere, at the cost of the one that is called.

    At high noise guidance drops modes, at low noise it has no effect. Raises ValueError unless 0 <= low < high. Source:
    Kynkäänniemi et al. 2024, arXiv:2404.07724, section 3.1, where ``plain`` is the conditional model.
    """
    if not 0 <= low < high:
        raise ValueError(f"need 0 <= low < high, got {low} and {high}")
    plain = on_process_of(guided, plain)
    process = guided.process

    def inside(t: Tensor) -> Tensor:
        ratio = process.ratio(t)
        return (ratio > low) & (ratio <= high)

    def build(guided: Denoiser, plain: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            here = inside(t)
            if bool(here.all()):
                return guided.function(x, t, **cond)
            outside = plain.predict(guided.prediction, x, t, **cond)
            return torch.where(expand(here, x), guided.function(x, t, **cond), outside) if bool(here.any()) else outside

        return function

    def cost(t: float) -> int:
        return (guided if bool(inside(torch.tensor(t, dtype=torch.float64))) else plain).cost(t)

    return wrap(build, guided, plain, cost=cost)
