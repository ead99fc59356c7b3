"""What the tests of the trajectory objectives share: a two-time network, exact steps, a map that takes notes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from consilience.diffusion import Process, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map

from .exact import gaussian

PROCESS = VPLinear()


class TwoTime(nn.Module):
    """A prediction of two coordinates from x, t and s, float64; ``shift`` and ``w`` [batch] are added on."""

    def __init__(self, seed: int = 0, width: int = 12) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.last = nn.Linear(width, 2)
        self.double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, shift: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        found: Tensor = self.last(self.layers(torch.cat([x, t.expand(len(x))[:, None], s.expand(len(x))[:, None]], 1)))
        for extra in (shift, w):
            found = found if extra is None else found * (1 + 0.1 * extra[:, None])
        return found


def flow(net: nn.Module, process: Process = PROCESS) -> FlowMap:
    return FlowMap(net, process, "flow")


def exact(process: Process = PROCESS) -> FlowMap:
    return exact_map(gaussian(process))


def exact_step(process: Process = PROCESS) -> Any:
    """A teacher's step without discretisation."""
    model = exact(process)

    def step(_teacher: Any, x: Tensor, t: Tensor, u: Tensor, **_: Any) -> Tensor:
        return model(x, t, u)

    return step


class Notes:
    """A map that remembers every call's x, t, s and conditions, and returns the exact jump."""

    def __init__(self, process: Process = PROCESS) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = []
        inner = exact(process)

        def function(x: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
            self.calls.append((x.detach(), t, s, cond))
            return inner.function(x, t, s)

        self.map = FlowMap(function, process, "flow")


def squares(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum(1)
