"""The time-shift sampler's choice of times."""

import pytest
import torch

from consilience.diffusion import Denoiser, GaussianMixture, VPCosine, VPScaledLinear, VPTable, linear_grid, solve
from consilience.diffusion.time_shift import fitting_time, time_shifted

torch.set_num_threads(1)


def table() -> VPTable:
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    return VPTable(torch.cumprod(1 - betas, 0))


def test_the_time_is_the_one_a_search_over_all_timesteps_finds():
    process, generator = table(), torch.Generator().manual_seed(0)
    x = torch.randn(50, 400, dtype=torch.float64, generator=generator) * torch.linspace(0.3, 1.1, 50)[:, None]
    t, window = torch.tensor(500.0, dtype=torch.float64), 60
    found = fitting_time(x, t, process, window, cutoff=200.0)
    steps = torch.arange(500 - window // 2, 500 + window // 2 + 1, dtype=torch.float64)
    distance = (x.var(1)[:, None] - process.sigma(steps)[None] ** 2).abs()
    nearest = steps[distance.argmin(1)]
    assert (found - nearest).abs().max() <= 0.5 + 1e-6
    assert found.min() == pytest.approx(470)
    assert found.max() == pytest.approx(530)


def test_below_the_cutoff_and_without_a_window_nothing_changes():
    process = VPScaledLinear()
    x = torch.randn(8, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(fitting_time(x, t, process, 0.2, cutoff=0.4), t.expand(8))
    assert torch.allclose(fitting_time(x, t, process, 0.0, cutoff=0.0), t.expand(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("process", [VPScaledLinear(), VPCosine(), table()], ids=lambda one: type(one).__name__)
def test_the_noise_that_sampling_starts_from_is_not_shifted(process, dtype):
    """Its variance over few values is far from 1 by chance alone."""
    seen = []

    def function(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.expand(len(x)))
        return x

    x = process.prior((32, 16), torch.Generator().manual_seed(0), dtype=dtype)
    shifted = time_shifted(Denoiser(function, process, "eps"), 0.2 * process.t_max, 0.0)
    solve(shifted, x, linear_grid(4, process), "ddim")
    assert torch.equal(seen[0], torch.tensor(process.t_max, dtype=dtype).expand(32))
    assert len(seen[1].unique()) > 1


def test_a_network_that_does_not_read_the_time_is_not_changed():
    process = VPScaledLinear()
    model = Denoiser(lambda x, t: 0.3 * x, process, "eps")
    x = process.prior((4, 64), torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, shifted = (solve(m, x, 8, "ddim") for m in (model, time_shifted(model, 0.2, 0.1)))
    assert torch.equal(plain.x, shifted.x)
    assert shifted.nfe == plain.nfe


def test_each_sample_of_a_batch_has_its_own_time():
    process = VPScaledLinear()
    data = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 128, dtype=torch.float64),
        0.01 * torch.eye(128, dtype=torch.float64)[None],
        process,
    )
    x = process.prior((6, 128), torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = time_shifted(data, 0.3, 0.1)
    together = solve(shifted, x, 10, "ddim").x
    alone = torch.cat([solve(shifted, row[None], 10, "ddim").x for row in x])
    assert torch.allclose(together, alone, atol=1e-12)
    assert not torch.allclose(together, solve(data, x, 10, "ddim").x, atol=1e-3)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="window"):
        time_shifted(Denoiser(lambda x, t: x, VPScaledLinear()), -1.0, 0.0)
