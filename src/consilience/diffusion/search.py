"""Evolutionary search over sampling grids: AutoDiffusion's search for the few timesteps that a model samples best with.

From Li et al., arXiv:2309.10438: candidates are sets of timesteps; the best of each generation are crossed and mutated,
and how good the samples are is the only signal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """The best grid, its fitness, and the best fitness after each generation."""

    grid: Tensor
    fitness: float
    history: tuple[float, ...]


def autodiffusion(
    fitness: Callable[[Tensor], float],
    times: Tensor,
    n: int,
    rng: np.random.Generator,
    *,
    population: int = 24,
    generations: int = 12,
    parents: int = 8,
    mutation: float = 0.25,
    start: tuple[Tensor, ...] = (),
) -> Found:
    """The decreasing grid of n steps through ``times`` for which ``fitness(grid)`` is smallest.

    ``times`` [m], decreasing, are the candidates; its first and last are always kept, so that a grid has n + 1 times.
    ``start`` grids are entered into the first population (they need not be of ``times``). Half of each generation
    comes from crossing two of the best ``parents``, half from mutating one, each time with probability ``mutation``;
    a grid is never evaluated twice. Raises ValueError where there are fewer than n + 1 times, or for a start grid of
    another number of steps.
    """
    candidates = times.double()
    if n < 1 or len(candidates) < n + 1 or not bool((candidates[1:] < candidates[:-1]).all()):
        raise ValueError(f"need at least n + 1 = {n + 1} candidate times, decreasing; got {len(candidates)}")
    if wrong := [len(grid) - 1 for grid in start if len(grid) != n + 1]:
        raise ValueError(f"start grids must be of n = {n} steps, got grids of {wrong}")
    scores: dict[tuple[float, ...], float] = {}

    def judge(grid: tuple[float, ...]) -> None:
        if grid not in scores:
            value = float(fitness(torch.tensor(grid, dtype=torch.float64)))
            scores[grid] = value if np.isfinite(value) else np.inf

    inner = candidates[1:-1].numpy()
    ends = (float(candidates[0]), float(candidates[-1]))
    for grid in start:
        judge(tuple(grid.double().tolist()))
    for _ in range(20 * population):
        if len(scores) >= population:
            break
        judge(_whole(rng.choice(inner, n - 1, replace=False), ends))
    history = []
    for _ in range(generations):
        best = sorted(scores, key=scores.__getitem__)[:parents]
        for i in range(population):
            mother, father = (best[int(rng.integers(len(best)))] for _ in range(2))
            child = _crossed(mother, father, n, rng) if i % 2 else mother
            judge(_whole(_mutated(np.array(child[1:-1]), inner, mutation, rng), ends))
        history.append(min(scores.values()))
    winner = min(scores, key=scores.__getitem__)
    return Found(torch.tensor(winner, dtype=torch.float64), scores[winner], tuple(history))


def _whole(inner: np.ndarray, ends: tuple[float, float]) -> tuple[float, ...]:
    return (ends[0], *(float(t) for t in -np.sort(-inner)), ends[1])


def _crossed(
    mother: tuple[float, ...], father: tuple[float, ...], n: int, rng: np.random.Generator
) -> tuple[float, ...]:
    """n - 1 of the two parents' inner times, between the mother's ends."""
    pool = np.array(sorted({*mother[1:-1], *father[1:-1]}))
    return (mother[0], *rng.choice(pool, n - 1, replace=False), mother[-1])


def _mutated(inner: np.ndarray, candidates: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each time replaced, with probability ``rate``, by a candidate that is not in the grid."""
    changed = inner.copy()
    for i in np.flatnonzero(rng.random(len(inner)) < rate):
        free = candidates[~np.isin(candidates, changed)]
        if len(free):
            changed[i] = rng.choice(free)
    return changed
