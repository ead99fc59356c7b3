"""What the tests of the objectives share: a Gaussian whose maps are known, a small student, and checks of gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, GaussianMixture, Process
from consilience.diffusion.consistency import FlowMap, consistency_map

torch.set_num_threads(1)

MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)
ROOT = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
EIGENVALUES = torch.linalg.eigvalsh(COVARIANCE)


def gaussian(process: Process | None = None) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=torch.float64), MEAN[None], COVARIANCE[None], process)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """F(x, c_noise) in two dimensions, float64."""

    def __init__(self, dim: int = 2, width: int = 16, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(dim + 1, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU()
            )
            self.last = nn.Linear(width, dim)
        self.double()

    def forward(self, x: Tensor, noise: Tensor, shift: Tensor | None = None) -> Tensor:
        found: Tensor = self.last(self.layers(torch.cat([x, noise.to(x).expand(len(x))[:, None]], 1)))
        return found if shift is None else found + shift[:, None]


def student(net: nn.Module, process: Process | None = None) -> FlowMap:
    return consistency_map(net, process or EDM(), sigma_data=0.5)


Loss = Callable[[nn.Module, nn.Module], Tensor]
"""The loss of a network learning from another one: every call with the same random numbers."""


def check_gradient(loss: Loss, net: nn.Module) -> None:
    """The gradient is that of central differences with the target's weights held, and not with them moving along."""
    held = copy.deepcopy(net)
    parameters = list(net.parameters())
    grads = torch.autograd.grad(loss(net, net), parameters)
    for mine, other in zip(grads, torch.autograd.grad(loss(net, held), parameters), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-14)
    along = [torch.randn(p.shape, dtype=p.dtype, generator=generator(7)) for p in parameters]
    slope = float(sum((g * v).sum() for g, v in zip(grads, along, strict=True)))
    held_slope, moving_slope = (_central(loss, net, along, target) for target in (held, net))
    assert abs(held_slope - slope) < 1e-5 * max(abs(slope), 1.0)
    assert abs(moving_slope - slope) > 1e-2 * abs(slope)


def _central(loss: Loss, net: nn.Module, along: list[Tensor], target: nn.Module, step: float = 1e-5) -> float:
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


def floor(t: Tensor, s: Tensor) -> Tensor:
    """E ||f(x_t) - f(x_s)||^2 of the exact map to the data under VE, t and s of one shape, one noise for both.

    Along an axis of variance v, f(x_t) - mean = sqrt(v) (x_t - mean) / sqrt(v + t^2) has variance v, and the
    correlation of x_t and x_s is (v + t s) / sqrt((v + t^2) (v + s^2)).
    """
    return floor_with(EIGENVALUES, t, s)


def floor_with(values: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """`floor` for axes of these variances."""
    v = values.reshape(-1, *(1,) * t.ndim)
    correlation = (v + t * s) / torch.sqrt((v + t**2) * (v + s**2))
    return (2 * v * (1 - correlation)).sum(0)


def z_score(values: list[float], expected: float) -> float:
    """How many standard errors the mean of independent values is away."""
    data = torch.tensor(values, dtype=torch.float64)
    return float((data.mean() - expected) / (data.std() / math.sqrt(len(values))))
