"""Noise consistency training: give a one-step generator a new condition, without data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from consilience.diffusion.consistency.shared import Distance, Result, dropout_seed, mean, same_dropout, squared
from consilience.diffusion.processes import expand

Generator = Callable[[Tensor], Tensor]
"""Noise [batch, ...] -> data [batch, ...]."""

Adapted = Callable[[Tensor, Tensor], Tensor]
"""Noise [batch, ...] and condition [batch, ...] -> data [batch, ...]."""


def nct(
    adapted: Adapted,
    base: Generator,
    control: Callable[[Tensor], Tensor],
    noise: Tensor,
    generator: torch.Generator | None = None,
    *,
    target: Adapted | None = None,
    levels: int = 10,
    boundary: float = 1.0,
    distance: Distance = squared,
) -> Result:
    """d(f(z_n, c), sg f(z_{n-1}, c)) + ``boundary`` d(f(z_0, c), g(z_0)), c = ``control`` of g(z_0), f = ``adapted``.

    ``noise`` [batch, ...] is standard normal: z_0, of which the frozen generator g = ``base`` makes data and thereby
    conditions. z_n = sqrt(1 - s_n^2) z_0 + s_n e with one e for both n and n - 1 is standard normal for every n, ever
    less bound to c as s_n = sin(n pi / (2 ``levels``)) goes from 0 to 1, where f(., c) samples what g makes given c; n
    is uniform. ``target`` supplies the second value of the first term. Source: Luo et al., arXiv:2506.19741, algorithm
    1, where ``boundary`` follows from its own term (`dual_step`); the sine, ``levels`` and the default are ours. Raises
    ValueError below two levels or for a negative ``boundary``.
    """
    if levels < 2 or boundary < 0:
        raise ValueError(f"need at least two levels and a boundary of at least 0, got {levels} and {boundary}")
    with torch.no_grad():
        data = base(noise)
        condition = control(data)
    device = None if generator is None else generator.device
    n = torch.randint(1, levels + 1, (len(noise),), generator=generator, device=device).to(noise.device)
    fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype, device=device).to(noise.device)
    seed = dropout_seed(generator)
    with same_dropout(seed):
        near = adapted(spread(noise, fresh, n, levels), condition)
    with same_dropout(seed), torch.no_grad():
        far = (target or adapted)(spread(noise, fresh, n - 1, levels), condition)
    consistency = mean(distance(near, far))
    with same_dropout(seed):
        kept = mean(distance(adapted(noise, condition), data))
    loss = consistency + boundary * kept
    values = {"loss": loss, "distance": consistency, "boundary": kept}
    return loss, {name: float(value.detach()) for name, value in values.items()}


def dual_step(boundary: float, term: float, margin: float, rate: float) -> float:
    """The weight ``boundary`` after a step of ``rate`` up the dual: max(0, boundary + rate (term - margin)).

    ``term`` is the boundary's distance that `nct` logs. The weight grows while it is above the ``margin`` that it may
    have, and is 0 once the constraint holds by itself (section 3.2). Raises ValueError for negative numbers.
    """
    if min(boundary, margin, rate) < 0:
        raise ValueError(f"weight, margin and rate must be at least 0, got {boundary}, {margin} and {rate}")
    return max(0.0, boundary + rate * (term - margin))


def spread(noise: Tensor, fresh: Tensor, n: Tensor, levels: int) -> Tensor:
    """z_n of a noise and a fresh one [batch, ...] for n [batch]: standard normal if they are."""
    theta = expand(n.to(noise) * (math.pi / 2 / levels), noise)
    return torch.cos(theta) * noise + torch.sin(theta) * fresh
