"""MeanFlow: learn the average velocity of the flow from the identity that ties it to its own derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    mean,
    pair,
    random_states,
    rows,
    same_dropout,
    split,
    squared,
)
from consilience.diffusion.consistency.straight import Intervals, along_path, logit_normal_pair, mean_flow, path_flow
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance inside the target, so that sampling needs no second evaluation.

    The path's flow v is replaced by scale v + mix u(x, t, t | c) + (1 - scale - mix) u(x, t, t | null); the guidance
    that results has the scale ``scale`` / (1 - ``mix``). A share ``drop`` of the samples gets the condition ``null``
    (a value per name, broadcast over the batch) and the plain v. Raises ValueError for a mix or drop outside [0, 1).
    """

    scale: float
    null: Mapping[str, Any]
    mix: float = 0.0
    drop: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.mix < 1 and 0 <= self.drop < 1):
            raise ValueError(f"need 0 <= mix < 1 and 0 <= drop < 1, got {self.mix} and {self.drop}")


def meanflow(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    intervals: Intervals | None = None,
    instantaneous: float = 0.75,
    power: float = 1.0,
    constant: float = 1e-3,
    guidance: Guidance | None = None,
    jvp: Jvp = "exact",
) -> Result:
    """Regress u(x_t, t, s) onto v - (tau_t - tau_s) du/dtau, the right side without gradient (arXiv:2505.13447, eq. 6).

    v is noise - x0, or the teacher's flow. ``instantaneous`` is the share of samples with s = t, plain flow matching;
    each sample's squared error is weighted by 1 / (itself + ``constant``)^``power`` (section 4.2). ``target`` supplies
    the derivative, which is taken where s < t alone. tau is the time on the straight path, the process's own on
    rectified flow, so that any process will do. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= instantaneous <= 1:
        raise ValueError(f"the share of samples with s = t must lie in [0, 1], got {instantaneous}")
    x0, _ = split(batch)
    t, s = (intervals or logit_normal_pair())(len(x0), student.process, generator)
    device = None if generator is None else generator.device
    s = torch.where(torch.rand(len(x0), generator=generator, device=device) < instantaneous, t, s)
    p = pair(student.process, batch, t, s, generator)
    seed = dropout_seed(generator)
    flow, cond = path_flow(teacher, p, student.process), p.cond
    if guidance is not None:
        flow, cond = guided(student, p, flow, guidance, generator, seed)
    with same_dropout(seed):
        before = random_states()
        u = mean_flow(student, cond)(p.x_t, p.t, p.s)
        dropping = random_states() != before
    moving = (s < t).nonzero()[:, 0].to(x0.device)
    if dropping and len(moving):  # a part of the batch would not drop the units that the whole of it did
        moving = torch.arange(len(x0), device=x0.device)
    drift = slope(target or student, p._replace(cond=cond), flow, moving, seed, jvp)
    error = squared(u, (flow - drift).detach())
    loss = mean(error, adaptive_weight(error, power, constant))
    return loss, {"loss": float(loss.detach()), "error": float(error.detach().mean())}


@torch.no_grad()
def slope(model: FlowMap, p: Pair, flow: Tensor, which: Tensor, seed: int, jvp: Jvp = "exact") -> Tensor:
    """(tau_t - tau_s) du/dtau along ``flow`` [batch, ...] at the rows of the indices ``which``, 0 at the others."""
    drift = torch.zeros_like(flow)
    if len(which):
        part = rows(p, which)
        with same_dropout(seed):
            _, drift[which] = along_path(model, part.x_t, part.t, part.s, flow[which], part.cond, jvp)
    return drift


def adaptive_weight(error: Tensor, power: float, constant: float) -> Tensor:
    """1 / (error + constant)^power of squared errors [batch], without gradient (arXiv:2505.13447, section 4.2)."""
    return (error.detach() + constant) ** -power


@torch.no_grad()
def guided(
    student: FlowMap, p: Pair, flow: Tensor, guidance: Guidance, generator: torch.Generator | None, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """The guided flow and the conditions, some of them dropped (arXiv:2505.13447, equation 21)."""
    unknown = set(guidance.null) - set(p.cond)
    if unknown:
        raise ValueError(f"the batch has no condition named {', '.join(sorted(unknown))}")
    device = None if generator is None else generator.device
    dropped = torch.rand(len(flow), generator=generator, device=device).to(flow.device) < guidance.drop
    null = dict(p.cond) | {
        name: torch.as_tensor(value).to(p.cond[name]).expand_as(p.cond[name]) for name, value in guidance.null.items()
    }
    with same_dropout(seed):
        without = mean_flow(student, null)(p.x_t, p.t, p.t)
    mixed = guidance.scale * flow + (1 - guidance.scale - guidance.mix) * without
    if guidance.mix:
        with same_dropout(seed):
            mixed = mixed + guidance.mix * mean_flow(student, p.cond)(p.x_t, p.t, p.t)
    cond = dict(p.cond) | {
        name: torch.where(expand(dropped, p.cond[name]), null[name], p.cond[name]) for name in guidance.null
    }
    return torch.where(expand(dropped, flow), flow, mixed), cond
