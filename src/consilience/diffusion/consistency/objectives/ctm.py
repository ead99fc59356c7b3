"""Consistency trajectory models (Kim et al. 2023, arXiv:2310.02279)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.curriculum import ratio_range
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
    gradient_ratio,
    hinge,
    pair,
    same_dropout,
    split,
    squared,
    teacher_step,
    through,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, Times, Weight, denoising_loss, edm_weight, lognormal_times
from consilience.diffusion.processes import Process

Discriminator = Callable[[Tensor], Tensor]
"""Of data [batch, ...]: logits, one or more per sample, high for real."""


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
    discriminator: Discriminator | None = None,
    adversarial: float = 1.0,
) -> Result:
    """Soft consistency from t to s by way of u, compared at the data, and denoising score matching.

    The teacher goes from t to u in up to ``longest`` steps of the decreasing ``grid`` (18 by default, to no noise);
    the student jumps from t to s, the target from u to s, and the target takes both on to the data, its weights held
    while the student's gradient passes. Added are ``denoising`` times the denoising error of the student at s = t
    (times as `half_lognormal_times`) and, with a ``discriminator``, ``adversarial`` times -D of the student's ends
    (train it with `discriminator_loss`). Where ``last_layer``, a weight, is given, both are scaled to the first term's
    gradient by it (`gradient_ratio`), the latter by 0.01 to 10, as in the authors' code. u = t - one step makes it
    local, u = s global consistency. Raises ValueError for ``longest`` below 1.
    """
    x0, _ = split(batch)
    route = _route(times(student.process, 18) if grid is None else grid, len(x0), longest, generator)
    held = student if target is None else target
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    s, seed = route.s.to(x0), dropout_seed(generator)
    near = _onto_data(held, found, s, p.cond, seed)
    with torch.no_grad():
        far = _onto_data(held, wanted, s, p.cond, seed)
    consistency, log = compared(student.process, p, near, far, distance)
    loss = consistency
    if denoising:
        error = denoising_loss(
            student.denoiser,
            batch,
            generator,
            times=denoising_times or half_lognormal_times,
            weight=denoising_weight or edm_weight(),
        )
        scale = _scale(consistency, error, last_layer)
        log |= {"denoising": float(error.detach()), "denoising_scale": float(scale)}
        loss = loss + denoising * scale * error
    if discriminator is not None:
        extra = -through(discriminator, near).mean()
        scale = _scale(consistency, extra, last_layer, 0.01, 10.0)
        log |= {"adversarial": float(extra.detach()), "adversarial_scale": float(scale)}
        loss = loss + adversarial * scale * extra
    return loss, log


def discriminator_loss(
    student: FlowMap,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    discriminator: Discriminator,
    target: FlowMap | None = None,
    grid: Tensor | None = None,
    longest: int = 17,
) -> Result:
    """relu(1 + D) of the student's ends and relu(1 - D) of the data; the arguments are those of `ctm`.

    Nothing but the discriminator has a gradient.
    """
    x0, _ = split(batch)
    route = _route(times(student.process, 18) if grid is None else grid, len(x0), longest, generator)
    t, s = route.path[0].to(x0), route.s.to(x0)
    p, seed = pair(student.process, batch, t, s, generator), dropout_seed(generator)
    with torch.no_grad():
        with same_dropout(seed):
            found = student(p.x_t, t, s, **p.cond)
        made = _onto_data(student if target is None else target, found, s, p.cond, seed)
    return hinge(discriminator(made), discriminator(x0))


def half_lognormal_times(count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
    """EDM's lognormal times for the first half, and above them, for the rest, ratios even in their seventh root.

    Down to 0.7 of the way from the greatest sigma / alpha to the least: a share at much noise that the lognormal law
    hardly visits. The training times of the authors' code, [count] in float64.
    """
    low, high = (end ** (1 / 7) for end in ratio_range(process))
    first = lognormal_times()(count // 2, process, generator)
    u = torch.rand(count - count // 2, generator=generator, dtype=torch.float64, device=device(generator))
    return torch.cat([first, process.time((high + 0.7 * u * (low - high)) ** 7)])


def _scale(loss: Tensor, term: Tensor, weight: Tensor | None, low: float = 0.0, high: float = 1e4) -> Tensor:
    return torch.ones_like(term) if weight is None else gradient_ratio(loss, term, weight).clamp(low, high)


def _onto_data(held: FlowMap, x: Tensor, s: Tensor, cond: dict[str, Any], seed: int) -> Tensor:
    """Where the map takes x [batch, ...] at s on to the data; a gradient passes to x, and not to the map's weights."""
    end = held.process.time(torch.zeros_like(s))
    with same_dropout(seed):
        return through(lambda y: held(y, s, end, **cond), x)


def _route(grid: Tensor, count: int, longest: int, generator: torch.Generator | None) -> Route:
    """One number of steps for all, t uniform among the times that leave room for them, s uniform from u to the end."""
    if longest < 1:
        raise ValueError(f"longest must be at least 1 step, got {longest}")
    steps = len(grid) - 1
    length = int(torch.randint(1, min(longest, steps) + 1, (), generator=generator, device=device(generator)))
    first = torch.randint(steps - length + 1, (count,), generator=generator, device=device(generator))
    grid = grid.to(first.device)
    return Route(tuple(grid[first + i] for i in range(length + 1)), grid[onward(first + length, steps, generator)])
