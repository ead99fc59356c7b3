"""Diffusers both ways: its models as a `Denoiser`, our solvers as one of its schedulers.

What a network was trained on (its process, what it predicts, how it is told the time) is read from its scheduler's
configuration, so that `from_diffusers` and `as_scheduler` agree about it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, Prediction, as_time
from consilience.diffusion.processes import EDM, Process, RectifiedFlow, VPTable, expand

_PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_UNKNOWN = ("ScoreSdeVe", "ScoreSdeVp", "KarrasVe", "VQDiffusion", "Amused", "UnCLIP", "RePaint", "CMStochastic")


ANGLE = 16.0
"""What the angle of the second time is multiplied by for a network of two times."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a network was trained on: the process, what it predicts, and its time for a time of the process.

    ``sigma_data`` is set where the network is a raw one to be preconditioned as in EDM.
    """

    process: Process
    prediction: Prediction
    steps: int
    sigma_data: float | None = None

    def timestep(self, t: Tensor) -> Tensor:
        """The network's time input for the process's time ``t``."""
        if isinstance(self.process, VPTable):
            return t
        if isinstance(self.process, RectifiedFlow):
            return self.process.sigma(t) * self.steps
        return torch.log(t) / 4

    def timesteps(self, t: Tensor, s: Tensor | None, count: int) -> Tensor:
        """The network's time input for ``count`` samples at t (0-d or [count]), [count]; with s both, [2, count].

        The second row is the angle arctan(sigma / alpha) at s, 0 at the data whatever the process, times `ANGLE`.
        """
        first = self.timestep(t).expand(count)
        if s is None:
            return first
        angle = torch.atan2(self.process.sigma(s), self.process.alpha(s)).clamp(min=0)
        return torch.stack([first, (ANGLE * angle).to(first).expand(count)])

    def time(self, timestep: Tensor) -> Tensor:
        """The process's time for the network's time input."""
        if isinstance(self.process, VPTable):
            return timestep
        if isinstance(self.process, RectifiedFlow):
            sigma = timestep / self.steps
            return self.process.time(sigma / (1 - sigma))
        return torch.exp(4 * timestep)

    def scaled(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's input for a state x [batch, ...]."""
        if self.sigma_data is None:
            return x
        return x / torch.sqrt(expand(t, x) ** 2 + self.sigma_data**2)

    def output(self, raw: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's prediction, in the form of ``prediction``, from its raw output at x."""
        if self.sigma_data is None:
            return raw
        sigma = expand(t, x)
        total = sigma**2 + self.sigma_data**2
        return x * (self.sigma_data**2 / total) + raw * (sigma * self.sigma_data / torch.sqrt(total))


def trained_on(config: dict[str, Any], name: str) -> Trained:
    """What a scheduler's configuration says of the network; ``name`` is the scheduler's class.

    Raises ValueError for a family of schedulers whose process is none of ours.
    """
    name = config.get("trained_with", name)
    steps = int(config.get("num_train_timesteps", 1000))
    predicts = config.get("prediction_type", "epsilon")
    if name.startswith(_UNKNOWN):
        raise ValueError(f"models of {name} are not supported: their process is not one of x_t = alpha x0 + sigma eps")
    if name.startswith("EDM"):
        process = EDM(config.get("sigma_min", 0.002), config.get("sigma_max", 80.0))
        if predicts != "epsilon":
            raise ValueError(f"{name} with prediction_type {predicts!r} is not supported; only 'epsilon' is")
        return Trained(process, "x0", steps, float(config.get("sigma_data", 0.5)))
    if "FlowMatch" in name or predicts == "flow_prediction" or config.get("use_flow_sigmas"):
        if config.get("use_dynamic_shifting"):
            return Trained(RectifiedFlow(), "flow", steps)
        return Trained(RectifiedFlow(float(config.get("shift") or config.get("flow_shift") or 1.0)), "flow", steps)
    if predicts not in _PREDICTIONS:
        raise ValueError(f"prediction_type {predicts!r} is not known; there are: {', '.join(_PREDICTIONS)}")
    return Trained(VPTable(_alphas_cumprod(config)), _PREDICTIONS[predicts], steps)


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    known = {name: config[name] for name in names if config.get(name) is not None}
    stock: Any = DDIMScheduler(**known)
    table: Tensor = stock.alphas_cumprod.double()
    return table


def from_diffusers(
    model: torch.nn.Module, scheduler: Any, call: Callable[..., Tensor] | None = None, **cond: Any
) -> Denoiser:
    """A diffusers model (UNet2DModel, UNet2DConditionModel, DiT, SD3-style flow transformers) as a Denoiser.

    ``scheduler`` is the one it was trained with, or its configuration. ``call(model, x, timestep, **cond)`` replaces
    the way the network is called; ``cond`` is passed at every call. Outputs with twice the channels (a learned
    variance) keep their first half. Raises ValueError for a process or prediction that is not known.
    """
    config = dict(getattr(scheduler, "config", scheduler))
    name = config.get("_class_name") or type(scheduler).__name__
    trained = trained_on(config, name)
    ask, two_times = call or _call, bool(config.get("two_times"))

    def predict(x: Tensor, t: Tensor, s: Tensor | None = None, **more: Any) -> Tensor:
        if two_times and s is None:  # what a denoiser is asked for is the prediction at the time itself
            s = t
        timestep = trained.timesteps(t, s, x.shape[0])
        raw = ask(model, trained.scaled(x, t), timestep, **(cond | more))
        if raw.ndim == x.ndim and raw.shape[1] == 2 * x.shape[1]:
            raw = raw[:, : x.shape[1]]
        return trained.output(raw, x, t)

    return Denoiser(predict, trained.process, trained.prediction, two_times=two_times)


def _call(model: torch.nn.Module, x: Tensor, timestep: Tensor, **cond: Any) -> Tensor:
    found = model(x, timestep=timestep, return_dict=False, **cond)
    value: Tensor = found[0] if isinstance(found, tuple) else found
    return value


def as_scheduler(scheduler: Any, method: str = "auto") -> Any:
    """A diffusers scheduler that runs ``method`` on the process of ``scheduler`` (a stock one, or its configuration).

    It drops into a stock pipeline, ``pipe.scheduler = as_scheduler(pipe.scheduler)``, and is saved and loaded with
    it. Raises ValueError for an unknown method or process.
    """
    from consilience.diffusion.scheduler import ConsilienceScheduler

    config = dict(getattr(scheduler, "config", scheduler))
    return ConsilienceScheduler.of(config, config.get("_class_name") or type(scheduler).__name__, method)


def grid_of(config: Any, process: Process, method: str, count: int) -> Tensor | int:
    """The grid that a scheduler's configuration has for ``count`` evaluations of its own method, or else the count.

    ``levels`` there are the values of sigma / alpha between pure noise and data, by number of evaluations. Warns where
    a model that was trained in phases (of one time, sampled by a chain) is asked for another number.
    """
    known = config.get("levels") or {}
    if method != config.get("method"):
        return count
    if known and str(count) not in known and method == "chain" and not config.get("two_times"):
        warnings.warn(
            f"this model was trained in phases and is sampled in {', '.join(known)} evaluations, not in {count}: "
            "it lands where a phase ends, and these steps go past it",
            UserWarning,
            stacklevel=2,
        )
    levels = known.get(str(count))
    return count if levels is None else grid_at(process, levels)


def grid_at(process: Process, levels: Sequence[float]) -> Tensor:
    """The times from t_max through those of sigma / alpha = ``levels``, decreasing, to no noise, in float64."""
    top = torch.tensor([process.t_max], dtype=torch.float64)
    return torch.cat([top, process.time(torch.tensor([*levels, 0.0], dtype=torch.float64))])


def start_scale(process: Process, t: float) -> float:
    """The standard deviation of a state at time t for data of unit variance: what unit noise is multiplied by."""
    at = as_time(t, torch.empty((), dtype=torch.float64))
    return math.hypot(float(process.alpha(at)), float(process.sigma(at)))
