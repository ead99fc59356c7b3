"""Analytical teleportation: skip the first part of sampling by the Gaussian that the data look like there.

At high noise a trained score is close to that of a Gaussian with the data's mean and covariance, whose
probability-flow map is known; start any solver where that stops being true (arXiv:2412.09726).
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.processes import Process


def teleport(x: Tensor, process: Process, t: float, s: float, mean: Tensor, covariance: Tensor) -> Tensor:
    """Where the probability-flow ODE of N(mean, covariance) takes x [batch, ...] from time t to s.

    ``mean`` [D] and ``covariance`` [D, D] are the data's, D the values of a sample. Exact for Gaussian data, to any s.
    Raises ValueError for shapes that do not fit.
    """
    flat = x.reshape(len(x), -1)
    if mean.shape != flat.shape[1:] or covariance.shape != (flat.shape[1], flat.shape[1]):
        raise ValueError(
            f"samples have {flat.shape[1]} values: need mean [D] and covariance [D, D], "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    times = torch.tensor([t, s], dtype=torch.float64)
    (alpha_t, alpha_s), (sigma_t, sigma_s) = process.alpha(times), process.sigma(times)
    values, vectors = torch.linalg.eigh(covariance.double())
    values = values.clamp(min=0)
    scale = torch.sqrt((alpha_s**2 * values + sigma_s**2) / (alpha_t**2 * values + sigma_t**2))
    away = (flat.double() - alpha_t * mean.double()) @ vectors
    return (alpha_s * mean.double() + (away * scale) @ vectors.T).reshape(x.shape).to(x.dtype)
