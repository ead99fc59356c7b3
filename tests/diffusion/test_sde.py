"""Stochastic samplers, teleportation and Brownian noise, against what is known of a Gaussian mixture."""

import itertools
import math

import pytest
import torch

from consilience.diffusion import (
    EDM,
    GaussianMixture,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPScaledLinear,
    arcsinh_grid,
    karras_grid,
    linear_grid,
    on_process,
    solve,
)
from consilience.diffusion.noise import brownian
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.sde import SDEDPM, Ancestral, Churn, Interval, Restart
from consilience.diffusion.teleport import teleport

from .linear import propagate

torch.set_num_threads(1)
PROCESSES = [EDM(), VPScaledLinear(), RectifiedFlow(), RectifiedFlow(3.0), TrigFlow()]


def ids(process: Process) -> str:
    return repr(process)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(process: Process, std: float = 0.5, dim: int = 1) -> GaussianMixture:
    return GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, dim, dtype=torch.float64),
        std**2 * torch.eye(dim, dtype=torch.float64)[None],
        process,
    )


def two(process: Process) -> GaussianMixture:
    means = torch.tensor([[1.0, 0.3], [-0.8, -0.4]], dtype=torch.float64)
    covariances = torch.diag_embed(torch.tensor([[0.04, 0.09], [0.16, 0.01]], dtype=torch.float64))
    return GaussianMixture(torch.tensor([0.3, 0.7], dtype=torch.float64), means, covariances, process)


def fine(process: Process, n: int) -> torch.Tensor:
    top = float(process.ratio(torch.tensor(process.t_max, dtype=torch.float64)))
    return linear_grid(n, process) if math.isinf(top) else on_process(arcsinh_grid(n, top, 0.3), process)


def start(process: Process, count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return process.prior((count, dim), seeded(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_without_noise_every_one_of_them_is_its_ode_solver(process):
    model, x, grid = two(process), start(process, 64, 2), fine(process, 12)
    ddim = solve(model, x, grid, "ddim").x
    assert torch.allclose(solve(model, x, grid, Ancestral(0.0)).x, ddim, atol=1e-10)
    assert torch.allclose(solve(model, x, grid, SDEDPM(1, 0.0)).x, ddim, atol=1e-10)
    assert torch.allclose(
        solve(model, x, grid[1:], SDEDPM(2, 0.0)).x, solve(model, x, grid[1:], Adams(2, "x0", "lambda")).x, atol=1e-8
    )
    if not math.isinf(float(process.ratio(grid[0]))):
        base = Adams(3, "eps", "sigma")
        assert torch.equal(
            solve(model, x, grid, Restart((Interval(times=0),), solver=base)).x,
            solve(model, x, grid, base).x,
        )


def test_churn_without_churning_is_heun_written_out():
    process = EDM()
    model, grid = two(process), karras_grid(10, 0.01, 80.0)
    x = state = start(process, 32, 2)
    for t, s in itertools.pairwise(grid):
        slope = (state - model.x0(state, t)) / t
        euler = state + (s - t) * slope
        state = euler if s == 0 else state + (s - t) * (slope + (euler - model.x0(euler, s)) / s) / 2
    solution = solve(model, x, grid, Churn(churn=0.0))
    assert torch.allclose(solution.x, state, atol=1e-10)
    assert solution.nfe == 19


def test_sde_dpm_solver_of_order_one_is_its_published_update():
    process = VPScaledLinear()
    grid = torch.tensor([0.8, 0.5], dtype=torch.float64)
    model, x = two(process), torch.randn(5, 2, dtype=torch.float64, generator=seeded())
    z = torch.randn(5, 2, dtype=torch.float64, generator=seeded(1))
    t, s = grid
    h = torch.log(process.alpha(s) / process.sigma(s)) - torch.log(process.alpha(t) / process.sigma(t))
    expected = (
        process.sigma(s) / process.sigma(t) * torch.exp(-h) * x
        + process.alpha(s) * (1 - torch.exp(-2 * h)) * model.x0(x, t)
        + process.sigma(s) * torch.sqrt(1 - torch.exp(-2 * h)) * z
    )
    found = solve(model, x, grid, SDEDPM(1, 1.0), noise=lambda *_: z).x
    assert torch.allclose(found, expected, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("solver", [Ancestral(1.0), Ancestral(0.5), SDEDPM(1), SDEDPM(2), SDEDPM(3)], ids=repr)
def test_the_marginal_variance_is_kept_on_a_fine_grid(process, solver):
    """Gaussian data: the coefficients alone give the variance of the sample, with no sampling noise at all.

    The error is one of discretisation: small at 200 steps, and about half of that at 100 or less.
    """
    std = 0.5
    model, found = gaussian(process, std), []
    for n in (100, 200):
        grid = fine(process, n)
        found.append(propagate(model, solver.plan(grid, process), process, float(grid[0]), std))
    coarse, finer = (abs(variance / std**2 - 1) for variance in found)
    assert finer < 0.1
    assert finer < max(0.62 * coarse, 0.005)


def test_few_ancestral_steps_lose_the_variance_that_the_literature_reports():
    """DDPM with 20 even steps on a unit-variance Gaussian of standard deviation 1 under VP: clearly too narrow."""
    process = VPScaledLinear()
    plan = Ancestral(1.0).plan(linear_grid(20, process), process)
    assert propagate(gaussian(process, 1.0), plan, process, process.t_max, 1.0) < 0.95


@pytest.mark.parametrize(
    "solver",
    [Ancestral(), SDEDPM(2), Churn(), Restart((Interval(0.05, 0.5, 2, 8), Interval(1.0, 4.0, 1, 4)))],
    ids=repr,
)
def test_samples_have_the_data_s_law(solver):
    """Share of the components and their moments, 6000 samples; 5 standard errors, false alarms below 1e-5."""
    process, count = EDM(), 6000
    model = two(process)
    x = solve(model, start(process, count, 2), arcsinh_grid(80, 80.0, 0.1), solver, generator=seeded(1)).x
    share = float(model.responsibilities(x, 0.0)[:, 0].mean())
    assert share == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / count))
    spread = torch.cov(x.T)
    for i in range(2):
        error = 5 * math.sqrt(2 / count) * float(model.covariance[i, i]) + 0.01 * float(model.covariance[i, i])
        assert float(spread[i, i]) == pytest.approx(float(model.covariance[i, i]), abs=error)


def test_restart_contracts_an_error_that_the_ode_keeps():
    """A state displaced at low noise: restarting forgets part of the displacement, the ODE alone keeps it."""
    process = EDM()
    model, grid = gaussian(process, 0.5, 1), arcsinh_grid(60, 1.0, 0.1)
    x = torch.full((4000, 1), 1.5, dtype=torch.float64)
    plain = solve(model, x, grid, "ab2").x.mean()
    again = solve(model, x, grid, Restart((Interval(0.1, 0.8, 4, 20),), 1.0), generator=seeded()).x.mean()
    assert abs(float(again)) < 0.5 * abs(float(plain))


def test_restarts_from_the_same_time_are_all_made():
    grid, process = karras_grid(12, 0.01, 80.0), EDM()
    first, second = Interval(0.1, 0.5, 1, 3), Interval(0.11, 0.8, 2, 4)
    both = Restart((first, second)).plan(grid, process)
    assert both.evaluations == 12 + 1 * 3 + 2 * 4
    tops = [stage.end for stage in both.stages if stage.t is None]
    assert tops == pytest.approx([0.5, 0.8, 0.8])


# -------------------------------------------------------------------------------------------------- Brownian noise


def test_brownian_increments_add_up_and_have_unit_variance():
    process = EDM()
    x = torch.zeros(20_000, dtype=torch.float64)
    noise = brownian(process, x, seed=3)
    whole, first, second = noise(x, 10.0, 1.0), noise(x, 10.0, 3.0), noise(x, 3.0, 1.0)
    clock = [math.atan(10.0), math.atan(3.0), math.atan(1.0)]
    parts = first * math.sqrt(clock[0] - clock[1]) + second * math.sqrt(clock[1] - clock[2])
    assert torch.allclose(whole * math.sqrt(clock[0] - clock[2]), parts, atol=1e-8)
    assert float(whole.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / 20_000))
    assert torch.equal(noise(x, 1.0, 10.0), -whole)


def test_one_brownian_path_makes_step_counts_agree():
    """The distance between 100 and 200 steps is smaller on one path than between two paths."""
    process = EDM()
    model, x = two(process), start(process, 256, 2)

    def run(n: int, seed: int) -> torch.Tensor:
        grid = arcsinh_grid(n, 80.0, 0.2)
        return solve(model, x, grid, SDEDPM(2, 0.5), noise=brownian(process, x, seed)).x

    coarse, finer, other = run(100, 1), run(200, 1), run(200, 2)
    assert (coarse - finer).norm(dim=1).median() < 0.3 * (coarse - other).norm(dim=1).median()


# -------------------------------------------------------------------------------------------------- teleportation


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_teleportation_of_gaussian_data_is_exact(process):
    generator = seeded(4)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator) * 0.4
    mean, covariance = torch.randn(3, dtype=torch.float64, generator=generator), root @ root.T
    model = GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], covariance[None], process)
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    x = start(process, 16, 3)
    exact = model.ode_map(x, process.t_max, end)
    assert torch.allclose(teleport(x, process, process.t_max, end, mean, covariance), exact, atol=1e-6)


def test_teleportation_saves_the_first_steps_of_a_mixture():
    process, n = EDM(), 12
    model, x = two(process), start(process, 256, 2)
    exact = model.ode_map(x, 80.0, 0.0)
    plain = solve(model, x, karras_grid(n, 0.01, 80.0), "ab2").x
    skipped = teleport(x, process, 80.0, 4.0, model.mean, model.covariance)
    ours = solve(model, skipped, karras_grid(n, 0.01, 4.0), "ab2").x
    assert (ours - exact).norm(dim=1).median() < 0.5 * (plain - exact).norm(dim=1).median()


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="eta"):
        Ancestral(1.5)
    with pytest.raises(ValueError, match="orders 1 to 3"):
        SDEDPM(4)
    with pytest.raises(ValueError, match="low < high"):
        Interval(0.5, 0.1)
    with pytest.raises(ValueError, match="no place"):
        Restart((Interval(0.01, 0.02),)).plan(karras_grid(4, 0.1, 1.0), EDM())
    with pytest.raises(ValueError, match="mean"):
        teleport(torch.zeros(2, 3), EDM(), 80.0, 1.0, torch.zeros(2), torch.eye(2))
