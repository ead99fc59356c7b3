"""rCM: the tangent and the score term at the exact map, the fake score's floor, and the student's own samples."""

from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Denoiser, GaussianMixture, Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.maps import angle
from consilience.diffusion.consistency.objectives.rcm import (
    SCORE_TIMES,
    distribution_matching,
    fake_score_loss,
    rcm,
    rollout,
    tangent,
    trig_v,
)
from consilience.diffusion.consistency.shared import dropout_seed

from .exact import EIGENVALUES, check_gradient, gaussian, generator, z_score
from .two_times import TwoTimes, example, flow_map, named

PROCESS = RectifiedFlow()


def to_data(process: Process, count: int = 64) -> Any:
    """States at drawn times, their ends at the data."""
    p = example(process, count)
    return p._replace(s=process.time(torch.zeros_like(p.t)))


@named
def test_the_loss_is_zero_at_the_exact_map_of_the_teacher(process: Process) -> None:
    teacher = gaussian(process)
    data = teacher.sample(64, generator())
    loss, log = rcm(exact_map(teacher), teacher, data, generator(1), fake=teacher)
    assert float(loss) < 1e-12
    assert log["tangent"] < 1e-7
    wrong = FlowMap(lambda x, t, s, **_: teacher.predict("flow", x, t), process, "flow")
    assert float(rcm(wrong, teacher, data, generator(1))[0]) > 1e-2


@named
def test_the_tangent_is_cos_times_the_derivative_of_the_data_along_the_path(process: Process) -> None:
    """By a difference along the teacher's exact map, at any student."""
    teacher, p = gaussian(process), to_data(process, 16)
    path, model = exact_map(teacher), flow_map(TwoTimes(), process)
    theta = angle(process, p.t).clamp(0.1, 1.4)
    step = 1e-5

    def at(theta: Tensor) -> Tensor:
        return process.time(torch.tan(theta))

    t = at(theta)
    x = process.add_noise(p.x0, p.noise, t)
    p = p._replace(t=t, x_t=x)
    with torch.no_grad():
        ahead, behind = (model.x0(path(x, t, at(theta + d)), at(theta + d)) for d in (step, -step))
    slope = (ahead - behind) / (2 * step)
    _, g = tangent(model, teacher, p, 1.0, 0)
    torch.testing.assert_close(g, torch.cos(theta)[:, None] * slope, rtol=1e-5, atol=1e-5)
    _, finite = tangent(model, teacher, p, 1.0, 0, "finite")
    assert float((finite - g).abs().max()) < 1e-2 * (1 + float(g.abs().max()))


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.8])
def test_the_warm_up_fades_in_the_state_and_not_the_derivative(warmup: float) -> None:
    """Against the whole tangent, which is tested above: only the weights of F - F_teacher and of the state differ."""
    teacher, p = gaussian(PROCESS), to_data(PROCESS)
    model = flow_map(TwoTimes())
    (_, g), (_, whole) = (tangent(model, teacher, p, r, 0) for r in (warmup, 1.0))
    theta = angle(PROCESS, p.t)[:, None]
    cos, sin, norm = torch.cos(theta), torch.sin(theta), torch.hypot(1 - p.t, p.t)[:, None]
    with torch.no_grad():
        ahead = trig_v(model, {})(p.x_t, p.t, p.s) - teacher.v(p.x_t, p.t) / norm
    state = (1 - warmup) * cos * sin * p.x_t / norm
    expected = cos * (cos - torch.sqrt(1 - warmup**2 * sin**2)) * ahead + state
    torch.testing.assert_close(g - whole, expected)


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: rcm(flow_map(net), gaussian(PROCESS), data, generator(3), target=flow_map(held))[0],
        TwoTimes(),
    )


def other(process: Process) -> GaussianMixture:
    model = gaussian(process)
    return GaussianMixture(model.weights, model.means + 0.5, model.covariances, process)


def test_the_score_term_moves_samples_from_the_fake_to_the_real() -> None:
    """Its gradient is 2 (fake's data - the teacher's) / mean |sample - the teacher's|, 0 where they agree."""
    real, fake = gaussian(PROCESS), other(PROCESS)
    sample = fake.sample(500, generator()).requires_grad_()
    value = distribution_matching(fake, real, sample, {}, generator(1), SCORE_TIMES)
    (grad,) = torch.autograd.grad(value.sum(), sample)
    draws = generator(1)
    t = SCORE_TIMES(500, PROCESS, draws)
    x = PROCESS.add_noise(sample.detach(), torch.randn(500, 2, dtype=torch.float64, generator=draws), t)
    clean = real.x0(x, t)
    scale = (sample.detach() - clean).abs().mean(1, keepdim=True)
    torch.testing.assert_close(grad, 2 * (fake.x0(x, t) - clean) / scale)
    assert float((sample.detach() - 0.01 * grad).mean()) < float(sample.detach().mean())  # real's mean is below
    same = distribution_matching(real, real, sample, {}, generator(1), SCORE_TIMES)
    assert float(same.detach().abs().max()) == 0.0


def test_the_terms_are_added_with_the_weight() -> None:
    data, flow = gaussian().sample(16, generator()), flow_map(TwoTimes())
    alone, _ = rcm(flow, gaussian(PROCESS), data, generator(1))
    loss, log = rcm(flow, gaussian(PROCESS), data, generator(1), fake=other(PROCESS), regularisation=0.25)
    assert float(loss.detach()) == pytest.approx(float(alone.detach()) + 0.25 * log["score"])


def test_samples_are_the_students_own_and_only_the_last_step_has_a_gradient() -> None:
    calls = []
    inner = flow_map(TwoTimes())

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        calls.append((torch.is_grad_enabled(), float(t.max())))
        return inner.function(x, t, s)

    flow = FlowMap(function, PROCESS, "flow")
    counts = set()
    for seed in range(40):
        calls.clear()
        like = torch.full((4, 2), float(seed), dtype=torch.float64)
        sample = rollout(flow, like, {}, generator(seed), 4, SCORE_TIMES)
        assert [on for on, _ in calls] == [False] * (len(calls) - 1) + [True]
        times = [t for _, t in calls]
        assert times[0] == PROCESS.t_max
        assert times == sorted(times, reverse=True)
        counts.add(len(calls))
        torch.testing.assert_close(sample, rollout(flow, 0 * like, {}, generator(seed), 4, SCORE_TIMES))  # not of data
    assert counts == {1, 2, 3, 4}


def test_the_fake_score_is_best_at_the_denoiser_of_the_students_samples() -> None:
    """The exact map makes exact samples; the floor is the spread of x0 given x over sin^2, by axes.

    Within 5 standard errors of 30 batches: false alarm below 1e-4.
    """
    teacher = gaussian(PROCESS)
    flow, values, worse = exact_map(teacher), [], []
    v = EIGENVALUES[:, None]
    for k in range(30):
        like = torch.zeros(400, 2, dtype=torch.float64)
        mine = float(fake_score_loss(teacher, flow, like, generator(k), rollout_steps=1)[0])
        draws = generator(k)
        dropout_seed(draws)
        PROCESS.prior((400, 2), draws, dtype=torch.float64)
        torch.randint(1, (), generator=draws)
        t = SCORE_TIMES(400, PROCESS, draws)
        a, b = 1 - t, t
        expected = (v * (a**2 + b**2) / (a**2 * v + b**2)).sum(0).mean()
        values.append(mine - float(expected))
        worse.append(float(fake_score_loss(other(PROCESS), flow, like, generator(k), rollout_steps=1)[0]) - mine)
    assert abs(z_score(values, 0.0)) < 5
    assert min(worse) > 0


def test_a_teacher_is_needed() -> None:
    with pytest.raises(ValueError, match="distils a teacher"):
        rcm(flow_map(TwoTimes()), None, torch.zeros(2, 2).double(), generator())


def test_the_teacher_may_be_on_another_process() -> None:
    data, flow = gaussian().sample(16, generator()), exact_map(gaussian(PROCESS))
    model: Denoiser = gaussian()
    assert float(rcm(flow, model, data, generator(1), fake=model)[0]) < 1e-12
