"""Density guidance with noise: the log-density of every path against the integral of its rate, and the limits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, VPLinear
from consilience.diffusion.guidance import (
    divergence,
    quantile_excess,
    quantile_guidance,
    stochastic_density_guidance,
)
from consilience.diffusion.guidance.stochastic_density import _parts, across

torch.set_num_threads(1)

PLACES = [(EDM(), 2.0, 0.5), (VPLinear(), 0.5, 0.2), (RectifiedFlow(), 0.7, 0.35)]


def mixture(process: Process) -> GaussianMixture:
    covariances = torch.tensor([[0.5, 0.3, 0.4], [0.2, 0.6, 0.3]], dtype=torch.float64).diag_embed()
    return GaussianMixture([0.4, 0.6], [[1.0, 0.0, -0.5], [-0.8, 0.6, 0.4]], covariances, process)  # type: ignore[arg-type]


def start(model: GaussianMixture, high: float, count: int = 64) -> Tensor:
    """States of p_t at the time ``high``."""
    generator = torch.Generator().manual_seed(3)
    at = torch.tensor(high, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return model.process.alpha(at) * model.sample(count, generator) + model.process.sigma(at) * noise


@pytest.mark.parametrize(("process", "high", "low"), PLACES, ids=lambda p: type(p).__name__)
def test_the_log_density_of_every_path_changes_at_the_chosen_rate(process: Process, high: float, low: float) -> None:
    """From log p of the start by 0.3 in all, while the noise makes the paths differ; the error falls with the steps.

    Euler-Maruyama has strong order 1/2: at four times the steps the median error over 64 paths falls by a factor of 2;
    below 1.6 would be a mistake of the drift (which leaves a bias) or of the projection (which leaves the noise).
    """
    model = mixture(process)
    x = start(model, high)
    rate = 0.3 / (low - high)

    def error(steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        end = stochastic_density_guidance(
            model,
            x,
            torch.linspace(high, low, steps + 1, dtype=torch.float64),
            lambda x, t: rate + divergence(model, x, t),
            lambda t: 0.7,
            torch.Generator().manual_seed(seed),
            probes=None,
        )
        return model.log_density(end, low) - model.log_density(x, high) - 0.3, end

    coarse, fine = error(20)[0], error(80)[0]
    assert float(coarse.abs().median()) > 1.6 * float(fine.abs().median())
    assert float(fine.abs().median()) < 0.1
    assert abs(float(fine.mean())) < 0.05
    moved = (error(20, 1)[1] - error(20, 2)[1]).norm(dim=1).median()
    assert float(moved) > 3 * float(coarse.abs().median())


@pytest.mark.parametrize(("process", "high", "low"), PLACES, ids=lambda p: type(p).__name__)
def test_without_noise_it_is_eulers_method_on_the_guided_velocity(process: Process, high: float, low: float) -> None:
    model = mixture(process)
    x = start(model, high)
    grid = torch.linspace(high, low, 8, dtype=torch.float64)
    found = stochastic_density_guidance(
        model, x, grid, quantile_excess(process, 0.3), lambda t: 0.0, torch.Generator().manual_seed(0)
    )
    guided = quantile_guidance(model, 0.3)
    for t, s in pairwise(grid.tolist()):
        x = x + (s - t) * guided.velocity(x, t)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-12)


def test_random_directions_give_the_trace_on_average() -> None:
    """tr(P H) of the mixture's Hessian, from all directions and by autograd; 600 random ones within 15 %."""
    model, generator = mixture(EDM()), torch.Generator().manual_seed(0)
    x, t = start(model, 1.0, 6), torch.tensor(1.0, dtype=torch.float64)
    hessian = torch.stack([
        torch.autograd.functional.hessian(lambda y: model.log_density(y[None], 1.0)[0], row) for row in x
    ])  # fmt: skip
    score = model.score(x, t)
    unit = score / score.norm(dim=1, keepdim=True)
    exact = hessian.diagonal(dim1=1, dim2=2).sum(1) - torch.einsum("ni,nij,nj->n", unit, hessian, unit)
    torch.testing.assert_close(_parts(model, x, t, generator, None, {})[2], exact, rtol=1e-9, atol=1e-10)
    estimate = _parts(model, x, t, generator, 600, {})[2]
    assert float((estimate - exact).abs().max()) < 0.15 * float(exact.abs().max())
    torch.testing.assert_close(
        (across(x, score) * score).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_from_pure_noise_of_a_flow_and_what_is_refused() -> None:
    model = mixture(RectifiedFlow())
    x, generator = torch.randn(5, 3, dtype=torch.float64), torch.Generator().manual_seed(0)

    def run(*times: float) -> Tensor:
        grid = torch.tensor(times, dtype=torch.float64)
        return stochastic_density_guidance(
            model, x, grid, quantile_excess(RectifiedFlow(), 0.6), lambda t: 0.5, generator
        )

    assert bool(torch.isfinite(run(1.0, 0.8, 0.5, 0.2)).all())
    for wrong in ((0.5,), (0.5, 0.7), (0.5, 0.5), (0.5, 0.0)):
        with pytest.raises(ValueError, match="end above zero noise"):
            run(*wrong)
