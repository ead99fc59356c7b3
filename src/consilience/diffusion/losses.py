"""Training losses as pure functions of a denoiser, a batch and a generator.

A batch is data [batch, ...], or a mapping with the data under ``x`` whose other entries are conditions of the model. A
trainer that knows only ``loss_fn(network, batch, generator)`` gets one by a closure:
``lambda net, batch, generator: denoising_loss(precondition(net, process), batch, generator)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from consilience.diffusion.denoisers import Denoiser, Prediction, convert, weights
from consilience.diffusion.guidance.classifier_free import extrapolate, with_condition
from consilience.diffusion.processes import Process, expand

Batch = Tensor | Mapping[str, Any]
Times = Callable[[int, Process, torch.Generator | None], Tensor]
"""Draws training times: how many, of which process -> float64 [count]."""

Weight = Callable[[Tensor], Tensor]
"""The weight of the squared error of x0 at the ratios sigma / alpha."""

Noise = Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
"""The noise for data x0 [batch, ...] at times [batch], of the shape of x0."""

Network = TypeVar("Network", bound=nn.Module)


def uniform_times(count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
    """Evenly spread over the process's own time, t_min to t_max."""
    u = torch.rand(count, generator=generator, dtype=torch.float64, device=_device(generator))
    return process.t_min + (process.t_max - process.t_min) * u


def lognormal_times(mean: float = -1.2, std: float = 1.2) -> Times:
    """log(sigma / alpha) normal, as EDM trains (arXiv:2206.00364, table 1)."""

    def draw(count: int, process: Process, generator: torch.Generator | None) -> Tensor:
        z = torch.randn(count, generator=generator, dtype=torch.float64, device=_device(generator))
        return process.time(torch.exp(mean + std * z))

    return draw


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """(r^2 + sigma_data^2) / (r sigma_data)^2 at r = sigma / alpha (arXiv:2206.00364, table 1)."""
    return lambda r: (r**2 + sigma_data**2) / (r * sigma_data) ** 2


def min_snr_weight(gamma: float = 5.0) -> Weight:
    """min(SNR, gamma) with SNR = 1 / r^2 (Hang et al. 2023, arXiv:2303.09556, section 3.4)."""
    return lambda r: torch.clamp(r**-2, max=gamma)


class Noised(NamedTuple):
    """A training example: data, conditions, times [batch], noise, and the noisy state."""

    x0: Tensor
    cond: dict[str, Any]
    t: Tensor
    noise: Tensor
    x: Tensor


def noised(
    process: Process, batch: Batch, generator: torch.Generator | None, times: Times, noise: Noise | None = None
) -> Noised:
    """Draw a time and noise for every sample of the batch, in this order."""
    cond = {name: value for name, value in batch.items() if name != "x"} if isinstance(batch, Mapping) else {}
    x0: Tensor = batch["x"] if isinstance(batch, Mapping) else batch
    t = times(len(x0), process, generator).to(x0)
    eps = process.noise(tuple(x0.shape), t, generator) if noise is None else noise(x0, t, generator)
    return Noised(x0, cond, t, eps, process.add_noise(x0, eps, t))


def denoising_loss(
    model: Denoiser,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    times: Times = uniform_times,
    weight: Weight | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """The mean squared error of the model's own prediction, or with ``weight`` the so weighted one of x0; 0-d.

    The minimiser is the exact denoiser whatever the weight and the distribution of ``times``. ``noise`` replaces the
    process's, for methods that assign noise to data.
    """
    return _error(model, noised(model.process, batch, generator, times, noise), weight)


def cfg_aligned_loss(
    model: Denoiser,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    null: Mapping[str, Any],
    w: tuple[float, float] = (0.0, 4.0),
    drop: float = 0.1,
    times: Times = uniform_times,
    weight: Weight | None = None,
) -> Tensor:
    """The error of the guided prediction (1 + w) D_cond - w D_null, w uniform per sample; 0-d.

    A share ``drop`` of the samples trains the unconditional prediction alone, as in classifier-free training; ``null``
    is the condition it is called with. At w = (0, 0) it is `denoising_loss` with dropped conditions. Sampling with
    scale 1 + w then reproduces the data rather than a sharpened version. Raises ValueError unless 0 <= drop <= 1 and
    w[0] <= w[1]. Source: Patel et al. 2023, arXiv:2311.00938, of which we have the description, not the equation.
    """
    if not 0 <= drop <= 1 or not w[0] <= w[1]:
        raise ValueError(f"need 0 <= drop <= 1 and w from low to high, got {drop} and {w}")
    example = noised(model.process, batch, generator, times)
    device = _device(generator)
    u = torch.rand(2, len(example.x0), generator=generator, dtype=torch.float64, device=device)
    scale = torch.where(u[0] < drop, 0.0, 1 + w[0] + (w[1] - w[0]) * u[1])
    return _error(extrapolate(model, with_condition(model, null), scale), example, weight)


def self_perceptual_loss(
    model: Denoiser,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    critic: Denoiser,
    features: nn.Module,
    times: Times = uniform_times,
) -> Tensor:
    """The squared difference of a frozen model's hidden features between data and the model's prediction, noised; 0-d.

    The model predicts x0 and eps at a time t; both the true and the predicted pair are put together at another time,
    and ``critic``, a denoiser around a frozen copy of the trained network (see `frozen`), sees the two states.
    ``features`` is the layer of that copy whose output is compared, the middle block of a UNet. Conditions go to both.
    Source: Lin and Yang 2024, arXiv:2401.00110 (one layer's features, t' uniform, a frozen copy, not an average).
    """
    process = model.process
    example = noised(process, batch, generator, times)
    value = model.function(example.x, example.t, **example.cond)
    x0, eps = (convert(value, example.x, example.t, process, model.prediction, want) for want in ("x0", "eps"))
    later = times(len(x0), process, generator).to(x0)
    with torch.no_grad():
        wanted = hidden(critic, features, process.add_noise(example.x0, example.noise, later), later, example.cond)
    found = hidden(critic, features, process.add_noise(x0, eps, later), later, example.cond)
    return (found - wanted).square().mean()


def hidden(critic: Denoiser, layer: nn.Module, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """What ``layer`` returns when the critic is called at x [batch, ...] and t [batch], through a forward hook.

    Raises ValueError where the call does not pass through the layer, or the layer returns no tensor.
    """
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        critic.function(x, t, **cond)
    finally:
        handle.remove()
    output = seen[-1][0] if seen and isinstance(seen[-1], tuple) else seen[-1] if seen else None
    if not isinstance(output, Tensor):
        raise ValueError("the critic's call does not pass through this layer, or the layer returns no tensor")
    return output


def frozen(network: Network) -> Network:
    """A copy of a network, in evaluation mode, whose parameters take no gradient."""
    return deepcopy(network).eval().requires_grad_(False)


def _error(model: Denoiser, example: Noised, weight: Weight | None) -> Tensor:
    process, t = model.process, expand(example.t, example.x0)
    p, q = weights(model.prediction, process, t)
    target = p * example.x0 + q * example.noise
    error = (model.function(example.x, example.t, **example.cond) - target).square()
    if weight is None:
        return error.mean()
    return (error * (weight(process.ratio(t)) / _per_x0(model.prediction, process, t) ** 2)).mean()


def _per_x0(prediction: Prediction, process: Process, t: Tensor) -> Tensor:
    """How much the prediction changes with x0 at a fixed x: its error over that of x0."""
    p, q = weights(prediction, process, t)
    return p - q * process.alpha(t) / process.sigma(t)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
