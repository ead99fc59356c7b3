"""TLCM, what later versions make of MLCM (Xie et al. 2024, arXiv:2406.05768v6): global consistency without data.

Its states are the student's own samples, noised. Distribution matching, an adversary and a preference are added to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.rcm import distribution_matching
from consilience.diffusion.consistency.objectives.trajectory import Step, at, ddim, device, times, walk
from consilience.diffusion.consistency.shared import (
    Discriminator,
    Distance,
    Pair,
    Result,
    compared,
    dropout_seed,
    ends,
    mean,
    pair,
    same_dropout,
    split,
    squared,
    through,
)
from consilience.diffusion.consistency.straight import on
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, Times, uniform_times
from consilience.diffusion.processes import Process

Scores = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of data [batch, ...]: how much they are liked under their own condition and under another, [batch] each."""


def tlcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    segments: int = 8,
    student_steps: int = 4,
    teacher_steps: int = 3,
    grid: Tensor | None = None,
    step: Step = ddim,
    distance: Distance = squared,
    scores: Scores | None = None,
    margin: float = 16.0,
    fake: Denoiser | None = None,
    discriminator: Discriminator | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    renoising: Times = uniform_times,
) -> Result:
    """The student's data from t and from u, ``teacher_steps`` steps of the teacher on, agree at the edges of segments.

    t is one of the ``segments`` edges of the decreasing ``grid`` (50 steps by default), u the next (equations 9 and 10,
    algorithm 2); the state at t is the student's own sample in ``student_steps`` steps (`own_samples`), noised. Of the
    batch only shape and conditions are used. Added with ``weights``, to the student's data from t: `preference_loss` of
    ``scores``; `rcm.distribution_matching` by ``fake``, a denoiser that the caller trains on `own_samples`; and
    softplus(-D) of the data noised to a time of ``renoising`` (see `discriminator_loss`). The paper takes the parts in
    turn, 2000 steps of consistency, 500 with the preference, 1000 with the last two; weights of 1 and uniform times
    are ours. Raises ValueError without a teacher, a segment or a step.
    """
    if teacher is None:
        raise ValueError("tlcm distils a teacher: give one")
    process = student.process
    grid = times(process, 50) if grid is None else grid
    p, path = _states(student, batch, generator, segments, student_steps, teacher_steps, grid)
    p = p._replace(x_s=walk(on(teacher, process), p.x_t, path, step, **p.cond))
    near, far = ends(student, target, p, generator)
    loss, log = compared(process, p, near, far, distance)
    terms: dict[str, Tensor] = {}
    if scores is not None:
        terms["preference"] = weights[0] * preference_loss(*scores(near), margin)
    if fake is not None:
        matching = distribution_matching(on(fake, process), on(teacher, process), near, p.cond, generator, renoising)
        terms["matching"] = weights[1] * mean(matching)
    if discriminator is not None:
        t, (made,) = _renoised(process, (near,), renoising, generator)
        terms["adversarial"] = weights[2] * softplus(-through(lambda x: discriminator(x, t), made)).mean()
    total = loss + torch.stack([loss.new_zeros(()), *terms.values()]).sum()
    return total, log | {name: float(term.detach()) for name, term in terms.items()}


def preference_loss(right: Tensor, wrong: Tensor, margin: float = 16.0) -> Tensor:
    """relu(``margin`` - right) + relu(wrong) of scores [batch] under the own condition and another; equation 11."""
    return (relu(margin - right) + relu(wrong)).mean()


def discriminator_loss(
    student: FlowMap,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    discriminator: Discriminator,
    segments: int = 8,
    student_steps: int = 4,
    grid: Tensor | None = None,
    renoising: Times = uniform_times,
) -> Result:
    """softplus(-D) of the student's samples in ``student_steps`` steps + softplus(D) of its data from t, both noised.

    Both are noised alike, and nothing but the discriminator has a gradient. Equation 13 has log D for both, which has
    no least value; this is the usual form of it. The arguments are those of `tlcm`.
    """
    grid = times(student.process, 50) if grid is None else grid
    p, _ = _states(student, batch, generator, segments, student_steps, 1, grid)
    with torch.no_grad(), same_dropout(dropout_seed(generator)):
        made = student.x0(p.x_t, p.t, **p.cond)
    t, (one, other) = _renoised(student.process, (made, p.x0), renoising, generator)
    loss = softplus(discriminator(one, t)).mean() + softplus(-discriminator(other, t)).mean()
    return loss, {"loss": float(loss.detach())}


@torch.no_grad()
def own_samples(
    student: FlowMap, batch: Batch, generator: torch.Generator | None, steps: int, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """The student's data of pure noise in equal steps of the grid, and the noise, which is the same at each of them."""
    like, cond = split(batch)
    process, count = student.process, len(like)
    top = grid[:1].to(like).expand(count)
    noise = process.noise(tuple(like.shape), top, generator)
    x, seed = process.add_noise(torch.zeros_like(like), noise, top), dropout_seed(generator)
    data = like
    for i in range(steps):
        t = at(grid, torch.full((count,), i * (len(grid) - 1) / steps, dtype=torch.float64)).to(like)
        x = x if i == 0 else process.add_noise(data, noise, t)
        with same_dropout(seed):
            data = student.x0(x, t, **cond)
    return data, noise


def _states(
    student: FlowMap,
    batch: Batch,
    generator: torch.Generator | None,
    segments: int,
    student_steps: int,
    teacher_steps: int,
    grid: Tensor,
) -> tuple[Pair, tuple[Tensor, ...]]:
    """The student's samples, noised to t and u with their own noise, and the times of the teacher's way from t to u."""
    if min(segments, student_steps, teacher_steps) < 1:
        raise ValueError(
            f"need a segment and a step each, got {segments} segments, {student_steps} and {teacher_steps} steps"
        )
    _, cond = split(batch)
    data, noise = own_samples(student, batch, generator, student_steps, grid)
    segment = torch.randint(segments, (len(data),), generator=generator, device=device(generator)).double()
    path = tuple(
        at(grid, (segment + k / teacher_steps) * (len(grid) - 1) / segments).to(data) for k in range(teacher_steps + 1)
    )
    return pair(student.process, {"x": data} | cond, path[0], path[-1], noise=noise), path


def _renoised(
    process: Process, states: tuple[Tensor, ...], renoising: Times, generator: torch.Generator | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A time per sample, and data [batch, ...] noised to it with one noise."""
    t = renoising(len(states[0]), process, generator).to(states[0])
    noise = process.noise(tuple(states[0].shape), t, generator)
    return t, tuple(process.add_noise(x, noise, t) for x in states)
