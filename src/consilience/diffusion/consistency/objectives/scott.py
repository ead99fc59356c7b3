"""Stochastic consistency distillation (Liu et al. 2024, arXiv:2403.01505)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Route, Step, hop, matched, times
from consilience.diffusion.consistency.shared import Distance, Result, compared, elementwise_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand


def scott(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    eta: float = 1.0,
    substeps: int = 3,
    grid: Tensor | None = None,
    skip: int = 1,
    distance: Distance | None = None,
    adversarial: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Consistency distillation whose point at u comes from the teacher's reverse SDE, in ``substeps`` steps from t.

    ``eta`` is the strength of the noise: 0 is the ODE, 1 the reverse SDE, and every value keeps the marginals. t is
    uniform on the decreasing ``grid`` (40 steps by default), u ``skip`` steps on; both ends are data. At the exact map
    the loss is not 0 for eta > 0, as the path leaves the ODE's. ``adversarial(end)`` is the generator's term of a
    discriminator that the caller trains, added. The distance is that of `lcm`. Raises ValueError without a
    teacher and for a negative eta.
    """
    if teacher is None:
        raise ValueError("scott follows a teacher's SDE: it needs a teacher")
    if eta < 0 or substeps < 1:
        raise ValueError(f"need eta >= 0 and substeps >= 1, got {eta} and {substeps}")
    x0, _ = split(batch)
    grid = times(student.process, 40) if grid is None else grid
    first, second = hop(len(grid) - 1, len(x0), generator, skip)
    grid = grid.to(first.device)
    t, u = grid[first], grid[second]
    path = (*(t + (u - t) * (i / substeps) for i in range(substeps)), u)
    route = Route(path, grid[-1].expand(len(x0)))
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=sde_step(eta, generator))
    loss, log = compared(student.process, p, found, wanted, distance or elementwise_huber(1e-3))
    if adversarial is not None:
        extra = adversarial(found)
        loss, log = loss + extra, log | {"adversarial": float(extra.detach())}
    return loss, log


def sde_step(eta: float, generator: torch.Generator | None) -> Step:
    """One exponential step of the reverse SDE with ``eta`` of its noise, x0 held: `SDEDPM` of order 1, per sample."""

    @torch.no_grad()
    def step(teacher: Denoiser, x: Tensor, t: Tensor, u: Tensor, **cond: Any) -> Tensor:
        process = teacher.process
        t_x, u_x = expand(t, x), expand(u, x)
        alpha, low = process.alpha(u_x), process.ratio(u_x)
        fall = low / process.ratio(t_x)
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        keep = alpha * low / process.sigma(t_x) * fall ** (eta**2)
        gain = alpha * (1 - fall ** (1 + eta**2))
        noise = alpha * low * torch.sqrt(1 - fall ** (2 * eta**2))
        return keep * x + gain * teacher.x0(x, t, **cond) + noise * z

    return step
