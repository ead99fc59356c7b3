"""`solve` by law: exact maps of one Gaussian, known identities, orders, counts, and no NaN anywhere."""

import math
import warnings

import pytest
import torch

from consilience.diffusion import (
    EDM,
    METHODS,
    VE,
    Denoiser,
    GaussianMixture,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    VPScaledLinear,
    VPTable,
    arcsinh_grid,
    exponential_grid,
    karras_grid,
    linear_grid,
    on_process,
    solve,
)
from consilience.diffusion.solvers.multistep import Adams

torch.set_num_threads(1)
TABLE = torch.cumprod(1 - torch.linspace(0.0292, 0.1095, 1000, dtype=torch.float64) ** 2, 0)
PROCESSES = [
    EDM(), VE(), VPLinear(), VPScaledLinear(), VPCosine(), VPTable(TABLE), RectifiedFlow(), RectifiedFlow(3.0),
    TrigFlow(),
]  # fmt: skip


def gaussian(mean=0.4, deviation=0.3):
    weights, means = torch.ones(1, dtype=torch.float64), torch.full((1, 2), mean, dtype=torch.float64)
    return GaussianMixture(weights, means, deviation**2 * torch.eye(2, dtype=torch.float64)[None])


def two():
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    means = torch.tensor([[0.8, 0.1], [-0.7, 0.5]], dtype=torch.float64)
    spreads = torch.tensor([0.04, 0.09], dtype=torch.float64)
    return GaussianMixture(weights, means, spreads[:, None, None] * torch.eye(2, dtype=torch.float64))


def noise(count, seed=0):
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda one: type(one).__name__)
def test_one_gaussian_is_mapped_as_the_closed_form_says(process):
    mean, deviation = 0.4, 0.3
    t = torch.tensor(process.t_max, dtype=torch.float64)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = sigma * noise(16)
    exact = mean + (x - alpha * mean) * deviation / math.hypot(alpha * deviation, sigma)
    found = solve(gaussian(mean, deviation).on(process), x, 60)
    assert float((found.x - exact).abs().max()) < 3e-4


def test_ddim_is_euler_in_sigma_and_the_exponential_integrator_of_order_1():
    for process in (EDM(), VPLinear(), VPScaledLinear()):
        model, x = two().on(process), noise(8)
        grid = on_process(karras_grid(12, 0.01, 10.0), process)
        found = [solve(model, x, grid, name).x for name in ("ddim", "euler", "expab1")]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "ab3", "expab3", "flow-ab3", "ddim", "dpmpp-2m", "unipc2"])
def test_the_sample_does_not_depend_on_the_process_the_same_data_are_seen_through(method):
    sigmas = karras_grid(10, 0.01, 10.0)
    found = []
    for process in (EDM(), VPLinear(), RectifiedFlow(), TrigFlow()):
        grid = on_process(sigmas, process)
        state = process.alpha(grid[0]) * (noise(8) * 10)
        found.append(solve(two().on(process), state, grid, method).x)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("path", ["eps", "x0", "flow", "v"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_observed_order_of_adams_is_the_nominal_one(order, path):
    model, x = two().on(EDM()), noise(16) * 80
    variable = {"eps": "sigma", "x0": "lambda", "flow": "flow", "v": "angle"}[path]
    exact = model.ode_map(x, 80.0, 0.002, 1e-12, 1e-14)
    errors = []
    for steps in (128, 256):
        grid = on_process(karras_grid(steps + 1, 0.002, 80.0)[:-1], EDM())
        errors.append(float((solve(model, x, grid, Adams(order, path, variable)).x - exact).norm(dim=1).median()))
    assert math.log2(errors[0] / errors[1]) > order - 0.15


@pytest.mark.parametrize("name", [*METHODS, "auto"])
def test_no_sample_is_nan_on_any_process_grid_and_number_of_steps(name):
    model = two()
    for process in (EDM(), VPLinear(), RectifiedFlow()):
        here = model.on(process)
        x = process.prior((1, 2), torch.Generator().manual_seed(0))  # float32, as networks run
        here = GaussianMixture(model.weights.float(), model.means.float(), model.covariances.float(), process)
        top = min(float(process.ratio(torch.tensor(process.t_max, dtype=torch.float64))), 500.0)
        for n in (1, 2, 3, 5, 13):
            made = [karras_grid(n, 0.01, top), exponential_grid(n, 0.01, top), arcsinh_grid(n, top)]
            for grid in [*(on_process(sigmas, process) for sigmas in made), linear_grid(n, process)]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    found = solve(here, x, grid, name)
                assert bool(torch.isfinite(found.x).all()), (process, n)
                assert torch.equal(found.grid, grid)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "auto"])
def test_no_sample_is_nan_for_any_count_from_1_to_100_on_any_process(name):
    model, least = two(), 2 if name in ("heun", "flow-heun", "flow-midpoint") else 4 if name == "flow-rk4" else 1
    for process in PROCESSES:
        here = model.on(process)
        x = process.prior((1, 2), torch.Generator().manual_seed(0), dtype=torch.float64)
        for n in range(least, 101):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                found = solve(here, x, n, name)
            assert bool(torch.isfinite(found.x).all()), (process, n)
            assert found.nfe <= n


def test_the_evaluations_that_a_solution_reports_are_the_calls_that_were_made():
    calls = []
    inner = two()
    model = Denoiser(
        lambda x, t: calls.append(float(t)) or inner.x0(x, t), EDM(), "x0", cost=lambda t: 2 if t > 1 else 1
    )
    solution = solve(model, 80 * noise(2), 7, "ab3")
    assert len(calls) == 7
    assert solution.nfe == sum(2 if t > 1 else 1 for t in calls)


def test_orders_that_the_steps_cannot_carry_are_capped_with_a_warning():
    model, x = two().on(EDM()), 80 * noise(2)
    with pytest.warns(UserWarning, match="2 steps cannot carry order 4, order 2 was used"):
        capped = solve(model, x, 2, "ab4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(solve(model, x, 2, "ab2").x, capped.x)
        solve(model, x, 4, "ab4")
        solve(model, x, 7, "flow-rk4")


@pytest.mark.parametrize(("name", "few", "enough"), [("heun", 2, 3), ("flow-heun", 2, 3), ("flow-rk4", 4, 7)])
def test_evaluations_that_carry_no_whole_step_are_said(name, few, enough):
    """They are Euler's method, or one step of the rule for the last step, and were that without a word."""
    model, x = two().on(EDM()), 80 * noise(2)
    for n in range(METHODS[name].evaluations_per_step - METHODS[name].evaluations_saved, few + 1):
        with pytest.warns(UserWarning, match=f"{name}: no step here takes its .* at a lower order"):
            found = solve(model, x, n, name)
        if name == "heun":
            torch.testing.assert_close(found.x, solve(model, x, 1, "euler").x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(model, x, enough, name)
        solve(model, x, 2, "flow-midpoint")  # its last step is like the others
    noise_alone = two().on(RectifiedFlow())
    if name == "heun":  # leaves pure noise by one evaluation
        with pytest.warns(UserWarning, match="the first from pure noise"):
            assert solve(noise_alone, noise(2), 4, name).nfe == 2


def test_the_trajectory_ends_in_the_sample_and_every_step_is_told():
    told = []
    solution = solve(two().on(EDM()), 80 * noise(2), 5, trajectory=True, on_step=lambda *step: told.append(step[:2]))
    assert torch.equal(solution.states[-1], solution.x)
    assert told == [(i, 5) for i in range(1, 6)]


def test_conditions_reach_the_model():
    def shifted(x, t, by=0.0):
        return torch.full_like(x, by)

    model = Denoiser(shifted, EDM(), "x0")
    assert torch.allclose(solve(model, 80 * noise(2), 3, "ddim", by=2.5).x, torch.tensor(2.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("steps", "method", "message"),
    [
        (0, "auto", "at least 1"),
        (True, "auto", "at least 1"),
        (2.5, "auto", "at least 1"),
        (3, "nonsense", "no method 'nonsense'"),
        (torch.tensor([1.0, 2.0]), "auto", "strictly decreasing"),
        (torch.tensor([1.0]), "auto", "strictly decreasing"),
        (torch.tensor([1.0, -1.0]), "auto", "no noise is left"),
    ],
)
def test_impossible_steps_and_methods_are_refused(steps, method, message):
    with pytest.raises(ValueError, match=message):
        solve(two().on(EDM()), noise(1), steps, method)
