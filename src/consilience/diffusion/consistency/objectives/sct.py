"""Stable consistency tuning (Wang et al. 2024, arXiv:2410.18958): the target's variance is reduced by a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.ect import jump
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    compared,
    ends,
    gap,
    pseudo_huber,
    split,
    teacher_step,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand


def sct(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    reference: Batch | None = None,
    decay: float = 0.5,
    c: float = 0.0,
    mean: float = -1.1,
    std: float = 2.0,
) -> Result:
    """`ect` whose state at r is an Euler step with the score that the score identity gives over a reference batch.

    grad log p_t(x) = E[grad log p_t(x | x0) | x], the mean over the sample's own datum and the ``reference`` data
    (None: the rest of the batch), weighted by how likely each makes x (section 4.1). With no other datum this is
    `ect` itself; with ever more it is distillation from the exact score. Data serve only samples of equal conditions,
    so a conditional batch needs several of each. Raises ValueError with a teacher, which would leave nothing to do.
    """
    if teacher is not None:
        raise ValueError("stable consistency tuning estimates its teacher from the data; use ect or cm to have one")
    p = jump(student.process, batch, generator, decay, mean, std)
    means = posterior_mean(student.process, p, reference)
    score = Denoiser(lambda x, t, **_: means, student.process, "x0")
    p = p._replace(x_s=teacher_step(score, p.x_t, p.t, p.s, heun=False))
    near, far = ends(student, target, p, generator)
    return compared(student.process, p, near, far, pseudo_huber(c), 1 / gap(student.process, p.t, p.s))


@torch.no_grad()
def posterior_mean(process: Process, p: Pair, reference: Batch | None = None) -> Tensor:
    """E[x0 | x_t] among each sample's own datum and the reference data (None: the batch), [batch, ...]."""
    state, data = (p.x_t / expand(process.alpha(p.t), p.x_t)).flatten(1), p.x0.flatten(1)
    scale = 1 / process.ratio(p.t)[:, None]
    others, cond = (p.x0, p.cond) if reference is None else split(reference)
    allowed = _alike(p.cond, cond, len(p.x0), len(others)).to(state.device)
    if reference is None:  # the batch holds each sample's own datum
        allowed.fill_diagonal_(False)
    # not by products of vectors, whose rounding is large against distances in units of little noise
    away = torch.cdist(state, others.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    own = (state - data).norm(dim=1, keepdim=True)
    found = torch.where(allowed, -((scale * away) ** 2) / 2, -torch.inf)
    chances = torch.softmax(torch.cat([-((scale * own) ** 2) / 2, found], 1), 1)
    found = chances[:, :1] * data + chances[:, 1:] @ others.flatten(1)
    return found.reshape(p.x0.shape)


def _alike(cond: dict[str, Any], other: dict[str, Any], rows: int, columns: int) -> Tensor:
    """Which samples and references have equal conditions, [rows, columns]."""
    allowed = torch.ones(rows, columns, dtype=torch.bool)
    for name, value in cond.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if name not in other:
            raise ValueError(f"the reference data lack the condition {name!r} of the batch")
        equal = value.reshape(rows, 1, -1) == other[name].reshape(1, columns, -1)
        allowed = allowed.to(equal.device) & equal.all(2)
    return allowed
