"""TraFlow: the teacher's pairs, the straight map that has no loss, and the terms one by one."""

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.objectives.traflow import output, pairs, traflow
from consilience.diffusion.consistency.straight import straight_time, uniform_pair

from .exact import COVARIANCE, MEAN, check_gradient, gaussian, generator
from .two_times import TwoTimes, flow_map, named

PROCESS = RectifiedFlow()


VALUES, VECTORS = torch.linalg.eigh(COVARIANCE)
A = VECTORS @ torch.diag(VALUES.sqrt()) @ VECTORS.T


def straight_map(process: Process) -> FlowMap:
    """The map along the straight lines between a noise and the datum m + A noise that the Gaussian's ODE makes."""
    eye = torch.eye(2, dtype=torch.float64)

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = (part.reshape(-1, 1, 1) for part in (process.alpha(t), process.sigma(t)))
        left = (x - alpha[:, 0] * MEAN)[:, :, None]
        noise = torch.linalg.solve(alpha * A + sigma * eye, left)[:, :, 0]
        return noise - (MEAN + noise @ A.T)

    return FlowMap(function, process, "flow")


def test_the_output_is_the_teachers_map_of_the_noise() -> None:
    noise = torch.randn(20, 2, dtype=torch.float64, generator=generator())
    teacher = gaussian(PROCESS)
    one = torch.ones(20, dtype=torch.float64)
    exact = exact_map(teacher)(noise, one, 0 * one)
    torch.testing.assert_close(exact, MEAN + noise @ A.T)
    errors = [float((output(teacher, noise, n, {}) - exact).abs().max()) for n in (16, 32)]
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 2.5


@named
def test_the_loss_is_zero_at_the_straight_map_of_the_teachers_pairs(process: Process) -> None:
    """Pairs in closed form, so that nothing is left of the solver: from the noise, m + A noise."""
    flow = straight_map(process)
    noise = torch.randn(64, 2, dtype=torch.float64, generator=generator())
    batch = {"x": MEAN + noise @ A.T, "noise": noise}
    loss, log = traflow(flow, None, batch, generator(1))
    assert float(loss) < 1e-12
    assert set(log) == {"loss", "output", "change", "distance"}
    curved = traflow(exact_map(gaussian(process)), None, batch, generator(1))[1]
    assert curved["change"] > 1e-2


def test_with_the_teacher_only_the_solvers_error_is_left() -> None:
    flow, teacher = straight_map(PROCESS), gaussian(PROCESS)
    like = torch.zeros(64, 2, dtype=torch.float64)
    losses = [float(traflow(flow, teacher, like, generator(1), steps=n)[0]) for n in (16, 64)]
    assert losses[1] < 2e-3
    assert losses[1] < losses[0] / 4


def test_each_weight_is_that_of_its_term() -> None:
    flow, teacher, like = flow_map(TwoTimes()), gaussian(PROCESS), torch.zeros(16, 2, dtype=torch.float64)
    log = traflow(flow, teacher, like, generator(1))[1]
    for place, name in enumerate(("output", "change", "distance")):
        weights = tuple(3.0 if i == place else 0.0 for i in range(3))
        loss = traflow(flow, teacher, like, generator(1), weights=weights)[0]  # type: ignore[arg-type]
        assert float(loss.detach()) == pytest.approx(3 * log[name])


def test_the_change_is_scaled_to_the_gradient_of_the_consistency() -> None:
    """At the last layer its gradient is then as long, where the scale lies within 0.01 and 10."""
    net = TwoTimes()
    teacher, like = gaussian(PROCESS), torch.zeros(16, 2, dtype=torch.float64)
    last = [p for p in net.parameters() if p.ndim == 2][-1]

    def slope(weights: tuple[float, float, float], layer: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
        loss, log = traflow(
            flow_map(net), teacher, like, generator(1), weights=weights, last_layer=layer, target=flow_map(TwoTimes(3))
        )
        return torch.autograd.grad(loss, last)[0], log

    (aim, _), (bare, _) = slope((0.0, 0.0, 1.0)), slope((0.0, 1.0, 0.0))
    scaled, log = slope((0.0, 1.0, 0.0), last)
    expected = float(aim.norm()) / (float(bare.norm()) + 1e-4)
    assert 0.01 < expected < 10
    assert log["change_scale"] == pytest.approx(expected)
    torch.testing.assert_close(scaled, expected * bare)


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    like = torch.zeros(12, 2, dtype=torch.float64)
    check_gradient(
        lambda net, held: traflow(
            flow_map(net),
            gaussian(PROCESS),
            like,
            generator(3),
            target=flow_map(held),
            steps=4,
            weights=(0.1, 0.1, 1.0),
        )[0],
        TwoTimes(),
    )


def test_given_pairs_are_kept_and_their_noise_is_no_condition() -> None:
    noise, x, shift = torch.randn(3, 8, 2, dtype=torch.float64, generator=generator())
    p = pairs(PROCESS, None, {"x": x, "noise": noise, "shift": shift}, 4, uniform_pair, generator())
    assert set(p.cond) == {"shift"}
    tau = straight_time(PROCESS, p.t)[:, None]
    torch.testing.assert_close(p.x_t, (1 - tau) * x + tau * noise)


def test_pairs_are_needed_without_a_teacher() -> None:
    with pytest.raises(ValueError, match="must hold the pairs"):
        traflow(flow_map(TwoTimes()), None, torch.zeros(2, 2).double(), generator())
