"""The time-shift sampler: tell the network the time that fits the state it is given.

A sampler's state drifts from the training states of the time it is said to have; its empirical variance shows to
which time it belongs. From Li et al., "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted
Time Steps" (arXiv:2305.15583), algorithm 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, Prediction
from consilience.diffusion.processes import Process

_HALVINGS = 40


def time_shifted(model: Denoiser, window: float, cutoff: float, prediction: Prediction = "eps") -> Denoiser:
    """The model evaluated, above time ``cutoff``, at the time within ``window`` around t whose sigma^2 fits best.

    Fits best the variance over the values of a sample, for each sample of the batch by itself; data should be scaled
    to a mean of 0 and have many values. The solver goes on as if the ``prediction`` made there was that at t. Any
    method of `solve` can be used. Raises ValueError for a negative window.
    """
    if window < 0:
        raise ValueError(f"window must not be negative, got {window}")

    def shifted(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return model.predict(prediction, x, fitting_time(x, t, model.process, window, cutoff), **cond)

    return Denoiser(shifted, model.process, prediction, model.cost)


def fitting_time(x: Tensor, t: Tensor, process: Process, window: float, cutoff: float) -> Tensor:
    """The time in [t - window / 2, t + window / 2] with sigma^2 nearest to the variance of each sample: [batch].

    ``t`` itself at or below ``cutoff`` and at the process's ``t_max``, where the state is the noise that sampling
    starts from; never outside the process's range.
    """
    t = t.expand(len(x))
    variance = x.reshape(len(x), -1).var(1).to(t.dtype)
    low = (t - window / 2).clamp(min=process.t_min)
    high = (t + window / 2).clamp(max=process.t_max)
    for _ in range(_HALVINGS):  # sigma grows with time: the nearest is where it crosses, or an end of the window
        middle = (low + high) / 2
        above = process.sigma(middle) ** 2 > variance
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    shifts = (t > cutoff) & (t < torch.as_tensor(process.t_max, dtype=t.dtype))
    return torch.where(shifts, (low + high) / 2, t)
