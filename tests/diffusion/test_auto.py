"""`auto`: the counts it spends, the grids it keeps, its accuracy on data it was not fitted on, its own file."""

import itertools
import json
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
from scipy.special import gamma

from consilience.diffusion import (
    EDM,
    Denoiser,
    GaussianMixture,
    RectifiedFlow,
    VPLinear,
    exponential_grid,
    karras_grid,
    on_process,
    solve,
)
from consilience.diffusion.solvers import auto
from consilience.diffusion.solvers.multistep import Adams, Soft

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def mixture():
    """Four Gaussians in three dimensions, none of those that `auto` was fitted on."""
    generator = torch.Generator().manual_seed(11)
    factors = 0.1 * torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    means = 0.6 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    covariances = factors @ factors.transpose(1, 2) + 0.003 * torch.eye(3, dtype=torch.float64)
    return GaussianMixture(torch.full((4,), 0.25, dtype=torch.float64), means, covariances)


def error(model, x, exact, steps, method="auto"):
    return float((solve(model, x, steps, method).x - exact).norm(dim=1).median())


@pytest.mark.parametrize("process", [EDM(), VPLinear(), RectifiedFlow()], ids=["edm", "vp", "flow"])
def test_auto_is_several_times_as_accurate_as_named_methods_at_equal_evaluations(mixture, process):
    model = mixture.on(process)
    x = process.prior((32, 3), torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = model.ode_map(x, process.t_max, float(process.time(torch.zeros((), dtype=torch.float64))), 1e-8, 1e-10)
    for count in (5, 9, 17):
        best = min(error(model, x, exact, count, name) for name in ("flow-ab3", "expab2", "unipc2", "deis3"))
        assert error(model, x, exact, count) < 0.5 * best, count


def test_more_evaluations_leave_less_error(mixture):
    model, x = (
        mixture.on(EDM()),
        80 * torch.randn(48, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
    )
    exact = model.ode_map(x, 80.0, 0.0, 1e-9, 1e-11)
    found = [error(model, x, exact, count) for count in (2, 4, 8, 16, 33)]
    assert all(more < 0.7 * less for less, more in itertools.pairwise(found)), found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 11, 13, 33, 34, 50, 64, 100])
def test_a_count_is_spent_exactly_and_the_reason_names_the_fit(mixture, count):
    calls = []
    model = mixture.on(EDM())
    object.__setattr__(model, "function", lambda x, t, inner=model.function: calls.append(float(t)) or inner(x, t))
    solution = solve(model, 80 * torch.ones(1, 3, dtype=torch.float64), count)
    assert solution.nfe == len(calls) == count
    assert len(solution.grid) == count + 1
    assert str(count) in solution.why


def test_a_grid_is_kept_and_its_steps_bound_the_order(mixture):
    model, x = mixture.on(EDM()), torch.full((1, 3), 20.0, dtype=torch.float64)
    for steps, order in ((1, 1), (2, 1), (3, 2), (5, 2), (6, 3), (23, 3), (24, 4)):
        grid = on_process(karras_grid(steps, 0.01, 20.0), EDM())
        solution = solve(model, x, grid)
        assert torch.equal(solution.grid, grid)
        assert solution.nfe == steps
        assert solution.method == f"soft-ab{order}"
        assert f"order {order}" in solution.why


@pytest.mark.parametrize("start", [None, auto.EDM_START], ids=["any start", "from 80"])
def test_corrections_of_a_step_sum_to_zero_so_that_a_constant_slope_is_exact(start):
    assert auto.fits(start)
    for count, fit in auto.fits(start).items():
        assert len(fit["corrections"]) == count
        for i, row in enumerate(fit["corrections"]):
            assert len(row) <= i + 1
            assert abs(sum(row)) < 1e-9
        assert len(fit["at"]) == count - 1
        assert np.all(np.diff([0.0, *fit["at"], 1.0]) > 0)


def test_without_corrections_a_fit_is_adams_bashforth():
    grid = on_process(karras_grid(6, 0.01, 20.0), EDM())
    variable = Soft(0.05, 5.0)
    plain = Adams(3, "flow", variable).plan(grid, EDM())
    fitted = auto.Fitted(3, variable, ((0.0,),) * 6).plan(grid, EDM())
    for one, other in zip(plain.stages, fitted.stages, strict=True):
        assert one.keep == other.keep
        np.testing.assert_allclose(one.weights, other.weights, rtol=1e-13)


def test_the_last_part_of_a_grid_takes_the_last_corrections():
    fitted = auto.Fitted(2, Soft(0.05, 5.0), ((0.0,), (0.1, -0.1), (0.2, -0.2), (0.3, -0.3)))
    grid = on_process(karras_grid(4, 0.01, 20.0), EDM())
    plain = Adams(2, "flow", Soft(0.05, 5.0)).plan(grid[1:], EDM())
    found = fitted.plan(grid[1:], EDM())
    time = grid / (1 + grid)
    assert found.stages[0].weights == pytest.approx(plain.stages[0].weights)  # no slope before it to correct with
    for i, extra in ((1, 0.2), (2, 0.3)):
        step = float((1 + grid[i + 2]) * (time[i + 2] - time[i + 1]))
        wanted = np.array(plain.stages[i].weights) + step * np.array([extra, -extra])
        np.testing.assert_allclose(found.stages[i].weights, wanted, rtol=1e-12)


@pytest.mark.parametrize("top", [14.6, 80.0, math.inf])
def test_the_fitted_grid_runs_from_the_start_to_zero(top):
    for count in (1, 2, 9, 40):
        grid = auto.grid_of(auto.nearest(count)[0], count, top)
        assert grid[0] == top
        assert grid[-1] == 0
        assert bool((grid[1:] < grid[:-1]).all())


def test_the_soft_logarithm_and_its_inverse_at_both_ends():
    soft = Soft(0.03, 9.0)
    ratio = np.array([0.0, 1e-3, 0.5, 80.0, np.inf])
    assert soft.value(ratio)[0] == pytest.approx(math.log(0.03))
    assert soft.value(ratio)[-1] == pytest.approx(math.log(9.0))
    np.testing.assert_allclose(soft.ratio(soft.value(ratio[1:4])), ratio[1:4], rtol=1e-10)
    step = 1e-6
    slope = (soft.ratio(soft.value(ratio[1:4]) + step) - soft.ratio(soft.value(ratio[1:4]) - step)) / (2 * step)
    np.testing.assert_allclose(soft.slope(ratio[1:4]), slope, rtol=1e-6)
    with pytest.raises(ValueError, match="low < high"):
        Soft(2.0, 1.0)


def test_the_file_of_fits_is_plain_json():
    text = files("consilience.diffusion.solvers").joinpath("auto.json").read_text(encoding="utf-8")
    assert {"2", "5", "9", "17", "33"} <= set(json.loads(text))


def test_a_fit_for_the_start_of_edm_serves_starts_near_it_alone():
    for top in (40.0, 80.0, 157.0):
        assert auto.nearest(33, top) == (auto.fits(80.0)[33], 33)
    for top in (14.6, 39.0, 161.0, math.inf):
        assert auto.nearest(33, top) == (auto.fits()[33], 33)
    assert auto.nearest(9, 80.0) == (auto.fits()[9], 9)  # no fit for 80 alone at this count
    assert "80 alone" in auto.choose(EDM(), 33, 80.0, 0.002).why
    assert "alone" not in auto.choose(RectifiedFlow(), 33, math.inf, 0.002).why


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.03, 0.1, 0.3])
def test_a_prediction_that_keeps_changing_on_the_scale_of_log_sigma_is_followed(rate, scale):
    """Networks told log sigma do so. The integral of sin(rate log sigma) exp(-sigma / scale) is a gamma function.

    The bound is what a run that ends at EDM's smallest sigma, .002, may lose, as the prediction is at most 1.
    """

    def wave(_x, t):
        return (torch.sin(rate * torch.log(t)) * torch.exp(-t / scale)).expand(1, 1)

    power = 1 + 1j * rate
    integral = float((scale**power * gamma(power)).imag)
    model, x = Denoiser(wave, EDM(), "eps"), torch.full((1, 1), integral, dtype=torch.float64)
    assert abs(float(solve(model, x, exponential_grid(1000, 1e-6, 80.0), "ab4").x)) < 1e-5
    assert abs(float(solve(model, x, 33).x)) < 0.002
