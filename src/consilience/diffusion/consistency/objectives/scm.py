"""Continuous-time consistency models on TrigFlow (Lu and Song 2024, arXiv:2410.11081): sCT and sCD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp, derivative
from consilience.diffusion.consistency.shared import Result, dropout_seed, mean, pair, same_dropout, split
from consilience.diffusion.denoisers import Denoiser, convert
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import TrigFlow, expand


def scm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    warmup: float = 1.0,
    c: float | None = 0.1,
    weight: Callable[[Tensor], Tensor] | None = None,
    jvp: Jvp = "exact",
    p_mean: float = -1.0,
    p_std: float = 1.4,
) -> Result:
    """e^w / D ||F - F^- - g||^2 - w: the limit of consistency training as the gap vanishes (algorithm 1).

    With f = cos(t) x - sin(t) sigma_d F the student's data and F^- a copy without gradient, g is the tangent
    -cos^2(t) (sigma_d F^- - dx/dt) - ``warmup`` cos(t) sin(t) (x + sigma_d dF^-/dt), divided by its norm + ``c``
    (None leaves it). dx/dt is the teacher's velocity (sCD), or cos(t) z - sin(t) x0 (sCT). ``warmup`` rises from 0 to
    1 in the first steps; ``weight`` is a network w(t) of times [batch], trained along (None: 0); D is the number of
    values of a sample. log tan(t) + log sigma_d is normal. ``target`` (None: the student) gives the tangent.
    Raises ValueError for a student on another process than `TrigFlow` or a teacher on another than the student's.
    """
    process = student.process
    if not isinstance(process, TrigFlow):
        raise ValueError(f"sCM trains on TrigFlow, the student is on {process}")
    if teacher is not None and teacher.process != process:
        raise ValueError(f"the teacher is on {teacher.process}; put it on the student's process with teacher.on(...)")
    x0, cond = split(batch)
    t = draw_times(process, len(x0), generator, p_mean, p_std).to(x0)
    p = pair(process, batch, t, torch.zeros_like(t), generator)
    with torch.no_grad():
        moving = _velocity(process, p.x0, p.noise, t) if teacher is None else teacher.velocity(p.x_t, t, **cond)
    seed = dropout_seed(generator)
    with same_dropout(seed):
        value = scaled(student, p.x_t, t, **cond)
    g, log = tangent(student if target is None else target, p.x_t, t, moving, warmup, jvp, seed, **cond)
    if c is not None:
        norm = torch.linalg.vector_norm(g.flatten(1), dim=1)
        g = g / expand(norm + c, g)
    # F is the velocity over sigma_d; the residual is -g, its gradient that of F
    error = ((value - value.detach()) / process.sigma_data - g).square().flatten(1).mean(1)
    log["distance"] = float(error.detach().mean())
    if weight is None:
        return mean(error), log
    w = weight(t)
    return mean(w.exp() * error - w), log


def tangent(
    model: FlowMap,
    x: Tensor,
    t: Tensor,
    moving: Tensor,
    warmup: float,
    jvp: Jvp,
    seed: int,
    **cond: Any,
) -> tuple[Tensor, dict[str, float]]:
    """g at x [batch, ...] and t [batch] moving along dx/dt = ``moving``, without gradient, and its norm for the log.

    With warmup 1 it is cos(t) df/dt, the derivative of the map's data along the trajectory.
    """

    def evaluate(y: Tensor, u: Tensor) -> Tensor:
        with same_dropout(seed):
            return scaled(model, y, u, **cond)

    with torch.no_grad():
        value, slope = derivative(evaluate, (x, t), (moving, torch.ones_like(t)), jvp)
    cos, sin = expand(torch.cos(t), x), expand(torch.sin(t), x)
    g = -(cos**2) * (value - moving) - warmup * cos * sin * (x + slope)
    return g, {"tangent_norm": float(torch.linalg.vector_norm(g.flatten(1), dim=1).mean())}


def scaled(model: FlowMap, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
    """sigma_d F(x / sigma_d, t): the map's prediction from t to the data as a velocity, [batch, ...]."""
    value = model.function(x, t, torch.zeros_like(t), **cond)
    return convert(value, x, t, model.process, model.prediction, "velocity")


def draw_times(process: TrigFlow, count: int, generator: torch.Generator | None, p_mean: float, p_std: float) -> Tensor:
    """arctan(e^n / sigma_d) for normal n, kept within the process's times; [count] in float64."""
    device = torch.device("cpu") if generator is None else generator.device
    n = torch.randn(count, generator=generator, dtype=torch.float64, device=device)
    return torch.arctan(torch.exp(p_mean + p_std * n) / process.sigma_data).clamp(process.t_min, process.t_max)


def _velocity(process: TrigFlow, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    t = expand(t, x0)
    return process.alpha_dot(t) * x0 + process.sigma_dot(t) * noise
