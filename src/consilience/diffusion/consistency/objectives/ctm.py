"""Consistency trajectory models (Kim et al. 2023, arXiv:2310.02279)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import (
    Route,
    Step,
    device,
    matched,
    onward,
    times,
)
from consilience.diffusion.consistency.shared import (
    Distance,
    Result,
    compared,
    dropout_seed,
    same_dropout,
    split,
    squared,
    teacher_step,
    through,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, Times, Weight, denoising_loss, edm_weight, lognormal_times


def ctm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    grid: Tensor | None = None,
    longest: int = 17,
    step: Step = teacher_step,
    distance: Distance = squared,
    denoising: float = 1.0,
    denoising_times: Times | None = None,
    denoising_weight: Weight | None = None,
    last_layer: Tensor | None = None,
    adversarial: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Soft consistency from t to s by way of u, compared at the data, and denoising score matching.

    The teacher goes from t to u in up to ``longest`` steps of the decreasing ``grid`` (18 by default, to no noise);
    the student jumps from t to s, the target from u to s, and the target takes both on to the data, its weights held
    while the student's gradient passes. Added are ``denoising`` times the denoising error of the
    student at s = t, scaled to the first term's gradient at ``last_layer`` where one is given, and
    ``adversarial(end)``, the generator's term of a discriminator that the caller trains, on the student's ends.
    u = t - one step makes it local, u = s global consistency. Raises ValueError for ``longest`` below 1.
    """
    if longest < 1:
        raise ValueError(f"longest must be at least 1 step, got {longest}")
    x0, _ = split(batch)
    route = _route(times(student.process, 18) if grid is None else grid, len(x0), longest, generator)
    held = student if target is None else target
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    s, seed = route.s.to(x0), dropout_seed(generator)
    end = student.process.time(torch.zeros_like(s))
    with same_dropout(seed):
        near = through(lambda x: held(x, s, end, **p.cond), found)
    with torch.no_grad(), same_dropout(seed):
        far = held(wanted, s, end, **p.cond)
    loss, log = compared(student.process, p, near, far, distance)
    if denoising:
        error = denoising_loss(
            student.denoiser,
            batch,
            generator,
            times=denoising_times or lognormal_times(),
            weight=denoising_weight or edm_weight(),
        )
        scale = torch.ones_like(error) if last_layer is None else gradient_ratio(loss, error, last_layer)
        log |= {"denoising": float(error.detach()), "denoising_scale": float(scale)}
        loss = loss + denoising * scale * error
    if adversarial is not None:
        extra = adversarial(near)
        loss, log = loss + extra, log | {"adversarial": float(extra.detach())}
    return loss, log


def gradient_ratio(loss: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """The norm of the loss's gradient by ``weight`` over that of the other's, without gradient, at most 10^4; 0-d."""
    mine, its = (torch.autograd.grad(part, weight, retain_graph=True)[0].norm() for part in (loss, other))
    return (mine / (its + 1e-4)).clamp(max=1e4).detach()


def _route(grid: Tensor, count: int, longest: int, generator: torch.Generator | None) -> Route:
    steps = len(grid) - 1
    length = int(torch.randint(1, longest + 1, (), generator=generator, device=device(generator)))
    first = torch.randint(steps, (count,), generator=generator, device=device(generator))
    grid = grid.to(first.device)
    path = tuple(grid[(first + i).clamp(max=steps)] for i in range(length + 1))
    return Route(path, grid[onward((first + length).clamp(max=steps), steps, generator)])
