"""Improved training of latent consistency models (Dao et al. 2025, arXiv:2502.01441): for data with outliers.

Its fifth change, layer normalisation without scale, is one of architecture and left to the network.
"""

from __future__ import annotations

import math

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.cm import neighbours
from consilience.diffusion.consistency.objectives.ict import draw
from consilience.diffusion.consistency.shared import Pair, Result, cauchy, compared, ends, gap, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, edm_weight
from consilience.diffusion.processes import Process


def slct(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    levels: int = 11,
    diffusion_weight: float = 5.0,
    sigma_data: float = 0.5,
    mean: float = -1.1,
    std: float = 2.0,
) -> Result:
    """`ict` with the Cauchy distance log(1 + d^2 / (2 c^2)), d^2 the mean square, coupled noise, and denoising.

    c follows the number of levels (`adaptive_c`); noises are assigned to the data of the batch by optimal transport
    (`coupled`); ``diffusion_weight`` times the `early_loss` of the samples at little noise is added, weighted as EDM's.
    Mean square, weights and quarter are those of the authors' code (quandao10/LCT, whose runs double to 640 steps);
    the paper prints the distance with the norm. Raises ValueError with a teacher, whose ODE is not that of
    coupled noise, and below two levels.
    """
    if teacher is not None:
        raise ValueError("the noise is coupled to the data here, so a teacher's ODE does not apply; use cm or ict")
    process = student.process
    grid = karras_levels(process, levels)
    x0, _ = split(batch)
    lower = draw(process, grid, len(x0), generator, mean, std)
    noise = coupled(x0, process.noise(tuple(x0.shape), grid[:1].to(x0), generator))
    p = neighbours(student, batch, grid, lower, generator, noise)
    near, far = ends(student, target, p, generator)
    distance = cauchy(adaptive_c(levels) * math.sqrt(x0[0].numel()))
    loss, log = compared(process, p, near, far, distance, 1 / gap(process, p.t, p.s))
    early = early_loss(process, p, near, lower.to(x0.device) < little_noise(levels), sigma_data)
    return loss + diffusion_weight * early, {**log, "diffusion": float(early.detach())}


def adaptive_c(levels: int) -> float:
    """sqrt(2) exp(-1.15 log(N - 1) - 0.85), smaller as the discretisation of N levels becomes finer.

    Of a difference per value. The authors' code uses it from the second stage of its doubling on, and 0.00054 sqrt(d)
    for d values before.
    """
    return math.sqrt(2) * math.exp(-1.15 * math.log(levels - 1) - 0.85)


@torch.no_grad()
def coupled(x0: Tensor, noise: Tensor) -> Tensor:
    """The noises [batch, ...] in the order of least total squared distance to the data: exact transport in a batch."""
    cost = torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()).square().cpu().numpy()
    _, order = linear_sum_assignment(cost)
    return noise[torch.from_numpy(order).to(noise.device)]


def little_noise(levels: int) -> int:
    """How many of the ``levels`` - 1 pairs of neighbouring levels count as of little noise: about a quarter."""
    return max(levels - 1 - levels * 3 // 4, 0)


def early_loss(process: Process, p: Pair, near: Tensor, chosen: Tensor, sigma_data: float = 0.5) -> Tensor:
    """The mean of ||near - x0||^2 per value, times (1 / r^2 + 1 / ``sigma_data``^2) at r = sigma / alpha of t; 0-d.

    Over the samples ``chosen`` [batch], whose ends ``near`` [batch, ...] are the student's; 0 where there are none.
    """
    error = (near - p.x0).square().flatten(1).mean(1) * edm_weight(sigma_data)(process.ratio(p.t))
    return torch.where(chosen, error, torch.zeros_like(error)).sum() / chosen.sum().clamp(min=1)
