"""Laws that objectives of few-step models must satisfy, as numbers, and known mistakes to plant against them.

The data are one Gaussian in two dimensions, whose flow map is known in closed form (`exact_map`): an objective's loss
there is zero or a floor that the distance's law gives, its gradient must be that of finite differences with the target
held, and the calls it makes of a map (`Recorder`) tell whether noises are shared and which time is which.
"""

from __future__ import annotations

import copy
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from consilience.diffusion import consistency
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.mixture import GaussianMixture
from consilience.diffusion.processes import Process, expand

MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
EIGENVALUES = torch.linalg.eigvalsh(COVARIANCE)


def gaussian(process: Process | None = None) -> GaussianMixture:
    """The data and their exact teacher, float64."""
    return GaussianMixture(torch.ones(1, dtype=torch.float64), MEAN[None], COVARIANCE[None], process)


def point(process: Process) -> GaussianMixture:
    """Data that are one point: their flow noise - x0 is constant along the path, and the map a straight line."""
    return GaussianMixture(torch.ones(1).double(), MEAN[None], torch.zeros(1, 2, 2).double(), process)


def generator(seed: int = 0) -> torch.Generator:
    """Random numbers of a seed."""
    return torch.Generator().manual_seed(seed)


def swapped(model: FlowMap) -> FlowMap:
    """The map told s for t and t for s (planted)."""
    return FlowMap(lambda x, t, s, **cond: model.function(x, s, t, **cond), model.process, model.prediction)


class Gradient(NamedTuple):
    """Of a loss: its relative difference from central differences along a direction, the target held or moving along,
    and its own greatest difference where the target is a copy, over its size.
    """

    held: float
    moving: float
    copied: float


Loss = Callable[[nn.Module, nn.Module], Tensor]
"""The loss of a network learning from another one: every call with the same random numbers."""


def gradient(loss: Loss, net: nn.Module, step: float = 1e-5) -> Gradient:
    """`Gradient` of a loss at a network in float64: ``held`` and ``copied`` are 0 up to rounding, ``moving`` is not."""
    held = copy.deepcopy(net)
    parameters = list(net.parameters())
    grads = torch.autograd.grad(loss(net, net), parameters)
    others = torch.autograd.grad(loss(net, held), parameters)
    along = [torch.randn(p.shape, dtype=p.dtype, generator=generator(7)) for p in parameters]
    slope = float(sum((g * v).sum() for g, v in zip(grads, along, strict=True)))
    size = max(abs(slope), 1e-12)
    differences = [abs(_central(loss, net, along, target, step) - slope) / size for target in (held, net)]
    whole = max(float(g.abs().max()) for g in grads)
    copied = max(float((a - b).abs().max()) for a, b in zip(grads, others, strict=True)) / max(whole, 1e-300)
    return Gradient(differences[0], differences[1], copied)


def _central(loss: Loss, net: nn.Module, along: list[Tensor], target: nn.Module, step: float) -> float:
    values = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for part, v in zip(net.parameters(), along, strict=True):
                part.add_(sign * step * v)
        values.append(float(loss(net, target).detach()))
    with torch.no_grad():
        for part, v in zip(net.parameters(), along, strict=True):
            part.add_(step * v)
    return (values[0] - values[1]) / (2 * step)


class Call(NamedTuple):
    """What a map was asked: x [batch, ...] at t for s [batch], and whether with a gradient."""

    x: Tensor
    t: Tensor
    s: Tensor
    learning: bool


class Recorder:
    """A map that remembers its calls: ``map`` is the one to hand out, ``calls`` what it was asked so far."""

    def __init__(self, model: FlowMap) -> None:
        self.calls: list[Call] = []

        def function(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
            if not torch._C._functorch.is_functorch_wrapped_tensor(x) and x.ndim > 1:
                self.calls.append(Call(x.detach().clone(), t.detach(), s.detach(), torch.is_grad_enabled()))
            found: Tensor = model.function(x, t, s, **cond)
            return found

        self.map = FlowMap(function, model.process, model.prediction)


def noise_of(process: Process, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The noise that makes x of x0 at t."""
    t = expand(t, x)
    return (x - process.alpha(t) * x0) / process.sigma(t)


def difference(process: Process, t: Tensor, u: Tensor, s: Tensor, values: Tensor = EIGENVALUES) -> Tensor:
    """The variances, along the axes [2, batch], of f(x_t, t, s) - f(x_u, u, s), f exact, one noise for x_t and x_u.

    Both are Gaussian of variance alpha_s^2 v + sigma_s^2 and have the correlation of x_t and x_u.
    """
    (a, b), (c, d) = ((process.alpha(r), process.sigma(r)) for r in (t, u))
    v = values[:, None]
    correlation = (a * c * v + b * d) / torch.sqrt((a**2 * v + b**2) * (c**2 * v + d**2))
    return 2 * (process.alpha(s) ** 2 * v + process.sigma(s) ** 2) * (1 - correlation)


def floor(t: Tensor, s: Tensor) -> Tensor:
    """E ||f(x_t) - f(x_s)||^2 of the exact map to the data under VE, t and s of one shape, one noise for both."""
    return floor_with(EIGENVALUES, t, s)


def floor_with(values: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """`floor` for axes of these variances.

    Along an axis of variance v, f(x_t) - mean = sqrt(v) (x_t - mean) / sqrt(v + t^2) has variance v, and the
    correlation of x_t and x_s is (v + t s) / sqrt((v + t^2) (v + s^2)).
    """
    v = values.reshape(-1, *(1,) * t.ndim)
    correlation = (v + t * s) / torch.sqrt((v + t**2) * (v + s**2))
    return (2 * v * (1 - correlation)).sum(0)


def expected(h: Callable[[Tensor], Tensor], variances: Tensor, rings: int = 120, angles: int = 24) -> Tensor:
    """E h(|d|^2), [batch], of Gaussian d in two dimensions with the ``variances`` [2, batch] along its axes.

    By quadrature in polar coordinates, exact to about 3e-4: even angles, and even rings out to 9 standard deviations.
    """
    r = (torch.arange(rings, dtype=torch.float64) + 0.5) * (9 / rings)
    mass = r * torch.exp(-(r**2) / 2)
    phi = (torch.arange(angles, dtype=torch.float64) + 0.5) * (math.pi / 2 / angles)
    along = variances[0, :, None] * torch.cos(phi) ** 2 + variances[1, :, None] * torch.sin(phi) ** 2  # [batch, angles]
    values = h(along[:, :, None] * r**2)  # [batch, angles, rings]
    return (values.mean(1) * mass).sum(1) / mass.sum()


def z_score(values: list[float], target: float) -> float:
    """How many standard errors the mean of independent values is away."""
    data = torch.tensor(values, dtype=torch.float64)
    return float((data.mean() - target) / (data.std() / math.sqrt(len(values))))


def identity_error(model: FlowMap, x: Tensor, ratios: tuple[float, ...] = (0.01, 0.3, 2.0)) -> float:
    """The greatest |f(x, s, s) - x| at times of these sigma / alpha, and at the process's last and without noise."""
    process = model.process
    times = [process.time(torch.tensor(r, dtype=x.dtype)) for r in (0.0, *ratios)]
    times.append(torch.tensor(process.t_max, dtype=x.dtype))
    found = [(model(x, t.expand(len(x)), t.expand(len(x))) - x).detach().abs().max() for t in times]
    return max(float(error) for error in found)


def semigroup_error(model: FlowMap, x: Tensor, t: Tensor, u: Tensor, s: Tensor) -> float:
    """The greatest |f(f(x, t, u), u, s) - f(x, t, s)| for states x [batch, ...] at t."""
    return float((model(model(x, t, u), u, s) - model(x, t, s)).detach().abs().max())


def velocity_error(model: FlowMap, velocity: Tensor, x: Tensor, t: Tensor, step: float = 1e-5) -> float:
    """How far the map's derivative by s at s = t, by central differences, is from the ODE's velocity, relatively."""
    h = step * t
    slope = (model(x, t, t + h) - model(x, t, t - h)) / expand(2 * h, x)
    return float((slope - velocity).detach().abs().max() / velocity.abs().max())


Mistake = Literal["unshared noise", "no stop-gradient", "missing weight"]


@contextmanager
def planted(mistake: Mistake) -> Iterator[None]:
    """The library with a mistake in it: in all that is imported of `consilience.diffusion.consistency`.

    ``unshared noise``: a datum has another noise at every time. ``no stop-gradient``: neither no_grad nor detach
    holds a target. ``missing weight``: means over the batch forget their weights.
    """
    with ExitStack() as stack:
        if mistake == "unshared noise":
            stack.enter_context(patch.object(Process, "add_noise", _fresh()))
        elif mistake == "no stop-gradient":
            stack.enter_context(patch.object(torch.Tensor, "detach", lambda x: x))
            for module in _modules():
                if getattr(module, "torch", None) is torch:
                    stack.enter_context(patch.object(module, "torch", _Heedless()))
                if hasattr(module, "through"):
                    stack.enter_context(patch.object(module, "through", lambda function, x: function(x)))
                for name, value in list(vars(module).items()):
                    if _without_gradient(value):
                        stack.enter_context(patch.object(module, name, value.__wrapped__))
        else:
            for module in _modules():
                for name in ("mean", "weighted_mean"):
                    if getattr(module, name, None) is not None:
                        stack.enter_context(patch.object(module, name, lambda values, weight=None: values.mean()))
        yield


class _Nothing(ContextDecorator):
    """A context, and a decorator, that does nothing."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""


class _Heedless:
    """torch, whose no_grad does nothing."""

    no_grad = _Nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _without_gradient(value: Any) -> bool:
    """Whether a function is decorated by torch.no_grad."""
    code = getattr(value, "__code__", None)
    return code is not None and code.co_filename.endswith("_contextlib.py") and hasattr(value, "__wrapped__")


def _fresh() -> Callable[..., Tensor]:
    honest = Process.add_noise

    def add_noise(self: Process, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        draws = generator(int(1e6 * abs(float(t.double().sum()))) % 2**31)  # another one at every other time
        return honest(self, x0, torch.randn(noise.shape, generator=draws, dtype=noise.dtype), t)

    return add_noise


def _modules() -> list[Any]:
    found = pkgutil.walk_packages(consistency.__path__, consistency.__name__ + ".")
    return [importlib.import_module(module.name) for module in found]
