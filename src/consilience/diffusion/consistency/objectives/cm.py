"""Consistency distillation and consistency training (Song et al. 2023, arXiv:2303.01469)."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.shared import (
    Distance,
    Pair,
    Result,
    compared,
    ends,
    pair,
    split,
    squared,
    teacher_step,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch


def cm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    levels: int = 18,
    distance: Distance = squared,
) -> Result:
    """The distance of the student's end from t_{n+1} and the target's from t_n, n uniform among N = ``levels`` times.

    With a teacher, x at t_n is one Heun step of its ODE from x at t_{n+1} (consistency distillation, algorithm 2);
    without one the two share datum and noise (consistency training, algorithm 3), and its gradient tends to that of
    distillation from the exact teacher as the steps shrink (theorem 2). The weight is 1. The paper's target is an
    average of the student's weights, see `curriculum.TargetAverage`; None is the student without gradient. Raises
    ValueError below two levels.
    """
    grid = karras_levels(student.process, levels)
    x0, _ = split(batch)
    lower = torch.randint(levels - 1, (len(x0),), generator=generator, device=_device(generator))
    p = stepped(teacher, neighbours(student, batch, grid, lower, generator))
    return compared(student.process, p, *ends(student, target, p, generator), distance)


def neighbours(
    student: FlowMap,
    batch: Batch,
    grid: Tensor,
    lower: Tensor,
    generator: torch.Generator | None,
    noise: Tensor | None = None,
) -> Pair:
    """The batch at the levels ``lower`` + 1 and ``lower`` [batch] of an increasing grid [levels]."""
    grid = grid.to(lower.device)
    return pair(student.process, batch, grid[lower + 1], grid[lower], generator, noise)


def stepped(teacher: Denoiser | None, p: Pair) -> Pair:
    """The pair whose earlier state is the teacher's Heun step from the later one; as it is without a teacher."""
    return p if teacher is None else p._replace(x_s=teacher_step(teacher, p.x_t, p.t, p.s, **p.cond))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
