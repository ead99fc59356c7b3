"""One solver of many: every step with a strategy of its own, and the search for the best of them (USF and S^3).

Liu et al., "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models" (arXiv:2312.07243):
the timestep, the order, the prediction, the polynomial's variable and the corrector may differ from step to step; S^3
searches them together by evolution, with a predictor that spares most of the sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion.denoisers import weights as forms
from consilience.diffusion.processes import Process
from consilience.diffusion.solvers.multistep import PREDICTED, Path, Points, Variable, step
from consilience.diffusion.solvers.plan import Plan, Stage

PATHS: tuple[Path, ...] = ("eps", "x0", "flow", "v")
VARIABLES: tuple[Variable, ...] = ("sigma", "lambda", "flow", "angle")
ORDERS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one step is taken: `Adams` of ``order`` on ``path`` in ``variable``.

    With ``corrector`` the state it starts from is first taken again from the one before, by the polynomial that has
    the new evaluation too, which costs none.
    """

    order: int = 2
    path: Path = "eps"
    variable: Variable = "sigma"
    corrector: bool = False


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A solver whose i-th step follows ``strategies[i]``, one for each step of its grid."""

    strategies: tuple[Strategy, ...]

    def plan(self, grid: Tensor, process: Process) -> Plan:
        """The stages; raises ValueError where the number of strategies is not that of the steps."""
        if len(self.strategies) != len(grid) - 1:
            raise ValueError(f"{len(self.strategies)} strategies for {len(grid) - 1} steps")
        return _Builder(Points(grid, process)).build(self.strategies)


class _Builder:
    """Stages in x0 form: any other prediction at t_j is a combination of x0_j and of the state it was made at."""

    def __init__(self, points: Points) -> None:
        self.points = points
        times = torch.from_numpy(points.t)
        self._forms = {path: [part.numpy() for part in forms(PREDICTED[path], points.process, times)] for path in PATHS}
        self.stages: list[Stage] = []
        self.made_at: list[int] = []  # the state (0 is the first) at which each evaluation was made

    def build(self, strategies: Sequence[Strategy]) -> Plan:
        start = 0  # the state from which the current step goes
        for i, strategy in enumerate(strategies):
            here = len(self.stages)
            self.made_at.append(here)
            evaluated = False
            if strategy.corrector and i > 0:
                self._add(i - 1, start, range(i, max(i - strategy.order, -1), -1), strategy, float(self.points.t[i]))
                start, evaluated = len(self.stages), True
            else:
                start = here
            used = range(i, max(i - strategy.order, -1), -1)
            self._add(i, start, used, strategy, None if evaluated else float(self.points.t[i]))
        return Plan(tuple(self.stages), "x0")

    def _add(self, i: int, start: int, seen: Sequence[int], strategy: Strategy, t: float | None) -> None:
        """The stage that goes from state ``start``, at grid point i, to i + 1 by the evaluations ``seen``."""
        points, path = self.points, strategy.path
        if path == "eps" and (points.alpha[list(seen)] == 0).any():
            path = "flow"
        keep, g_weights = step(points, i, seen, path, strategy.variable)
        states = np.zeros(len(self.stages) + 1)
        states[start] += keep
        newest = len(self.made_at) - 1
        evaluations = np.zeros(newest + 1)
        p, q = self._forms[path]
        for j, weight in zip(seen, g_weights, strict=True):
            evaluations[newest - j] += weight * (p[j] - q[j] * points.alpha[j] / points.sigma[j])
            states[self.made_at[j]] += weight * q[j] / points.sigma[j]
        offsets = states[::-1]  # the current state first
        last = int(np.flatnonzero(offsets).max(initial=0))
        past = tuple(float(share) for share in offsets[1 : last + 1])
        end = float(points.t[i + 1])
        self.stages.append(Stage(t, end, float(offsets[0]), tuple(map(float, evaluations)), past=past))


@dataclass(frozen=True, slots=True)
class Searched:
    """The best schedule found: its grid, its solver, its fitness; ``history`` holds the best fitness per generation."""

    grid: Tensor
    solver: Scheduled
    fitness: float
    history: tuple[float, ...]
    evaluated: int


def s3(
    fitness: Callable[[Tensor, Scheduled], float],
    start: Sequence[tuple[Tensor, Scheduled]],
    rng: np.random.Generator,
    *,
    generations: int = 8,
    population: int = 16,
    pool: int = 128,
    parents: int = 8,
    spread: float = 0.15,
) -> Searched:
    """Search grids and per-step strategies for the smallest ``fitness(grid, solver)``.

    ``start`` [>= 1] are schedules of one length to begin from. In each generation ``pool`` children of the best
    ``parents`` are made (steps of one parent replaced by the other's, strategies redrawn, inner times moved by a
    relative ``spread``), a regression of the fitness on all schedules evaluated so far ranks them, and the
    ``population`` ranked best are evaluated. Raises ValueError where the starts differ in length.
    """
    sizes = {len(grid) for grid, _ in start}
    if len(sizes) != 1:
        raise ValueError(f"need start schedules of one length, got lengths {sorted(sizes)}")
    seen: list[tuple[float, _Candidate]] = []

    def evaluate(candidate: _Candidate) -> None:
        value = float(fitness(torch.tensor(candidate.times, dtype=torch.float64), Scheduled(candidate.strategies)))
        seen.append((value if np.isfinite(value) else np.inf, candidate))

    for grid, solver in start:
        evaluate(_Candidate(tuple(grid.double().tolist()), solver.strategies))
    history = []
    for _ in range(generations):
        best = [candidate for _, candidate in sorted(seen, key=lambda one: one[0])[:parents]]
        children = [_child(best, rng, spread) for _ in range(pool)]
        for index in _predicted(seen, children).argsort(kind="stable")[:population]:
            evaluate(children[index])
        history.append(min(value for value, _ in seen))
    value, winner = min(seen, key=lambda one: one[0])
    grid = torch.tensor(winner.times, dtype=torch.float64)
    return Searched(grid, Scheduled(winner.strategies), value, tuple(history), len(seen))


@dataclass(frozen=True, slots=True)
class _Candidate:
    times: tuple[float, ...]
    strategies: tuple[Strategy, ...]

    def encoded(self) -> np.ndarray:
        """Where the inner times lie between the ends, and one column per choice of each step."""
        times = np.array(self.times)
        gaps = np.log(-np.diff(times) / (times[0] - times[-1]))
        chosen = [
            [one.order == k for k in ORDERS]
            + [one.path == p for p in PATHS]
            + [one.variable == v for v in VARIABLES]
            + [one.corrector]
            for one in self.strategies
        ]
        return np.concatenate([gaps, np.array(chosen, dtype=float).ravel()])


def _child(best: Sequence[_Candidate], rng: np.random.Generator, spread: float) -> _Candidate:
    mother, father = (best[int(rng.integers(len(best)))] for _ in range(2))
    steps = len(mother.strategies)
    from_father = rng.random(steps) < 0.3
    strategies = [
        b if swap else a for a, b, swap in zip(mother.strategies, father.strategies, from_father, strict=True)
    ]
    for i in np.flatnonzero(rng.random(steps) < 1 / steps):
        strategies[i] = _random_strategy(rng)
    gaps = -np.diff(np.where(rng.random() < 0.3, np.array(father.times), np.array(mother.times)))
    moved = gaps * np.exp(spread * rng.standard_normal(steps) * (rng.random(steps) < 0.5))
    total = mother.times[0] - mother.times[-1]
    times = mother.times[0] - np.concatenate([[0.0], np.cumsum(moved)]) * total / moved.sum()
    times[0], times[-1] = mother.times[0], mother.times[-1]
    return _Candidate(tuple(times.tolist()), tuple(strategies))


def _random_strategy(rng: np.random.Generator) -> Strategy:
    path, variable = PATHS[int(rng.integers(len(PATHS)))], VARIABLES[int(rng.integers(len(VARIABLES)))]
    return Strategy(int(rng.integers(1, 5)), path, variable, bool(rng.random() < 0.5))


def _predicted(seen: Sequence[tuple[float, _Candidate]], children: Sequence[_Candidate]) -> np.ndarray:
    """The children's log fitness by kernel ridge regression on those evaluated: [children]."""
    known = np.array([candidate.encoded() for _, candidate in seen])
    values = np.log(np.clip([value for value, _ in seen], 1e-12, 1e12))
    centre, scale = known.mean(0), known.std(0) + 0.1
    asked = (np.array([child.encoded() for child in children]) - centre) / scale
    known = (known - centre) / scale
    width = known.shape[1]

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return np.exp(-np.maximum(squares, 0) / (2 * width))

    fitted = np.linalg.solve(kernel(known, known) + 0.1 * np.eye(len(known)), values - values.mean())
    predicted: np.ndarray = values.mean() + kernel(asked, known) @ fitted
    return predicted
