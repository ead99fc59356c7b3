"""Multistep latent consistency models (Xie et al. 2024, arXiv:2406.05768): the first stage; the second is `tlcm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import (
    Route,
    Step,
    at,
    ddim,
    indices_within,
    matched,
    times,
    walk,
)
from consilience.diffusion.consistency.shared import Distance, Pair, Result, compared, split, squared
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch


def mlcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    segments: int = 8,
    rollout: int = 8,
    grid: Tensor | None = None,
    skip: int = 1,
    step: Step = ddim,
    distance: Distance = squared,
) -> Result:
    """Consistency within segments, on states that the teacher makes of noise: `pcm` without a data set.

    The state at t comes from pure noise in 1 step of the teacher in the first of ``rollout`` equal parts of the grid, 2
    in the second and so on (algorithm 1, where the parts are the segments); of the batch only shape and conditions are
    used. ``rollout`` 0 noises the data instead. Guidance is the teacher's (8 in the paper); u is a fiftieth of the way
    on, and the paper's target is the student itself (None). Over a training ``segments`` may fall (`progressive`),
    which makes the segments agree with each other. Raises ValueError without a teacher.
    """
    if teacher is None:
        raise ValueError("the states come from the teacher's trajectories: mlcm needs a teacher")
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    first, second, last = indices_within(len(grid) - 1, segments, len(x0), generator, skip)
    grid = grid.to(first.device)

    def start(p: Pair) -> Tensor:
        return teacher_state(teacher, p.noise, grid, first, rollout, step, p.cond)

    route = Route((grid[first], grid[second]), grid[last])
    p, found, wanted = matched(
        student, teacher, batch, generator, route, target=target, step=step, start=start if rollout else None
    )
    return compared(student.process, p, found, wanted, distance)


def teacher_state(
    teacher: Denoiser,
    noise: Tensor,
    grid: Tensor,
    index: Tensor,
    most: int,
    step: Step,
    cond: dict[str, object] | None = None,
) -> Tensor:
    """What the teacher makes of normal ``noise`` [batch, ...] until it is at grid[index] [batch], by equal steps.

    Equal on the grid [steps + 1]; their number is 1 in the first of ``most`` equal parts of it, and so on to ``most``.
    """
    count = 1 + (index * most).div(len(grid) - 1, rounding_mode="floor").clamp(max=most - 1)
    path = tuple(
        at(grid, index.double() * torch.clamp(torch.full_like(count, i), max=count) / count).to(noise)
        for i in range(most + 1)
    )
    return walk(teacher, teacher.process.sigma(path[0][0]) * noise, path, step, **(cond or {}))


def progressive(step: int, steps: int, segments: Sequence[int] = (8, 4, 2)) -> int:
    """The number of segments at a step of the training, whose equal stages have these numbers of them in turn."""
    return segments[min(max(step, 0) * len(segments) // max(steps, 1), len(segments) - 1)]
