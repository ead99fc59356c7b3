"""Density guidance: the log-density along the way is the one asked for, on exact mixtures."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow, VPLinear, solve
from consilience.diffusion.guidance import density_guidance, divergence, interval, quantile_guidance, score_alignment

torch.set_num_threads(1)
RANGES = [(EDM(), 3.0, 0.3), (VPLinear(), 0.8, 0.2), (RectifiedFlow(), 0.9, 0.3)]


def mixture(process: Process, dim: int = 2) -> GaussianMixture:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    roots = 0.4 * torch.randn(3, dim, dim, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.transpose(1, 2) + 0.05 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances, process)


def states(model: GaussianMixture, t: float, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    at = torch.tensor(t, dtype=torch.float64)
    x0 = model.sample(count, generator)
    return model.process.add_noise(x0, model.process.noise(tuple(x0.shape), at, generator), at)


def laplacian(model: GaussianMixture, x: Tensor, t: float) -> Tensor:
    total = torch.zeros(len(x), dtype=x.dtype)
    for i in range(x.shape[1]):
        direction = torch.zeros_like(x)
        direction[:, i] = 1e-5
        total += (model.score(x + direction, t) - model.score(x - direction, t))[:, i] / 2e-5
    return total


def log_density_rate(model: GaussianMixture, velocity: Tensor, x: Tensor, t: float) -> Tensor:
    """d log p_t(x_t) / dt for x moving at ``velocity``, by central differences of the exact log-density."""
    h = 1e-5
    return (model.log_density(x + h * velocity, t + h) - model.log_density(x - h * velocity, t - h)) / (2 * h)


@pytest.mark.parametrize(("process", "high", "low"), RANGES, ids=lambda value: str(value))
def test_the_divergence_is_minus_the_natural_rate(process: Process, high: float, low: float) -> None:
    model = mixture(process)
    for t in (low, (low + high) / 2, high):
        x = states(model, t)
        found = log_density_rate(model, model.velocity(x, t), x, t)
        torch.testing.assert_close(divergence(model, x, t), -found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("process", "high", "low"), RANGES, ids=lambda value: str(value))
def test_the_log_density_at_the_end_is_that_at_the_start_and_the_integral_of_the_rate(
    process: Process, high: float, low: float
) -> None:
    model = mixture(process)
    slower = 0.8

    def rate(x: Tensor, t: Tensor) -> Tensor:
        return -slower * divergence(model, x, t) - 0.1 * torch.cos(3 * t) * x[:, 0].tanh()

    guided = density_guidance(model, rate)
    x, integral, steps = states(model, high), torch.zeros(5, dtype=torch.float64), 40
    start, h = model.log_density(x, high), (low - high) / steps
    for i in range(steps):  # Runge-Kutta 4 on (x, integral)
        t = high + i * h
        slopes, total = [], torch.zeros_like(integral)
        for shift, share in ((0.0, 1), (0.5, 2), (0.5, 2), (1.0, 1)):
            at = t + shift * h
            y = x + shift * h * slopes[-1] if slopes else x
            slopes.append(guided.velocity(y, at))
            total += share * rate(y, torch.tensor(at, dtype=torch.float64)) / 6
        x = x + h * (slopes[0] + 2 * slopes[1] + 2 * slopes[2] + slopes[3]) / 6
        integral = integral + h * total
    torch.testing.assert_close(model.log_density(x, low), start + integral, rtol=0, atol=1e-5)
    natural = model.ode_map(states(model, high), high, low)
    assert (model.log_density(natural, low) - model.log_density(x, low)).abs().min() > 1e-2


@pytest.mark.parametrize(("process", "high", "low"), RANGES, ids=lambda value: str(value))
def test_the_natural_rate_changes_nothing(process: Process, high: float, low: float) -> None:
    model = mixture(process)
    guided = density_guidance(model, lambda x, t: -divergence(model, x, t))
    x = states(model, high)
    torch.testing.assert_close(guided.velocity(x, high), model.velocity(x, high), rtol=1e-12, atol=1e-12)
    assert quantile_guidance(model, 0.5) is model


@pytest.mark.parametrize(("process", "high", "low"), RANGES, ids=lambda value: str(value))
@pytest.mark.parametrize("quantile", [0.2, 0.9])
def test_a_quantile_scales_the_score_and_shifts_the_rate_by_its_share(
    process: Process, high: float, low: float, quantile: float
) -> None:
    model, dim, z = mixture(process, 6), 6, stats.norm.ppf(quantile)
    guided = quantile_guidance(model, quantile)
    for time in (low, high):
        x, t = states(model, time), torch.tensor(time, dtype=torch.float64)
        alpha, sigma = process.alpha(t), process.sigma(t)
        drift = process.alpha_dot(t) / alpha
        half_g2 = sigma * process.sigma_dot(t) - drift * sigma**2
        score = model.score(x, t)
        eta = 1 + math.sqrt(2 * dim) * z / (sigma * score).square().sum(1, keepdim=True)
        velocity = guided.velocity(x, t)
        torch.testing.assert_close(velocity, drift * x - half_g2 * eta * score, rtol=1e-9, atol=1e-9)
        want = -divergence(model, x, t) - half_g2 * math.sqrt(2 * dim) * z / sigma**2
        torch.testing.assert_close(log_density_rate(model, velocity, x, time), want, rtol=1e-5, atol=1e-5)


def test_the_quantity_behind_the_quantile_is_standard_normal_in_high_dimension() -> None:
    dim, count = 200, 600
    model = GaussianMixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        torch.stack([torch.ones(dim, dtype=torch.float64), -torch.ones(dim, dtype=torch.float64)]),
        1e-6 * torch.eye(dim, dtype=torch.float64).expand(2, dim, dim),
        EDM(),
    )
    x, sigma = states(model, 0.5, count), 0.5
    score = model.score(x, sigma)
    shape = sigma**2 * (score.square().sum(1) - dim / (sigma**2 + 1e-6)) / math.sqrt(2 * dim)
    torch.testing.assert_close(laplacian(model, x[:1], sigma), torch.tensor([-dim / (sigma**2 + 1e-6)]).double())
    # skewness sqrt(8 / dim) = 0.2 is below what 600 draws show; false alarm 1e-3 under normality
    assert stats.kstest(shape.numpy(), "norm").pvalue > 1e-3


def test_higher_quantiles_give_denser_samples_above_the_scale_of_the_data() -> None:
    dim, generator = 128, torch.Generator().manual_seed(3)
    means = torch.randn(3, dim, generator=generator, dtype=torch.float64)
    covariances = 0.04 * torch.eye(dim, dtype=torch.float64).expand(3, dim, dim)
    model = GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, covariances, EDM(sigma_max=20.0))
    x = 20 * torch.randn(30, dim, generator=generator, dtype=torch.float64)
    ends = []
    for quantile in (0.3, 0.5, 0.7):
        guided = interval(quantile_guidance(model, quantile), model, 0.2, math.inf)
        ends.append(model.log_density(solve(guided, x, 40, "ab2", sigma_min=0.01).x, 0.0))
    assert (ends[1] - ends[0]).min() > 20
    assert (ends[2] - ends[1]).min() > 20


def test_the_evaluations_of_density_guidance_are_counted() -> None:
    exact, calls = mixture(EDM()), []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return exact.x0(x, t)

    for guide in (lambda model: density_guidance(model, lambda x, t: 0 * x[:, 0]), lambda m: quantile_guidance(m, 0.4)):
        calls.clear()
        model = guide(Denoiser(counted, EDM()))
        model.velocity(states(exact, 1.0), 1.0)
        assert model.cost(1.0) == len(calls)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1.0, math.nan])
def test_a_quantile_lies_inside_the_unit_interval(wrong: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        quantile_guidance(mixture(EDM()), wrong)


# ------------------------------------------------------------------------------------------------ score alignment


def test_the_alignment_on_one_gaussian_is_the_closed_form() -> None:
    variances = torch.tensor([2.0, 0.1], dtype=torch.float64)
    model = GaussianMixture(
        torch.ones(1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64), torch.diag(variances)[None], EDM()
    )
    x = 5 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.linspace(5.0, 0.5, 40, dtype=torch.float64)
    end, alignment = score_alignment(model, x, grid)
    first, last = variances + 25, variances + 0.25
    torch.testing.assert_close(end, x * (last / first).sqrt(), rtol=1e-5, atol=1e-5)
    want = (x / first * (last / first).sqrt() * (end / last)).sum(1)
    torch.testing.assert_close(alignment, want, rtol=1e-4, atol=1e-4)
    assert alignment.min() > 0


def test_the_alignment_is_the_slope_of_the_log_density_along_the_first_score() -> None:
    model = mixture(EDM())
    x = states(model, 3.0)
    grid = torch.logspace(math.log10(3.0), math.log10(0.3), 40, dtype=torch.float64)
    _, alignment = score_alignment(model, x, grid)
    h, score = 1e-4, model.score(x, 3.0)
    ends = [model.log_density(model.ode_map(x + by * score, 3.0, 0.3), 0.3) for by in (h, -h)]
    torch.testing.assert_close(alignment, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-4)
