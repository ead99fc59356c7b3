"""Averages of the weights along a training run: plain decay, power-function profiles, and any length afterwards.

A profile says by its ``beta(step)`` how much of the average is kept at the step-th update. Power-function averages of
two lengths, saved now and then, are enough to put together the average of any other length after training
(Karras et al., arXiv:2312.02696, section 3).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

State = Mapping[str, Tensor]


class Profile(Protocol):
    """How an average forgets."""

    def beta(self, step: int) -> float:
        """The share of the old average that is kept at update ``step`` = 1, 2, ..."""


@dataclass(frozen=True, slots=True)
class Decay:
    """The exponential average with a fixed ``rate`` in [0, 1).

    With ``warmup`` the rate of update t is min(rate, (1 + t) / (10 + t)), so that the first weights, which are random,
    are soon forgotten. Raises ValueError for a rate outside [0, 1).
    """

    rate: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"the rate of an average must be at least 0 and below 1, got {self.rate}")

    def beta(self, step: int) -> float:
        return min(self.rate, (1 + step) / (10 + step)) if self.warmup else self.rate


@dataclass(frozen=True, slots=True)
class Power:
    """The average with weights proportional to tau^gamma on [0, t]: its length grows with the training so far.

    ``sigma_rel`` is the standard deviation of that profile relative to t; 0.05 and 0.10 are usual. Raises ValueError
    unless 0 < sigma_rel < 1/sqrt(12), the uniform average. Source: arXiv:2312.02696, equation 1 and 2, appendix C.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        exponent(self.sigma_rel)

    @property
    def gamma(self) -> float:
        """The exponent."""
        return exponent(self.sigma_rel)

    def beta(self, step: int) -> float:
        return float((1 - 1 / step) ** (self.gamma + 1))


@cache
def exponent(sigma_rel: float) -> float:
    """gamma of the profile whose relative standard deviation is sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3)))."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie strictly between 0 and {12**-0.5:.4f}, got {sigma_rel}")
    inverse = sigma_rel**-2.0
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class EMA:
    """An average of a module's parameters, as a module of its own; its buffers are those of the last update."""

    def __init__(self, model: nn.Module, profile: Profile) -> None:
        self.profile = profile
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._parameters: list[Tensor] = list(self.module.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the parameters after optimizer step number ``step`` = 1, 2, ..."""
        if self._parameters:
            torch._foreach_lerp_(self._parameters, list(model.parameters()), 1 - self.profile.beta(step))
        for own, part in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(part)


# ------------------------------------------------------------------------------------------ any length afterwards


def correlation(step: float, gamma: float, other_step: float, other_gamma: float) -> float:
    """The inner product of two power-function profiles, on [0, step] and [0, other_step] (arXiv:2312.02696, app. C)."""
    (low, low_gamma), (high, high_gamma) = sorted([(step, gamma), (other_step, other_gamma)])
    scale = (low_gamma + 1) * (high_gamma + 1) / (low_gamma + high_gamma + 1)
    return float(scale * (low / high) ** high_gamma / high)


def coefficients(saved: Sequence[tuple[float, float]], step: float, sigma_rel: float) -> NDArray[np.float64]:
    """The weights of saved averages whose sum is closest to the profile ``sigma_rel`` at ``step``; they sum to 1.

    ``saved`` holds (step, sigma_rel) of each. The least-squares solution of arXiv:2312.02696, algorithm 3. Raises
    ValueError where nothing is saved, or nothing up to ``step``.
    """
    if not any(at <= step for at, _ in saved):
        raise ValueError(f"no average was saved at or before step {step:g}; there are {sorted({a for a, _ in saved})}")
    profiles = [(at, exponent(length)) for at, length in saved]
    gram = np.array([[correlation(*one, *other) for other in profiles] for one in profiles])
    aim = np.array([correlation(*one, step, exponent(sigma_rel)) for one in profiles])
    unit = np.sqrt(np.diag(gram))  # profiles differ in norm by orders of magnitude
    weights = np.linalg.lstsq(gram / np.outer(unit, unit), aim / unit)[0] / unit
    return cast("NDArray[np.float64]", weights / weights.sum())


def combine(states: Iterable[State], weights: Sequence[float] | NDArray[np.float64]) -> dict[str, Tensor]:
    """sum_i weights[i] states[i] of state dictionaries, in float64 and back to each tensor's dtype.

    What is not floating (counters) is taken from the last one. Raises ValueError where names or shapes differ or
    there are not as many states as weights.
    """
    total: dict[str, Tensor] = {}
    last: State = {}
    for state, weight in zip(states, weights, strict=True):
        if last and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in last.items()}:
            raise ValueError("the states are not of one model: their names or shapes differ")
        for name, value in state.items():
            if value.is_floating_point():
                share = value.detach().double() * float(weight)
                total[name] = total[name] + share if name in total else share
        last = state
    return {name: total[name].to(value) if name in total else value.clone() for name, value in last.items()}


def reconstruct(
    snapshots: Sequence[Mapping[str, Any]], sigma_rel: float, step: int | None = None
) -> tuple[dict[str, Tensor], NDArray[np.float64]]:
    """The power-function average of any length from the snapshots of a run, with the weights it is made of.

    ``snapshots`` are those of `snapshots`, of a run with averages of profile `Power`; ``step`` is by default the last
    one saved. A length outside those tracked is reached less well. Raises ValueError where none was tracked.
    """
    saved = [
        (float(shot["step"]), length, ema)
        for shot in snapshots
        for length, ema in zip(shot["sigma_rel"], shot["ema"], strict=True)
        if length is not None
    ]
    if not saved:
        raise ValueError("no snapshot has a power-function average: train with ema=(Power(0.05), Power(0.1))")
    at = max(part[0] for part in saved) if step is None else step
    weights = coefficients([(when, length) for when, length, _ in saved], at, sigma_rel)
    return combine((ema for _, _, ema in saved), weights), weights
