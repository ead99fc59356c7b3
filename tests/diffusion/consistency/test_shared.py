"""The rules all objectives share: one noise, a stopped gradient, equal dropout, distances, weights, the log."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.diffusion import EDM, Denoiser, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import exact_map, pair, same_dropout, shared, teacher_step
from consilience.diffusion.consistency.straight import own_time, straight_time

from .exact import Net, gaussian, generator, student

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(), TrigFlow()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def two_times(process: Process, high: float, low: float, count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    at = process.time(torch.tensor([high, low], dtype=torch.float64))
    return at[0].expand(count), at[1].expand(count)


@named
def test_a_pair_shares_its_datum_and_its_noise(process: Process) -> None:
    t, s = two_times(process, 2.0, 0.3)
    x0 = gaussian().sample(6, generator())
    p = pair(process, {"x": x0, "label": torch.arange(6)}, t, s, generator(3))
    for x, at in ((p.x_t, t), (p.x_s, s)):
        noise = (x - process.alpha(at)[:, None] * x0) / process.sigma(at)[:, None]
        torch.testing.assert_close(noise, p.noise, rtol=1e-10, atol=1e-10)
    assert list(p.cond) == ["label"]
    assert torch.equal(p.x0, x0)


@named
def test_a_teachers_steps_have_their_orders(process: Process) -> None:
    """The error of one step over a halved distance falls by 4 (Euler) and 8 (Heun)."""
    model = gaussian(process)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for width in (0.1, 0.05):
        t, s = two_times(process, 1.0, 1.0 - width)
        x = torch.randn(6, 2, dtype=torch.float64, generator=generator())
        exact = exact_map(model)(x, t, s)
        for heun in errors:
            errors[heun].append(float((teacher_step(model, x, t, s, heun) - exact).norm()))
    assert errors[False][0] / errors[False][1] == pytest.approx(4, rel=0.15)
    assert errors[True][0] / errors[True][1] == pytest.approx(8, rel=0.15)


@pytest.mark.parametrize("process", [*PROCESSES, RectifiedFlow(3.0)], ids=lambda p: f"{type(p).__name__}")
def test_from_the_last_time_on_a_teachers_steps_have_their_orders(process: Process) -> None:
    """Pure noise included: halved steps divide one step's error by 4 (Euler) and 8 (Heun), and go to the exact map."""
    model, flow = gaussian(process), exact_map(gaussian(process))
    top = torch.full((6,), process.t_max, dtype=torch.float64)
    x = process.prior((6, 2), generator(), dtype=torch.float64)
    errors: dict[bool, list[float]] = {True: [], False: []}
    for length in (0.08, 0.04, 0.02):
        s = own_time(process, straight_time(process, top) - length)
        for heun in errors:
            found = teacher_step(model, x, top, s, heun)
            scale = (process.alpha(s) + process.sigma(s))[:, None]
            errors[heun].append(float(((found - flow(x, top, s)) / scale).norm()))
    assert errors[False][1] / errors[False][2] == pytest.approx(4, rel=0.2)
    assert errors[True][1] / errors[True][2] == pytest.approx(8, rel=0.25)
    assert errors[True][0] < 0.2 * errors[False][0]


@named
def test_a_teacher_on_another_process_is_asked_in_pure_noise_too(process: Process) -> None:
    """A denoiser that is no mixture, so that `Denoiser.on` moves it: a step from pure noise is finite and right."""
    exact = gaussian(process)
    moved = Denoiser(exact.function, process, "x0").on(RectifiedFlow())
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator())
    t, s = torch.ones(6, dtype=torch.float64), torch.full((6,), 0.9, dtype=torch.float64)
    wanted = teacher_step(gaussian(RectifiedFlow()), x, t, s)
    torch.testing.assert_close(teacher_step(moved, x, t, s), wanted, rtol=0, atol=2e-2)  # EDM's noise ends at 80


def test_the_step_is_the_same_on_every_process() -> None:
    """Taken in a time that all processes share, at equal sigma / alpha it is one step of one ODE."""
    found = []
    x0 = gaussian().sample(6, generator())
    for process in PROCESSES:
        t, s = two_times(process, 3.0, 0.7)
        noise = torch.randn(6, 2, dtype=torch.float64, generator=generator(1))
        step = teacher_step(gaussian(process), process.add_noise(x0, noise, t), t, s)
        found.append(step / process.alpha(s)[:, None])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-10)


@named
def test_a_step_to_no_noise_gives_the_denoised_data(process: Process) -> None:
    model = gaussian(process)
    t, s = two_times(process, 1.5, 0.0)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator())
    torch.testing.assert_close(teacher_step(model, x, t, s), model.x0(x, t), rtol=1e-10, atol=1e-10)


@named
def test_an_end_without_noise_is_the_data_and_brings_no_nan(process: Process) -> None:
    net = Net()
    t = process.time(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator())
    found = student(net, process).x0(x, t)
    torch.testing.assert_close(found[[0, 2]], x[[0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(found[1], student(net, process).x0(x, t.clamp(min=process.t_min))[1])
    torch.autograd.backward(found.sum())
    assert all(bool(torch.isfinite(part.grad).all()) for part in net.parameters() if part.grad is not None)


def test_only_the_later_end_has_a_gradient_and_both_drop_the_same_units() -> None:
    net = Net(dropout=0.5).train()
    t = torch.full((40,), 1.0, dtype=torch.float64)
    p = pair(EDM(), gaussian().sample(40, generator()), t, t, generator(1))
    before = torch.get_rng_state()
    near, far = shared.ends(student(net), None, p, generator(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert near.requires_grad
    assert not far.requires_grad
    assert torch.equal(near, far)  # equal times and noise: only dropout could differ
    another, _ = shared.ends(student(net), None, p, generator(3))
    assert not torch.equal(near, another)


def test_passes_under_one_seed_are_equal_and_under_two_are_not() -> None:
    net, x = Net(dropout=0.5).train(), torch.ones(8, 2, dtype=torch.float64)
    found = []
    for seed in (5, 5, 6):
        with same_dropout(seed):
            found.append(net(x, x[:, 0]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_distances_are_their_formulas(size: float, c: float) -> None:
    a, b = torch.tensor([[size, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    assert float(shared.squared(a, b)) == pytest.approx(size**2, rel=1e-12)
    assert float(shared.pseudo_huber(c)(a, b)) == pytest.approx(math.sqrt(size**2 + c**2) - c, rel=1e-9, abs=1e-12)
    assert float(shared.pseudo_huber(0)(a, b)) == pytest.approx(size, rel=1e-12)
    assert float(shared.cauchy(c)(a, b)) == pytest.approx(math.log(1 + size**2 / (2 * c**2)), rel=1e-9)


@pytest.mark.parametrize(
    "distance", [shared.squared, shared.pseudo_huber(0.0), shared.pseudo_huber(0.03), shared.cauchy(0.1)]
)
def test_equal_ends_have_no_distance_and_a_finite_gradient(distance: shared.Distance) -> None:
    a = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    value = distance(a, torch.ones(3, 2, dtype=torch.float64))
    torch.autograd.backward(value.sum())
    assert float(value.detach().abs().max()) == 0
    assert a.grad is not None
    assert float(a.grad.abs().max()) == 0


def test_weights_multiply_the_loss_and_not_what_is_logged() -> None:
    t, s = two_times(EDM(), 2.0, 0.5, 4)
    p = pair(EDM(), gaussian().sample(4, generator()), t, s, generator(1))
    near, far = p.x0 + 1, p.x0
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    loss, log = shared.compared(EDM(), p, near, far, shared.squared, weight)
    assert float(loss) == pytest.approx(2 * 2.5)
    assert log["distance"] == pytest.approx(2)
    assert log["difference"] == pytest.approx(1)
    assert log["ratio"] == pytest.approx(0.25)
    assert log["log_gap"] == pytest.approx(math.log(4))
    assert log["spread"] == pytest.approx(1)


@named
def test_a_gap_is_a_difference_of_noise_to_signal_ratios(process: Process) -> None:
    t, s = two_times(process, 3.0, 0.5)
    torch.testing.assert_close(shared.gap(process, t, s), torch.full((6,), 2.5).double(), rtol=1e-9, atol=1e-9)
