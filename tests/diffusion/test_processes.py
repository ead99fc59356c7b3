"""Processes: their definitions computed another way, derivatives, inverses, and the law of their noise."""

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats  # type: ignore[import-untyped,unused-ignore]

from consilience.diffusion import (
    EDM,
    PFGMPP,
    VE,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    VPScaledLinear,
    VPTable,
)

torch.set_num_threads(1)

STABLE_DIFFUSION = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
VPS: list[Process] = [VPLinear(), VPScaledLinear(), VPCosine(), VPTable(STABLE_DIFFUSION)]
PROCESSES: list[Process] = [VE(), EDM(), PFGMPP(), *VPS, RectifiedFlow(), RectifiedFlow(3.0), TrigFlow()]


def name(process: Process) -> str:
    return type(process).__name__


def times(process: Process, count: int = 41) -> torch.Tensor:
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    return process.t_min + share * (process.t_max - process.t_min)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_derivatives_are_those_of_autograd(process: Process) -> None:
    t = (times(process)[:-1] + 1e-3 * process.t_min + 1e-4).requires_grad_(True)
    for value, slope in ((process.alpha, process.alpha_dot), (process.sigma, process.sigma_dot)):
        out = value(t)
        (found,) = torch.autograd.grad(out.sum() + 0 * t.sum(), t)
        torch.testing.assert_close(slope(t.detach()), found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
@settings(max_examples=60, deadline=None)
@given(log_ratio=st.floats(-9.0, 4.6))
def test_time_inverts_the_ratio(process: Process, log_ratio: float) -> None:
    """From sigma / alpha = 1e-4 to 100, past both ends of the range."""
    ratio = torch.tensor(math.exp(log_ratio), dtype=torch.float64)
    t = process.time(ratio)
    if isinstance(process, VPTable) and float(t) > process.t_max:
        return  # a table says nothing past its end
    torch.testing.assert_close(process.ratio(t), ratio, rtol=1e-9, atol=0)
    torch.testing.assert_close(process.sigma(t) / process.alpha(t), ratio, rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", PROCESSES, ids=name)
def test_the_time_without_noise_has_none(process: Process) -> None:
    end = process.time(torch.zeros((), dtype=torch.float64))
    assert float(process.sigma(end)) == 0
    assert float(process.alpha(end)) == 1
    t = torch.cat([end[None], times(process)])
    assert bool((process.ratio(t).diff() > 0).all())


@pytest.mark.parametrize("process", VPS, ids=name)
def test_variance_is_preserved(process: Process) -> None:
    t = times(process)
    torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("process", "beta"),
    [
        (VPLinear(), lambda t: 0.1 + t * 19.9),
        (VPLinear(0.3, 7.0), lambda t: 0.3 + t * 6.7),
        (VPScaledLinear(), lambda t: (math.sqrt(0.85) + t * (math.sqrt(12.0) - math.sqrt(0.85))) ** 2),
    ],
    ids=["linear", "gentle", "scaled-linear"],
)
def test_alpha_is_the_integral_of_beta(process: Process, beta: Any) -> None:
    for t in (0.01, 0.2, 0.5, 0.9, 1.0):
        expected = math.exp(-0.5 * integrate.quad(beta, 0, t, epsabs=1e-13)[0])
        assert float(process.alpha(torch.tensor(t, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12)


def test_the_cosine_schedule_is_nichol_and_dhariwals() -> None:
    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0.001, 0.1, 0.5, 0.9, 0.99):
        at = torch.tensor(t, dtype=torch.float64)
        assert float(VPCosine().alpha(at) ** 2) == pytest.approx(f(t) / f(0.0), rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_table_is_diffusers_at_its_timesteps(schedule: str) -> None:
    scheduler: Any = getattr(diffusers, "DDPMScheduler")(beta_schedule=schedule)  # noqa: B009
    process = VPTable(scheduler.alphas_cumprod)
    t = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2, scheduler.alphas_cumprod.double(), rtol=1e-10, atol=1e-12)
    x0, noise = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)).unbind()
    steps = torch.tensor([0, 3, 200, 500, 700, 998, 999])
    theirs = scheduler.add_noise(x0, noise, steps)
    torch.testing.assert_close(process.add_noise(x0, noise, steps.float()), theirs, rtol=1e-5, atol=1e-5)


def test_a_table_of_scaled_linear_betas_follows_the_continuous_schedule() -> None:
    t = torch.tensor([50.0, 300.0, 700.0, 950.0], dtype=torch.float64)
    found, expected = VPTable(STABLE_DIFFUSION).ratio(t), VPScaledLinear().ratio((t + 1) / 1000)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)  # beta is up to 0.012, its sum no integral


def test_a_table_that_ends_without_signal_stays_finite() -> None:
    table = torch.linspace(0.999, 0.0, 100)
    process = VPTable(table)
    assert math.isfinite(float(process.ratio(torch.tensor(99.0))))
    assert float(process.alpha(torch.tensor(98.0, dtype=torch.float64)) ** 2) == pytest.approx(
        float(table[98]), rel=1e-6
    )


def test_the_shift_of_a_flow_is_stable_diffusion_3s() -> None:
    """sigma_shifted = shift sigma / (1 + (shift - 1) sigma); shifts compose by multiplication; 1 - sigma is alpha."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = RectifiedFlow(3.0)
    torch.testing.assert_close(shifted.sigma(t), 3 * t / (1 + 2 * t))
    torch.testing.assert_close(shifted.alpha(t) + shifted.sigma(t), torch.ones_like(t))
    twice = RectifiedFlow(2.0).sigma(RectifiedFlow(1.5).sigma(t))
    torch.testing.assert_close(twice, shifted.sigma(t))
    assert math.isinf(float(shifted.ratio(t[-1])))
    assert float(shifted.time(torch.tensor(math.inf, dtype=torch.float64))) == 1


def test_trigflow_is_edm_divided_by_its_norm() -> None:
    """x = cos t (x0 + sigma_data tan t z), on the sphere of radius sigma_data for data of that deviation."""
    process, t = TrigFlow(0.7), torch.linspace(0.01, 1.5, 9, dtype=torch.float64)
    torch.testing.assert_close(process.ratio(t), 0.7 * torch.tan(t))
    marginal = process.alpha(t) ** 2 * 0.7**2 + process.sigma(t) ** 2
    torch.testing.assert_close(marginal, torch.full_like(t, 0.49))
    assert process.t_max == pytest.approx(math.atan(80 / 0.7))


@pytest.mark.parametrize("process", [p for p in PROCESSES if not isinstance(p, PFGMPP)], ids=name)
def test_the_marginal_variance_is_that_of_data_plus_noise(process: Process) -> None:
    """Sample variance of 40,000 normal values, within 5 standard errors at 3 times: false alarm 2e-6."""
    generator = torch.Generator().manual_seed(0)
    data = 1.7 * torch.randn(40_000, 1, dtype=torch.float64, generator=generator)
    for share in (0.2, 0.6, 1.0):
        t = torch.tensor(process.t_min + share * (process.t_max - process.t_min), dtype=torch.float64)
        x = process.add_noise(data, process.noise((40_000, 1), t, generator), t)
        expected = float(process.alpha(t) ** 2 * 1.7**2 + process.sigma(t) ** 2)
        assert abs(float(x.var()) - expected) < 5 * expected * math.sqrt(2 / 40_000)


def test_add_noise_takes_a_time_for_every_sample() -> None:
    process = VPLinear()
    x0, noise = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    one_by_one = [process.add_noise(x0[i : i + 1], noise[i : i + 1], t[i]) for i in range(3)]
    torch.testing.assert_close(process.add_noise(x0, noise, t), torch.cat(one_by_one))


@pytest.mark.parametrize(("dim", "extra_dim"), [(2, 1.0), (3, 16.0), (8, 128.0)])
def test_the_radius_of_pfgmpp_has_the_papers_law(dim: int, extra_dim: float) -> None:
    """R^2 / (R^2 + r^2), r = sigma sqrt(D), is Beta(N / 2, D / 2): Kolmogorov-Smirnov, false alarm 1e-4."""
    process = PFGMPP(dim=dim, extra_dim=extra_dim)
    noise = process.noise((20_000, dim), torch.tensor(3.0, dtype=torch.float64), torch.Generator().manual_seed(0))
    square = noise.square().sum(1).numpy()
    assert stats.kstest(square / (square + extra_dim), stats.beta(dim / 2, extra_dim / 2).cdf).pvalue > 1e-4
    unit = (noise / noise.norm(dim=1, keepdim=True)).numpy()
    spread = unit.mean(0) * math.sqrt(20_000 * dim)  # each about standard normal
    assert abs(spread).max() < 5


def test_pfgmpp_tends_to_normal_noise() -> None:
    """At D = 1e7 not told from normal by 20,000 values, at D = 4 told at once."""
    t = torch.tensor(1.0, dtype=torch.float64)
    far = PFGMPP(dim=2, extra_dim=1e7).noise((20_000, 2), t, torch.Generator().manual_seed(1))
    near = PFGMPP(dim=2, extra_dim=4.0).noise((20_000, 2), t, torch.Generator().manual_seed(1))
    assert stats.kstest(far[:, 0].numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(near[:, 0].numpy(), "norm").pvalue < 1e-10


def test_the_prior_has_the_processs_noise_at_t_max() -> None:
    one = EDM().prior((5, 2), torch.Generator().manual_seed(4), dtype=torch.float64)
    noise = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(one, 80 * noise)
    heavy = PFGMPP(dim=2, extra_dim=2.0).prior((5_000, 2), torch.Generator().manual_seed(4))
    assert float(heavy.norm(dim=1).max()) > 80 * 20  # D = 2: a tail that normal noise has not


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VE(1.0, 0.5), "sigma_min < sigma_max"),
        (lambda: VPLinear(5.0, 1.0), "beta_0 < beta_1"),
        (lambda: VPScaledLinear(0.0, 1.0), "beta_0 < beta_1"),
        (lambda: VPTable(torch.tensor([0.1, 0.9])), "one decreasing row"),
        (lambda: VPTable(torch.tensor([[0.9, 0.1]])), "one decreasing row"),
        (lambda: RectifiedFlow(0.0), "shift must be positive"),
        (lambda: PFGMPP(dim=0), "dim >= 1"),
        (lambda: PFGMPP(dim=3).noise((4, 2), torch.tensor(1.0)), "have not 3 dimensions"),
        (lambda: TrigFlow(-1.0), "sigma_data"),
        (lambda: VPCosine(offset=-0.1), "offset"),
    ],
)
def test_what_is_no_process_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
