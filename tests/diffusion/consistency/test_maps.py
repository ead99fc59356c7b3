"""Flow maps: the identity at s = t, the semigroup, the derivative, the boundary; exact, for every process."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import (
    EDM,
    GaussianMixture,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    VPTable,
    solve,
)
from consilience.diffusion.consistency import FlowMap, consistency_map, ddim_step, derivative, exact_map
from consilience.diffusion.consistency.curriculum import boundary_error
from consilience.diffusion.consistency.maps import angle
from consilience.diffusion.denoisers import PREDICTIONS, Denoiser
from consilience.diffusion.guidance.classifier_free import with_condition

from .exact import COVARIANCE, MEAN, Net, gaussian, generator

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(2.0), TrigFlow()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def times(process: Process, *ratios: float) -> list[Tensor]:
    return [process.time(torch.tensor(r, dtype=torch.float64)).expand(5) for r in ratios]


def states(process: Process, t: Tensor, seed: int = 0) -> Tensor:
    x0 = gaussian(process).sample(len(t), generator(seed))
    return process.add_noise(x0, process.noise((len(t), 2), t, generator(seed + 1)), t)


@named
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_function_is_the_identity_at_equal_times(process: Process, prediction: Any) -> None:
    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return torch.sin(3 * x) + t[:, None] - s[:, None]

    (t,) = times(process, 0.7)
    x = states(process, t)
    torch.testing.assert_close(FlowMap(function, process, prediction)(x, t, t), x, rtol=1e-12, atol=1e-12)


DEAD_ENDS = [(process, prediction, 0.0) for process in PROCESSES for prediction in ("x0", "eps", "score")]
DEAD_ENDS += [(VPTable(torch.linspace(0.999, 0.01, 50)), "x0", 0.0), (VPLinear(), "velocity", 0.0)]
DEAD_ENDS += [(RectifiedFlow(2.0), prediction, math.inf) for prediction in ("eps", "score")]


@pytest.mark.parametrize(("process", "prediction", "ratio"), DEAD_ENDS)
def test_the_identity_holds_where_the_prediction_says_nothing(process: Process, prediction: Any, ratio: float) -> None:
    """x0 tells nothing of the noise where there is none, eps nothing of the data in pure noise: equal times are the
    identity there too, with a finite gradient, of a network that is not finite there; other rows are as without them.
    """
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        left = process.sigma(t) if ratio == 0 else process.alpha(t)
        return weight * torch.sin(x) * (torch.log(left) + t - s)[:, None]

    flow = FlowMap(function, process, prediction)
    t = process.time(torch.tensor([ratio, 0.7, 0.7], dtype=torch.float64))
    s = torch.stack([t[0], t[1], process.time(torch.tensor(0.1, dtype=torch.float64))])
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator())
    found = flow(x, t, s)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1:], flow(x[1:], t[1:], s[1:]), rtol=0, atol=0)
    assert bool(found.isfinite().all())
    (grad,) = torch.autograd.grad(found.sum(), weight)
    (alone,) = torch.autograd.grad(flow(x[2:], t[2:], s[2:]).sum(), weight)
    torch.testing.assert_close(grad, alone)
    _, slope = derivative(lambda y: flow(y, t, s), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope[:2], torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("process", [RectifiedFlow(), RectifiedFlow(3.0)])
def test_a_consistency_map_is_finite_in_pure_noise_and_goes_there_in_the_limit(process: Process) -> None:
    wild = consistency_map(Net(), process, sigma_data=0.5)
    x = torch.randn(5, 2, dtype=torch.float64, generator=generator())
    ends = wild.x0(x, 1.0)
    assert bool(ends.isfinite().all())
    torch.testing.assert_close(wild.x0(x, 1 - 1e-9), ends, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ends, 0.5 * Net()(x, torch.full((5,), math.log(80) / 4, dtype=torch.float64)))


def semigroup_error(flow: FlowMap, ratios: tuple[float, float, float]) -> float:
    t, u, s = times(flow.process, *ratios)
    x = states(flow.process, t)
    return float((flow(flow(x, t, u), u, s) - flow(x, t, s)).abs().max())


@named
def test_the_exact_map_is_a_semigroup_and_one_with_swapped_times_is_not(process: Process) -> None:
    flow = exact_map(gaussian(process))
    swapped = FlowMap(lambda x, t, s: flow.function(x, s, t), process, "flow")
    assert semigroup_error(flow, (5.0, 1.0, 0.1)) < 1e-9
    assert semigroup_error(swapped, (5.0, 1.0, 0.1)) > 1e-2


@named
def test_the_exact_map_is_the_ode_and_its_derivative_the_velocity(process: Process) -> None:
    model = gaussian(process)
    flow = exact_map(model)
    t, s = times(process, 4.0, 0.2)
    x = states(process, t)
    found = model.ode_map(x, float(t[0]), float(s[0]))
    torch.testing.assert_close(flow(x, t, s), found, rtol=1e-7, atol=1e-8)
    step = 1e-5 * float(t[0])
    slope = (flow(x, t, t + step) - flow(x, t, t - step)) / (2 * step)
    torch.testing.assert_close(slope, model.velocity(x, t), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow.denoiser.x0(x, t), model.x0(x, t), rtol=1e-9, atol=1e-9)


def test_a_mixture_has_no_exact_map() -> None:
    two = GaussianMixture(torch.full((2,), 0.5).double(), torch.stack([MEAN, -MEAN]), COVARIANCE.expand(2, 2, 2))
    with pytest.raises(ValueError, match="single Gaussian"):
        exact_map(two)


def test_a_step_by_the_exact_noise_and_data_keeps_them() -> None:
    process = VPLinear()
    t, s = times(process, 2.0, 0.5)
    x0, noise = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator())
    x_t, x_s = process.add_noise(x0, noise, t), process.add_noise(x0, noise, s)
    for prediction, value in {"x0": x0, "eps": noise, "flow": noise - x0}.items():
        step = ddim_step(x_t, value, t, s, process, prediction)  # type: ignore[arg-type]
        torch.testing.assert_close(step, x_s, rtol=1e-10, atol=1e-12)


def test_a_consistency_map_has_the_published_coefficients_and_the_boundary() -> None:
    """c_skip and c_out worked out by hand at sigma 3, and the identity at sigma_min, whatever the network says."""
    wild = consistency_map(lambda x, c: torch.full_like(x, 100.0) + c[:, None], EDM(), sigma_data=0.5)
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator())
    t = torch.full((4,), 3.0, dtype=torch.float64)
    skip = 0.25 / ((3 - 0.002) ** 2 + 0.25)
    out = 0.5 * (3 - 0.002) / math.sqrt(9 + 0.25)
    torch.testing.assert_close(wild.x0(x, t), skip * x + out * (100 + math.log(3) / 4), rtol=1e-12, atol=1e-12)
    least = torch.full((4,), 0.002, dtype=torch.float64)
    torch.testing.assert_close(wild.x0(x, least), x, rtol=1e-12, atol=1e-12)


@named
def test_consistency_maps_at_equal_ratios_are_one(process: Process) -> None:
    net = Net()
    (t,), (edm_t,) = times(process, 1.7), times(EDM(), 1.7)
    x = torch.randn(5, 2, dtype=torch.float64, generator=generator())
    here = consistency_map(net, process, 0.5, sigma_min=0.002).x0(process.alpha(t)[:, None] * x, t)
    torch.testing.assert_close(here, consistency_map(net, EDM(), 0.5).x0(x, edm_t), rtol=1e-9, atol=1e-9)


@named
def test_a_map_without_the_boundary_is_seen(process: Process) -> None:
    """Planted: c_skip = 0 and c_out = 1."""
    net = Net()
    free = FlowMap(lambda x, t, s: net(x, process.ratio(t).log() / 4), process, "x0")
    x0 = gaussian().sample(50, generator())
    assert boundary_error(consistency_map(net, process, 0.5), x0) < 1e-9
    assert boundary_error(free, x0) > 0.5


def test_derivatives_agree_with_each_other_and_with_the_closed_form() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator())
    t = torch.rand(6, dtype=torch.float64, generator=generator(1))
    v, one = torch.randn(6, 3, dtype=torch.float64, generator=generator(2)), torch.ones(6, dtype=torch.float64)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x * t[:, None])

    expected = torch.cos(x * t[:, None]) * (v * t[:, None] + x)
    for how, tolerance in (("exact", 1e-12), ("finite", 1e-5)):
        value, slope = derivative(f, (x, t), (v, one), how)  # type: ignore[arg-type]
        torch.testing.assert_close(value, f(x, t), rtol=0, atol=1e-12)
        torch.testing.assert_close(slope, expected, rtol=0, atol=tolerance)


class Attention(nn.Module):
    """Self-attention over 4 tokens of 3 values."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.qkv = nn.Linear(3, 9).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def test_exact_finite_and_reverse_mode_agree_on_attention() -> None:
    net = Attention()
    x, v = torch.randn(2, 2, 4, 3, dtype=torch.float64, generator=generator())
    _, exact = derivative(net, (x,), (v,), "exact")
    _, finite = derivative(net, (x,), (v,), "finite")
    jacobian = torch.func.jacrev(net)(x)
    reverse = torch.tensordot(jacobian, v, dims=3)
    torch.testing.assert_close(exact, reverse, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(finite, reverse, rtol=1e-5, atol=1e-6)


@named
def test_the_angle_is_that_of_noise_to_signal(process: Process) -> None:
    t = process.time(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    expected = torch.tensor([0.0, math.pi / 4, math.atan(2.0)], dtype=torch.float64)
    torch.testing.assert_close(angle(process, t), expected, rtol=0, atol=1e-9)
    top = torch.tensor(1.0, dtype=torch.float64)
    assert float(angle(RectifiedFlow(), top)) == pytest.approx(math.pi / 2, abs=1e-12)


@pytest.mark.parametrize("own", [EDM(), VPCosine()], ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("method", ["chain", "consistency", "auto"])
def test_a_model_of_two_times_is_told_where_to_land_on_another_process_and_when_wrapped(
    own: Process, method: str
) -> None:
    """Without being told, a chain of jumps would be DDIM steps of another map."""
    process: Process = VPCosine() if isinstance(own, EDM) else EDM()

    def told(process: Process) -> Denoiser:
        model = exact_map(gaussian(process))
        return Denoiser(lambda x, t, s: model.function(x, t, s), process, model.prediction, two_times=True)

    grid = process.time(torch.tensor([20.0, 2.0, 0.3, 0.0], dtype=torch.float64))
    x = process.prior((8, 2), generator(0), dtype=torch.float64)
    wanted = solve(told(process), x, grid, method, generator=generator(1)).x
    for model in (told(own).on(process), with_condition(told(process), {})):
        assert model.two_times
        found = solve(model, x, grid, method, generator=generator(1)).x
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
