"""The ODE's density against the exact density of mixtures."""

import math

import pytest
import torch

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.solvers.likelihood import Likelihood, log_likelihood

torch.set_num_threads(1)


def mixture(process: Process, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    weights = torch.tensor([0.6, 0.4], dtype=dtype)
    means = torch.tensor([[0.8, 0.2, 0.0], [-0.9, 0.5, 0.3]], dtype=dtype)
    covariances = torch.diag_embed(torch.tensor([[0.05, 0.1, 0.02], [0.2, 0.04, 0.3]], dtype=dtype))
    return GaussianMixture(weights, means, covariances, process)


@pytest.mark.parametrize("process", [EDM(), VPLinear(), TrigFlow(), RectifiedFlow(2.0)], ids=lambda p: type(p).__name__)
def test_it_is_the_exact_density_within_the_solvers_tolerance(process: Process) -> None:
    model = mixture(process)
    x = model.sample(12, torch.Generator().manual_seed(0))
    found = log_likelihood(model, x, prior=lambda z: model.log_density(z, process.t_max), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_density, model.log_density(x, process.t_min), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.latent, model.ode_map(x, process.t_min, process.t_max), rtol=1e-6, atol=1e-6)
    assert found.nfe > 10


def test_a_flow_needs_no_exact_prior() -> None:
    """At t = 1 no signal is left, and standard normal noise is the truth."""
    model = mixture(RectifiedFlow())
    x = model.sample(8, torch.Generator().manual_seed(0)).reshape(8, 3, 1)
    found = log_likelihood(model, x, 0.01, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.log_density, model.log_density(x, 0.01), rtol=0, atol=2e-6)
    assert found.latent.shape == x.shape


def test_the_default_prior_errs_by_the_signal_it_forgets() -> None:
    """Under EDM, sigma 80 with data of deviation about 1: relative error of the variance 1e-4."""
    model = mixture(EDM())
    x = model.sample(8, torch.Generator().manual_seed(0))
    found = log_likelihood(model, x, 0.05)
    error = (found.log_density - model.log_density(x, 0.05)).abs()
    assert 1e-7 < float(error.max()) < 0.2


def test_random_probes_are_unbiased() -> None:
    """The mean over 256 single-probe runs is within 5 standard errors for all of 4 samples: false alarm 2e-6."""
    model = mixture(VPLinear())
    x = model.sample(4, torch.Generator().manual_seed(0))
    exact = log_likelihood(model, x).log_density
    many = x.repeat(256, 1)
    found = log_likelihood(model, many, probes=1, generator=torch.Generator().manual_seed(1)).log_density.reshape(
        256, 4
    )
    assert float(found.std(0).min()) > 1e-3  # the probes do differ
    error = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(256))
    assert float(error.max()) < 5


def test_enough_probes_of_a_diagonal_jacobian_are_exact() -> None:
    """Signs squared are one, so that a single axis-aligned Gaussian has no variance at all."""
    model = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
        torch.diag_embed(torch.tensor([[0.5, 2.0]], dtype=torch.float64)),
        VPLinear(),
    )
    x = model.sample(4, torch.Generator().manual_seed(0))
    random = log_likelihood(model, x, probes=2, generator=torch.Generator().manual_seed(3)).log_density
    torch.testing.assert_close(random, log_likelihood(model, x).log_density, rtol=1e-8, atol=1e-8)


def test_float32_models_see_float32() -> None:
    model = mixture(VPLinear(), torch.float32)
    x = model.sample(4, torch.Generator().manual_seed(0))
    found = log_likelihood(model, x, 0.01, prior=lambda z: model.log_density(z, 1.0), rtol=1e-4, atol=1e-4)
    assert found.latent.dtype == torch.float32
    torch.testing.assert_close(found.log_density, model.log_density(x, 0.01).double(), rtol=0, atol=5e-3)


def test_bits_per_dim_of_uniform_bytes_are_eight() -> None:
    """256 equal bins over [-1, 1): density 1/2 per dimension."""
    uniform = Likelihood(torch.full((3,), 10 * math.log(0.5)), torch.zeros(3, 2, 5), 1)
    torch.testing.assert_close(uniform.bits_per_dim(2 / 256), torch.full((3,), 8.0))


def test_a_time_without_density_is_refused() -> None:
    model = mixture(EDM())
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="some noise before 80"):
        log_likelihood(model, x, 0.0)
    with pytest.raises(ValueError, match="some noise before 80"):
        log_likelihood(model, x, 90.0)
    with pytest.raises(ValueError, match="at least one probe"):
        log_likelihood(model, x, probes=0)
