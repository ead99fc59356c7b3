"""Variational consistency training (Silvestri et al. 2025, arXiv:2502.18197): the noise of a datum is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.curriculum import ratio_range
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.ect import earlier, jump
from consilience.diffusion.consistency.shared import Result, compared, ends, gap, mean, pseudo_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import standard_normal
from consilience.diffusion.solvers.plan import Noise

Encoder = Callable[..., tuple[Tensor, Tensor]]
"""``encoder(x0, **cond)`` -> mean and positive standard deviation of the noise, each of the shape of x0."""


def vct(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    encoder: Encoder,
    target: FlowMap | None = None,
    kl_weight: float = 10.0,
    decay: float = 0.5,
    c: float = 0.0,
    p_mean: float = -1.1,
    p_std: float = 2.0,
) -> Result:
    """`ect` with noise mean(x0) + std(x0) eps from the encoder, plus its divergence from the standard normal.

    The encoder learns through the student's end alone. The divergence, summed over the values of a sample, is weighted
    by ``kl_weight`` over the gap at the greatest sigma / alpha, the consistency term's own weight there. The paper's
    kl_weight is 10 for tuning CIFAR-10, 30 for training from scratch. With an encoder of the standard normal this is
    `ect`. Sampling starts from the standard normal as ever; between steps the noise is `coupled_noise`. Raises
    ValueError with a teacher, whose ODE is not that of coupled noise.
    """
    if teacher is not None:
        raise ValueError("the noise is coupled to the data here, so a teacher's ODE does not apply; use cm or ect")
    process = student.process
    x0, cond = split(batch)
    loc, scale = encoder(x0, **cond)
    if loc.shape != x0.shape or scale.shape != x0.shape:
        shapes = f"{tuple(loc.shape)} and {tuple(scale.shape)}"
        raise ValueError(f"the encoder must give a mean and a deviation of shape {tuple(x0.shape)}, got {shapes}")
    times = jump(process, batch, generator, decay, p_mean, p_std)
    p = times._replace(noise=loc + scale * times.noise)
    p = p._replace(x_t=process.add_noise(x0, p.noise, p.t), x_s=process.add_noise(x0, p.noise, p.s).detach())
    near, far = ends(student, target, p, generator)
    loss, log = compared(process, p, near, far, pseudo_huber(c), 1 / gap(process, p.t, p.s))
    top = torch.tensor(ratio_range(process)[1], dtype=torch.float64)
    divergence = mean(kl(loc, scale))
    weight = kl_weight / float(top - earlier(top, decay))
    return loss + weight * divergence, {**log, "kl": float(divergence.detach())}


def coupled_noise(encoder: Encoder, generator: torch.Generator | None = None, **cond: Any) -> Noise:
    """The ``noise`` for `samplers.multistep`: what the encoder gives the data reached, as the authors' code does.

    A model trained on noise of this law has not seen states whose noise knows nothing of the data.
    """

    @torch.no_grad()
    def draw(x: Tensor, s: float, t: float) -> Tensor:
        loc, scale = encoder(x, **cond)
        return loc + scale * standard_normal(tuple(x.shape), x, generator)

    return draw


def kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale^2) || N(0, 1)) summed over the values of each sample, [batch]."""
    return ((loc.square() + scale.square() - 1) / 2 - scale.log()).flatten(1).sum(1)
