"""Minority guidance: score the data by how badly the model restores it, and guide to the badly restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from consilience.diffusion.denoisers import Denoiser, as_time
from consilience.diffusion.guidance.potential import classifier_guidance

Distance = Callable[[Tensor, Tensor], Tensor]
Classifier = Callable[[Tensor, Tensor], Tensor]
"""Logits [batch, classes] of a noisy state [batch, ...] and its time [batch]."""


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """The distance of samples [batch, ...]: [batch]."""
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)


def minority_score(
    model: Denoiser,
    x0: Tensor,
    t: float,
    generator: torch.Generator | None = None,
    repeats: int = 5,
    distance: Distance = euclidean,
    **cond: Any,
) -> Tensor:
    """How far data x0 [batch, ...] is from its denoising after noise of time ``t``, on average: [batch].

    Tweedie's x0 is drawn to the majority, so rare data scores high; the paper takes t at 0.6 to 0.9 of the steps and
    a perceptual ``distance`` for images. Source: Um et al. 2023, arXiv:2301.12334, eq. 7, and their code
    (construct_ms_dataset.py).
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    at, process = as_time(t, x0), model.process
    total = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    with torch.no_grad():
        for _ in range(repeats):
            noise = process.noise(tuple(x0.shape), at, generator).to(x0.dtype)
            total += distance(x0, model.x0(process.add_noise(x0, noise, at), at, **cond))
    return total / repeats


def ordinal_bins(scores: Tensor, count: int) -> Tensor:
    """The quantile bin of each score [n], 0 (lowest) to count - 1: int64 [n]. Raises ValueError unless count >= 2."""
    if count < 2:
        raise ValueError(f"need at least two bins, got {count}")
    levels = torch.arange(1, count, dtype=scores.dtype, device=scores.device) / count
    return torch.searchsorted(torch.quantile(scores, levels), scores.contiguous())


def fit_minority_classifier(
    network: nn.Module,
    model: Denoiser,
    x0: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    steps: int = 1000,
    batch: int = 256,
    lr: float = 3e-3,
) -> list[float]:
    """Train ``network`` (x, t) -> logits to tell the bin ``labels`` [n] of x0 [n, ...] from its noisy states.

    Times are drawn uniformly in the angle arctan(sigma / alpha) over the model's range, the learning rate falls
    linearly to zero. Returns the loss of each step.
    """
    process = model.process
    ends = torch.tensor([process.t_min, process.t_max], dtype=x0.dtype, device=x0.device)
    low, high = torch.atan2(process.sigma(ends), process.alpha(ends))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    device, losses = x0.device if generator is None else generator.device, []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(x0), (batch,), generator=generator, device=device).to(x0.device)
        u = torch.rand(batch, generator=generator, dtype=x0.dtype, device=device).to(x0.device)
        t = process.time(torch.tan(low + (high - low) * u))
        noisy = process.add_noise(x0[chosen], process.noise((batch, *x0.shape[1:]), t, generator), t)
        loss = functional.cross_entropy(network(noisy, t), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def minority_guidance(model: Denoiser, classifier: Classifier, target: int, scale: float = 1.0) -> Denoiser:
    """score + scale * grad_x log P(bin = target | x_t), with a classifier of minority-score bins on noisy states.

    The highest bin is the rarest data; scale 0 is no guidance. Source: Um et al. 2023, arXiv:2301.12334, section 4.
    """

    def log_probability(x: Tensor, t: Tensor) -> Tensor:
        return functional.log_softmax(classifier(x, t.expand(len(x))), dim=1)[:, target]

    return classifier_guidance(model, log_probability, scale)
