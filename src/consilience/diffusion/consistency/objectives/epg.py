"""EPG: pixel models in two stages, an encoder trained along the sampling path, then the whole model end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.cm import stepped
from consilience.diffusion.consistency.objectives.ect import jump
from consilience.diffusion.consistency.shared import (
    Result,
    dropout_seed,
    ends,
    gap,
    pair,
    same_dropout,
    squared,
)
from consilience.diffusion.consistency.shared import mean as weighted_mean
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process

Encoder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, t) -> the projections of a sample that the views and that the path are compared by, [batch, D] each."""

Features = Callable[[Tensor], Tensor]
"""Of data [batch, ...]: [batch, D]."""


def epg(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    decay: float = 0.5,
    c: float = 0.08,
    mean: float = -1.1,
    std: float = 2.0,
    features: Features | None = None,
    temperature: float = 0.1,
) -> Result:
    """The second stage: d^2 / sqrt(sg(d^2) + c^2) over t - r, d the distance of the ends from t and r of ECT.

    The times are ECT's (``decay`` 1 trains denoising, the stage before consistency), in sigma / alpha. With
    ``features``, of the encoder that the first stage left, frozen, `contrast` of the student's data with the true data
    is added. Lei et al., arXiv:2510.12586, and its public code, whose ImageNet-256 run has c 0.06, mean -0.4 and std
    1.6, its noise 4 times as great for the resolution. Raises ValueError unless 0 < decay <= 1.
    """
    p = stepped(teacher, jump(student.process, batch, generator, decay, mean, std))
    near, far = ends(student, target, p, generator)
    error = squared(near, far)
    loss = weighted_mean(normalised_error(error, c), 1 / gap(student.process, p.t, p.s))
    log = {"distance": float(error.detach().mean())}
    if features is not None:
        with torch.no_grad():
            known = features(p.x0)
        perceived = contrast(features(near), known, temperature)
        loss, log = loss + perceived, log | {"features": float(perceived.detach())}
    return loss, {"loss": float(loss.detach())} | log


def normalised_error(error: Tensor, c: float) -> Tensor:
    """error / sqrt(error + c^2) of squared errors [batch], no gradient through the denominator."""
    return error / torch.sqrt(error.detach() + c**2)


def representation_loss(
    encoder: Encoder,
    process: Process,
    batch: Mapping[str, Any],
    generator: torch.Generator | None = None,
    *,
    target: Encoder | None = None,
    levels: int = 20,
    view_temperature: float = 0.2,
    temperature: float = 0.1,
) -> Result:
    """The first stage: `contrast` of two views at the lowest noise, and of one datum at neighbouring noise levels.

    ``batch`` holds data ``x`` and two augmented views ``view`` and ``other_view``, [batch, ...] each. The views share a
    noise and are compared both ways with the values of ``target`` (an average of the encoder; None is the encoder); the
    neighbours, points of one sampling path, share another, the one nearer to data is not differentiated. One of
    ``levels`` levels, 20 growing to 1280 in the public code, is drawn for the whole batch. Source as `epg`. Raises
    ValueError without the views.
    """
    missing = [name for name in ("x", "view", "other_view") if name not in batch]
    if missing:
        raise ValueError(f"the batch must hold data x and two views of them, view and other_view; no {missing}")
    grid = karras_levels(process, levels)
    device = None if generator is None else generator.device
    n = int(torch.randint(levels - 1, (), generator=generator, device=device))
    x: Tensor = batch["x"]
    t, s, least = (grid[i].to(x).expand(len(x)) for i in (n + 1, n, 0))
    noise = process.noise(tuple(x.shape), t, generator)
    seed = dropout_seed(generator)
    one, other = (process.add_noise(batch[name], noise, least) for name in ("view", "other_view"))
    still = target or encoder
    views = contrast(encoder(one, least)[0], _still(still, other, least)[0], view_temperature)
    views = views + contrast(encoder(other, least)[0], _still(still, one, least)[0], view_temperature)
    p = pair(process, x, t, s, noise=noise)
    with same_dropout(seed):
        near = encoder(p.x_t, t)[1]
    with same_dropout(seed):
        far = _still(encoder, p.x_s, s)[1]
    path = contrast(near, far, temperature)
    loss = views + path
    return loss, {"loss": float(loss.detach()), "views": float(views.detach()), "path": float(path.detach())}


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """InfoNCE: row i of ``one`` should be most like row i of ``other``, [batch, D] each, by cosine; 0-d."""
    logits = normalize(one.flatten(1), dim=1) @ normalize(other.flatten(1), dim=1).T / temperature
    return cross_entropy(logits, torch.arange(len(one), device=one.device))


@torch.no_grad()
def _still(encoder: Encoder, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return encoder(x, t)
