"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Route, Step, ddim, hop, matched, times
from consilience.diffusion.consistency.shared import Distance, Result, compared, elementwise_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.classifier_free import extrapolate, with_condition
from consilience.diffusion.losses import Batch


def lcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    null: Mapping[str, Any] | None = None,
    w: tuple[float, float] = (2.0, 14.0),
    skip: int = 20,
    grid: Tensor | None = None,
    step: Step = ddim,
    distance: Distance | None = None,
) -> Result:
    """Guided consistency distillation: the student learns the end of the PF-ODE of a guided teacher, for every scale.

    ``w`` is drawn uniformly per sample and given to student and target as the condition ``w`` [batch] (embed it with
    `guidance_embedding`); the teacher's step is by (1 + w) D - w D_null, ``null`` the conditions of its unconditional
    call. t is uniform on the decreasing ``grid`` (1000 steps by default), u ``skip`` steps on; both ends are data
    (algorithm 1; the skipping is section 4.3). Without a teacher it is latent consistency fine-tuning, whose states
    share datum and noise (algorithm 4). The distance is the code's pseudo-Huber of 0.001, value by value. Raises
    ValueError for a teacher without ``null`` and where w is not from low to high.
    """
    if teacher is not None and null is None:
        raise ValueError("guided distillation needs null, the conditions of the teacher's unconditional call")
    if not w[0] <= w[1]:
        raise ValueError(f"w must go from low to high, got {w}")
    x0, _ = split(batch)
    grid = times(student.process, 1000) if grid is None else grid
    first, second = hop(len(grid) - 1, len(x0), generator, skip)
    grid = grid.to(first.device)
    route = Route((grid[first], grid[second]), grid[-1].expand(len(x0)))
    drawn = torch.rand(len(x0), generator=generator, dtype=torch.float64, device=first.device)
    scale = (w[0] + (w[1] - w[0]) * drawn).to(x0)
    if teacher is not None and null is not None:
        teacher = extrapolate(teacher, with_condition(teacher, null), 1 + scale)
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step, own={"w": scale})
    return compared(student.process, p, found, wanted, distance or elementwise_huber(1e-3))


def guidance_embedding(w: Tensor, dim: int = 512) -> Tensor:
    """The sinusoidal embedding of guidance scales [batch], times 1000 as timesteps are: sines, then cosines.

    [batch, dim], the periods geometric from 2 pi to 20000 pi. Raises ValueError unless dim is even and at least 4.
    """
    if dim < 4 or dim % 2:
        raise ValueError(f"dim must be even and at least 4, got {dim}")
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=w.dtype, device=w.device) * (-math.log(10000.0) / (half - 1)))
    phase = 1000 * w[:, None] * rates
    return torch.cat([torch.sin(phase), torch.cos(phase)], 1)
