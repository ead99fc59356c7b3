"""What every solver comes down to: evaluate the model, and replace the state by a linear combination.

A solver turns a grid into a `Plan`, its coefficients computed once in float64; `run` carries a plan out in one go,
and a diffusers scheduler carries out the same plan step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser, Prediction, as_time, factors
from consilience.diffusion.processes import Process


@dataclass(frozen=True, slots=True)
class Stage:
    """x <- keep * anchor + sum_k past[k] * x_(k+1) + sum_j weights[j] * g_j + noise * z.

    First, where ``t`` is a time, the model is evaluated at the current x and ``t``: that is g_0, older evaluations are
    g_1, g_2, ... ``anchor`` 0 is the current x, k the state x_k before the last k stages; z is standard normal.
    ``end`` is the time at which x then stands. ``prediction`` is the form of this evaluation where it is not the
    plan's.
    """

    t: float | None
    end: float
    keep: float
    weights: tuple[float, ...] = ()
    anchor: int = 0
    noise: float = 0.0
    prediction: Prediction | None = None
    past: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a solver on one grid; ``prediction`` is the form of the model they combine.

    With ``jumps`` each evaluation is used to land at its stage's end, and a model of two times is told that; otherwise
    it is asked for its value at the time itself.
    """

    stages: tuple[Stage, ...]
    prediction: Prediction
    jumps: bool = False

    def form(self, stage: Stage) -> Prediction:
        """The form in which a stage wants its evaluation."""
        return stage.prediction or self.prediction

    @property
    def evaluations(self) -> int:
        """How often the model is evaluated."""
        return sum(stage.t is not None for stage in self.stages)

    @property
    def memory(self) -> tuple[int, int]:
        """How many states and how many evaluations have to be kept."""
        states = max((max(stage.anchor, len(stage.past)) for stage in self.stages), default=0) + 1
        return states, max((len(stage.weights) for stage in self.stages), default=0)


class Solver(Protocol):
    """A method: from a grid to a plan.

    ``evaluations_per_step`` is 1 where it is left out; a solver with more says how many of them a step takes, and
    with ``evaluations_saved`` how many fewer the last step takes. One with a ``grid(steps, process, sigma_max)``
    chooses its grid for a number of steps.
    """

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages through the grid's times; raises ValueError for a grid it cannot go through."""


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver returns: ``x`` at the last time, ``nfe`` network evaluations per sample, the grid and the method.

    ``why`` says why `auto` chose as it did; ``states`` are x after each stage where the trajectory was asked for.
    """

    x: Tensor
    nfe: int
    grid: Tensor
    method: str
    why: str = ""
    states: tuple[Tensor, ...] = ()


Noise = Callable[[Tensor, float, float], Tensor]
"""Standard normal noise like x for going from one time to another."""


class State:
    """A sample on its way through a plan: the last states and evaluations."""

    __slots__ = ("_evaluations", "_kept", "_states", "x")

    def __init__(self, x: Tensor, plan: Plan) -> None:
        self.x = x
        self._kept = plan.memory
        self._states = [x]
        self._evaluations: list[Tensor] = []

    def stands_at(self, x: Tensor) -> None:
        """The current x was changed from outside, as inpainting pipelines do."""
        self.x = self._states[0] = x

    def saw(self, evaluation: Tensor) -> None:
        """The model was evaluated at the current x."""
        self._evaluations.insert(0, evaluation)
        del self._evaluations[self._kept[1] :]

    def update(self, stage: Stage, z: Tensor | None = None) -> Tensor:
        """Carry out a stage's update, after its evaluation, and return x."""
        x = self._states[stage.anchor] * stage.keep
        for share, earlier in zip(stage.past, self._states[1:], strict=False):
            x.add_(earlier, alpha=share)
        for weight, evaluation in zip(stage.weights, self._evaluations, strict=False):
            if weight:
                x.add_(evaluation, alpha=weight)
        if stage.noise and z is not None:
            x.add_(z, alpha=stage.noise)
        self.x = x
        self._states.insert(0, x)
        del self._states[self._kept[0] :]
        return x


def run(
    plan: Plan, model: Denoiser, x: Tensor, noise: Noise, start: float, **cond: Any
) -> Iterator[tuple[Stage, Tensor]]:
    """Carry a plan out from x [batch, ...] at time ``start``: yields every stage with the state after it."""
    model, state, here = model.run(), State(x, plan), start
    own = factors_of(plan, model.process, model.prediction)
    times = [torch.nan if stage.t is None else stage.t for stage in plan.stages]
    at = as_time(torch.tensor(times, dtype=torch.float64), x).unbind()
    ends = as_time(torch.tensor([stage.end for stage in plan.stages], dtype=torch.float64), x).unbind()
    for i, stage in enumerate(plan.stages):
        if stage.t is not None:
            told = {"s": ends[i] if plan.jumps else at[i]} if model.two_times else {}
            state.saw(view(model.function(state.x, at[i], **cond, **told), state.x, *own[i]))
        z = noise(state.x, here, stage.end) if stage.noise else None
        yield stage, state.update(stage, z)
        here = stage.end


def view(value: Tensor, x: Tensor, a: float, b: float) -> Tensor:
    """a x + b value: a model's output at x in another form."""
    if a == 0:
        return value if b == 1 else value * b
    return torch.add(x * a, value, alpha=b)


def factors_of(plan: Plan, process: Process, have: Prediction) -> list[tuple[float, float]]:
    """(a, b) of `view` for each stage, from the model's prediction ``have`` to the form that the stage asks for."""
    times = torch.tensor([0.0 if stage.t is None else stage.t for stage in plan.stages], dtype=torch.float64)
    found = [(0.0, 1.0)] * len(plan.stages)
    for form in {plan.form(stage) for stage in plan.stages} - {have}:
        a, b = (part.tolist() for part in factors(times, process, have, form))
        found = [
            (a[i], b[i]) if stage.t is not None and plan.form(stage) == form else found[i]
            for i, stage in enumerate(plan.stages)
        ]
    return found
