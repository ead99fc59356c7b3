"""The few-step methods of rectified-flow-pytorch for a network of ours, each with its own loss, defaults and sampler.

The network is called as network(x, t, gap): t is 0 at data and 1 at noise, gap is the part of it that is jumped over.
Each class turns that into the arguments, the direction of time and the sign that its method is written for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ema_pytorch import EMA
from rectified_flow_pytorch import MeanFlow, RectifiedFlow
from rectified_flow_pytorch.soflow import SoFlow
from torch import Tensor, nn


class Called(nn.Module):
    """The network under another call."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        return self.call(self.network, *args, **named)


class MeanFlowSide:
    """Its MeanFlow, told t and t - r, with its defaults but for the settings named."""

    def __init__(self, network: nn.Module, **settings: float) -> None:
        self.module = MeanFlow(Called(network, lambda net, x, t, delta: net(x, t, delta)), **settings)

    def loss(self, data: Tensor, progress: float) -> Tensor:
        return self.module(data)

    def updated(self) -> None:
        pass

    @staticmethod
    def sample(module: Any, noise: Tensor, evaluations: int) -> Tensor:
        """One jump, or the steps of its `slow_sample`, which asks for the flow at t and not for the jump's average."""
        if evaluations == 1:
            return module.sample(batch_size=len(noise), data_shape=noise.shape[1:], noise=noise)
        return module.slow_sample(steps=evaluations, batch_size=len(noise), noise=noise)


class TunedMeanFlowSide(MeanFlowSide):
    """Its MeanFlow with the share of batches with r = t, and the power of the weight, that did best in the plane."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network, prob_default_flow_obj=0.75, adaptive_loss_weight_p=1.0)


class ConsistencySide(MeanFlowSide):
    """Its RectifiedFlow with ``use_consistency``: flow matching plus consistency flow matching, one segment."""

    def __init__(self, network: nn.Module) -> None:
        model = Called(network, lambda net, x, times: net(x, 1 - times, 1 - times))
        self.module = RectifiedFlow(model, use_consistency=True, data_normalize_fn=None, data_unnormalize_fn=None)

    def updated(self) -> None:
        self.module.post_training_step_update()

    @staticmethod
    def sample(module: Any, noise: Tensor, evaluations: int) -> Tensor:
        """Its midpoint rule, two evaluations a step; for one evaluation Euler's."""
        module.odeint_kwargs = {"method": "euler" if evaluations == 1 else "midpoint"}
        return module.sample(batch_size=len(noise), steps=max(evaluations // 2, 1) + 1, noise=noise)


class SolutionSide(MeanFlowSide):
    """Its SoFlow; the schedule goes through in the time that there is."""

    def __init__(self, network: nn.Module) -> None:
        self.module = SoFlow(Called(network, lambda net, x, t, s: net(x, t, t - s)))

    def loss(self, data: Tensor, progress: float) -> Tensor:
        self.module.step = int(progress * self.module.r_total_steps)
        return self.module(data)


SIDES: dict[str, type[MeanFlowSide]] = {
    "meanflow": MeanFlowSide,
    "meanflow, tuned": TunedMeanFlowSide,
    "consistency-fm": ConsistencySide,
    "soflow": SolutionSide,
}


class OwnRecipe:
    """What its `Trainer` does with gradients by default: Adam at 3e-4, their norm at most .5, an `EMA` of weights."""

    batch = 16

    def __init__(self, module: nn.Module, network: nn.Module, average: bool = True) -> None:
        self.optimiser = torch.optim.Adam(network.parameters(), lr=3e-4)
        self.network, self.ema = network, EMA(module) if average else None
        self.module = module

    def step(self, loss: Tensor, progress: float) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ema is not None:
            self.ema.update()

    def sampled(self) -> nn.Module:
        """What its trainer samples from."""
        return self.module if self.ema is None else self.ema.ema_model
