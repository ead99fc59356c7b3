"""Align Your Flow: continuous-time distillation of a flow map from a teacher, with autoguidance."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp, ddim_step
from consilience.diffusion.consistency.shared import Result, dropout_seed, mean, pair, same_dropout, split, squared
from consilience.diffusion.consistency.straight import (
    Intervals,
    along_end,
    along_path,
    logit_normal_length,
    mean_flow,
    on,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.classifier_free import extrapolate
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand


def ayf(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    kind: Literal["eulerian", "lagrangian"] = "eulerian",
    weak: Denoiser | None = None,
    guidance: float | tuple[float, float] = 2.0,
    warmup: float = 1.0,
    constant: float | None = 0.1,
    intervals: Intervals | None = None,
    jvp: Jvp = "exact",
) -> Result:
    """One step of u against its tangent: |u - sg(u - g / (|g| + ``constant``))|^2, g the map's error at (x_t, t, s).

    AYF-EMD (arXiv:2506.14603, algorithm 1) has g = u - v + ``warmup`` (tau_t - tau_s) du/dtau along the
    teacher's path; AYF-LMD has g = u - (tau_t - tau_s) du/dtau_s - v(f(x_t, t, s), s). v is the teacher's flow, with
    ``weak`` that of autoguidance at scale ``guidance`` (section 3.3); for a range the scale is drawn per sample and the
    student gets it as the condition ``guidance`` [batch]. ``warmup`` rises from 0, flow matching, to 0.99 in training;
    ``constant`` None leaves g as it is. ``target`` (None: the student) gives the part without gradient. The logits of
    the lengths are normal, -0.8 and 1 by default; a third party's reading of the paper has -0.6 and 1.6, and scales of
    1 to 3. Raises ValueError without a teacher or for a warm-up outside [0, 1].
    """
    if teacher is None:
        raise ValueError("ayf distils a teacher: give one (self_distillation and meanflow need none)")
    if not 0 <= warmup <= 1:
        raise ValueError(f"the warm-up must lie in [0, 1], got {warmup}")
    process, model = student.process, target or student
    x0, _ = split(batch)
    t, s = (intervals or logit_normal_length())(len(x0), process, generator)
    p = pair(process, batch, t, s, generator)
    guided, scale = guide(on(teacher, process), weak, guidance, p.x_t, generator)
    cond = p.cond | scale
    seed = dropout_seed(generator)
    with same_dropout(seed), torch.no_grad():
        if kind == "eulerian":
            v = guided.predict("flow", p.x_t, p.t, **p.cond)
            now, drift = along_path(model, p.x_t, p.t, p.s, v, cond, jvp)
        elif kind == "lagrangian":
            now, drift = along_end(model, p.x_t, p.t, p.s, cond, jvp)
            end = ddim_step(p.x_t, now, p.t, p.s, process, "flow")
            v, drift = guided.predict("flow", end, p.s, **p.cond), -drift
        else:
            raise ValueError(f"no kind {kind!r}; there are: eulerian, lagrangian")
    tangent = now - v + warmup * drift
    with same_dropout(seed):
        u = mean_flow(student, cond)(p.x_t, p.t, p.s)
    loss = mean(squared(u, now - normalised(tangent, constant)))
    return loss, {"loss": float(loss.detach()), "tangent": float(tangent.flatten(1).norm(dim=1).mean())}


def normalised(tangent: Tensor, constant: float | None) -> Tensor:
    """g / (|g| + constant) per sample (sCM, arXiv:2410.11081, section 4.1); g itself for None."""
    if constant is None:
        return tangent
    return tangent / (expand(tangent.flatten(1).norm(dim=1), tangent) + constant)


def guide(
    teacher: Denoiser,
    weak: Denoiser | None,
    scale: float | tuple[float, float],
    x: Tensor,
    generator: torch.Generator | None,
) -> tuple[Denoiser, dict[str, Any]]:
    """The autoguided teacher, and the scale as a condition of the student where it is drawn."""
    if weak is None:
        return teacher, {}
    if not isinstance(scale, tuple):
        return extrapolate(teacher, weak, scale), {}
    low, high = scale
    device = None if generator is None else generator.device
    drawn = (low + (high - low) * torch.rand(len(x), generator=generator, device=device)).to(x)
    return extrapolate(teacher, weak, drawn), {"guidance": drawn}
