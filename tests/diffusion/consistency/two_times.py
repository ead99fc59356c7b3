"""What the tests of flow maps share: a small two-time student, and states of the Gaussian at two times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, pair
from consilience.diffusion.consistency.maps import angle
from consilience.diffusion.consistency.shared import Pair
from consilience.diffusion.consistency.straight import uniform_pair
from consilience.diffusion.denoisers import Prediction

from .exact import EIGENVALUES, gaussian, generator, swapped

__all__ = [
    "PROCESSES",
    "TwoTimes",
    "example",
    "flow_map",
    "named",
    "shrink",
    "spread_of_flow",
    "swapped",
]

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(2.0), TrigFlow()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


class TwoTimes(nn.Module):
    """u(x, t, s) in two dimensions, float64."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, width: int = 12) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(4, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.SiLU()
            )
            self.last = nn.Linear(width, 2)
        self.double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, shift: Tensor | None = None) -> Tensor:
        found: Tensor = self.last(self.layers(3 * torch.cat([x, t[:, None], s[:, None]], 1)))
        return found if shift is None else found + shift[:, None]


def flow_map(net: nn.Module, process: Process | None = None, prediction: Prediction = "flow") -> FlowMap:
    process = process or RectifiedFlow()

    def function(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        norm = torch.hypot(process.alpha(t), process.sigma(t))[:, None]
        found: Tensor = net(x / norm, angle(process, t), angle(process, s), **cond)
        return found

    return FlowMap(function, process, prediction)


def example(process: Process, count: int = 64, seed: int = 0) -> Pair:
    data = gaussian(process).sample(count, generator(seed))
    return pair(process, data, *uniform_pair(count, process, generator(seed + 1)), generator(seed + 2))


def spread_of_flow(tau: Tensor) -> Tensor:
    """The variance of noise - x0 given x_t, summed over both axes: v / ((1 - tau)^2 v + tau^2)."""
    v = EIGENVALUES[:, None]
    return (v / ((1 - tau) ** 2 * v + tau**2)).sum(0)


def shrink(t: Tensor, s: Tensor) -> Tensor:
    """The squared stretch of the exact map on the straight path from tau t to s along each axis, [2, ...]."""
    v = EIGENVALUES[:, None]
    return ((1 - s) ** 2 * v + s**2) / ((1 - t) ** 2 * v + t**2)
