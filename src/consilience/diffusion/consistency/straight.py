"""Flow maps on the straight path: every process is rectified flow in the time tau = sigma / (alpha + sigma).

There y = x / (alpha + sigma) = (1 - tau) x0 + tau eps, the velocity dy/dtau is the flow eps - x0, and what a map's
function predicts is its average from t to s, f = y + (tau_s - tau_t) u: MeanFlow's u. The objectives of flow maps are
written once for this u and hold for every process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap, Jvp, derivative
from consilience.diffusion.consistency.shared import Pair
from consilience.diffusion.denoisers import Denoiser, Prediction, convert
from consilience.diffusion.processes import Process, expand

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Intervals = Callable[[int, Process, torch.Generator | None], tuple[Tensor, Tensor]]
"""Draws training times t above s: how many, of which process -> float64 [count] each."""


def straight_time(process: Process, t: Tensor) -> Tensor:
    """tau of times of any shape: 0 at data, 1 at pure noise."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma)


def own_time(process: Process, tau: Tensor) -> Tensor:
    """The process's time at tau, inside the times it is trained on."""
    low, high = straight_time(process, torch.tensor([process.t_min, process.t_max], dtype=tau.dtype, device=tau.device))
    tau = tau.clamp(low, high)
    return process.time(tau / (1 - tau)).clamp(process.t_min, process.t_max)


def pace(process: Process, t: Tensor) -> Tensor:
    """dtau/dt, of the shape of ``t``."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return (process.sigma_dot(t) * alpha - sigma * process.alpha_dot(t)) / (alpha + sigma) ** 2


def step_size(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """tau_t - tau_s."""
    (a_t, s_t), (a_s, s_s) = ((process.alpha(u), process.sigma(u)) for u in (t, s))
    return (s_t * a_s - s_s * a_t) / ((a_t + s_t) * (a_s + s_s))


def velocity(flow: Tensor, x: Tensor, t: Tensor, process: Process) -> Tensor:
    """dx/dt of the state x [batch, ...] that moves with ``flow``."""
    return convert(flow, x, t, process, "flow", "velocity")


def mean_flow(model: FlowMap, cond: dict[str, Any]) -> Function:
    """(x, t, s) -> the average flow u from t to s, whichever prediction the model makes."""
    return average(model, cond, "flow")


def average(model: FlowMap, cond: dict[str, Any], want: Prediction) -> Function:
    """(x, t, s) -> what the model predicts for the way from t to s, as the prediction ``want``."""

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return convert(model.function(x, t, s, **cond), x, t, model.process, model.prediction, want)

    return function


def along_path(
    model: FlowMap, x: Tensor, t: Tensor, s: Tensor, flow: Tensor, cond: dict[str, Any], jvp: Jvp = "exact"
) -> tuple[Tensor, Tensor]:
    """(u, (tau_t - tau_s) du/dtau) as the state moves with ``flow`` and s stays: [batch, ...] each.

    f does not change along the path where u + (tau_t - tau_s) du/dtau is the flow (MeanFlow, arXiv:2505.13447,
    equation 6; the Eulerian equation of arXiv:2505.18825).
    """
    moving = (velocity(flow, x, t, model.process), torch.ones_like(t))
    function = mean_flow(model, cond)
    u, slope = derivative(lambda y, time: function(y, time, s), (x, t), moving, jvp)
    return u, expand(step_size(model.process, t, s) / pace(model.process, t), x) * slope


def along_end(
    model: FlowMap, x: Tensor, t: Tensor, s: Tensor, cond: dict[str, Any], jvp: Jvp = "exact"
) -> tuple[Tensor, Tensor]:
    """(u, (tau_t - tau_s) du/dtau_s) as only the end s moves: [batch, ...] each.

    The map's own velocity there, df/dtau_s, is the first minus the second (the Lagrangian equation of
    arXiv:2505.18825).
    """
    function = mean_flow(model, cond)
    u, slope = derivative(lambda end: function(x, t, end), (s,), (torch.ones_like(s),), jvp)
    return u, expand(step_size(model.process, t, s) / pace(model.process, s), x) * slope


def on(teacher: Denoiser, process: Process) -> Denoiser:
    """The teacher on the student's process."""
    return teacher if teacher.process is process or teacher.process == process else teacher.on(process)


def path_flow(teacher: Denoiser | None, p: Pair, process: Process) -> Tensor:
    """The flow at x_t: the teacher's, without gradient, or where there is none the datum's own noise - x0."""
    if teacher is None:
        return p.noise - p.x0
    with torch.no_grad():
        return on(teacher, process).predict("flow", p.x_t, p.t, **p.cond)


def uniform_pair(count: int, process: Process, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Two uniform tau, the larger first (arXiv:2505.18825)."""
    return _ordered(process, *_uniform(2, count, generator))


def uniform_time(count: int, process: Process, generator: torch.Generator | None = None) -> Tensor:
    """A uniform tau as the process's own time, float64 [count]."""
    return own_time(process, _uniform(1, count, generator)[0])


def logit_normal_pair(mean: float = -0.4, std: float = 1.0) -> Intervals:
    """Two tau whose logits are normal, the larger first (MeanFlow, arXiv:2505.13447)."""

    def draw(count: int, process: Process, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return _ordered(process, *torch.sigmoid(mean + std * _normal((2, count), generator)))

    return draw


def logit_normal_length(mean: float = -0.8, std: float = 1.0) -> Intervals:
    """A length of tau whose logit is normal, placed uniformly in [0, 1] (AYF, arXiv:2506.14603, algorithm 1)."""

    def draw(count: int, process: Process, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        length = torch.sigmoid(mean + std * _normal((count,), generator))
        start = (1 - length) * _uniform(1, count, generator)[0]
        return _ordered(process, start + length, start)

    return draw


def _ordered(process: Process, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    return own_time(process, torch.maximum(one, other)), own_time(process, torch.minimum(one, other))


def _uniform(rows: int, count: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand((rows, count), generator=generator, dtype=torch.float64, device=device)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
