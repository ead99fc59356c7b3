"""Grids found for a model: Align Your Steps' bound and its minimiser, AutoDiffusion's evolution."""

import itertools
import math

import numpy as np
import pytest
import torch

from consilience.diffusion import (
    EDM,
    GaussianMixture,
    VPScaledLinear,
    exponential_grid,
    karras_grid,
    linear_grid,
    on_process,
    solve,
)
from consilience.diffusion.ays import _distances, ays_grid, shortest_path, step_bounds
from consilience.diffusion.search import autodiffusion
from consilience.diffusion.solvers.sde import SDEDPM

from .linear import propagate

torch.set_num_threads(1)


def gaussian(std: float, process=None) -> GaussianMixture:
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, torch.zeros(1, 1, dtype=torch.float64), one[:, None, None] * std**2, process or EDM())


def two() -> GaussianMixture:
    means = torch.tensor([[1.0, 0.3], [-0.8, -0.4]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.04, 0.09], [0.16, 0.01]], dtype=torch.float64))
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances)


def test_the_shortest_path_is_the_least_of_all_paths():
    bounds = np.random.default_rng(0).random((9, 9))
    for steps in (1, 2, 3, 5, 8):
        all_paths = ((0, *inner, 8) for inner in itertools.combinations(range(1, 8), steps - 1))
        cost = {path: sum(bounds[b, a] for a, b in itertools.pairwise(path)) for path in all_paths}
        assert tuple(shortest_path(bounds, steps)) == min(cost, key=cost.__getitem__)


def test_the_bound_of_a_step_is_the_integral_over_it():
    sigmas = np.geomspace(0.1, 10, 400)
    distances = (sigmas[:, None] - sigmas[None]) ** 2  # the integral of (s - S)^2 / s^3 is known
    high, low = sigmas[300], sigmas[100]
    exact = np.log(high / low) + 2 * high / high - 2 * high / low - high**2 / (2 * high**2) + high**2 / (2 * low**2)
    assert step_bounds(distances, sigmas)[300, 100] == pytest.approx(exact, rel=1e-3)


def test_the_distances_of_a_gaussian_are_the_closed_form():
    """E||D(x_s) - D(x_S)||^2 = c^4 (S^2 - s^2) / ((c^2 + s^2)(c^2 + S^2)) for data N(0, c^2) and s < S."""
    model, sigmas, c = gaussian(0.5), np.geomspace(0.05, 20, 12), 0.5
    generator = torch.Generator().manual_seed(0)
    found = _distances(model, model.sample(40_000, generator), sigmas, generator)
    s, top = np.minimum.outer(sigmas, sigmas), np.maximum.outer(sigmas, sigmas)
    exact = c**4 * (top**2 - s**2) / ((c**2 + s**2) * (c**2 + top**2))
    assert np.allclose(found, exact, rtol=0.06, atol=1e-9)  # 6 standard errors of a variance from 40,000 paths


def test_no_other_grid_has_a_smaller_bound_on_fresh_data():
    model, n, low, high = two(), 8, 0.02, 80.0
    generator = torch.Generator().manual_seed(0)
    ours = ays_grid(model, model.sample(1500, generator), n, low, high, generator)

    def bound(grid: torch.Tensor) -> float:
        """The same integral computed another way: nested sampling of (x_s, x_S), step by step."""
        x0, total = model.sample(4000, generator), 0.0
        for top, end in itertools.pairwise(grid[:-1].tolist()):
            nodes, weights = np.polynomial.legendre.leggauss(12)
            logs = (math.log(top / end) * nodes + math.log(top * end)) / 2
            for s, weight in zip(np.exp(logs), weights * math.log(top / end) / 2, strict=True):
                x = x0 + s * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
                above = x + math.sqrt(top**2 - s**2) * torch.randn(x0.shape, dtype=torch.float64, generator=generator)
                gap = ((model.x0(x, s) - model.x0(above, top)) ** 2).sum(1).mean()
                total += weight * s * float(gap) / s**3
        return total

    others = [exponential_grid(n, low, high), karras_grid(n, low, high)]
    moved = ours.clone()
    moved[3] = moved[3] * 1.4
    assert bound(ours) < 1.02 * min(bound(grid) for grid in [*others, moved])


def test_the_grid_serves_the_sampler_that_it_is_made_for():
    """The exact KL divergence of SDE-DPM-Solver++1 on Gaussian data, 20 evaluations."""
    model, n, low, high = gaussian(0.5), 20, 0.02, 80.0
    generator = torch.Generator().manual_seed(0)
    ours = ays_grid(model, model.sample(4000, generator), n, low, high, generator)

    def divergence(grid: torch.Tensor) -> float:
        plan = SDEDPM(1).plan(grid, model.process)
        ratio = propagate(model, plan, model.process, high, 0.5) / 0.25
        return (ratio - 1 - math.log(ratio)) / 2

    assert divergence(ours) < 0.8 * min(
        divergence(exponential_grid(n, low, high)), divergence(karras_grid(n, low, high))
    )


def test_a_model_of_another_process_has_the_same_best_grid():
    data = gaussian(0.5).sample(2000, torch.Generator().manual_seed(0))
    grids = [
        ays_grid(gaussian(0.5, process), data, 6, 0.05, 12.0, torch.Generator().manual_seed(1))
        for process in (EDM(), VPScaledLinear())
    ]
    assert torch.allclose(grids[0], grids[1])


def test_autodiffusion_finds_the_grid_with_the_least_error():
    """Against every grid there is: 3 steps out of 12 candidate times."""
    model = two()
    x = 80.0 * torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = model.ode_map(x, 80.0, 0.0)
    times = karras_grid(11, 0.02, 80.0)
    calls = []

    def fitness(grid: torch.Tensor) -> float:
        calls.append(tuple(grid.tolist()))
        return float((solve(model, x, grid, "flow-ab2").x - exact).norm(dim=1).median())

    inner = itertools.combinations(times[1:-1].tolist(), 3)
    best = min(fitness(torch.tensor([80.0, *chosen, 0.0], dtype=torch.float64)) for chosen in inner)
    calls.clear()
    found = autodiffusion(fitness, times, 4, np.random.default_rng(0), population=16, generations=6)
    assert found.fitness <= 1.02 * best
    assert len(calls) == len(set(calls))
    assert list(found.history) == sorted(found.history, reverse=True)
    again = autodiffusion(fitness, times, 4, np.random.default_rng(0), population=16, generations=6)
    assert torch.equal(found.grid, again.grid)


def test_autodiffusion_beats_even_times_on_fresh_noise():
    model = two().on(VPScaledLinear())
    generator = torch.Generator().manual_seed(0)

    def error(grid: torch.Tensor, x: torch.Tensor) -> float:
        return float((solve(model, x, grid, "ddim").x - model.ode_map(x, 1.0, 0.0, 1e-7)).norm(dim=1).median())

    search, fresh = (torch.randn(48, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    times, even = linear_grid(40, model.process), linear_grid(4, model.process)
    rng = np.random.default_rng(1)
    found = autodiffusion(lambda g: error(g, search), times, 4, rng, population=12, generations=5, start=(even,))
    assert error(found.grid, fresh) < 0.9 * error(even, fresh)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="levels"):
        ays_grid(gaussian(1.0), torch.zeros(2, 1), 200, 0.1, 1.0)
    with pytest.raises(ValueError, match=r"n = 4 steps, got grids of \[8\]"):
        autodiffusion(
            lambda g: 0.0, linear_grid(20, EDM()), 4, np.random.default_rng(0), start=(linear_grid(8, EDM()),)
        )
    with pytest.raises(ValueError, match="candidate times"):
        autodiffusion(lambda g: 0.0, on_process(karras_grid(2, 0.1, 1.0), EDM()), 4, np.random.default_rng(0))
