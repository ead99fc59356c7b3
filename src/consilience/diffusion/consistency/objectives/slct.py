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
from consilience.diffusion.consistency.shared import Result, cauchy, compared, ends, gap, pair, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch


def slct(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    levels: int = 11,
    diffusion_weight: float = 1.0,
    mean: float = -1.1,
    std: float = 2.0,
) -> Result:
    """`ict` with the Cauchy distance log(1 + ||.||^2 / (2 c^2)), coupled noise, and denoising at little noise.

    c follows the number of levels (`adaptive_c`); noises are assigned to the data of the batch by optimal transport
    (`coupled`); ``diffusion_weight`` times the mean squared error of the data is added at levels drawn evenly from
    the lowest quarter. The published weight of that term is not known to us; 1 is ours. Raises ValueError with a
    teacher, whose ODE is not that of coupled noise, and below two levels.
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
    loss, log = compared(process, p, near, far, cauchy(adaptive_c(levels)), 1 / gap(process, p.t, p.s))
    early = early_loss(student, batch, grid, noise, generator)
    return loss + diffusion_weight * early, {**log, "diffusion": float(early.detach())}


def adaptive_c(levels: int) -> float:
    """sqrt(2) exp(-1.15 log(N - 1) - 0.85), smaller as the discretisation of N levels becomes finer.

    The authors' code uses it from the second stage of its doubling on.
    """
    return math.sqrt(2) * math.exp(-1.15 * math.log(levels - 1) - 0.85)


@torch.no_grad()
def coupled(x0: Tensor, noise: Tensor) -> Tensor:
    """The noises [batch, ...] in the order of least total squared distance to the data: exact transport in a batch."""
    cost = torch.cdist(x0.flatten(1).double(), noise.flatten(1).double()).square().cpu().numpy()
    _, order = linear_sum_assignment(cost)
    return noise[torch.from_numpy(order).to(noise.device)]


def early_loss(
    student: FlowMap, batch: Batch, grid: Tensor, noise: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The mean squared error of the data at levels drawn evenly from the lowest quarter of the grid; 0-d."""
    device = torch.device("cpu") if generator is None else generator.device
    index = torch.randint(max(math.ceil(len(grid) / 4), 1), (len(noise),), generator=generator, device=device)
    t = grid.to(device)[index]
    p = pair(student.process, batch, t, t, generator, noise)
    return (student.x0(p.x_t, p.t, **p.cond) - p.x0).square().mean()
