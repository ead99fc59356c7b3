"""Phased consistency models (Wang et al. 2024, arXiv:2405.18407)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import relu

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import (
    Route,
    Step,
    ddim,
    device,
    matched,
    times,
    within_segments,
)
from consilience.diffusion.consistency.shared import (
    Discriminator,
    Distance,
    Result,
    compared,
    elementwise_huber,
    hinge,
    split,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand


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
    discriminator: Discriminator | None = None,
    adversarial: float = 0.1,
) -> Result:
    """Consistency within each of the sub-trajectories that ``phases`` cut the decreasing ``grid`` (50 steps) into.

    Jumps from t and from u, one teacher step on, both end at the edge of t's phase, by a DDIM step of the student's
    prediction; at the edge the map is the identity. The distance is the code's pseudo-Huber of 0.001, value by value.
    With a ``discriminator`` the generator's hinge term, ``adversarial`` times relu(1 - D) of the student's state noised
    on into its phase, is added (section 3.3); train it with `discriminator_loss`. One phase is consistency
    distillation; as many as steps make the student the teacher's DDIM step. Sample with `samplers.phased`.
    """
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    route = within_segments(grid, phases, len(x0), generator)
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    loss, log = compared(student.process, p, found, wanted, distance or elementwise_huber(1e-3))
    if discriminator is not None:
        t, (made,) = noised(student.process, route, grid, phases, (found,), generator)
        extra = relu(1 - discriminator(made, t)).mean()
        loss, log = loss + adversarial * extra, log | {"adversarial": float(extra.detach())}
    return loss, log


def discriminator_loss(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    discriminator: Discriminator,
    target: FlowMap | None = None,
    phases: int = 4,
    grid: Tensor | None = None,
    step: Step = ddim,
) -> Result:
    """relu(1 + D) of the student's states at their phase's edge + relu(1 - D) of the target's, both noised on alike.

    Nothing but the discriminator has a gradient; the arguments are those of `pcm`. The real ones are the target's own
    states, so that data take no part where the student agrees with itself (section 3.3, and the public code).
    """
    x0, _ = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    route = within_segments(grid, phases, len(x0), generator)
    with torch.no_grad():
        _, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
        t, (made, true) = noised(student.process, route, grid, phases, (found, wanted), generator)
    return hinge(discriminator(made, t), discriminator(true, t))


def noised(
    process: Process,
    route: Route,
    grid: Tensor,
    phases: int,
    states: tuple[Tensor, ...],
    generator: torch.Generator | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Times [batch] uniform between each phase's edge and a phase further up, and the states carried there.

    By the process's own law, each with a noise of its own: alpha_t / alpha_s x + alpha_t sqrt(r_t^2 - r_s^2) noise
    with r = sigma / alpha.
    """
    s = route.s.to(states[0])
    span = float(grid[0] - grid[-1]) / phases
    share = torch.rand(len(s), generator=generator, dtype=torch.float64, device=device(generator)).to(s)
    t = (s + share * span).clamp(max=float(grid[0]))
    keep = process.alpha(t) / process.alpha(s)
    left = torch.sqrt((process.sigma(t) ** 2 - (keep * process.sigma(s)) ** 2).clamp(min=0))
    carried = []
    for x in states:
        noise = process.noise(tuple(x.shape), t, generator)
        carried.append(expand(keep, x) * x + expand(left, x) * noise)
    return t, tuple(carried)
