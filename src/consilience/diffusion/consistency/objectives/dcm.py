"""DCM: two consistency experts, one for the noisy part of the path and one for the details at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import relu

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    elementwise_huber,
    hinge,
    mean,
    pair,
    same_dropout,
    split,
    teacher_step,
)
from consilience.diffusion.consistency.straight import on
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand

Expert = Literal["semantic", "detail"]
Noisy = Callable[[Tensor, Tensor], Tensor]
"""Of states x [batch, ...] and times t [batch]: logits, or features, with a row per sample."""


def two_experts(semantic: FlowMap, detail: FlowMap, boundary: float) -> FlowMap:
    """One map: ``semantic`` at times above ``boundary``, ``detail`` at it and below.

    Where a batch is on one side of it, only that expert is run. Raises ValueError where the experts' processes or
    predictions differ.
    """
    if semantic.process != detail.process or semantic.prediction != detail.prediction:
        raise ValueError("both experts must be of one process and one prediction")

    def function(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        noisy = t > boundary
        if bool(noisy.all()):
            return semantic.function(x, t, s, **cond)
        if not bool(noisy.any()):
            return detail.function(x, t, s, **cond)
        pieces = semantic.function(x, t, s, **cond), detail.function(x, t, s, **cond)
        return torch.where(expand(noisy, x), *pieces)

    return FlowMap(function, semantic.process, semantic.prediction)


def dcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    boundary: float,
    expert: Expert = "semantic",
    target: FlowMap | None = None,
    levels: int = 50,
    phases: int = 1,
    frames: int | None = None,
    lag: int = 3,
    discriminator: Noisy | None = None,
    features: Noisy | None = None,
    adversarial: float = 0.1,
) -> Result:
    """Phased consistency distillation of one expert's part of the path, cut at time ``boundary``, and its own terms.

    From x_t at a level of the part, the student's state at the end of its phase against the target's from the
    teacher's Euler step one level down, by pseudo-Huber of 0.001 value by value. The semantic expert adds temporal
    coherence along axis ``frames`` (video is [batch, channels, frames, ...], axis 2): the mean square of the difference
    between both states' changes over ``lag`` frames. The detail expert adds ``adversarial`` times 5 relu(1 - D) of its
    state noised again, and 10 times the mean square between the ``features`` of both states noised alike (10 in the
    public code for Wan, 1 in that for HunyuanVideo, which cuts 50 levels at the 38th from the data and Wan's at the
    35th). Lv et al., arXiv:2506.03123, and its public code. Raises ValueError without a teacher, for a boundary outside
    the path, more phases than levels, or terms of the other expert.
    """
    if (expert == "semantic" and (discriminator or features)) or (expert == "detail" and frames is not None):
        raise ValueError(
            "temporal coherence (frames) is the semantic expert's, discriminator and features the detail's"
        )
    near, far, end = states(
        student,
        teacher,
        batch,
        generator,
        boundary=boundary,
        expert=expert,
        target=target,
        levels=levels,
        phases=phases,
    )
    terms = {"distance": mean(elementwise_huber(0.001)(near, far))}
    loss = terms["distance"]
    if frames is not None:
        terms["coherence"] = coherence(near, far, frames, lag)
        loss = loss + terms["coherence"]
    if discriminator is not None or features is not None:
        seen, terms_seen = detail_terms(student.process, near, far, end, boundary, discriminator, features, generator)
        loss, terms = loss + adversarial * seen, terms | terms_seen
    return loss, {name: float(value.detach()) for name, value in ({"loss": loss} | terms).items()}


def states(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    boundary: float,
    expert: Expert,
    target: FlowMap | None = None,
    levels: int = 50,
    phases: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `dcm` compares: both states [batch, ...] at the phase's end, the second still, and this time [batch]."""
    if teacher is None:
        raise ValueError("dcm distils a teacher: give one")
    process = student.process
    x0, cond = split(batch)
    t, s, end = part(process, boundary, expert, levels, phases, len(x0), generator)
    p = pair(process, batch, t, s, generator)
    p = p._replace(x_s=teacher_step(on(teacher, process), p.x_t, p.t, p.s, heun=False, **cond))
    return *phase_ends(student, target or student, p, end.to(p.t), dropout_seed(generator)), end.to(p.t)


def part(
    process: Process,
    boundary: float,
    expert: Expert,
    levels: int,
    phases: int,
    count: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A level of the expert's part, the one below it and the end of its phase: times [count] in float64.

    ``levels`` levels are even in the process's own time (a shifted process shifts them).
    """
    start = float(process.time(torch.zeros((), dtype=torch.float64)))
    if not start < boundary < process.t_max:
        raise ValueError(f"the boundary must lie strictly between {start} and {process.t_max}, got {boundary}")
    if expert not in ("semantic", "detail"):
        raise ValueError(f"no expert {expert!r}; there are: semantic, detail")
    cut = math.ceil((boundary - start) / (process.t_max - start) * levels - 1e-9)
    low, high = (cut, levels) if expert == "semantic" else (0, cut)
    if not 1 <= phases <= high - low:
        raise ValueError(f"the {expert} part has {high - low} levels, that is no place for {phases} phases")
    edges = low + torch.arange(phases + 1) * (high - low) // phases
    device = None if generator is None else generator.device
    n = torch.randint(low + 1, high + 1, (count,), generator=generator, device=device)
    end = edges.to(n.device)[torch.searchsorted(edges.to(n.device), n) - 1]
    times = torch.linspace(start, process.t_max, levels + 1, dtype=torch.float64).to(n.device)
    return times[n], times[n - 1], times[end]


def phase_ends(student: FlowMap, target: FlowMap, p: Pair, end: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The student's state at ``end`` [batch] from x_t and the target's, without gradient, from x_s."""
    with same_dropout(seed):
        near = student(p.x_t, p.t, end, **p.cond)
    with same_dropout(seed), torch.no_grad():
        far = target(p.x_s, p.s, end, **p.cond)
    return near, far


def coherence(near: Tensor, far: Tensor, frames: int, lag: int) -> Tensor:
    """The mean square of the difference of both states' changes over ``lag`` frames; 0 for a shorter video; 0-d."""
    length = near.shape[frames]
    if length <= lag:
        return near.new_zeros(())
    off = near - far
    return (off.narrow(frames, lag, length - lag) - off.narrow(frames, 0, length - lag)).square().mean()


def detail_terms(
    process: Process,
    near: Tensor,
    far: Tensor,
    end: Tensor,
    boundary: float,
    discriminator: Noisy | None,
    features: Noisy | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """5 relu(1 - D) and 10 times the features' mean square, of both states noised alike to a time between."""
    t, made, true = noised_alike(process, near, far.detach(), end, boundary, generator)
    terms = {}
    total = near.new_zeros(())
    if discriminator is not None:
        terms["adversarial"] = relu(1 - discriminator(made, t)).mean()
        total = total + 5 * terms["adversarial"]
    if features is not None:
        with torch.no_grad():
            known = features(true, t)
        terms["features"] = (features(made, t) - known).square().mean()
        total = total + 10 * terms["features"]
    return total, terms


def noised_alike(
    process: Process, near: Tensor, far: Tensor, end: Tensor, boundary: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A time per sample between the states' ``end`` and the boundary, and both states carried there with one noise."""
    device = None if generator is None else generator.device
    share = torch.rand(len(end), generator=generator, dtype=torch.float64, device=device).to(end)
    t = end + share * (boundary - end)
    noise = process.noise(tuple(near.shape), t, generator).to(near)
    return t, renoised(process, near, end, t, noise), renoised(process, far, end, t, noise)


def renoised(process: Process, x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A state at s carried to t above it: alpha_t / alpha_s x + (sigma_t - sigma_s alpha_t / alpha_s) noise."""
    s, t = expand(s, x), expand(t, x)
    keep = process.alpha(t) / process.alpha(s)
    return keep * x + (process.sigma(t) - process.sigma(s) * keep) * noise


def discriminator_loss(
    process: Process,
    discriminator: Noisy,
    near: Tensor,
    far: Tensor,
    end: Tensor,
    boundary: float,
    generator: torch.Generator | None = None,
) -> Result:
    """The hinge loss relu(1 + D) of the student's states + relu(1 - D) of the target's, both noised alike."""
    t, made, true = noised_alike(process, near.detach(), far.detach(), end, boundary, generator)
    return hinge(discriminator(made, t), discriminator(true, t))
