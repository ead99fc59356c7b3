"""What the tests of the objectives share: a Gaussian whose maps are known, a small student, and checks of gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, Process
from consilience.diffusion.consistency import FlowMap, consistency_map
from consilience.testing.few_steps import (
    COVARIANCE,
    EIGENVALUES,
    MEAN,
    ROOT,
    Loss,
    floor,
    floor_with,
    gaussian,
    generator,
    gradient,
    point,
    swapped,
    z_score,
)

__all__ = [
    "COVARIANCE",
    "EIGENVALUES",
    "MEAN",
    "ROOT",
    "Net",
    "check_gradient",
    "floor",
    "floor_with",
    "gaussian",
    "generator",
    "point",
    "student",
    "swapped",
    "z_score",
]

torch.set_num_threads(1)


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


def check_gradient(loss: Loss, net: nn.Module) -> None:
    """The gradient is that of central differences with the target's weights held, and not with them moving along."""
    found = gradient(loss, net)
    assert found.copied < 1e-10
    assert found.held < 1e-5
    assert found.moving > 1e-2
