"""Continuous-time consistency: the tangent is a derivative, zero at the exact map, and the limit of small gaps."""

import copy
import math

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, TrigFlow
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.objectives.scm import draw_times, scaled, scm, tangent

from .exact import Net, gaussian, generator, student, z_score

PROCESS = TrigFlow(sigma_data=0.5)


def raw(net: Net) -> FlowMap:
    """A network of sigma_d F: what the paper trains."""
    return FlowMap(lambda x, t, s, **cond: net(x, t, **cond), PROCESS, "velocity")


def points(count: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and an arbitrary direction of x."""
    t = 0.2 + 1.2 * torch.rand(count, dtype=torch.float64, generator=generator(seed))
    x, v = torch.randn(2, count, 2, dtype=torch.float64, generator=generator(seed + 1))
    return x, t, v


def test_distillation_from_the_exact_teacher_is_zero_at_the_exact_map() -> None:
    teacher = gaussian(PROCESS)
    data = teacher.sample(200, generator())
    loss, log = scm(exact_map(teacher), teacher, data, generator(1), jvp="finite", c=None)
    assert float(loss) < 1e-8
    assert log["tangent_norm"] < 1e-4
    exact, exact_log = scm(exact_map(teacher), teacher, data, generator(1), c=None)
    assert float(exact) < 1e-18
    assert exact_log["tangent_norm"] < 1e-8


def test_without_a_teacher_the_exact_maps_tangent_is_zero_in_the_mean() -> None:
    """E[g | x] = 0: products of g and functions of x, z below 5 over 40 batches (false alarm below 1e-4)."""
    flow, model = exact_map(gaussian(PROCESS)), gaussian(PROCESS)
    products: list[list[float]] = [[], [], []]
    for seed in range(40):
        data = model.sample(200, generator(seed))
        t = draw_times(PROCESS, 200, generator(1000 + seed), -1.0, 1.4)
        noise = torch.randn(200, 2, dtype=torch.float64, generator=generator(2000 + seed))
        x = PROCESS.add_noise(data, noise, t)
        moving = -torch.sin(t)[:, None] * data + 0.5 * torch.cos(t)[:, None] * noise
        g, log = tangent(flow, x, t, moving, 1.0, "exact", 0)
        assert log["tangent_norm"] > 0.1  # not zero sample by sample
        for found, value in zip(products, (g, g * x, g * torch.sin(4 * x)), strict=True):
            found.append(float(value.sum(1).mean()))
    assert all(abs(z_score(found, 0.0)) < 5 for found in products)


@pytest.mark.parametrize("jvp", ["exact", "finite"])
def test_the_tangent_is_the_derivative_of_the_data_along_the_trajectory(jvp: str) -> None:
    """At full warm-up it is cos(t) d f(x + h v, t + h) / dh, by differences of the map itself."""
    flow = raw(Net())
    x, t, v = points()
    g, _ = tangent(flow, x, t, v, 1.0, jvp, 0)  # type: ignore[arg-type]
    h = 1e-5
    slope = (flow.x0(x + h * v, t + h) - flow.x0(x - h * v, t - h)) / (2 * h)
    torch.testing.assert_close(g, torch.cos(t)[:, None] * slope, rtol=1e-5, atol=1e-6)


def test_at_the_start_of_the_warm_up_it_trains_the_velocity() -> None:
    """The gradient at warmup 0 is that of cos^2 ||velocity - dx/dt||^2 over sigma_d and the dimension."""
    net, data = Net(), gaussian().sample(16, generator())
    loss, _ = scm(raw(net), None, data, generator(1), warmup=0.0, c=None)
    clock = generator(1)
    t = draw_times(PROCESS, 16, clock, -1.0, 1.4)
    noise = torch.randn(16, 2, dtype=torch.float64, generator=clock)
    moving = -torch.sin(t)[:, None] * data + 0.5 * torch.cos(t)[:, None] * noise
    error = (scaled(raw(net), PROCESS.add_noise(data, noise, t), t) - moving).square().mean(1)
    expected = (torch.cos(t) ** 2 * error).mean() / 0.5
    for a, b in zip(*(torch.autograd.grad(value, list(net.parameters())) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_it_is_the_limit_of_small_gaps() -> None:
    """The gradient of ||f(x_t) - f(x_(t - h))||^2 / (h sigma_d tan t) over the dimension tends to it."""
    teacher, net = gaussian(PROCESS), Net()
    data = teacher.sample(16, generator())
    loss, _ = scm(raw(net), teacher, data, generator(1), c=None)
    parameters = list(net.parameters())
    limit = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    clock = generator(1)
    t = draw_times(PROCESS, 16, clock, -1.0, 1.4)
    x = PROCESS.add_noise(data, torch.randn(16, 2, dtype=torch.float64, generator=clock), t)
    errors = []
    for h in (1e-4, 5e-5):
        with torch.no_grad():
            far = raw(net).x0(x - h * teacher.velocity(x, t), t - h)
        values = (raw(net).x0(x, t) - far).square().mean(1) / (h * 0.5 * torch.tan(t))
        found = torch.cat([g.flatten() for g in torch.autograd.grad(values.mean(), parameters)])
        errors.append(float((found - limit).norm() / limit.norm()))
    assert errors[1] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


def test_the_gradient_is_that_of_a_held_residual() -> None:
    """Central differences of ||(u - u_held) / sigma_d - g_held||^2 / D along a direction, held parts computed once.

    Letting them move along (planted: no stopped gradient) gives another number.
    """
    net, data, teacher = Net(), gaussian().sample(12, generator()), gaussian(PROCESS)
    loss, _ = scm(raw(net), teacher, data, generator(1))
    parameters = list(net.parameters())
    along = [torch.randn(p.shape, dtype=p.dtype, generator=generator(5)) for p in parameters]
    slope = sum(float((g * v).sum()) for g, v in zip(torch.autograd.grad(loss, parameters), along, strict=True))
    clock = generator(1)
    t = draw_times(PROCESS, 12, clock, -1.0, 1.4)
    x = PROCESS.add_noise(data, torch.randn(12, 2, dtype=torch.float64, generator=clock), t)
    moving = teacher.velocity(x, t)

    def residual(moved: Net, held: Net) -> float:
        g, _ = tangent(raw(held), x, t, moving, 1.0, "exact", 0)
        g = g / (g.norm(dim=1, keepdim=True) + 0.1)
        away = (scaled(raw(moved), x, t) - scaled(raw(held), x, t)) / 0.5 - g
        return float(away.square().mean().detach())

    step = 1e-5
    ahead, behind = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for copied, sign in ((ahead, 1), (behind, -1)):
            for part, v in zip(copied.parameters(), along, strict=True):
                part.add_(sign * step * v)
    held = (residual(ahead, net) - residual(behind, net)) / (2 * step)
    free = (residual(ahead, ahead) - residual(behind, behind)) / (2 * step)
    assert held == pytest.approx(slope, rel=1e-5)
    assert abs(free - slope) > 1e-2 * abs(slope)


def test_a_normalised_tangent_is_shorter_than_one() -> None:
    """||g|| / (||g|| + c): the loss times D is below 1, and near it for tangents much longer than c."""
    data = gaussian().sample(64, generator())
    loss, log = scm(raw(Net()), None, 1e4 * data, generator(1))
    assert log["tangent_norm"] > 100
    assert 0.9 < 2 * float(loss) < 1


def test_the_weight_that_is_best_levels_the_error() -> None:
    """e^w E - w is least at w = -log E, where it is 1 + log E; there the weight has no gradient."""
    data = gaussian().sample(1, generator())
    plain, _ = scm(raw(Net()), None, data, generator(1))
    w = torch.tensor(-math.log(float(plain)), dtype=torch.float64, requires_grad=True)
    loss, log = scm(raw(Net()), None, data, generator(1), weight=lambda t: w.expand(len(t)))
    assert float(loss) == pytest.approx(1 + math.log(float(plain)), rel=1e-9)
    assert abs(float(torch.autograd.grad(loss, w)[0])) < 1e-9
    assert log["distance"] == pytest.approx(float(plain))


def test_exact_and_finite_derivatives_train_alike_with_dropout_and_conditions() -> None:
    net = Net(dropout=0.5).train()
    data = {"x": gaussian().sample(16, generator()), "shift": torch.linspace(-1, 1, 16, dtype=torch.float64)}
    found = []
    for jvp in ("exact", "finite"):
        loss, _ = scm(raw(net), None, data, generator(1), jvp=jvp)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_a_map_in_any_form_is_taken() -> None:
    """A consistency map in x0 form and the same values as a velocity give one loss."""
    net, data = Net(), gaussian().sample(16, generator())
    form = student(net, PROCESS)
    same = FlowMap(lambda x, t, s: scaled(form, x, t), PROCESS, "velocity")
    one, two = (scm(flow, None, data, generator(1))[0] for flow in (form, same))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_times_are_normal_in_the_logarithm_of_the_tangent() -> None:
    """Mean and deviation of log tan t + log sigma_d of 20,000 draws within 5 standard errors: false alarm 1e-6."""
    t = draw_times(TrigFlow(0.5, 1e-9, 1e9), 20_000, generator(), -1.0, 1.4)
    logs = torch.tan(t).log() + math.log(0.5)
    assert abs(float(logs.mean()) + 1) < 5 * 1.4 / 20_000**0.5
    assert abs(float(logs.std()) - 1.4) < 5 * 1.4 / 40_000**0.5


def test_another_process_is_refused() -> None:
    data = gaussian().sample(4, generator())
    with pytest.raises(ValueError, match="TrigFlow"):
        scm(student(Net(), EDM()), None, data, generator())
    with pytest.raises(ValueError, match=r"teacher\.on"):
        scm(raw(Net()), gaussian(EDM()), data, generator())
