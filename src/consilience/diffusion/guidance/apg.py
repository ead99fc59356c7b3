"""Adaptive projected guidance: classifier-free guidance without the part that saturates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.classifier_free import with_condition
from consilience.diffusion.guidance.wrapping import Function, on_process_of, wrap


def apg(
    model: Denoiser,
    scale: float,
    unconditional: Denoiser | Mapping[str, Any],
    eta: float = 0.0,
    momentum: float = -0.5,
    norm_limit: float = math.inf,
) -> Denoiser:
    """D = D_cond + (scale - 1) (d_orthogonal + eta d_parallel), where d = D_cond - D_uncond in terms of x0.

    Parallel and orthogonal are meant to D_cond, sample by sample. Before, d becomes d + ``momentum`` times the d of the
    step before (a negative momentum pushes on what is new), and is shortened to ``norm_limit`` where it is longer;
    the limit is in units of the data, about the norm that d has in good samples. eta = 1, momentum 0 and no limit are
    `classifier_free`. The memory is that of a run: it starts empty in each `solve`, and a single call has none.
    Raises ValueError unless norm_limit > 0 and -1 < momentum < 1. Source: Sadat et al. 2024, arXiv:2410.02416,
    algorithm 1.
    """
    if not norm_limit > 0 or not -1 < momentum < 1:
        raise ValueError(f"need norm_limit > 0 and -1 < momentum < 1, got {norm_limit} and {momentum}")
    if scale == 1:
        return model
    other = unconditional if isinstance(unconditional, Denoiser) else with_condition(model, unconditional)

    def build(model: Denoiser, other: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            target = model.x0(x, t, **cond)
            step = limited(memory(target - other.x0(x, t, **cond)), norm_limit)
            parallel, orthogonal = split(step, target)
            return target + (scale - 1) * (orthogonal + eta * parallel)

        memory = _Momentum(momentum)
        return function

    def single(model: Denoiser, other: Denoiser) -> Function:
        return lambda x, t, **cond: build(model, other)(x, t, **cond)

    other = on_process_of(model, other)
    alone = wrap(single, model, other, prediction="x0")
    return replace(alone, fresh=lambda: build(model.run(), other.run())) if momentum else alone


class _Momentum:
    """d_k + momentum * (what it returned before)."""

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._last: Tensor | None = None

    def __call__(self, step: Tensor) -> Tensor:
        self._last = step if self._last is None else step + self._momentum * self._last
        return self._last


def limited(step: Tensor, limit: float) -> Tensor:
    """``step`` [batch, ...] with samples longer than ``limit`` shortened to it."""
    if math.isinf(limit):
        return step
    length = torch.linalg.vector_norm(step, dim=tuple(range(1, step.ndim)), keepdim=True)
    return step * (limit / length.clamp(min=limit))


def split(step: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of ``step`` [batch, ...] parallel and orthogonal to ``along``, sample by sample."""
    dims = tuple(range(1, step.ndim))
    dtype = torch.promote_types(step.dtype, torch.float32)
    a, b = step.to(dtype), along.to(dtype)
    length = (b * b).sum(dims, keepdim=True)
    parallel = ((a * b).sum(dims, keepdim=True) / length.clamp(min=torch.finfo(dtype).tiny) * b).to(step.dtype)
    return parallel, step - parallel
