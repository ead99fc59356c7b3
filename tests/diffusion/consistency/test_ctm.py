"""Consistency trajectory models: soft consistency, where its gradient goes, and the terms added."""

import copy

import pytest
import torch

from consilience.diffusion.consistency.objectives.ctm import ctm, gradient_ratio
from consilience.diffusion.consistency.objectives.tcd import tcd
from consilience.diffusion.consistency.objectives.trajectory import times
from consilience.diffusion.consistency.shared import teacher_step, through
from consilience.diffusion.losses import denoising_loss, edm_weight, lognormal_times

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


def test_times_go_down_and_every_length_of_the_teachers_way_occurs() -> None:
    grid, lengths, ends = times(PROCESS, 10), set(), set()
    place = {round(float(t), 12): i for i, t in enumerate(grid)}
    for seed in range(60):
        notes = Notes()
        ctm(notes.map, None, DATA[:8], generator(seed), grid=grid, longest=3, denoising=0.0)
        (_, t, s, _), (_, u, _, _) = notes.calls[:2]
        assert bool((t > s).all())
        for a, b, c in zip(t.tolist(), u.tolist(), s.tolist(), strict=True):
            ends.add(place[round(c, 12)])
            if c < b < a:  # elsewhere the second jump was not asked for
                lengths.add(place[round(b, 12)] - place[round(a, 12)])
    assert lengths == {1, 2, 3}
    assert ends == set(range(1, 11))


def test_the_denoising_term_is_the_denoisers_own_loss_scaled_to_the_first() -> None:
    net = TwoTime()
    loss, log = ctm(flow(net), TEACHER, DATA, generator(2), last_layer=net.last.weight)
    plain, bare = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) + log["denoising_scale"] * log["denoising"])
    assert log["denoising_scale"] != pytest.approx(1.0)
    assert "denoising" not in bare
    error = denoising_loss(flow(net).denoiser, DATA, generator(5), times=lognormal_times(), weight=edm_weight())
    torch.testing.assert_close(gradient_ratio(3 * error, error, net.last.weight).item(), 3.0, rtol=1e-3, atol=0)


def test_the_adversarial_term_is_added_and_reaches_the_student() -> None:
    net = TwoTime()
    plain = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0)[0]
    loss, log = ctm(flow(net), TEACHER, DATA, generator(2), denoising=0.0, adversarial=lambda end: -0.4 * end.mean())
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) + log["adversarial"])
    one, two = (torch.autograd.grad(part, list(net.parameters())) for part in (loss, plain))
    assert max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) > 1e-4


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
