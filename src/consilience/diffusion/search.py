"""AutoDiffusion's evolutionary search for the timesteps, and the blocks of the network, that a model samples best with.

From Li et al., arXiv:2309.10438: candidates are sets of timesteps, with the blocks that are left out in each; the best
of each generation are crossed and mutated, and how good the samples are is the only signal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Candidate = TypeVar("Candidate")


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
    candidates = _candidates(times, n, start)
    judge = _Judge[tuple[float, ...]](lambda grid: fitness(torch.tensor(grid, dtype=torch.float64)))
    inner = candidates[1:-1].numpy()
    ends = (float(candidates[0]), float(candidates[-1]))
    for grid in start:
        judge(tuple(grid.double().tolist()))
    for _ in range(20 * population):
        if len(judge.scores) >= population:
            break
        judge(_whole(rng.choice(inner, n - 1, replace=False), ends))
    history = []
    for _ in range(generations):
        best = judge.best(parents)
        for i in range(population):
            mother, father = (best[int(rng.integers(len(best)))] for _ in range(2))
            child = _crossed(mother, father, n, rng) if i % 2 else mother
            judge(_whole(_mutated(np.array(child[1:-1]), inner, mutation, rng), ends))
        history.append(min(judge.scores.values()))
    (winner,) = judge.best(1)
    return Found(torch.tensor(winner, dtype=torch.float64), judge.scores[winner], tuple(history))


def _candidates(times: Tensor, n: int, start: tuple[Tensor, ...]) -> Tensor:
    """The candidate times in float64, where they and the start grids can be searched for n steps."""
    candidates = times.double()
    if n < 1 or len(candidates) < n + 1 or not bool((candidates[1:] < candidates[:-1]).all()):
        raise ValueError(f"need at least n + 1 = {n + 1} candidate times, decreasing; got {len(candidates)}")
    if wrong := [len(grid) - 1 for grid in start if len(grid) != n + 1]:
        raise ValueError(f"start grids must be of n = {n} steps, got grids of {wrong}")
    return candidates


class _Judge(Generic[Candidate]):
    """The fitness of each candidate, asked for once; one that is no number is the worst."""

    def __init__(self, fitness: Callable[[Candidate], float]) -> None:
        self._fitness = fitness
        self.scores: dict[Candidate, float] = {}

    def __call__(self, candidate: Candidate) -> float:
        if candidate not in self.scores:
            value = float(self._fitness(candidate))
            self.scores[candidate] = value if np.isfinite(value) else np.inf
        return self.scores[candidate]

    def best(self, count: int) -> list[Candidate]:
        """The fittest, in order."""
        return sorted(self.scores, key=self.scores.__getitem__)[:count]


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


# ------------------------------------------------------------------------------------------------- timesteps and blocks

Skips = tuple[frozenset[str], ...]
"""The names of the blocks that are left out in each step."""

_Steps = tuple[tuple[float, frozenset[str]], ...]


@dataclass(frozen=True, slots=True)
class Slimmed:
    """The best grid with the blocks left out at each of its times but the last, and its fitness.

    ``cost`` is in whole evaluations, ``history`` the best fitness after each generation.
    """

    grid: Tensor
    skips: Skips
    cost: float
    fitness: float
    history: tuple[float, ...]


def autodiffusion_blocks(
    fitness: Callable[[Tensor, Skips], float],
    times: Tensor,
    budget: float,
    shares: Mapping[str, float],
    rng: np.random.Generator,
    *,
    population: int = 24,
    generations: int = 16,
    parents: int = 8,
    mutation: float = 0.25,
    most: float = 0.5,
) -> Slimmed:
    """The grid and the blocks to leave out for which ``fitness(grid, skips)`` is smallest within a budget.

    ``shares`` says which part of an evaluation each block costs (`blocks.shares`); a run may cost ``budget`` whole
    evaluations, so that steps with fewer blocks leave room for further steps. As in the authors' code the first stage,
    a quarter of the generations, searches whole steps alone; then the part of an evaluation that one step may leave out
    grows generation by generation to ``most``. Other arguments are those of `autodiffusion`. Raises ValueError as it
    does, for a budget below 1, a ``most`` outside 0 to 1, or fewer than two generations.
    """
    _check_budget(budget, most, generations)
    first = max(1, generations // 4)
    breeder = _Breeder(times.double().numpy(), budget, dict(shares), rng, mutation)
    judge = _Judge[_Steps](lambda steps: fitness(breeder.grid(steps), _skips(steps)))
    found = autodiffusion(
        lambda grid: judge(tuple((t, frozenset()) for t in grid.tolist()[:-1])),
        times,
        min(int(budget), len(times) - 1),
        rng,
        population=population,
        generations=first,
        parents=parents,
        mutation=mutation,
    )
    history = (*found.history, *_bred(judge, breeder, generations - first, population, parents, most))
    (winner,) = judge.best(1)
    return Slimmed(breeder.grid(winner), _skips(winner), breeder.cost(winner), judge.scores[winner], history)


def _check_budget(budget: float, most: float, generations: int) -> None:
    if budget < 1 or not 0 <= most < 1 or generations < 2:
        raise ValueError(
            f"need budget >= 1, 0 <= most < 1 and 2 generations at least, got {budget}, {most} and {generations}"
        )


def _bred(
    judge: _Judge[_Steps], breeder: _Breeder, generations: int, population: int, parents: int, most: float
) -> list[float]:
    """Breeds further generations; the best fitness after each."""
    history = []
    for generation in range(generations):
        best = judge.best(parents)
        allowed = most * min(1.0, (generation + 1) / 5)
        for i in range(population):
            mother, father = (best[int(breeder.rng.integers(len(best)))] for _ in range(2))
            judge(breeder.child(mother, father if i % 2 else mother, allowed))
        history.append(min(judge.scores.values()))
    return history


def _skips(steps: _Steps) -> Skips:
    return tuple(skip for _, skip in steps)


@dataclass(frozen=True, slots=True)
class _Breeder:
    """Makes candidates of candidates; every one costs no more than the budget."""

    times: np.ndarray
    budget: float
    shares: dict[str, float]
    rng: np.random.Generator
    mutation: float

    def grid(self, steps: _Steps) -> Tensor:
        return torch.tensor([*(t for t, _ in steps), float(self.times[-1])], dtype=torch.float64)

    def cost(self, steps: _Steps) -> float:
        return sum(1 - self._left_out(skip) for _, skip in steps)

    def child(self, mother: _Steps, father: _Steps, allowed: float) -> _Steps:
        """One crossed and mutated, then made to fit the budget: by leaving out more, or by another step."""
        rng = self.rng
        held = dict(father) | dict(mother) if rng.random() < 0.5 else dict(mother) | dict(father)
        first = self.times[0]
        pool = np.array([t for t in held if t != first])
        count = min(len(pool), int(rng.choice([len(mother), len(father)])) - 1)
        steps = (
            {t: held[t] for t in [first, *rng.choice(pool, count, replace=False)]} if count else {first: held[first]}
        )
        for t in [t for t in steps if t != first and rng.random() < self.mutation]:
            steps[self._free(steps)] = steps.pop(t)
        for t in [t for t in steps if rng.random() < self.mutation]:
            steps[t] = self._toggled(steps[t], allowed)
        return tuple((float(t), steps[t]) for t in sorted(self._fitted(steps, allowed), reverse=True))

    def _fitted(self, steps: dict[float, frozenset[str]], allowed: float) -> dict[float, frozenset[str]]:
        rng = self.rng
        if len(steps) < len(self.times) - 1 and rng.random() < 0.5:
            steps[self._free(steps)] = self._thin(allowed)
        while self.cost(tuple(steps.items())) > self.budget + 1e-9:
            t = list(steps)[int(rng.integers(len(steps)))]
            thinner = self._more(steps[t], allowed)
            if thinner is not None and rng.random() < 0.8:
                steps[t] = thinner
            elif len(steps) > 1 and t != self.times[0]:
                del steps[t]
        return steps

    def _free(self, steps: Mapping[float, frozenset[str]]) -> float:
        """A time that is not in use, of those between the ends; one in use where there is none."""
        inner = self.times[1:-1]
        free = inner[~np.isin(inner, list(steps))]
        return float(self.rng.choice(free if len(free) else inner))

    def _left_out(self, skip: frozenset[str]) -> float:
        return sum(self.shares[name] for name in skip)

    def _more(self, skip: frozenset[str], allowed: float) -> frozenset[str] | None:
        """One block more left out, where that is allowed."""
        room = [name for name in self.shares if name not in skip and self._left_out(skip | {name}) <= allowed + 1e-9]
        return skip | {str(self.rng.choice(room))} if room else None

    def _thin(self, allowed: float) -> frozenset[str]:
        """Blocks to leave out, of a random number."""
        skip: frozenset[str] = frozenset()
        for _ in range(int(self.rng.integers(len(self.shares) + 1))):
            skip = self._more(skip, allowed) or skip
        return skip

    def _toggled(self, skip: frozenset[str], allowed: float) -> frozenset[str]:
        """A block back in, or another one out."""
        if skip and self.rng.random() < 0.5:
            return skip - {str(self.rng.choice(sorted(skip)))}
        return self._more(skip, allowed) or skip
