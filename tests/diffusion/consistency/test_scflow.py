"""SCFlow: agreement along the teacher's path both ways, the reconstruction, truncation, and the adversary."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from consilience.diffusion import Process, RectifiedFlow
from consilience.diffusion.consistency import exact_map, pair
from consilience.diffusion.consistency.objectives.scflow import (
    discriminator_loss,
    levels,
    one_step,
    reconstruction,
    scflow,
)
from consilience.diffusion.consistency.shared import elementwise_huber
from consilience.diffusion.consistency.straight import own_time

from .exact import MEAN, check_gradient, gaussian, generator, point
from .two_times import TwoTimes, flow_map, named

PROCESS = RectifiedFlow()


@named
def test_the_loss_is_zero_where_the_teachers_flow_is_straight(process: Process) -> None:
    teacher = point(process)
    loss, log = scflow(exact_map(teacher), teacher, MEAN.expand(64, 2), generator(1))
    assert float(loss) < 1e-9
    assert set(log) == {"loss", "distance", "backward", "reflow"}


def test_where_it_is_curved_an_euler_steps_error_is_left() -> None:
    """Second order in the window; the pseudo-Huber distance is quadratic near 0 and linear beyond."""
    teacher = gaussian(PROCESS)
    data = teacher.sample(2000, generator())
    logs = [
        scflow(exact_map(teacher), teacher, data, generator(1), window=window, truncation=0.0, reflow=0.0)[1]
        for window in (0.1, 0.05, 0.025)
    ]
    for name in ("distance", "backward"):
        assert logs[1][name] < logs[0][name] / 4
        assert logs[2][name] < logs[1][name] / 6
        assert logs[2][name] < 1e-4


def test_below_the_truncation_the_datum_is_the_target() -> None:
    teacher, flow = gaussian(PROCESS), flow_map(TwoTimes())
    data = teacher.sample(64, generator())
    found = scflow(flow, teacher, data, generator(1), truncation=1.1, backward=0.0, reflow=0.0)[0]
    draws = generator(1)
    tau, _, _ = levels(64, PROCESS, 0.1, draws)
    noise = torch.randn(64, 2, dtype=torch.float64, generator=draws)
    x = (1 - tau)[:, None] * data + tau[:, None] * noise
    torch.testing.assert_close(found, elementwise_huber(0.01)(flow.x0(x, tau), data).mean())


def test_pseudo_huber_value_by_value() -> None:
    a, b = torch.tensor([[3.0, 0.0]]).double(), torch.zeros(1, 2).double()
    assert float(elementwise_huber(4.0)(a, b)) == pytest.approx(0.5)


@named
def test_times_stay_inside_and_within_the_window(process: Process) -> None:
    tau, down, up = levels(3000, process, 0.1, generator())
    assert bool(((down <= tau) & (tau <= up)).all())
    assert bool(((tau - down <= 0.1) & (up - tau <= 0.1)).all())
    assert float(up.max()) <= 1.0
    assert float(down.min()) >= 0.0


@pytest.mark.parametrize("backward", [0.0, 0.5])
def test_gradients_are_those_of_differences_with_the_target_held(backward: float) -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: scflow(
            flow_map(net), gaussian(PROCESS), data, generator(3), target=flow_map(held), backward=backward, reflow=0.0
        )[0],
        TwoTimes(),
    )


def test_the_reconstruction_is_learned_and_the_one_step_data_are_not() -> None:
    """The reconstruction's share of the gradient is that of a target that is held: the one-step data themselves."""
    net = TwoTimes()
    flow, data = flow_map(net), gaussian().sample(12, generator())
    draws = generator(1)
    tau, down, _ = levels(12, PROCESS, 0.1, draws)
    p = pair(PROCESS, data, own_time(PROCESS, tau), own_time(PROCESS, down), draws)
    made = one_step(flow, p.noise, {}, 0)
    last = torch.full((12,), torch.pi / 2, dtype=torch.float64)
    torch.testing.assert_close(made, p.noise - net(p.noise, last, 0 * last))
    alone = reconstruction(flow, made.detach(), p, 0).mean()
    with_, without = (
        torch.autograd.grad(
            scflow(flow, gaussian(PROCESS), data, generator(1), reflow=weight)[0], list(net.parameters())
        )
        for weight in (2.0, 0.0)
    )
    for a, b, c in zip(with_, without, torch.autograd.grad(alone, list(net.parameters())), strict=True):
        torch.testing.assert_close(a - b, 2 * c, rtol=1e-8, atol=1e-12)
    x_t = (1 - p.t)[:, None] * made.detach() + p.t[:, None] * p.noise
    torch.testing.assert_close(alone, (flow.x0(x_t, p.t) - made.detach()).square().mean())


def test_the_adversary_is_optional_and_sees_the_one_step_data() -> None:
    teacher, flow, data = gaussian(PROCESS), flow_map(TwoTimes()), gaussian().sample(16, generator())
    seen: list[Tensor] = []

    def discriminator(x: Tensor) -> Tensor:
        seen.append(x)
        return x.sum(1)

    plain = scflow(flow, teacher, data, generator(1))[0]
    loss, log = scflow(flow, teacher, data, generator(1), discriminator=discriminator, adversarial=0.5)
    assert len(seen) == 1
    assert seen[0].requires_grad
    torch.testing.assert_close(loss - plain, 0.5 * softplus(-seen[0].sum(1)).mean())
    assert log["adversarial"] > 0
    made = seen[0]
    value, _ = discriminator_loss(lambda x: x.sum(1), data, made)
    torch.testing.assert_close(value, (softplus(-data.sum(1)) + softplus(made.detach().sum(1))).mean())
    assert not value.requires_grad


def test_the_penalty_is_half_the_squared_slope_at_the_real_data() -> None:
    """Of D = x A x, whose slope is 2 A x; its gradient reaches D's weights."""
    form = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    real, made = gaussian().sample(16, generator()), gaussian().sample(16, generator(1))

    def discriminator(x: Tensor) -> Tensor:
        return (x.square() * form).sum(1)

    with_, without = (discriminator_loss(discriminator, real, made, penalty)[0] for penalty in (0.6, 0.0))
    expected = 0.3 * (2 * form * real).square().sum(1).mean()
    torch.testing.assert_close(with_ - without, expected)
    found, wanted = (torch.autograd.grad(value, form, retain_graph=True)[0] for value in (with_ - without, expected))
    torch.testing.assert_close(found, wanted)


def test_a_teacher_is_needed() -> None:
    with pytest.raises(ValueError, match="distils a teacher"):
        scflow(flow_map(TwoTimes()), None, torch.zeros(2, 2).double(), generator())
