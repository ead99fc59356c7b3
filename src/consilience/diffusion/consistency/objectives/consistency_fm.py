"""Consistency flow matching: straight flows, segment by segment, from agreeing ends and agreeing velocities."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, ddim_step
from consilience.diffusion.consistency.shared import (
    Result,
    dropout_seed,
    mean,
    pair,
    same_dropout,
    split,
    squared,
    teacher_step,
)
from consilience.diffusion.consistency.straight import mean_flow, on, own_time
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand


def consistency_fm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    segments: int = 2,
    step: float = 1e-3,
    anchored: float = 0.1,
    weight: float = 1e-5,
) -> Result:
    """|f(x_t, t, e) - f(x_r, r, e)|^2 + ``weight`` |u(x_t, t, e) - u(x_r, r, e)|^2, the second of each no-gradient.

    On the straight path tau runs from 0 (data) to 1 in equal ``segments``; e is the end of t's segment towards data and
    r lies ``step`` below t, at most at e. Where r is at e or tau_r is at most ``anchored`` the target of the first term
    is the datum's own state at e; the second term is for t above ``anchored`` and further than ``step`` from e. x_r has
    x_t's noise, or is the teacher's Heun step (then only r = e is anchored). Yang et al., arXiv:2407.02398
    (velocity consistency, multi-segment) and its code; r beyond e, which the code allows, is not visited. Raises
    ValueError for no segment, or a step outside (0, 1 / segments).
    """
    if segments < 1 or not 0 < step < 1 / segments:
        raise ValueError(f"need at least one segment and 0 < step < 1 / segments, got {segments} and {step}")
    process = student.process
    x0, cond = split(batch)
    tau, end, low = levels(len(x0), segments, step, generator)
    t, r, e = own_time(process, tau), own_time(process, low), process.time(end / (1 - end))
    p = pair(process, batch, t, r, generator)
    e = e.to(p.t)
    x_r, x_e, anchors = p.x_s, process.add_noise(p.x0, p.noise, e), low <= anchored
    if teacher is not None:
        source = on(teacher, process)
        x_r, x_e = (teacher_step(source, p.x_t, p.t, lower, **cond) for lower in (p.s, e))
        anchors = low <= end
    known = ((low <= end) | anchors).to(x_r.device)
    seed = dropout_seed(generator)
    with same_dropout(seed):
        now = mean_flow(student, cond)(p.x_t, p.t, e)
    with same_dropout(seed), torch.no_grad():
        then = mean_flow(target or student, cond)(x_r, p.s, e)
    near, far = (ddim_step(x, u, at, e, process, "flow") for x, u, at in ((p.x_t, now, p.t), (x_r, then, p.s)))
    far = torch.where(expand(known, far), x_e, far)
    ends = squared(near, far)
    inside = ((tau > anchored) & (tau - end > 1.01 * step)).to(p.t.device)
    speeds = torch.where(inside, squared(now, then), torch.zeros_like(ends))
    loss = mean(ends + weight * speeds)
    log = {"loss": loss, "distance": ends.mean(), "velocity": speeds.mean()}
    return loss, {name: float(value.detach()) for name, value in log.items()}


def levels(count: int, segments: int, step: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """tau of t, uniform, of the end of its segment, and of r, [count] each in float64."""
    device = None if generator is None else generator.device
    tau = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
    end = torch.floor(tau * segments) / segments
    return tau, end, torch.maximum(tau - step, end)
