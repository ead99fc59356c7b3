"""Flow maps by self-distillation: Lagrangian, Eulerian and progressive, with or without a teacher."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp, ddim_step
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    mean,
    pair,
    rows,
    same_dropout,
    split,
    squared,
)
from consilience.diffusion.consistency.straight import (
    Intervals,
    along_end,
    along_path,
    mean_flow,
    on,
    own_time,
    path_flow,
    step_size,
    straight_time,
    uniform_pair,
    uniform_time,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand

Kind = Literal["lagrangian", "eulerian", "progressive"]


def self_distillation(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    kind: Kind = "lagrangian",
    diagonal: float = 0.75,
    intervals: Intervals = uniform_pair,
    jvp: Jvp = "exact",
) -> Result:
    """Flow matching at s = t on a share ``diagonal`` of the batch, and an equation of the flow map on the rest.

    ``kind``: the map's end moves with the velocity found there (LSD), the map does not change along the path (ESD), or
    one step is two (PSD); the velocity is the model's own at s = t (``target``'s where given, always without gradient),
    or the teacher's. Boffi, Albergo and Vanden-Eijnden, arXiv:2505.18825, section 3. Mean over the batch of squared
    residuals of the average flow. On the straight path equal times are uniform, and the others uniform in the triangle
    s < t (as in forks of its code, nmboffi/flow-maps). Raises ValueError for a share outside [0, 1] or an unknown kind.
    """
    if not 0 <= diagonal <= 1:
        raise ValueError(f"the share of samples with s = t must lie in [0, 1], got {diagonal}")
    x0, _ = split(batch)
    count = round(diagonal * len(x0))
    same = uniform_time(count, student.process, generator)
    t, s = intervals(len(x0) - count, student.process, generator)
    p = pair(student.process, batch, torch.cat([same, t]), torch.cat([same, s]), generator)
    seed = dropout_seed(generator)
    first, rest = rows(p, slice(0, count)), rows(p, slice(count, None))
    with same_dropout(seed):
        near = mean_flow(student, first.cond)(first.x_t, first.t, first.t) if count else first.x_t
    errors = [squared(near, path_flow(teacher, first, student.process))] if count else []
    if count < len(x0):
        errors.append(
            residual(kind, student, target or student, teacher, rest, generator, jvp).square().flatten(1).sum(1)
        )
    error = torch.cat(errors)
    loss = mean(error)
    log = {"loss": float(loss.detach())}
    if count:
        log["diagonal"] = float(error[:count].detach().mean())
    if count < len(x0):
        log[kind] = float(error[count:].detach().mean())
    return loss, log


def residual(
    kind: Kind,
    student: FlowMap,
    model: FlowMap,
    teacher: Denoiser | None,
    p: Pair,
    generator: torch.Generator | None = None,
    jvp: Jvp = "exact",
) -> Tensor:
    """What is left of the equation ``kind`` at x_t from t to s, [batch, ...] in units of the average flow."""
    seed = dropout_seed(generator)
    match kind:
        case "lagrangian":
            return lagrangian(student, model, teacher, p, seed, jvp)
        case "eulerian":
            return eulerian(student, model, teacher, p, seed, jvp)
        case "progressive":
            return progressive(student, model, p, generator, seed)
    raise ValueError(f"no kind {kind!r}; there are: lagrangian, eulerian, progressive")


def lagrangian(
    student: FlowMap, model: FlowMap, teacher: Denoiser | None, p: Pair, seed: int, jvp: Jvp = "exact"
) -> Tensor:
    """df/dtau_s - v(f, s): the velocity at the end is not differentiated, neither in the model nor in f."""
    with same_dropout(seed):
        u, drift = along_end(student, p.x_t, p.t, p.s, p.cond, jvp)
    with same_dropout(seed), torch.no_grad():
        end = model(p.x_t, p.t, p.s, **p.cond)
    with same_dropout(seed), torch.no_grad():
        there = instantaneous(model, teacher, end, p.s, p.cond)
    return u - drift - there


def eulerian(
    student: FlowMap, model: FlowMap, teacher: Denoiser | None, p: Pair, seed: int, jvp: Jvp = "exact"
) -> Tensor:
    """u - (v(x, t) - (tau_t - tau_s) du/dtau): -df/dtau along the path, gradient through u alone."""
    with same_dropout(seed), torch.no_grad():
        here = instantaneous(model, teacher, p.x_t, p.t, p.cond)
    with same_dropout(seed), torch.no_grad():
        _, drift = along_path(model, p.x_t, p.t, p.s, here, p.cond, jvp)
    with same_dropout(seed):
        u = mean_flow(student, p.cond)(p.x_t, p.t, p.s)
    return u - (here - drift)


def progressive(student: FlowMap, model: FlowMap, p: Pair, generator: torch.Generator | None, seed: int) -> Tensor:
    """u(t, s) less the mean of u(t, m) and u(m, s), weighted by their lengths, m uniform between in tau."""
    process = student.process
    device = None if generator is None else generator.device
    share = torch.rand(len(p.t), generator=generator, dtype=torch.float64, device=device).to(p.t)
    tau_s = straight_time(process, p.s)
    middle = torch.minimum(torch.maximum(own_time(process, tau_s + share * step_size(process, p.t, p.s)), p.s), p.t)
    with same_dropout(seed), torch.no_grad():
        one = mean_flow(model, p.cond)(p.x_t, p.t, middle)
        half = ddim_step(p.x_t, one, p.t, middle, process, "flow")
    with same_dropout(seed), torch.no_grad():
        two = mean_flow(model, p.cond)(half, middle, p.s)
    whole = step_size(process, p.t, p.s)
    weight = expand(torch.where(whole > 0, step_size(process, p.t, middle) / whole, torch.ones_like(whole)), one)
    with same_dropout(seed):
        u = mean_flow(student, p.cond)(p.x_t, p.t, p.s)
    return u - (weight * one + (1 - weight) * two)


def instantaneous(model: FlowMap, teacher: Denoiser | None, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """The flow at x [batch, ...] and t: the teacher's, or the model's own at s = t."""
    if teacher is None:
        return mean_flow(model, cond)(x, t, t)
    return on(teacher, model.process).predict("flow", x, t, **cond)
