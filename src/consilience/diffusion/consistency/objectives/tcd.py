"""Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159)."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Route, Step, ddim, hop, matched, onward, times
from consilience.diffusion.consistency.shared import Distance, Result, compared, split, squared
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch


def tcd(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    grid: Tensor | None = None,
    skip: int = 1,
    step: Step = ddim,
    distance: Distance = squared,
) -> Result:
    """The trajectory consistency function: jumps from t and from u, one teacher step on, agree at any s up to u.

    t is uniform on the decreasing ``grid`` (50 steps by default), u ``skip`` steps on, s uniform on the grid from u to
    its end; at s the states themselves are compared. The semi-linear form of the map,
    the first-order exponential integrator, is the DDIM step by which every `FlowMap` moves. Guidance is the
    teacher's (`classifier_free`); without a teacher datum and noise are shared. Sample with `samplers.tcd_sample`.
    """
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    steps = len(grid) - 1
    first, second = hop(steps, len(x0), generator, skip)
    grid = grid.to(first.device)
    route = Route((grid[first], grid[second]), grid[onward(second, steps, generator)])
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    return compared(student.process, p, found, wanted, distance)
