"""Phased consistency models (Wang et al. 2024, arXiv:2405.18407)."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Step, ddim, matched, times, within_segments
from consilience.diffusion.consistency.shared import Distance, Result, compared, pseudo_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch


def pcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    phases: int = 4,
    grid: Tensor | None = None,
    step: Step = ddim,
    distance: Distance | None = None,
) -> Result:
    """Consistency within each of the sub-trajectories that ``phases`` cut the decreasing ``grid`` (50 steps) into.

    Jumps from t and from u, one teacher step on, both end at the edge of t's phase, by a DDIM step of the student's
    prediction; at the edge the map is the identity. The distance is pseudo-Huber with 0.001.
    One phase is consistency distillation; as many as steps make the student the teacher's DDIM step. Sample with
    `samplers.phased`. The paper's adversarial loss is not part of it.
    """
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    route = within_segments(grid, phases, len(x0), generator)
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    return compared(student.process, p, found, wanted, distance or pseudo_huber(1e-3))
