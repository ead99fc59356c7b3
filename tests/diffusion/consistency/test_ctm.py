"""Consistency trajectory models: soft consistency, where its gradient goes, and the terms added."""

import copy
import math

import pytest
import torch
from scipy import stats

from consilience.diffusion import EDM, Process, RectifiedFlow
from consilience.diffusion.consistency import SETUPS, FlowMap
from consilience.diffusion.consistency.curriculum import ratio_range
from consilience.diffusion.consistency.objectives.ctm import (
    ctm,
    discriminator_loss,
    half_lognormal_times,
)
from consilience.diffusion.consistency.objectives.tcd import tcd
from consilience.diffusion.consistency.objectives.trajectory import times
from consilience.diffusion.consistency.shared import gradient_ratio, teacher_step, through
from consilience.diffusion.losses import denoising_loss, edm_weight

from .exact import check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(40, generator())
TEACHER = gaussian(PROCESS)
GRID = torch.linspace(0.6, 0.0, 13, dtype=torch.float64)


def test_zero_at_the_exact_map_but_for_the_posterior_variance() -> None:
    assert float(ctm(exact(), TEACHER, DATA, generator(1), step=exact_step(), denoising=0.0)[0]) < 1e-18
    _, log = ctm(exact(), TEACHER, DATA, generator(1), step=exact_step())
    assert log["denoising"] > 0.01
    assert log["distance"] < 1e-18


@pytest.mark.parametrize("denoising", [0.0, 0.01])
def test_gradients_are_those_of_differences_with_the_target_held(denoising: float) -> None:
    check_gradient(
        lambda net, held: ctm(
            flow(net), TEACHER, DATA, generator(3), target=flow(held), longest=1, denoising=denoising, grid=GRID
        )[0],
        TwoTime(),
    )


def test_the_second_jump_passes_gradients_to_the_state_alone() -> None:
    net, x = TwoTime(), DATA.clone().requires_grad_()
    t, s = torch.full((40,), 0.6, dtype=torch.float64), torch.zeros(40, dtype=torch.float64)
    held = through(lambda y: flow(net)(y, t, s), x)
    held.square().sum().backward()
    assert all(p.grad is None for p in net.parameters())
    whole = DATA.clone().requires_grad_()
    flow(net)(whole, t, s).square().sum().backward()
    torch.testing.assert_close(x.grad, whole.grad)


def test_one_grid_step_to_the_data_is_tcd_with_the_heun_teacher() -> None:
    """With s at the end there is no second jump; both draw t, s and noise in another order, so one step is fixed."""
    net, grid = TwoTime(), torch.tensor([0.7, 0.0], dtype=torch.float64)
    noise = torch.randn(40, 2, dtype=torch.float64, generator=generator(9))

    class Fixed(type(PROCESS)):
        def noise(self, shape, t, generator=None):
            return noise

    process = Fixed()
    teacher = gaussian(process)
    soft = ctm(flow(net, process), teacher, DATA, generator(1), grid=grid, longest=1, denoising=0.0)[0]
    plain = tcd(flow(net, process), teacher, DATA, generator(1), grid=grid, step=teacher_step)[0]
    torch.testing.assert_close(soft, plain, rtol=1e-12, atol=1e-14)


def test_times_go_down_and_every_length_of_the_teachers_way_occurs_whole() -> None:
    grid, lengths, ends = times(PROCESS, 10), set(), set()
    place = {round(float(t), 12): i for i, t in enumerate(grid)}
    for seed in range(60):
        notes, whole = Notes(), None
        ctm(notes.map, None, DATA[:8], generator(seed), grid=grid, longest=3, denoising=0.0)
        (_, t, s, _), (_, u, _, _) = notes.calls[:2]
        assert bool((t > s).all())
        for a, b, c in zip(t.tolist(), u.tolist(), s.tolist(), strict=True):
            ends.add(place[round(c, 12)])
            if c < b < a and (c, b) != (0.0, PROCESS.t_min):  # elsewhere the second jump was not asked for
                lengths.add(place[round(b, 12)] - place[round(a, 12)])
                whole = place[round(b, 12)] - place[round(a, 12)] if whole is None else whole
                assert place[round(b, 12)] - place[round(a, 12)] == whole  # of the batch: none is cut short
    assert lengths == {1, 2, 3}
    assert ends == set(range(1, 11))


def test_the_denoising_term_is_the_denoisers_own_loss_scaled_to_the_first() -> None:
    net = TwoTime()
    loss, log = ctm(flow(net), TEACHER, DATA, generator(2), last_layer=net.last.weight)
    plain, bare = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) + log["denoising_scale"] * log["denoising"])
    assert log["denoising_scale"] != pytest.approx(1.0)
    assert "denoising" not in bare
    error = denoising_loss(flow(net).denoiser, DATA, generator(5), times=half_lognormal_times, weight=edm_weight())
    torch.testing.assert_close(gradient_ratio(3 * error, error, net.last.weight).item(), 3.0, rtol=1e-3, atol=0)


class Critic(torch.nn.Module):
    """A logit of two coordinates, with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.form = torch.nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.form)


def grads(loss: torch.Tensor, net: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))


def test_the_adversary_is_optional_and_reaches_the_student_alone() -> None:
    net, critic = TwoTime(), Critic()
    plain = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0]
    loss, log = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0, discriminator=critic, adversarial=0.3)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) + 0.3 * log["adversarial"])
    assert log["adversarial_scale"] == 1.0
    assert max(float((a - b).abs().max()) for a, b in zip(grads(loss, net), grads(plain, net), strict=True)) > 1e-4
    loss.backward()
    assert critic.form.grad is None
    off = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0, discriminator=critic, adversarial=0.0)[0]
    for a, b in zip(grads(off, net), grads(plain, net), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["ctm", "scott", "pcm", "scflow", "tlcm"])
def test_the_setups_take_an_adversary_as_a_part(name: str) -> None:
    """Without one it is off; with one the objective's own term is added."""
    net, critic = TwoTime(), Critic()
    where = {"student": flow(net), "teacher": TEACHER, "batch": DATA, "step": 1, "steps": 10}
    plain, bare = SETUPS[name].loss(**where, generator=generator(1))
    loss, log = SETUPS[name].loss(**where, generator=generator(1), discriminator=lambda x, *_: critic(x))
    assert "adversarial" not in bare
    assert math.isfinite(log["adversarial"])
    assert float(loss.detach()) != float(plain.detach())


def test_the_adversarys_gradient_at_the_last_layer_is_scaled_to_the_consistencys() -> None:
    """lambda = |grad consistency| / |grad adversary| within 0.01 to 10, so that beyond it is 0.01 or 10 times."""
    net = TwoTime()

    def added(size: float, last_layer: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        arguments = {"denoising": 0.0, "discriminator": lambda x: size * torch.tanh(x[:, 0])}
        loss, log = ctm(flow(net), TEACHER, DATA, generator(2), last_layer=last_layer, **arguments)
        plain = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0]
        return torch.autograd.grad(loss - plain, net.last.weight)[0], log["adversarial_scale"]

    plain = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0]
    aim = float(torch.autograd.grad(plain, net.last.weight)[0].norm())
    bare = float(added(1.0, None)[0].norm())
    for size in (aim / bare / 5, 3 * aim / bare):
        slope, scale = added(size, net.last.weight)
        assert float(slope.norm()) == pytest.approx(aim * size * bare / (size * bare + 1e-4), rel=1e-9)
        assert scale == pytest.approx(aim / (size * bare + 1e-4), rel=1e-9)
    assert added(1000 * aim / bare, net.last.weight)[1] == 0.01
    assert added(aim / bare / 1000, net.last.weight)[1] == 10.0


def test_a_loss_with_scaled_terms_can_be_trained_on() -> None:
    """The gradient of the whole is the sum of the terms', which were differentiated on the way to their scales."""
    net, critic = TwoTime(), Critic()
    arguments = {"last_layer": net.last.weight, "discriminator": critic}
    loss, log = ctm(flow(net), TEACHER, DATA, generator(2), **arguments)
    whole = grads(loss, net)
    only = grads(ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0], net)
    noisy = grads(ctm(flow(net), TEACHER, DATA, generator(2))[0], net)
    judged = grads(ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0, discriminator=critic)[0], net)
    for a, b, c, d in zip(whole, only, noisy, judged, strict=True):
        torch.testing.assert_close(a, b + log["denoising_scale"] * (c - b) + log["adversarial_scale"] * (d - b))


def test_the_discriminator_learns_from_the_ends_and_the_data() -> None:
    """Its hinge loss is 2 where nothing is told apart, and at the exact map and the data the made ones are data."""
    net, critic = TwoTime(), Critic()
    loss, _ = discriminator_loss(flow(net), DATA, generator(1), discriminator=critic)
    assert torch.autograd.grad(loss, critic.form)[0].abs().sum() > 0
    assert all(p.grad is None for p in net.parameters())
    seen: list[torch.Tensor] = []

    def constant(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(len(x), dtype=torch.float64)

    assert float(discriminator_loss(flow(net), DATA, generator(1), discriminator=constant)[0]) == 2.0
    assert not seen[0].requires_grad
    torch.testing.assert_close(seen[1], DATA)
    seen.clear()
    off = FlowMap(lambda x, t, s: exact().function(x, t, s) + 0.5, PROCESS, "flow")
    for model in (exact(), off):
        for seed in range(20):
            x = gaussian().sample(400, generator(100 + seed))
            discriminator_loss(model, x, generator(seed), discriminator=constant, target=exact())
    differences = torch.tensor([float((a - b).mean()) for a, b in zip(seen[::2], seen[1::2], strict=True)])
    scores = [float(d.mean() / (d.std() / math.sqrt(20))) for d in (differences[:20], differences[20:])]
    assert abs(scores[0]) < 5 < abs(scores[1])


def test_the_generators_ends_are_those_that_the_discriminator_is_trained_on() -> None:
    """Both sides' draws of route and noise are alike, so that with one generator both see the same ends."""
    net, seen = TwoTime(), []

    def discriminator(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach())
        return x.sum(1)

    ctm(flow(net), None, DATA, generator(4), denoising=0.0, discriminator=discriminator)
    discriminator_loss(flow(net), DATA, generator(4), discriminator=discriminator)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("process", [EDM(), PROCESS, RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_half_of_the_denoising_times_are_lognormal_and_half_at_much_noise(process: Process) -> None:
    """20000 times: Kolmogorov-Smirnov at 1e-6 for both laws; the least of the upper ones is 0.7 of the way down."""
    ratio = process.ratio(half_lognormal_times(20000, process, generator()))
    low, high = (float(end) ** (1 / 7) for end in ratio_range(process))
    share = (high - ratio[10000:] ** (1 / 7)) / (high - low)
    assert stats.kstest(share / 0.7, "uniform").pvalue > 1e-6
    inside = ratio[:10000]
    assert stats.kstest((inside.log() + 1.2) / 1.2, "norm").pvalue > 1e-6


def test_a_target_average_is_used_for_the_second_jump_too() -> None:
    net = TwoTime()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.last.bias += 0.3
    same = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0]
    assert float(ctm(flow(net), TEACHER, DATA, generator(2), target=flow(other), denoising=0.0)[0].detach()) != float(
        same.detach()
    )


def test_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="longest"):
        ctm(exact(), TEACHER, DATA, generator(), longest=0)
