"""Per-step strategies and their search: identities with the uniform solvers, and a schedule that beats them all."""

import itertools
import math

import numpy as np
import pytest
import torch

from consilience.diffusion import EDM, GaussianMixture, RectifiedFlow, arcsinh_grid, karras_grid, linear_grid, solve
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.searched import ORDERS, PATHS, VARIABLES, Scheduled, Strategy, s3

torch.set_num_threads(1)


def mixture(process=None) -> GaussianMixture:
    means = torch.tensor([[1.0, 0.3], [-0.8, -0.4], [0.2, 1.1]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.04, 0.02], [0.06, 0.01], [0.01, 0.03]], dtype=torch.float64))
    return GaussianMixture(torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), means, covariances, process)


def noise(count: int, seed: int, scale: float = 80.0) -> torch.Tensor:
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("order", "path", "variable"), list(itertools.product(ORDERS, PATHS, VARIABLES)))
def test_the_same_strategy_at_every_step_is_the_uniform_solver(order, path, variable):
    model, x, grid = mixture(), noise(16, 0), arcsinh_grid(9, 80.0, 0.2)
    ours = solve(model, x, grid, Scheduled((Strategy(order, path, variable),) * 9))
    uniform = solve(model, x, grid, Adams(order, path, variable))
    assert torch.allclose(ours.x, uniform.x, atol=1e-7 * max(1.0, float(uniform.x.abs().max())))
    assert ours.nfe == 9


def test_mixed_predictions_agree_where_they_must():
    """At order 1 the three straight paths are the same step, so any mixture is DDIM; also from pure noise."""
    strategies = tuple(Strategy(1, path) for path in ("eps", "x0", "flow", "eps")) * 2
    for process, x, grid in (
        (EDM(), noise(16, 0), karras_grid(8, 0.01, 80.0)),
        (RectifiedFlow(), noise(16, 0, 1.0), linear_grid(8, RectifiedFlow())),
    ):
        model = mixture(process)
        assert torch.allclose(
            solve(model, x, grid, Scheduled(strategies)).x, solve(model, x, grid, "ddim").x, atol=1e-9
        )


def test_the_corrector_raises_the_order_and_costs_no_evaluation():
    model, x = mixture(), noise(64, 1, 2.0)
    exact = model.ode_map(x, 2.0, 0.05)
    slopes = []
    for corrector in (False, True):
        errors = []
        for n in (64, 128):
            grid = torch.linspace(2.0**0.25, 0.05**0.25, n + 1, dtype=torch.float64) ** 4
            found = solve(model, x, grid, Scheduled((Strategy(2, "eps", "sigma", corrector),) * n))
            assert found.nfe == n
            errors.append(float((found.x - exact).norm(dim=1).median()))
        slopes.append((math.log2(errors[0] / errors[1]), errors[1]))
    assert slopes[0][0] > 1.85
    assert slopes[1][1] < slopes[0][1]


def test_a_schedule_searched_with_five_evaluations_beats_every_uniform_solver_on_fresh_noise():
    model, n = mixture(), 5
    search, fresh = noise(96, 0), noise(256, 1)
    exact = {id(x): model.ode_map(x, 80.0, 0.0, 1e-8) for x in (search, fresh)}

    def error(grid: torch.Tensor, solver, x: torch.Tensor = search) -> float:
        return float((solve(model, x, grid, solver).x - exact[id(x)]).norm(dim=1).median())

    grids = [arcsinh_grid(n, 80.0, 0.3), karras_grid(n, 0.05, 80.0)]
    uniform = [Adams(order, path, "flow" if path == "flow" else "sigma") for order in (1, 2, 3) for path in PATHS]
    best = min(error(grid, solver, fresh) for grid in grids for solver in uniform)
    start = [(grid, Scheduled((Strategy(2, path, "flow"),) * n)) for grid in grids for path in PATHS]
    found = s3(error, start, np.random.default_rng(0), generations=20)
    assert list(found.history) == sorted(found.history, reverse=True)
    assert error(found.grid, found.solver, fresh) < 0.9 * best
    again = s3(error, start, np.random.default_rng(0), generations=1)
    assert again.history[0] == found.history[0]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="2 strategies for 3 steps"):
        Scheduled((Strategy(), Strategy())).plan(karras_grid(3, 0.1, 1.0), EDM())
    start = [(karras_grid(n, 0.1, 1.0), Scheduled((Strategy(),) * n)) for n in (2, 3)]
    with pytest.raises(ValueError, match="one length"):
        s3(lambda *_: 0.0, start, np.random.default_rng(0))
