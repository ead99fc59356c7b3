"""SCFlow: distil a flow into steps of any number that end in the same place, with an optional adversary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    elementwise_huber,
    ends,
    mean,
    pair,
    same_dropout,
    split,
    teacher_step,
)
from consilience.diffusion.consistency.straight import on, own_time, straight_time
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand

Discriminator = Callable[[Tensor], Tensor]
"""Logits of data [batch, ...], high for real."""


def scflow(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    window: float = 0.1,
    truncation: float = 0.1,
    backward: float = 0.1,
    reflow: float = 0.1,
    discriminator: Discriminator | None = None,
    adversarial: float = 0.1,
) -> Result:
    """Consistency down and up the teacher's path, one-step output against its own reconstruction, and an adversary.

    All in the data f(., ., 0): from x_t against the target's from the teacher's Euler step down, of at most ``window``
    in tau (below ``truncation`` the datum itself); ``backward`` times the same from a step up; ``reflow`` times the
    mean square of the one-step datum's reconstruction from its straight line to the noise; and with a
    ``discriminator`` ``adversarial`` times softplus(-D) of the one-step datum (train it with `discriminator_loss`).
    Without one the objective has no adversarial part. Dao et al., arXiv:2412.16906; all constants are those of the
    public code's text-to-image run, whose target is an average of rate 0.9 and whose discriminator sees the data noised
    (on CelebA ``truncation`` is 0.4 and it does not). Raises ValueError without a teacher.
    """
    if teacher is None:
        raise ValueError("scflow distils a teacher: give one")
    process, source = student.process, on(teacher, student.process)
    x0, cond = split(batch)
    tau, down, up = levels(len(x0), process, window, generator)
    p = pair(process, batch, own_time(process, tau), own_time(process, down), generator)
    higher = own_time(process, up).to(p.t)
    below = p._replace(x_s=teacher_step(source, p.x_t, p.t, p.s, heun=False, **cond))
    above = p._replace(s=higher, x_s=teacher_step(source, p.x_t, p.t, higher, heun=False, **cond))
    seed = dropout_seed(generator)
    huber = elementwise_huber(0.01)
    near, far = ends(student, target, below, generator)
    far = torch.where(expand((down < truncation).to(far.device), far), p.x0, far)
    terms = {"distance": mean(huber(near, far))}
    loss = terms["distance"]
    if backward:
        terms["backward"] = mean(huber(near, _other_end(student, target, above, seed)))
        loss = loss + backward * terms["backward"]
    made = one_step(student, p.noise, cond, seed)
    if reflow:
        terms["reflow"] = mean(reconstruction(student, made.detach(), p, seed))
        loss = loss + reflow * terms["reflow"]
    if discriminator is not None:
        terms["adversarial"] = softplus(-discriminator(made)).mean()
        loss = loss + adversarial * terms["adversarial"]
    return loss, {name: float(value.detach()) for name, value in ({"loss": loss} | terms).items()}


def levels(
    count: int, process: Process, window: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """tau of t, uniform, and of the times below and above it, each at most ``window`` away; [count] in float64."""
    device = None if generator is None else generator.device
    u = torch.rand((3, count), generator=generator, dtype=torch.float64, device=device)
    low, high = straight_time(process, torch.tensor([process.t_min, process.t_max], dtype=torch.float64))
    tau = float(low) + float(high - low) * u[0]
    down = tau - u[1] * torch.clamp(tau - float(low), max=window)
    return tau, down, tau + u[2] * torch.clamp(float(high) - tau, max=window)


def one_step(student: FlowMap, noise: Tensor, cond: dict[str, Any], seed: int) -> Tensor:
    """The data that the student makes of noise [batch, ...] at the process's last time in one step."""
    process = student.process
    t = torch.full((len(noise),), process.t_max, dtype=noise.dtype, device=noise.device)
    with same_dropout(seed):
        return student.x0(process.sigma(expand(t, noise)) * noise, t, **cond)


def reconstruction(student: FlowMap, made: Tensor, p: Pair, seed: int) -> Tensor:
    """The mean square per sample of the data that the student sees on the straight line from its own to their noise."""
    x_t = student.process.add_noise(made, p.noise, p.t)
    with same_dropout(seed):
        return (student.x0(x_t, p.t, **p.cond) - made).square().flatten(1).mean(1)


def discriminator_loss(discriminator: Discriminator, real: Tensor, made: Tensor, penalty: float = 0.0) -> Result:
    """softplus(-D(real)) + softplus(D(made)) + ``penalty`` / 2 |dD/dreal|^2, the made data [batch, ...] held.

    The penalty is 1 in the public code's run on CelebA, and 0 in the text-to-image run.
    """
    real = real.detach().requires_grad_(penalty > 0)
    logits = discriminator(real)
    loss = (softplus(-logits) + softplus(discriminator(made.detach()))).mean()
    if penalty:
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        loss = loss + penalty / 2 * slope.square().flatten(1).sum(1).mean()
    return loss, {"loss": float(loss.detach())}


@torch.no_grad()
def _other_end(student: FlowMap, target: FlowMap | None, p: Pair, seed: int) -> Tensor:
    with same_dropout(seed):
        return (target or student).x0(p.x_s, p.s, **p.cond)
