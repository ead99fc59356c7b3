"""rCM: continuous-time consistency distillation, with score distillation of the student's own samples beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp, angle, derivative
from consilience.diffusion.consistency.objectives.ayf import normalised
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    mean,
    pair,
    same_dropout,
    split,
    squared,
)
from consilience.diffusion.consistency.straight import Function, average, on
from consilience.diffusion.denoisers import Denoiser, convert
from consilience.diffusion.losses import Batch, Times, lognormal_times
from consilience.diffusion.processes import Process, expand

TRAIN_TIMES = lognormal_times(-0.8, 1.6)
SCORE_TIMES = lognormal_times(0.0, 1.6)


def rcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    fake: Denoiser | None = None,
    regularisation: float = 0.01,
    warmup: float = 1.0,
    constant: float = 0.1,
    rollout_steps: int = 4,
    times: Times = TRAIN_TIMES,
    score_times: Times = SCORE_TIMES,
    jvp: Jvp = "exact",
) -> Result:
    """L_sCM + ``regularisation`` L_DMD (Zheng et al., arXiv:2510.08431, algorithm 1, and its public code).

    On the angle arctan(sigma / alpha) every process is TrigFlow with unit data; the student's v there is F, and
    L_sCM = |F - sg(F) - g / (|g| + ``constant``)|^2 with the tangent `tangent` along the teacher's path. L_DMD moves
    samples of 1 to ``rollout_steps`` steps of the student by the difference of the data that ``fake``, a denoiser
    trained on such samples with `fake_score_loss`, and the teacher see in them when noised. Without ``fake`` (as in the
    first steps of training) only L_sCM is taken. sg(F) and g are ``target``'s (None: the student's). ``warmup`` rises
    from 0 to 1. Raises ValueError without a teacher.
    """
    if teacher is None:
        raise ValueError("rcm distils a teacher: give one")
    process, real = student.process, on(teacher, student.process)
    x0, cond = split(batch)
    t = times(len(x0), process, generator)
    p = pair(process, batch, t, process.time(torch.zeros_like(t)), generator)
    seed = dropout_seed(generator)
    still, g = tangent(target or student, real, p, warmup, seed, jvp)
    with same_dropout(seed):
        value = trig_v(student, cond)(p.x_t, p.t, p.s)
    consistency = mean(squared(value, still + normalised(g, constant)))
    log = {"distance": float(consistency.detach()), "tangent": float(g.flatten(1).norm(dim=1).mean())}
    if fake is None:
        return consistency, log
    with same_dropout(seed):
        sample = rollout(student, x0, cond, generator, rollout_steps, score_times)
    score = mean(distribution_matching(on(fake, process), real, sample, cond, generator, score_times))
    loss = consistency + regularisation * score
    return loss, log | {"loss": float(loss.detach()), "score": float(score.detach())}


def trig_v(model: FlowMap, cond: dict[str, Any]) -> Function:
    """F = cos eps - sin x0 on the angle: the v-prediction over hypot(alpha, sigma)."""
    v = average(model, cond, "v")

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return v(x, t, s) / expand(_norm(model.process, t), x)

    return function


@torch.no_grad()
def tangent(
    model: FlowMap, teacher: Denoiser, p: Pair, warmup: float, seed: int, jvp: Jvp = "exact"
) -> tuple[Tensor, Tensor]:
    """F and g = -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - cos sin (r y + dF/dangle), r = ``warmup``.

    y is x on the angle. At r = 1 it is cos df/dangle, f the map's data: 0 for the teacher's exact map. As in algorithm
    1 and the later code, r is on the state alone, not on the derivative (as it is in sCM).
    """
    process, (alpha, sigma) = model.process, (model.process.alpha(p.t), model.process.sigma(p.t))
    norm = _norm(process, p.t)
    theta = expand(angle(process, p.t), p.x_t)
    cos, sin = torch.cos(theta), torch.sin(theta)
    v = teacher.predict("v", p.x_t, p.t, **p.cond)
    moving = convert(v, p.x_t, p.t, process, "v", "velocity")
    rate = (process.sigma_dot(p.t) * alpha - sigma * process.alpha_dot(p.t)) / norm**2
    speed = alpha * sigma / norm**2 / rate  # cos sin dt/dangle
    function = trig_v(model, p.cond)
    with same_dropout(seed):
        along = (expand(speed, moving) * moving, speed)
        value, slope = derivative(lambda x, t: function(x, t, p.s), (p.x_t, p.t), along, jvp)
    ahead = value - v / expand(norm, v)
    y = p.x_t / expand(norm, v)
    return value, -cos * torch.sqrt(1 - warmup**2 * sin**2) * ahead - (warmup * cos * sin * y + slope)


def rollout(
    student: FlowMap, like: Tensor, cond: dict[str, Any], generator: torch.Generator | None, steps: int, times: Times
) -> Tensor:
    """Data of 1 to ``steps`` steps of the student from pure noise, noised anew between them; gradient in the last."""
    process = student.process
    t = torch.full((len(like),), process.t_max, dtype=like.dtype, device=like.device)
    x = process.prior(tuple(like.shape), generator, dtype=like.dtype, device=like.device)
    device = None if generator is None else generator.device
    for _ in range(int(torch.randint(steps, (), generator=generator, device=device))):
        with torch.no_grad():
            data = student.x0(x, t, **cond)
        t = torch.minimum(times(len(like), process, generator).to(like), t)
        x = process.add_noise(data, process.noise(tuple(like.shape), t, generator), t)
    return student.x0(x, t, **cond)


def distribution_matching(
    fake: Denoiser,
    real: Denoiser,
    sample: Tensor,
    cond: dict[str, Any],
    generator: torch.Generator | None,
    times: Times,
) -> Tensor:
    """|sample - sg(sample - d)|^2 per sample, d = (x0 of fake - x0 of real) / mean |sample - x0 of real|.

    Both see the sample noised to a drawn time. Its gradient is 2 d: the sample leaves what the fake score likes for
    what the real one does (DMD, arXiv:2311.18828, equations 7 and 8).
    """
    t = times(len(sample), real.process, generator).to(sample)
    with torch.no_grad():
        x = real.process.add_noise(sample, real.process.noise(tuple(sample.shape), t, generator), t)
        data = real.x0(x, t, **cond)
        scale = (sample - data).abs().flatten(1).mean(1).clamp(min=1e-5)
        d = (fake.x0(x, t, **cond) - data) / expand(scale, sample)
    return squared(sample, sample.detach() - d)


def fake_score_loss(
    fake: Denoiser,
    student: FlowMap,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    rollout_steps: int = 4,
    score_times: Times = SCORE_TIMES,
) -> Result:
    """Denoising of the student's samples by the fake score, |x0 - D|^2 / sin^2 of the angle; the batch gives shapes."""
    like, cond = split(batch)
    process = fake.process
    with torch.no_grad(), same_dropout(dropout_seed(generator)):
        sample = rollout(student, like, cond, generator, rollout_steps, score_times)
    t = score_times(len(like), process, generator).to(sample)
    x = process.add_noise(sample, process.noise(tuple(sample.shape), t, generator), t)
    share = (_norm(process, t) / process.sigma(t)) ** 2
    error = squared(fake.x0(x, t, **cond), sample)
    loss = mean(error, share)
    return loss, {"loss": float(loss.detach()), "error": float(error.detach().mean())}


def _norm(process: Process, t: Tensor) -> Tensor:
    return torch.hypot(process.alpha(t), process.sigma(t))
