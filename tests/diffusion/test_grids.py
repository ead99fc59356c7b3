"""Grids against the formulas they are named after."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.diffusion import (
    EDM,
    RectifiedFlow,
    TrigFlow,
    VPLinear,
    arcsinh_grid,
    exponential_grid,
    karras_grid,
    linear_grid,
    on_process,
)


def test_karras_grid_is_equation_5_term_by_term():
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    wanted = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    grid = karras_grid(n, low, high).tolist()
    assert grid[:-1] == pytest.approx(wanted, rel=1e-12)
    assert (grid[0], grid[-2], grid[-1]) == (80.0, 0.002, 0.0)


def test_karras_grid_with_large_rho_tends_to_the_exponential_grid():
    torch.testing.assert_close(karras_grid(9, 0.01, 50.0, rho=1e6), exponential_grid(9, 0.01, 50.0), rtol=1e-4, atol=0)


def test_exponential_grid_has_one_ratio():
    grid = exponential_grid(6, 0.1, 3.2)
    assert (grid[1:-1] / grid[:-2]).tolist() == pytest.approx([0.5] * 5)
    assert grid[-1] == 0


def test_arcsinh_grid_is_linear_below_its_scale_and_logarithmic_above():
    grid = arcsinh_grid(1000, 100.0, 0.2)
    gaps = grid[:-1] - grid[1:]
    assert float(gaps[-1] / gaps[-10]) == pytest.approx(1.0, abs=0.02)
    ratios = grid[:5] / grid[1:6]
    assert ratios.tolist() == pytest.approx([math.exp(math.asinh(500.0) / 1000)] * 5, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 100),
    low=st.floats(1e-3, 0.1),
    high=st.floats(0.5, 200.0),
    kind=st.sampled_from(["karras", "exponential", "arcsinh"]),
)
def test_grids_fall_strictly_from_exact_top_to_zero_on_every_process(n, low, high, kind):
    make = {
        "karras": lambda: karras_grid(n, low, high),
        "exponential": lambda: exponential_grid(n, low, high),
        "arcsinh": lambda: arcsinh_grid(n, high),
    }
    grid = make[kind]()
    assert len(grid) == n + 1
    assert grid[0] == high
    assert grid[-1] == 0
    for process in (EDM(), VPLinear(), RectifiedFlow(3.0), TrigFlow()):
        times = on_process(grid, process)
        assert bool((times[1:] < times[:-1]).all())
        torch.testing.assert_close(process.ratio(times), grid, rtol=1e-6, atol=1e-9)


def test_linear_grid_is_even_and_ends_where_no_noise_is_left():
    grid = linear_grid(4, RectifiedFlow())
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert linear_grid(3, RectifiedFlow(), t_min=0.2).tolist() == pytest.approx([1.0, 0.6, 0.2, 0.0])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: karras_grid(0, 0.1, 1.0),
        lambda: karras_grid(3, 1.0, 0.1),
        lambda: exponential_grid(3, 0.1, math.inf),
        lambda: arcsinh_grid(3, 1.0, 0.0),
        lambda: linear_grid(0, EDM()),
        lambda: linear_grid(3, RectifiedFlow(), t_min=2.0),
    ],
)
def test_impossible_grids_are_refused(wrong):
    with pytest.raises(ValueError, match=r"need|needs|must"):
        wrong()
