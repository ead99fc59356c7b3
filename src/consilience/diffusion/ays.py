"""Align Your Steps: the sampling grid that minimises a bound on the KL divergence between two reverse SDEs.

A first-order stochastic sampler holds the denoiser fixed within a step; Girsanov's theorem bounds what that costs by
the integral of E||D(x_s, s) - D(x_i, s_i)||^2 / s^3 over each step (Sabour et al., arXiv:2404.14507).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.processes import standard_normal


def ays_grid(
    model: Denoiser,
    data: Tensor,
    n: int,
    sigma_min: float,
    sigma_max: float,
    generator: torch.Generator | None = None,
    levels: int = 96,
) -> Tensor:
    """n sigmas (sigma / alpha) from ``sigma_max`` to ``sigma_min`` and then 0, float64 [n + 1], optimal for ``data``.

    ``data`` [count, ...] is a sample of what the model was trained on. The bound is estimated once between
    ``levels`` log-spaced sigmas, on forward paths through all of them, and its minimiser over all grids of these
    levels is found exactly by dynamic programming, where the paper searches coordinate by coordinate. Costs
    ``levels`` evaluations of each datum. Raises ValueError unless 2 <= n <= levels and 0 < sigma_min < sigma_max.
    """
    if not 2 <= n <= levels:
        raise ValueError(f"need 2 <= n <= {levels} (the levels), got {n}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    sigmas = np.geomspace(sigma_min, sigma_max, levels)
    chosen = shortest_path(step_bounds(_distances(model, data, sigmas, generator), sigmas), n - 1)
    return torch.tensor([*sigmas[chosen[::-1]], 0.0], dtype=torch.float64)


def step_bounds(distances: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The bound of a step from level i down to level j < i, [levels, levels]; ``distances`` is E||D_k - D_i||^2.

    The integral over s of distances[k, i] / s^3 by the trapezoid rule between neighbouring levels.
    """
    integrand = distances / sigmas[:, None] ** 3  # [k, i]
    pieces = (integrand[1:] + integrand[:-1]) / 2 * np.diff(sigmas)[:, None]
    below = np.concatenate([np.zeros((1, len(sigmas))), np.cumsum(pieces, axis=0)])  # up to level k
    bounds: np.ndarray = np.diag(below)[:, None] - below.T
    return bounds


def shortest_path(bounds: np.ndarray, steps: int) -> np.ndarray:
    """The levels, ascending, of the path of exactly ``steps`` steps from the last level to the first with least sum."""
    size = len(bounds)
    best, came = np.full(size, np.inf), []
    best[-1] = 0.0  # the least sum of bounds with which a level is reached from the top
    for _ in range(steps):
        through = np.where(np.tri(size, k=-1, dtype=bool), best[:, None] + bounds, np.inf)  # [from, to]
        came.append(through.argmin(0))
        best = through.min(0)
    path = [0]
    for previous in reversed(came):
        path.append(int(previous[path[-1]]))
    return np.array(path)


def _distances(model: Denoiser, data: Tensor, sigmas: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    """E||D(x_k, k) - D(x_i, i)||^2 of all pairs of levels, on forward paths x_k = x_(k-1) + noise: [levels, levels]."""
    process, state, seen, last = model.process, data, [], 0.0
    for sigma in sigmas.tolist():
        fresh = standard_normal(data.shape, data, generator)
        state, last = state + fresh * (sigma**2 - last**2) ** 0.5, sigma
        t = process.time(torch.tensor(sigma, dtype=torch.float64))
        with torch.no_grad():
            seen.append(model.x0(state * float(process.alpha(t)), float(t)).reshape(len(data), -1).double().cpu())
    stacked = torch.stack(seen)  # [levels, count, D]
    flat = stacked.reshape(len(sigmas), -1)
    squared: np.ndarray = (torch.cdist(flat, flat) ** 2 / len(data)).numpy()
    return squared
