"""Immiscible diffusion: each datum is noised with a nearby noise of its batch (Li et al., arXiv:2406.12303).

Along a path from a datum to a noise that depend on each other the model learns the mean velocity, which an ODE sampler
may follow as before. It is no longer a score: samplers that add noise have no right to it.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from consilience.diffusion.losses import Noise
from consilience.diffusion.processes import Process


@torch.no_grad()
def assign(x0: Tensor, noise: Tensor) -> Tensor:
    """The noises [batch, ...] in the order that minimises the sum of the distances |x0_i - noise_i|.

    The batch keeps the very noises it was given, so their distribution over all data stays the same; which datum
    gets which one no longer is independent of it. The distance is Euclidean, not squared, as in the authors' code.
    O(batch^3) at worst. Raises ValueError where the shapes differ or a value is not finite.
    """
    if x0.shape != noise.shape or x0.ndim < 2:
        raise ValueError(f"need data and noise of one shape [batch, ...], got {tuple(x0.shape)}, {tuple(noise.shape)}")
    distance = torch.cdist(x0.flatten(1).float(), noise.flatten(1).float()).cpu().numpy()
    try:
        _, order = linear_sum_assignment(distance)
    except ValueError as error:
        raise ValueError("data or noise holds a value that is not finite") from error
    return noise[torch.from_numpy(order).to(noise.device)]


def assigned(process: Process) -> Noise:
    """The process's noise, assigned: what `denoising_loss` takes as ``noise``."""

    def draw(x0: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
        return assign(x0, process.noise(tuple(x0.shape), t, generator))

    return draw
