"""Multistep consistency models (Heek, Hoogeboom and Salimans 2024, arXiv:2403.06807)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, step_factors
from consilience.diffusion.consistency.objectives.trajectory import Step, matched, times, within_segments
from consilience.diffusion.consistency.shared import Distance, Result, compared, pseudo_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, Weight
from consilience.diffusion.processes import expand


def multistepcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    segments: int = 4,
    grid: Tensor | None = None,
    step: Step | None = None,
    distance: Distance | None = None,
    weight: Weight = lambda r: 1 + r**-2,
) -> Result:
    """Consistency within equal segments of the decreasing ``grid`` (64 steps by default), compared in terms of x0.

    Jumps from t and u, one step apart, end at the start of t's segment; their difference there over what a unit of x0
    moves that state is the error of x0 whose norm, weighted by SNR + 1 at t (a function of r = sigma / alpha), is
    minimised (algorithm 1). The teacher's step is `addim` with 0.75 of the squared error that it makes in x0; without
    a teacher the data take its place and the step is DDIM's. One segment is a consistency model; as many as steps
    make denoising at the grid's times. Anneal the grid by `teacher_steps`; sample with `samplers.phased`.
    """
    x0, _ = split(batch)
    process = student.process
    grid = times(process, 64) if grid is None else grid
    route = within_segments(grid, segments, len(x0), generator)

    def adjusted(teacher: Denoiser, x: Tensor, t: Tensor, u: Tensor, **cond: Any) -> Tensor:
        return addim(teacher, x, t, u, x0=x0, **cond)

    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step or adjusted)
    _, gain = step_factors(p.t, route.s.to(x0), process, "x0")
    scale = expand(gain, x0)
    return compared(
        process, p, found / scale, wanted / scale, distance or pseudo_huber(0.0), weight(process.ratio(p.t))
    )


@torch.no_grad()
def addim(
    teacher: Denoiser, x: Tensor, t: Tensor, u: Tensor, *, x0: Tensor | None = None, eta: float = 0.75, **cond: Any
) -> Tensor:
    """Adjusted DDIM: a DDIM step whose noise is enlarged by the posterior variance that the mean of x0 lacks.

    The variance per coordinate is ``eta`` times the squared error of the teacher's x0 against the datum ``x0``
    [batch, ...], or without it 0.1 / (2 + SNR) (section 3.2, algorithm 3, equation 14). One evaluation.
    """
    process = teacher.process
    ratio = expand(process.ratio(t), x)
    mean = teacher.x0(x, t, **cond)
    t_x, u_x = expand(t, x), expand(u, x)
    eps = (x - process.alpha(t_x) * mean) / process.sigma(t_x)
    error = None if x0 is None else expand((mean - x0).square().flatten(1).mean(1), x)
    variance = 0.1 / (2 + ratio**-2) if error is None else eta * error
    _, gain = step_factors(t_x, u_x, process, "x0")
    size = expand(eps.square().flatten(1).mean(1), x)
    return process.alpha(u_x) * mean + torch.sqrt(process.sigma(u_x) ** 2 + gain**2 * variance / size) * eps


def teacher_steps(step: int, steps: int, segments: int, first: int = 64, last: int = 1280) -> int:
    """How many steps the grid has at a step of the training: geometric from ``first`` to ``last``, a multiple of
    ``segments`` (section 3.1).
    """
    share = min(max(step / steps, 0.0), 1.0)
    return segments * max(round(first * math.exp(share * math.log(last / first)) / segments), 1)
