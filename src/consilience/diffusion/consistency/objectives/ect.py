"""Easy consistency tuning (Geng et al. 2024, arXiv:2406.14548): from a denoiser to a consistency model."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.consistency.curriculum import ratio_range
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.cm import stepped
from consilience.diffusion.consistency.shared import Pair, Result, compared, ends, gap, pair, pseudo_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch, lognormal_times
from consilience.diffusion.processes import Process


def ect(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    decay: float = 0.5,
    c: float = 0.0,
    mean: float = -1.1,
    std: float = 2.0,
) -> Result:
    """The distance sqrt(||.||^2 + c^2) - c of the ends from t and from r = `earlier` of t, over t - r in sigma / alpha.

    log t is normal. ``decay`` is the part of t that is jumped over, made small through the run
    (`curriculum.ect_decay`); at 1 every r is 0, the data are the target, and this is plain denoising. Best started
    from a trained denoiser. With a teacher the state at r is its Heun step. Raises ValueError unless 0 < decay <= 1.
    """
    p = stepped(teacher, jump(student.process, batch, generator, decay, mean, std))
    near, far = ends(student, target, p, generator)
    return compared(student.process, p, near, far, pseudo_huber(c), 1 / gap(student.process, p.t, p.s))


def jump(
    process: Process,
    batch: Batch,
    generator: torch.Generator | None,
    decay: float,
    mean: float,
    std: float,
    noise: Tensor | None = None,
) -> Pair:
    """The batch at lognormal times within the process's range, and at the earlier times that belong to them."""
    x0, _ = split(batch)
    low, high = ratio_range(process)
    ratio = process.ratio(lognormal_times(mean, std)(len(x0), process, generator)).clamp(low, high)
    return pair(process, batch, process.time(ratio), process.time(earlier(ratio, decay)), generator, noise)


def earlier(t: Tensor, decay: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t (1 - decay n(t)), n(t) = 1 + k sigmoid(-b t), and 0 where that is negative; of sigma / alpha.

    The paper's mapping function with decay = q^-a (section 3.2). Raises ValueError unless 0 < decay <= 1.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
    return (t * (1 - decay * (1 + k * torch.sigmoid(-b * t)))).clamp(min=0)
