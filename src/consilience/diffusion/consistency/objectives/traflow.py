"""TraFlow: distil a teacher's pairs of noise and data into a map that is consistent and straight."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp
from consilience.diffusion.consistency.shared import (
    Pair,
    Result,
    dropout_seed,
    gradient_ratio,
    mean,
    pair,
    same_dropout,
    split,
    squared,
    teacher_step,
)
from consilience.diffusion.consistency.straight import (
    Intervals,
    along_end,
    on,
    own_time,
    step_size,
    straight_time,
    uniform_pair,
)
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process


def traflow(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    steps: int = 16,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    intervals: Intervals = uniform_pair,
    last_layer: Tensor | None = None,
    jvp: Jvp = "exact",
) -> Result:
    """Three squared errors on the straight line between a noise and the datum the teacher makes of it.

    In the order of ``weights``: the output, f(x_t, t, 0) against the datum; the change, the map's own velocity
    df/dtau_s at s against noise - datum, which makes it straight; and self-consistency, f(x_t, t, s) against
    f(x_m, m, s) of ``target`` (None: the student) without gradient, m between. The teacher's data come from ``steps``
    Heun steps; the batch then gives only shape and conditions. Without a teacher the batch is of such pairs already:
    data ``x`` and their ``noise``. Where ``last_layer``, a weight, is given, the change is scaled to the consistency's
    gradient by it, by 0.01 to 10. Wu et al., arXiv:2502.16972: the change and its scale are those of the last version
    (equation 2, section 4.6), which leaves the output out and takes `ctm`'s consistency, along the teacher's path and
    with an average of rate 0.9999 as target. Of the first we have the three targets: equal weights, and consistency
    on the straight line, are ours. Raises ValueError without teacher and noise.
    """
    process = student.process
    p = pairs(process, teacher, batch, steps, intervals, generator)
    device = None if generator is None else generator.device
    share = torch.rand(len(p.t), generator=generator, dtype=torch.float64, device=device).to(p.t)
    middle = own_time(process, straight_time(process, p.s) + share * step_size(process, p.t, p.s))
    x_m = process.add_noise(p.x0, p.noise, middle)
    seed = dropout_seed(generator)
    with same_dropout(seed):
        out = student.x0(p.x_t, p.t, **p.cond)
    with same_dropout(seed):
        u, drift = along_end(student, p.x_t, p.t, p.s, p.cond, jvp)
    with same_dropout(seed):
        near = student(p.x_t, p.t, p.s, **p.cond)
    with same_dropout(seed), torch.no_grad():
        far = (target or student)(x_m, middle, p.s, **p.cond)
    terms = {
        "output": mean(squared(out, p.x0)),
        "change": mean(squared(u - drift, p.noise - p.x0)),
        "distance": mean(squared(near, far)),
    }
    log = {name: float(term.detach()) for name, term in terms.items()}
    if last_layer is not None:
        scale = gradient_ratio(terms["distance"], terms["change"], last_layer).clamp(0.01, 10.0)
        terms["change"], log["change_scale"] = scale * terms["change"], float(scale)
    loss = torch.stack([weight * term for weight, term in zip(weights, terms.values(), strict=True)]).sum()
    return loss, {"loss": float(loss.detach())} | log


def pairs(
    process: Process,
    teacher: Denoiser | None,
    batch: Batch,
    steps: int,
    intervals: Intervals,
    generator: torch.Generator | None,
) -> Pair:
    """Noise, the teacher's datum of it, and their straight line's states at two drawn times."""
    x, cond = split(batch)
    t, s = intervals(len(x), process, generator)
    if teacher is None:
        if "noise" not in cond:
            raise ValueError("without a teacher the batch must hold the pairs: data x and the noise they were made of")
        noise = cond.pop("noise")
        return pair(process, {"x": x} | cond, t, s, noise=noise)
    noise = process.noise(tuple(x.shape), t.to(x), generator)
    data = output(on(teacher, process), noise, steps, cond)
    return pair(process, {"x": data} | cond, t, s, noise=noise)


@torch.no_grad()
def output(teacher: Denoiser, noise: Tensor, steps: int, cond: dict[str, Any]) -> Tensor:
    """The datum of a noise [batch, ...] by Heun steps, even in tau, of the teacher's ODE."""
    process = teacher.process
    top = straight_time(process, torch.tensor(process.t_max, dtype=torch.float64))
    taus = torch.linspace(float(top), 0.0, steps + 1, dtype=torch.float64)
    times = torch.cat([torch.tensor([process.t_max], dtype=torch.float64), process.time(taus[1:] / (1 - taus[1:]))])
    rows = times.to(noise)[:, None].expand(-1, len(noise))
    x = process.sigma(rows[0]).reshape(-1, *(1,) * (noise.ndim - 1)) * noise
    for t, s in itertools.pairwise(rows):
        x = teacher_step(teacher, x, t, s, **cond)
    return x
