"""Stochastic consistency distillation (Liu et al. 2024, arXiv:2403.01505)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Route, Step, hop, matched, times
from consilience.diffusion.consistency.shared import (
    Discriminator,
    Distance,
    Result,
    compared,
    dropout_seed,
    elementwise_huber,
    hinge,
    pair,
    same_dropout,
    split,
    through,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand, standard_normal


def scott(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    eta: float = 0.3,
    substeps: int = 3,
    grid: Tensor | None = None,
    skip: int = 1,
    distance: Distance | None = None,
    discriminator: Discriminator | None = None,
    adversarial: float = 0.4,
) -> Result:
    """Consistency distillation whose point at u comes from the teacher's reverse SDE, in ``substeps`` steps from t.

    ``eta`` is the strength of the noise: 0 is the ODE, 1 the reverse SDE, and every value keeps the marginals. t is
    uniform on the decreasing ``grid`` (40 steps by default), u ``skip`` steps on; both ends are data. At the exact map
    the loss is not 0 for eta > 0, as the path leaves the ODE's. With a ``discriminator`` ``adversarial`` times -D of
    the student's data is added (train it with `discriminator_loss`). The distance is that of `lcm`. Of the paper we
    have a summary: 3 substeps, u 24 of 1000 steps below t, DDIM's eta from 0.1 to 0.6 or an ER-SDE solver, hinge losses
    and 0.4; the step's form and 0.3 are ours. Raises ValueError without a teacher and for a negative eta.
    """
    if teacher is None:
        raise ValueError("scott follows a teacher's SDE: it needs a teacher")
    if eta < 0 or substeps < 1:
        raise ValueError(f"need eta >= 0 and substeps >= 1, got {eta} and {substeps}")
    x0, _ = split(batch)
    t, u, end = _times(student.process, len(x0), grid, skip, generator)
    path = (*(t + (u - t) * (i / substeps) for i in range(substeps)), u)
    route = Route(path, end)
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=sde_step(eta, generator))
    loss, log = compared(student.process, p, found, wanted, distance or elementwise_huber(1e-3))
    if discriminator is not None:
        extra = -through(lambda x: discriminator(x, p.t), found).mean()
        loss, log = loss + adversarial * extra, log | {"adversarial": float(extra.detach())}
    return loss, log


def discriminator_loss(
    student: FlowMap,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    discriminator: Discriminator,
    grid: Tensor | None = None,
    skip: int = 1,
) -> Result:
    """relu(1 + D) of the student's data and relu(1 - D) of the true ones; the arguments are those of `scott`.

    Nothing but the discriminator has a gradient.
    """
    x0, _ = split(batch)
    t, _, end = (part.to(x0) for part in _times(student.process, len(x0), grid, skip, generator))
    p = pair(student.process, batch, t, end, generator)
    with torch.no_grad(), same_dropout(dropout_seed(generator)):
        made = student(p.x_t, t, end, **p.cond)
    return hinge(discriminator(made, t), discriminator(x0, t))


def _times(
    process: Process, count: int, grid: Tensor | None, skip: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """t, u and the end of the grid, [count] each."""
    grid = times(process, 40) if grid is None else grid
    first, second = hop(len(grid) - 1, count, generator, skip)
    grid = grid.to(first.device)
    return grid[first], grid[second], grid[-1].expand(count)


def sde_step(eta: float, generator: torch.Generator | None) -> Step:
    """One exponential step of the reverse SDE with ``eta`` of its noise, x0 held: `SDEDPM` of order 1, per sample."""

    @torch.no_grad()
    def step(teacher: Denoiser, x: Tensor, t: Tensor, u: Tensor, **cond: Any) -> Tensor:
        process = teacher.process
        t_x, u_x = expand(t, x), expand(u, x)
        alpha, low = process.alpha(u_x), process.ratio(u_x)
        fall = low / process.ratio(t_x)
        z = standard_normal(x.shape, x, generator)
        keep = alpha * low / process.sigma(t_x) * fall ** (eta**2)
        gain = alpha * (1 - fall ** (1 + eta**2))
        noise = alpha * low * torch.sqrt(1 - fall ** (2 * eta**2))
        return keep * x + gain * teacher.x0(x, t, **cond) + noise * z

    return step
