"""One view of every model: x0, eps, v, velocity and score at (x, t), whatever the network predicts.

With x = alpha x0 + sigma eps, each of these predictions is p x0 + q eps for known p and q, so that one linear map
converts any of them to any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.diffusion.processes import Process, expand

Prediction = Literal["x0", "eps", "v", "velocity", "score", "flow"]
PREDICTIONS: tuple[Prediction, ...] = ("x0", "eps", "v", "velocity", "score", "flow")


def weights(prediction: Prediction, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with prediction = p x0 + q eps: ``v`` is alpha eps - sigma x0, ``velocity`` dx/dt, ``flow`` eps - x0."""
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    match prediction:
        case "x0":
            return one, zero
        case "eps":
            return zero, one
        case "v":
            return -process.sigma(t), process.alpha(t)
        case "velocity":
            return process.alpha_dot(t), process.sigma_dot(t)
        case "score":
            return zero, -1 / process.sigma(t)
        case "flow":
            return -one, one
    raise ValueError(f"no prediction {prediction!r}; there are: {', '.join(PREDICTIONS)}")


def factors(t: Tensor, process: Process, have: Prediction, want: Prediction) -> tuple[Tensor, Tensor]:
    """(a, b) with want = a x + b have, of the shape of ``t``."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = weights(have, process, t)
    p_want, q_want = weights(want, process, t)
    det = alpha * q - sigma * p
    return (p_want * q - q_want * p) / det, (alpha * q_want - sigma * p_want) / det


def convert(value: Tensor, x: Tensor, t: Tensor, process: Process, have: Prediction, want: Prediction) -> Tensor:
    """A prediction at ``x`` [batch, ...] and ``t`` (one, or one per sample) in another form, of the shape of ``x``."""
    if have == want:
        return value
    a, b = factors(expand(t, x), process, have, want)
    return a * x + b * value


@dataclass(frozen=True)
class Denoiser:
    """A model seen as x0, eps, v, velocity, score or flow at (x, t).

    ``function(x, t, **cond)`` takes x [batch, ...] and t (0-d or [batch]) and returns its ``prediction``, the shape of
    x. ``cost(t)`` is how many network evaluations a call at time t takes: guidance takes more than one. ``fresh``
    makes the function anew for a run where it remembers something from step to step. With ``two_times`` it is the
    model of a flow map and takes the condition ``s`` too, where it is to land.
    """

    function: Callable[..., Tensor]
    process: Process
    prediction: Prediction = "x0"
    cost: Callable[[float], int] = lambda t: 1
    fresh: Callable[[], Callable[..., Tensor]] | None = None
    two_times: bool = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"no prediction {self.prediction!r}; there are: {', '.join(PREDICTIONS)}")

    def predict(self, want: Prediction, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The prediction ``want`` at x [batch, ...] and t (a float, 0-d or [batch])."""
        t = as_time(t, x)
        return convert(self.function(x, t, **cond), x, t, self.process, self.prediction, want)

    def x0(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The expected data given x."""
        return self.predict("x0", x, t, **cond)

    def eps(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The expected noise given x."""
        return self.predict("eps", x, t, **cond)

    def v(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """alpha eps - sigma x0 (Salimans and Ho, arXiv:2202.00512)."""
        return self.predict("v", x, t, **cond)

    def velocity(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """dx/dt of the probability-flow ODE in the process's own time."""
        return self.predict("velocity", x, t, **cond)

    def score(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The gradient of log p_t, -eps / sigma."""
        return self.predict("score", x, t, **cond)

    def run(self) -> Denoiser:
        """This model for one sampling run: with a memory of its own where it has one."""
        return self if self.fresh is None else replace(self, function=self.fresh())

    def on(self, process: Process) -> Denoiser:
        """The same trained model on another process: states are rescaled to the time of equal sigma / alpha."""
        here = self.process

        def own(t: Tensor) -> Tensor:
            ratio = process.ratio(t)  # infinite in pure noise: the nearest that this model can be asked is t_max
            return torch.where(torch.isinf(ratio), torch.full_like(t, here.t_max), here.time(ratio))

        def moved(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            time = own(t)
            if self.two_times and "s" in cond:
                cond = cond | {"s": own(cond["s"])}
            return self.x0(x * expand(_norm(here, time) / _norm(process, t), x), time, **cond)

        def cost(t: float) -> int:
            return self.cost(float(here.time(process.ratio(torch.tensor(t, dtype=torch.float64)))))

        def fresh() -> Callable[..., Tensor]:
            return self.run().on(process).function

        return Denoiser(moved, process, "x0", cost, None if self.fresh is None else fresh, self.two_times)


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """A time as a tensor on the device of ``x``, in its dtype but never below float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(t, dtype=dtype, device=x.device)


def _norm(process: Process, t: Tensor) -> Tensor:
    return torch.hypot(process.alpha(t), process.sigma(t))


def precondition(
    network: Callable[..., Tensor],
    process: Process,
    sigma_data: float = 0.5,
    c_noise: Callable[[Tensor], Tensor] = lambda r: r.log() / 4,
) -> Denoiser:
    """A raw network F as an x0 model: D = c_skip x + c_out F(c_in x, c_noise) (EDM, arXiv:2206.00364, eq. 7).

    On a process with alpha != 1 the state is divided by alpha first; ``c_noise`` maps sigma / alpha to the network's
    time, log(sigma) / 4 by default. ``sigma_data`` is the standard deviation of the data.
    """
    if sigma_data <= 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def denoise(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        s = process.ratio(t)
        alpha, sigma = expand(process.alpha(t), x), expand(s, x)
        total = torch.sqrt(sigma**2 + sigma_data**2)
        state = x / alpha
        raw = network(state / total, c_noise(s).expand(x.shape[0]), **cond)
        return state * (sigma_data / total) ** 2 + raw * (sigma * sigma_data / total)

    return Denoiser(denoise, process, "x0")
