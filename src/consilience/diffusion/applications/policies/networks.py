"""Multilayer perceptrons of an actor and of twin critics, and how time enters the first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

OCTAVES = (1.0, 2.0, 4.0, 8.0)
"""Frequencies of the time's sines and cosines: low ones, for a time derivative is taken of the network."""


def perceptron(inputs: int, outputs: int, width: int = 128) -> nn.Sequential:
    """Three hidden layers with Mish, as Diffusion Q-Learning and its followers use."""
    hidden = (nn.Linear(inputs, width), nn.Mish(), nn.Linear(width, width), nn.Mish(), nn.Linear(width, width))
    return nn.Sequential(*hidden, nn.Mish(), nn.Linear(width, outputs))


def waves(t: Tensor) -> Tensor:
    """Times [batch] as features [batch, 9]: themselves, sines and cosines."""
    phase = t[:, None] * torch.tensor(OCTAVES, dtype=t.dtype, device=t.device)
    return torch.cat([t[:, None], phase.sin(), phase.cos()], 1)


class ActionNetwork(nn.Module):
    """F(x, t, obs) or, with ``two_times``, F(x, t, s, obs) for noisy actions x [batch, actions]; of their shape."""

    def __init__(self, observations: int, actions: int, width: int = 128, two_times: bool = False) -> None:
        super().__init__()
        self.actions, self.two_times = actions, two_times
        times = (1 + 2 * len(OCTAVES)) * (2 if two_times else 1)
        self.body = perceptron(observations + actions + times, actions, width)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, *, obs: Tensor) -> Tensor:
        """t and s are 0-d or [batch]; obs [batch, observations]."""
        times = (t,) if not self.two_times or s is None else (t, s)
        return torch.as_tensor(self.body(torch.cat([x, *(waves(u.expand(len(x))) for u in times), obs], 1)))


class Critics(nn.Module):
    """Two independent action values of (obs, action): [2, batch]; the perceptrons are carried out side by side."""

    def __init__(self, observations: int, actions: int, width: int = 128) -> None:
        super().__init__()
        layers = [[m for m in perceptron(observations + actions, 1, width) if isinstance(m, nn.Linear)] for _ in "12"]
        pairs = list(zip(*layers, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().T for m in pair]) for pair in pairs)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in pair]) for pair in pairs)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [batch, observations], action [batch, actions]."""
        x = torch.cat([obs, action], 1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, nn.functional.mish(x) if i else x, weight)
        return x[..., 0]
