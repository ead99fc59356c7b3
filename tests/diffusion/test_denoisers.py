"""One view of every model: conversions, Tweedie's formula, other processes, preconditioning."""

import itertools
from typing import Any

import pytest
import torch

from consilience.diffusion import (
    EDM,
    Denoiser,
    GaussianMixture,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    precondition,
    solve,
)
from consilience.diffusion.denoisers import PREDICTIONS, Prediction, convert

torch.set_num_threads(1)

PROCESSES: list[Process] = [EDM(), VPLinear(), VPCosine(), RectifiedFlow(2.0), TrigFlow()]


def mixture(process: Process) -> GaussianMixture:
    weights = torch.tensor([0.6, 0.4], dtype=torch.float64)
    means = torch.tensor([[0.8, 0.2], [-0.9, 0.5]], dtype=torch.float64)
    covariances = torch.tensor([[[0.2, 0.1], [0.1, 0.3]], [[0.1, 0.0], [0.0, 0.05]]], dtype=torch.float64)
    return GaussianMixture(weights, means, covariances, process)


def values(process: Process) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """t, one per sample, x, x0 and eps of images [5, 1, 2, 2]."""
    generator = torch.Generator().manual_seed(0)
    ratio = torch.tensor([0.05, 0.3, 1.0, 4.0, 30.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=generator).unbind()
    t = process.time(ratio)
    return t, process.add_noise(x0, eps, t), x0, eps


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("have", "want"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_gives_every_other_and_back(process: Process, have: Prediction, want: Prediction) -> None:
    """To 1e-12, of the size of what the conversion passes through."""
    t, x, x0, _ = values(process)
    first = convert(x0, x, t, process, "x0", have)
    there = convert(first, x, t, process, have, want)
    back = convert(there, x, t, process, want, have)
    scale = float(max(first.abs().max(), there.abs().max(), x.abs().max()))
    torch.testing.assert_close(back, first, rtol=1e-12, atol=1e-12 * scale * 30)
    torch.testing.assert_close(there, convert(x0, x, t, process, "x0", want), rtol=1e-11, atol=1e-12 * scale * 30)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_predictions_are_what_their_names_say(process: Process) -> None:
    t, x, x0, eps = values(process)
    model = Denoiser(lambda *_: x0, process)
    at = t.reshape(-1, 1, 1, 1)
    alpha, sigma = process.alpha(at), process.sigma(at)
    close: Any = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(model.eps(x, t), eps, **close)
    torch.testing.assert_close(model.v(x, t), alpha * eps - sigma * x0, **close)
    torch.testing.assert_close(model.score(x, t), -eps / sigma, **close)
    torch.testing.assert_close(model.predict("flow", x, t), eps - x0, **close)
    torch.testing.assert_close(model.velocity(x, t), process.alpha_dot(at) * x0 + process.sigma_dot(at) * eps, **close)
    torch.testing.assert_close(x0, (x + sigma**2 * model.score(x, t)) / alpha, rtol=1e-8, atol=1e-8)  # Tweedie


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_velocity_is_the_slope_of_the_exact_map(process: Process) -> None:
    model, t, h = mixture(process), float(process.time(torch.tensor(0.7, dtype=torch.float64))), 1e-4
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slope = (model.ode_map(x, t, t + h) - model.ode_map(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(model.velocity(x, t), slope, rtol=1e-6, atol=1e-6)


def test_pure_noise_has_an_x0_where_the_prediction_carries_one() -> None:
    process = RectifiedFlow()
    x0, eps = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    one = torch.ones((), dtype=torch.float64)
    for have in ("x0", "v", "velocity", "flow"):
        given = convert(x0, eps, one, process, "x0", have)
        torch.testing.assert_close(convert(given, eps, one, process, have, "x0"), x0)


@pytest.mark.parametrize("target", [VPLinear(), RectifiedFlow(3.0), TrigFlow()], ids=lambda p: type(p).__name__)
def test_a_model_on_another_process_has_the_same_endpoint_map(target: Process) -> None:
    """Noise to data through the moved model alone: it is never told what the data are."""
    source = mixture(EDM(0.002, 60.0))
    moved = Denoiser(source.function, source.process).on(target)
    top = torch.tensor(60.0, dtype=torch.float64)
    t = float(target.time(top))
    x = 60 * torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = x * target.alpha(torch.tensor(t, dtype=torch.float64))
    exact = source.ode_map(x, 60.0, 0.0)
    torch.testing.assert_close(mixture(target).ode_map(there, t, float(target.time(torch.zeros(())))), exact)
    found = solve(moved, there, 120, "flow-rk4", sigma_max=60.0, sigma_min=0.002).x
    assert float((found - exact).abs().max()) < 1e-2
    torch.testing.assert_close(moved.x0(there, t), source.x0(x, 60.0), rtol=1e-9, atol=1e-9)


def test_a_moved_model_keeps_its_cost_and_its_memory() -> None:
    made = []

    def fresh() -> Any:
        made.append(1)
        return lambda x, t: x * len(made)

    model = Denoiser(lambda x, t: x, EDM(), cost=lambda t: 2 if t > 1 else 1, fresh=fresh)
    moved = model.on(VPLinear())
    t = float(VPLinear().time(torch.tensor(1.5, dtype=torch.float64)))
    assert (moved.cost(t), moved.cost(0.01)) == (2, 1)
    first, second = moved.run(), moved.run()
    x = torch.ones(1, 2, dtype=torch.float64)
    assert len(made) == 2
    assert not torch.equal(first.x0(x, 0.5), moved.x0(x, 0.5)) or not torch.equal(second.x0(x, 0.5), moved.x0(x, 0.5))
    plain = Denoiser(lambda x, t: x, EDM())
    assert plain.run() is plain


def test_preconditioning_is_equation_7_of_edm() -> None:
    """On VP too: the network sees the state of VE at the same sigma / alpha."""
    seen = []

    def network(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.append((x, noise))
        return torch.tanh(x)

    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma, data = 1.3, 0.5
    total = (sigma**2 + data**2) ** 0.5
    expected = data**2 / total**2 * x + sigma * data / total * torch.tanh(x / total)
    torch.testing.assert_close(precondition(network, EDM(), data).x0(x, sigma), expected)
    torch.testing.assert_close(seen[0][1], torch.full((3,), sigma, dtype=torch.float64).log() / 4)
    process = VPLinear()
    t = process.time(torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(precondition(network, process, data).x0(x * process.alpha(t), t), expected)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        precondition(network, EDM(), 0.0)


def test_conditions_go_to_the_function() -> None:
    model = Denoiser(lambda x, t, label: x + label, EDM())
    x = torch.zeros(2, 1)
    torch.testing.assert_close(model.x0(x, 1.0, label=3.0), torch.full((2, 1), 3.0))
    torch.testing.assert_close(model.on(EDM()).x0(x, 1.0, label=3.0), torch.full((2, 1), 3.0))


def test_a_form_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no prediction 'noise'"):
        Denoiser(lambda x, t: x, EDM(), "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no prediction 'noise'"):
        Denoiser(lambda x, t: x, EDM()).predict("noise", torch.zeros(1, 1), 1.0)  # type: ignore[arg-type]
