"""DC-Solver: its limit, its search and its regression, on guidance of a mixture whose guided model is exact."""

import numpy as np
import pytest
import torch

from consilience.diffusion import Denoiser, GaussianMixture, VPScaledLinear, linear_grid, solve
from consilience.diffusion.solvers.dc import DCSolver, Regression, fit
from consilience.diffusion.solvers.dpm import Multistep
from consilience.diffusion.solvers.unipc import UniPC

torch.set_num_threads(1)

PROCESS = VPScaledLinear()


def guided(scale: float) -> Denoiser:
    """Classifier-free guidance towards the first of four components, from the exact denoisers of both."""
    weights = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.2], [-0.9, 0.8], [-0.4, -1.1], [0.7, -0.9]], dtype=torch.float64)
    spread = torch.tensor([[0.04, 0.02], [0.03, 0.03], [0.06, 0.01], [0.02, 0.02]], dtype=torch.float64)
    everything = GaussianMixture(weights, means, torch.diag_embed(spread), PROCESS)
    wanted = GaussianMixture(torch.ones(1, dtype=torch.float64), means[:1], torch.diag_embed(spread[:1]), PROCESS)

    def function(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without = everything.x0(x, t)
        return without + scale * (wanted.x0(x, t) - without)

    return Denoiser(function, PROCESS)


def noise(count: int, seed: int) -> torch.Tensor:
    return PROCESS.prior((count, 2), torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("base", [UniPC(2), UniPC(3), UniPC(2, "bh1"), UniPC(3, corrector=False)], ids=repr)
def test_ratios_of_one_are_unipc(base: UniPC) -> None:
    grid = linear_grid(7, PROCESS, t_min=0.02)
    assert DCSolver((1.0,) * 7, base).plan(grid, PROCESS) == base.plan(grid, PROCESS)


@pytest.mark.parametrize("n", [5, 8, 10])
def test_on_noise_it_has_not_seen_it_beats_unipc_and_dpm_solver(n: int) -> None:
    model, grid = guided(7.5), linear_grid(n, PROCESS, t_min=0.02)
    solver = fit(model, noise(10, 0), grid)
    assert solver.ratios[:2] == (1.0, 1.0)
    x = noise(256, 1)
    fine = np.interp(np.linspace(0, n, 100 * n + 1), np.arange(n + 1), grid.numpy())
    exact = solve(model, x, torch.from_numpy(fine), "flow-ab3").x

    def error(method: object) -> float:
        return float((solve(model, x, grid, method).x - exact).square().mean())  # type: ignore[arg-type]

    assert error(solver) < 0.8 * min(error(UniPC(2)), error(UniPC(3)), error(Multistep(2)), error(Multistep(3)))
    assert solve(model, x, grid, solver).nfe == n


def test_a_ratio_minimises_the_distance_after_its_step() -> None:
    """Against a plain scan of the last ratio of four, all steps run anew from the start."""
    model, grid, x = guided(4.0), linear_grid(4, PROCESS, t_min=0.02), noise(10, 0)
    distances: list[float] = []
    solver = fit(model, x, grid, progress=lambda _i, _ratio, distance: distances.append(distance))
    fine = np.interp(np.linspace(0, 4, 401), np.arange(5), grid.numpy())
    exact = solve(model, x, torch.from_numpy(fine), "flow-ab2").x

    def distance(ratio: float) -> float:
        return float((solve(model, x, grid, DCSolver((*solver.ratios[:3], ratio))).x - exact).square().mean())

    assert distance(solver.ratios[3]) == pytest.approx(distances[3], rel=1e-9)
    assert distances[3] <= min(distance(ratio) for ratio in np.linspace(0, 2, 101)) * (1 + 1e-3)


def test_regression_recovers_ratios_of_its_own_form() -> None:
    def ratios(scale: float, steps: int) -> tuple[float, ...]:
        share = [(step + 1) / steps for step in range(steps)]
        rest = (1 + 0.3 * s - 0.2 * s**3 * scale / 10 + 0.1 * (scale / 10) ** 2 * (steps / 10) ** 2 for s in share[2:])
        return (1.0, 1.0, *rest)

    seen = [(scale, DCSolver(ratios(scale, n))) for scale in (1.5, 3.0, 5.0, 7.5) for n in (5, 7, 9, 12, 15)]
    for scale, n in ((4.0, 8), (6.0, 10)):
        assert Regression.of(seen).predict(scale, n).ratios == pytest.approx(ratios(scale, n), abs=1e-4)


def test_regression_helps_at_a_count_it_was_not_fitted_on() -> None:
    fitted = [(7.5, fit(guided(7.5), noise(10, 0), linear_grid(n, PROCESS, t_min=0.02), substeps=40)) for n in (5, 7)]
    solver = Regression.of(fitted).predict(7.5, 6)
    model, grid, x = guided(7.5), linear_grid(6, PROCESS, t_min=0.02), noise(128, 1)
    exact = solve(model, x, 600, "flow-ab3").x
    errors = [float((solve(model, x, grid, s).x - exact).square().mean()) for s in (solver, UniPC(2))]
    assert errors[0] < errors[1]


def test_what_cannot_be_fitted_or_run_is_refused() -> None:
    model, grid = guided(2.0), linear_grid(4, PROCESS)
    with pytest.raises(ValueError, match="ratios are for 3 steps, the grid has 4"):
        DCSolver((1.0,) * 3).plan(grid, PROCESS)
    with pytest.raises(ValueError, match="remembers"):
        fit(Denoiser(model.function, PROCESS, fresh=lambda: model.function), noise(2, 0), grid)
    with pytest.raises(ValueError, match="must hold 1"):
        fit(model, noise(2, 0), grid, bounds=(0.0, 0.9))
    with pytest.raises(ValueError, match="needs solvers"):
        Regression.of([])
