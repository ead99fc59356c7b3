"""Where to spend the evaluations: decreasing grids of a process's own time.

A grid is a tensor [n + 1] in float64; the model is evaluated at the first n of its times, the last is where the
sample ends. `karras_grid` and its siblings give sigma / alpha, which is sigma under VE and EDM; `on_process` turns
such a grid into the times of any process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.processes import Process


def karras_grid(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n sigmas from ``sigma_max`` to ``sigma_min``, evenly spaced in sigma^(1/rho), then 0: [n + 1].

    Karras et al., arXiv:2206.00364, equation 5. Raises ValueError unless n >= 1 and 0 < sigma_min < sigma_max.
    """
    _check(n, sigma_min, sigma_max)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _ending_in_zero((high + _ramp(n) * (low - high)) ** rho, sigma_min, sigma_max)


def exponential_grid(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """n sigmas from ``sigma_max`` to ``sigma_min``, evenly spaced in log sigma (so in log-SNR too), then 0: [n + 1]."""
    _check(n, sigma_min, sigma_max)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
    return _ending_in_zero(torch.exp(ends[0] + _ramp(n) * (ends[1] - ends[0])), sigma_min, sigma_max)


def arcsinh_grid(n: int, sigma_max: float, scale: float = 0.2) -> Tensor:
    """n + 1 sigmas from ``sigma_max`` to 0, evenly spaced in arcsinh(sigma / scale).

    Logarithmic above ``scale`` and linear below it, so that the last step is as small as the data's finest detail
    asks for. Raises ValueError unless n >= 1, sigma_max > 0 and scale > 0.
    """
    _check(n, 0.0, sigma_max)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    top = torch.tensor(sigma_max / scale, dtype=torch.float64).arcsinh()
    grid = scale * torch.sinh(top * (1 - torch.arange(n + 1, dtype=torch.float64) / n))
    grid[0] = sigma_max
    return grid


def linear_grid(n: int, process: Process, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """n + 1 times of the process from ``t_max`` to the time without noise, evenly spaced; ``t_min`` is not left out.

    With ``t_min`` the first n times end there and the last step goes from it to the time without noise.
    """
    top = process.t_max if t_max is None else t_max
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    if n < 1 or top <= end:
        raise ValueError(f"need n >= 1 and t_max above {end}, got {n} and {top}")
    if t_min is None:
        return top + (end - top) * torch.arange(n + 1, dtype=torch.float64) / n
    if not end < t_min < top:
        raise ValueError(f"t_min must be between {end} and {top}, got {t_min}")
    return torch.cat([top + _ramp(n) * (t_min - top), torch.tensor([end], dtype=torch.float64)])


def on_process(sigmas: Tensor, process: Process) -> Tensor:
    """The process's times at which sigma / alpha is ``sigmas``."""
    return process.time(sigmas.double())


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)


def _ending_in_zero(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """The ends exactly as given, then 0."""
    if len(sigmas) > 1:
        sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n = {n}")
    if not 0 <= sigma_min < sigma_max < float("inf"):
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
