"""Multistep consistency models: the loss in x0, adjusted DDIM, and both ends of the number of segments."""

import math

import pytest
import torch

from consilience.diffusion import EDM, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives.multistepcm import addim, multistepcm, teacher_steps
from consilience.diffusion.consistency.objectives.trajectory import ddim, times, within_segments
from consilience.diffusion.consistency.shared import pair, squared

from .exact import COVARIANCE, check_gradient, gaussian, generator
from .jumps import PROCESS, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)


@pytest.mark.parametrize("segments", [1, 4, 64])
def test_zero_at_the_exact_map(segments: int) -> None:
    assert float(multistepcm(exact(), TEACHER, DATA, generator(1), segments=segments, step=exact_step())[0]) < 1e-7


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    teacher = TEACHER if taught else None
    check_gradient(
        lambda net, held: multistepcm(flow(net), teacher, DATA, generator(3), target=flow(held))[0], TwoTime()
    )


def test_the_loss_is_the_papers_error_of_x0() -> None:
    """Algorithm 1 by its own formulas: DDIM to the segment's start, its inverse from t, the norm, SNR + 1."""
    net, grid = TwoTime(), times(PROCESS, 12)
    model = FlowMap(lambda x, t, s: net(x, t, s), PROCESS, "x0")
    gen = generator(4)
    route = within_segments(grid, 3, len(DATA), gen)
    p = pair(PROCESS, DATA, *route.path, gen)
    (a_t, s_t), (a_u, s_u), (a_s, s_s) = (
        (PROCESS.alpha(v)[:, None], PROCESS.sigma(v)[:, None]) for v in (p.t, p.s, route.s)
    )
    later = net(p.x_s, p.s, route.s)
    moving = p.s > route.s
    reached = torch.where(moving[:, None], a_s * later + s_s / s_u.clamp(min=1e-30) * (p.x_s - a_u * later), p.x_s)
    reference = (reached - s_s / s_t * p.x_t) / (a_s - a_t * s_s / s_t)
    error = (reference - net(p.x_t, p.t, route.s)).square().sum(1).sqrt()
    by_hand = ((a_t / s_t)[:, 0] ** 2 + 1) * error
    loss, _ = multistepcm(model, None, DATA, generator(4), segments=3, grid=grid)
    torch.testing.assert_close(loss, by_hand.mean())


def test_as_many_segments_as_steps_are_denoising() -> None:
    """Without a teacher: s = u, so that the reference is the datum itself (equation 9)."""
    net = TwoTime()
    model = FlowMap(lambda x, t, s: net(x, t, s), PROCESS, "x0")
    grid = times(PROCESS, 8)
    gen = generator(4)
    route = within_segments(grid, 8, len(DATA), gen)
    p = pair(PROCESS, DATA, *route.path, gen)
    by_hand = (1 + PROCESS.ratio(p.t) ** -2) * (net(p.x_t, p.t, route.s) - DATA).square().sum(1).sqrt()
    loss, _ = multistepcm(model, None, DATA, generator(4), segments=8, grid=grid)
    torch.testing.assert_close(loss, by_hand.mean())


def test_addim_without_error_is_ddim_and_goes_there_as_the_steps_shrink() -> None:
    x, t = DATA, torch.full((60,), 0.6, dtype=torch.float64)
    u = torch.full((60,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        addim(TEACHER, x, t, u, x0=TEACHER.x0(x, t)), ddim(TEACHER, x, t, u), rtol=1e-12, atol=1e-12
    )
    gaps = [float((addim(TEACHER, x, t, t - h) - ddim(TEACHER, x, t, t - h)).abs().max()) for h in (0.02, 0.01)]
    assert 3.5 < gaps[0] / gaps[1] < 4.6


@pytest.mark.parametrize("process", [VPLinear(), EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_addim_lengthens_the_noise_by_the_missing_variance(process) -> None:
    """Equation 14: ||z - alpha x0||^2 = (sigma^2 + variance of z) ||eps||^2 with that variance over ||eps||^2 / d."""
    teacher = gaussian(process)
    t = process.time(torch.full((60,), 1.5, dtype=torch.float64))
    u = process.time(torch.full((60,), 0.4, dtype=torch.float64))
    noise = torch.randn(60, 2, dtype=torch.float64, generator=generator(1))
    x = process.add_noise(DATA, noise, t)
    mean = teacher.x0(x, t)
    a_t, s_t, a_u, s_u = (v[:, None] for v in (process.alpha(t), process.sigma(t), process.alpha(u), process.sigma(u)))
    eps = (x - a_t * mean) / s_t
    lacking = (a_u - a_t * s_u / s_t) ** 2 * 0.75 * (mean - DATA).square().sum(1, keepdim=True)
    found = (addim(teacher, x, t, u, x0=DATA) - a_u * mean).square().sum(1, keepdim=True)
    torch.testing.assert_close(found, s_u**2 * eps.square().sum(1, keepdim=True) + lacking)


def test_addim_brings_the_trace_of_the_next_state_nearer_to_the_truth() -> None:
    """One long step on 20000 samples: DDIM's variance is too small; eta 1 makes it that of z up to 5 standard errors.

    The noise estimate is uncorrelated with the posterior mean only approximately, hence the margin of 3 %.
    """
    data = gaussian().sample(20000, generator(2))
    t, u = torch.full((20000,), 0.8, dtype=torch.float64), torch.full((20000,), 0.3, dtype=torch.float64)
    x = pair(PROCESS, data, t, u, generator(3)).x_t
    true = float(PROCESS.alpha(u)[0] ** 2 * COVARIANCE.trace() + 2 * PROCESS.sigma(u)[0] ** 2)

    def trace(z: torch.Tensor) -> float:
        return float(z.var(0).sum())

    plain, adjusted = trace(ddim(TEACHER, x, t, u)), trace(addim(TEACHER, x, t, u, x0=data, eta=1.0))
    assert plain < true < 1.5 * plain
    assert abs(adjusted - true) < 0.5 * (true - plain)


def test_teacher_steps_are_geometric_multiples() -> None:
    assert [teacher_steps(k, 100, 4) for k in (0, 50, 100, 900)] == [
        64,
        4 * round(math.sqrt(64 * 1280) / 4),
        1280,
        1280,
    ]
    assert all(teacher_steps(k, 100, 7) % 7 == 0 for k in range(101))


def test_squared_distance_and_weight_are_taken() -> None:
    net = TwoTime()
    once, thrice = (
        float(
            multistepcm(
                flow(net), TEACHER, DATA, generator(1), distance=squared, weight=lambda r, k=k: k * torch.ones_like(r)
            )[0].detach()
        )
        for k in (1.0, 3.0)
    )
    assert thrice == pytest.approx(3 * once)
