"""LCSC: the best linear combination of the checkpoints of one run, found by evolution (Liu et al., arXiv:2404.02241).

Gradient-free: a candidate is a vector of coefficients that sum to 1 and may be negative, its worth any number that
you measure on the combined weights, such as a distance of samples from data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.diffusion.training.ema import State, combine

Float = NDArray[np.float64]
Metric = Callable[[dict[str, Tensor]], float]


@dataclass(frozen=True, slots=True)
class Combination:
    """What the search found: ``coefficients`` [K] that sum to 1, their ``value`` and the combined ``state``.

    ``starts`` are the values of the candidates it started from (the last checkpoint, the mean, moving averages);
    ``best`` is the best value after each evaluation.
    """

    coefficients: Float
    value: float
    state: dict[str, Tensor] = field(repr=False)
    starts: tuple[float, ...]
    best: tuple[float, ...] = field(repr=False)


def search(
    states: Sequence[State],
    metric: Metric,
    rng: np.random.Generator,
    *,
    evaluations: int = 500,
    parents: int = 10,
    mutation: float = 0.1,
) -> Combination:
    """Look for coefficients of K checkpoints, oldest first, that make ``metric(state)`` small.

    It starts from the last checkpoint, the mean and moving averages of several lengths. Each further candidate takes
    every coefficient from one of two of the best ``parents`` and adds normal noise of standard deviation up to
    ``mutation``, on a random subset; the coefficients are then shifted to sum to 1. A value that is not a
    number counts as infinite. What is returned is never worse than the starts; judge it on data that the metric has not
    seen. Raises ValueError unless K >= 2, parents >= 2, mutation > 0 and evaluations exceed the starts.
    """
    first = starts(len(states))
    if parents < 2 or mutation <= 0 or evaluations < len(first):
        raise ValueError(f"need parents >= 2, mutation > 0 and evaluations >= {len(first)}")

    mix = _Mixer(states)

    def judge(candidate: Float) -> float:
        value = float(metric(mix(candidate)))
        return math.inf if math.isnan(value) else value

    population = [(judge(candidate), candidate) for candidate in first]
    begun = tuple(value for value, _ in population)
    best = list(np.minimum.accumulate(begun))
    while len(best) < evaluations:
        population = sorted(population, key=lambda entry: entry[0])[:parents]
        child = _child([candidate for _, candidate in population], rng, mutation)
        population.append((judge(child), child))
        best.append(min(best[-1], population[-1][0]))
    value, found = min(population, key=lambda entry: entry[0])
    return Combination(found, value, mix(found), begun, tuple(map(float, best)))


def starts(count: int) -> list[Float]:
    """The last checkpoint alone, moving averages over 1/16 ... 1/2 of ``count`` checkpoints, and their mean."""
    if count < 2:
        raise ValueError(f"a combination needs at least 2 checkpoints, got {count}")
    age = np.arange(count)[::-1]
    lengths = [count / share for share in (16, 8, 4, 2) if count / share >= 0.5]
    averages = [np.exp(-age / length) for length in lengths]
    return [np.eye(count)[-1], *(part / part.sum() for part in averages), np.full(count, 1 / count)]


class _Mixer:
    """Combines states fast: their floating tensors stand in one matrix [K, values] per dtype."""

    def __init__(self, states: Sequence[State]) -> None:
        self.last = combine(states[-1:], [1.0])  # checked against the others by the full sum below
        combine(states, np.full(len(states), 1 / len(states)))
        kinds = {value.dtype for value in self.last.values() if value.is_floating_point()}
        self.parts: list[tuple[list[str], Tensor]] = []
        for kind in kinds:
            names = [name for name, value in self.last.items() if value.dtype == kind]
            rows = [torch.cat([state[name].detach().flatten() for name in names]) for state in states]
            self.parts.append((names, torch.stack(rows)))

    def __call__(self, weights: Float) -> dict[str, Tensor]:
        mixed = dict(self.last)
        for names, matrix in self.parts:
            row = torch.from_numpy(weights).to(matrix) @ matrix
            pieces = torch.split(row, [self.last[name].numel() for name in names])
            mixed |= {name: piece.view_as(self.last[name]) for name, piece in zip(names, pieces, strict=True)}
        return mixed


def _child(parents: Sequence[Float], rng: np.random.Generator, mutation: float) -> Float:
    """Uniform crossover of two parents, noise of a random size on a random subset, and the sum put right."""
    one, other = (parents[i] for i in rng.choice(len(parents), 2, replace=False))
    count = len(one)
    child = np.where(rng.random(count) < 0.5, one, other)
    hit = rng.random(count) < rng.uniform(1 / count, 1)
    size = mutation * 10 ** rng.uniform(-2, 0)
    child = child + np.where(hit, rng.normal(0, size, count), 0.0)
    return child + (1 - child.sum()) / count
