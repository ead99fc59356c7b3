"""Improved consistency training (Song and Dhariwal 2023, arXiv:2310.14189)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.cm import neighbours, stepped
from consilience.diffusion.consistency.shared import Result, compared, ends, gap, pseudo_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process


def ict(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    levels: int = 11,
    c: float | None = None,
    mean: float = -1.1,
    std: float = 2.0,
) -> Result:
    """The pseudo-Huber distance between neighbouring levels, over their gap, levels drawn lognormally.

    ``c`` is by default 0.00054 sqrt(d) for d values per sample (equation 7), for images: far below the distances it
    makes them lengths, whose minimiser is no mean, which matters in few dimensions. The weight is
    1 / (t_{n+1} - t_n) in sigma / alpha; n has the probability that a normal of ``mean`` and ``std`` gives to
    log(sigma / alpha) between the two levels (section 3.5). The paper's target is the student itself (None), and its
    number of levels doubles through the run (`curriculum.doubling_levels`). With a teacher the earlier state is its
    Heun step, which the paper does not do. Raises ValueError below two levels.
    """
    grid = karras_levels(student.process, levels)
    x0, _ = split(batch)
    p = neighbours(student, batch, grid, draw(student.process, grid, len(x0), generator, mean, std), generator)
    p = stepped(teacher, p)
    near, far = ends(student, target, p, generator)
    distance = pseudo_huber(0.00054 * math.sqrt(x0[0].numel()) if c is None else c)
    return compared(student.process, p, near, far, distance, 1 / gap(student.process, p.t, p.s))


def draw(
    process: Process, grid: Tensor, count: int, generator: torch.Generator | None, mean: float, std: float
) -> Tensor:
    """Indices [count] of the lower of two neighbouring levels, with `interval_probabilities`."""
    chances = interval_probabilities(process, grid, mean, std)
    device = torch.device("cpu") if generator is None else generator.device
    return torch.multinomial(chances.to(device), count, replacement=True, generator=generator)


def interval_probabilities(process: Process, grid: Tensor, mean: float, std: float) -> Tensor:
    """What a normal law of log(sigma / alpha) gives to each interval of the increasing grid [n + 1], scaled to 1."""
    found = torch.special.ndtr((process.ratio(grid).log() - mean) / std).diff()
    return found / found.sum()
