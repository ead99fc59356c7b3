"""Multistep latent consistency models (Xie et al. 2024, arXiv:2406.05768)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Step, ddim, matched, times, walk, within_segments
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
    """Consistency within segments, on states of the teacher's own trajectories: `pcm` without a data set.

    The state at t lies on the teacher's own sampling trajectory in ``rollout`` steps from pure noise, which is followed
    as far as t; of the batch only shape and conditions are used. ``rollout`` 0 noises the data instead. Guidance is
    the teacher's. Over a training ``segments`` falls (`progressive`), which makes the segments agree with each other.
    Later versions of the paper add distribution matching, adversarial and preference
    losses, which are not part of it. Raises ValueError without a teacher.
    """
    if teacher is None:
        raise ValueError("the states come from the teacher's trajectories: mlcm needs a teacher")
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    route = within_segments(grid, segments, len(x0), generator, skip)

    def start(p: Pair) -> Tensor:
        return trajectory_state(teacher, p.noise, p.t, rollout, step, p.cond)

    p, found, wanted = matched(
        student, teacher, batch, generator, route, target=target, step=step, start=start if rollout else None
    )
    return compared(student.process, p, found, wanted, distance)


def trajectory_state(
    teacher: Denoiser, noise: Tensor, t: Tensor, steps: int, step: Step, cond: dict[str, object] | None = None
) -> Tensor:
    """Where sampling with the teacher in ``steps`` steps (`times`) has brought normal ``noise`` [batch, ...] by t.

    Each sample's last step ends at its t [batch], so that all samples' steps have the lengths that sampling's have.
    """
    top = torch.full_like(t, teacher.process.t_max)
    path = (top, *(torch.maximum(end.to(t), t) for end in times(teacher.process, steps)[1:]))
    return walk(teacher, teacher.process.sigma(top[0]) * noise, path, step, **(cond or {}))


def progressive(step: int, steps: int, segments: Sequence[int] = (8, 4, 2)) -> int:
    """The number of segments at a step of the training, whose equal stages have these numbers of them in turn.

    A last stage of 1 is the second stage of the paper's later versions, consistency of the whole path without data.
    """
    return segments[min(max(step, 0) * len(segments) // max(steps, 1), len(segments) - 1)]
