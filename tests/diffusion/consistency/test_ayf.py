"""Align Your Flow: both objectives at the exact map, their limits, the guided teacher, and the tangent's norm."""

from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, exact_map, pair
from consilience.diffusion.consistency.objectives.ayf import ayf, guide, normalised
from consilience.diffusion.consistency.straight import logit_normal_length, mean_flow, step_size, straight_time
from consilience.diffusion.guidance import autoguidance
from consilience.diffusion.processes import expand

from .exact import check_gradient, gaussian, generator
from .two_times import TwoTimes, flow_map, named, swapped

KINDS = ["eulerian", "lagrangian"]
PROCESS = RectifiedFlow()


@named
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_zero_at_the_exact_map_and_not_with_swapped_times(kind: Any, process: Process) -> None:
    teacher = gaussian(process)
    flow, data = exact_map(teacher), teacher.sample(64, generator())
    right, wrong = (
        float(ayf(map_, teacher, data, generator(1), kind=kind, constant=None)[0]) for map_ in (flow, swapped(flow))
    )
    assert right < 1e-12
    assert wrong > 1e-3


@pytest.mark.parametrize("constant", [0.1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences_with_the_target_held(kind: Any, constant: float | None) -> None:
    data = gaussian().sample(12, generator(2))
    check_gradient(
        lambda net, held: ayf(
            flow_map(net), gaussian(PROCESS), data, generator(5), target=flow_map(held), kind=kind, constant=constant
        )[0],
        TwoTimes(),
    )


def test_its_gradient_is_the_limit_of_consistency_distillation() -> None:
    """That of |f(x_t, t, s) - sg f(x_{t - h}, t - h, s)|^2 / (h gap), for one sample, as h goes to 0."""
    net, teacher, h = TwoTimes(), gaussian(PROCESS), 1e-5
    flow, data = flow_map(net), gaussian().sample(1, generator())
    loss = ayf(flow, teacher, data, generator(1), constant=None)[0]
    mine = torch.autograd.grad(loss, list(net.parameters()))
    t, s = logit_normal_length()(1, PROCESS, generator(1))
    draws = generator(1)
    logit_normal_length()(1, PROCESS, draws)
    p = pair(PROCESS, data, t, s, draws)
    before = p.x_t - h * teacher.velocity(p.x_t, t)
    with torch.no_grad():
        far = flow(before, t - h, s)
    consistency = (flow(p.x_t, t, s) - far).square().sum() / (h * float(step_size(PROCESS, t, s)))
    for a, b in zip(mine, torch.autograd.grad(consistency, list(net.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def test_without_warm_up_it_is_flow_matching_to_the_teacher() -> None:
    net, teacher, data = TwoTimes(), gaussian(PROCESS), gaussian().sample(16, generator())
    flow = flow_map(net)
    loss = ayf(flow, teacher, data, generator(1), warmup=0.0, constant=None)[0]
    draws = generator(1)
    t, s = logit_normal_length()(16, PROCESS, draws)
    p = pair(PROCESS, data, t, s, draws)
    plain = (mean_flow(flow, {})(p.x_t, t, s) - teacher.predict("flow", p.x_t, t)).square().sum(1).mean()
    torch.testing.assert_close(loss, plain)


def test_a_tangent_is_divided_by_its_norm_and_the_constant() -> None:
    tangent = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.03, 0.04]], dtype=torch.float64)
    expected = torch.tensor([[3 / 5.1, 4 / 5.1], [0, 0], [0.2, 0.04 / 0.15]], dtype=torch.float64)
    torch.testing.assert_close(normalised(tangent, 0.1), expected)
    assert normalised(tangent, None) is tangent


def test_the_teacher_is_autoguided_and_a_drawn_scale_reaches_the_student() -> None:
    teacher = gaussian(PROCESS)
    weak = teacher.__class__(teacher.weights, teacher.means + 1.0, 2 * teacher.covariances)  # on another process
    x, t = torch.randn(6, 2, dtype=torch.float64, generator=generator()), torch.full((6,), 0.6, dtype=torch.float64)
    fixed, none = guide(teacher, weak, 2.0, x, generator())
    assert none == {}
    torch.testing.assert_close(fixed.x0(x, t), autoguidance(teacher, weak, 2.0).x0(x, t))
    drawn, cond = guide(teacher, weak, (1.0, 3.0), x, generator())
    scale = cond["guidance"]
    assert bool(((scale >= 1) & (scale < 3)).all())
    assert len(set(scale.tolist())) == 6
    strong, poor = teacher.x0(x, t), weak.on(PROCESS).x0(x, t)
    torch.testing.assert_close(drawn.x0(x, t), poor + expand(scale, x) * (strong - poor))
    seen: list[Tensor] = []
    inner = flow_map(TwoTimes())

    def function(x: Tensor, t: Tensor, s: Tensor, guidance: Tensor) -> Tensor:
        seen.append(guidance)
        return inner.function(x, t, s)

    student = FlowMap(function, PROCESS, "flow")
    ayf(student, teacher, teacher.sample(6, generator()), generator(1), weak=weak, guidance=(1.0, 3.0))
    assert seen
    assert all(bool(((g >= 1) & (g < 3)).all()) for g in seen)


def test_guided_by_itself_it_is_the_teacher() -> None:
    teacher, flow = gaussian(PROCESS), flow_map(TwoTimes())
    data = teacher.sample(8, generator())
    plain, same = (float(ayf(flow, teacher, data, generator(1), weak=weak)[0].detach()) for weak in (None, teacher))
    assert same == pytest.approx(plain)


@named
def test_lengths_are_logit_normal_and_starts_uniform(process: Process) -> None:
    """The mean logit within 5 standard errors: false alarm below 1e-6."""
    t, s = logit_normal_length(-0.8, 1.0)(4000, process, generator())
    assert bool((t >= s).all())
    tau, low = straight_time(process, t), straight_time(process, s)
    inside = (tau < 0.98) & (low > 0.02)  # EDM and TrigFlow end below 1
    length = torch.logit((tau - low)[inside])
    if isinstance(process, RectifiedFlow):
        every = torch.logit(tau - low)
        assert abs(float(every.median()) + 0.8) < 0.1
    assert float(length.max()) < 3


def test_bad_arguments_are_refused() -> None:
    flow, data = flow_map(TwoTimes()), gaussian().sample(4, generator())
    with pytest.raises(ValueError, match="distils a teacher"):
        ayf(flow, None, data, generator())
    with pytest.raises(ValueError, match="warm-up"):
        ayf(flow, gaussian(PROCESS), data, generator(), warmup=2.0)
    with pytest.raises(ValueError, match="no kind"):
        ayf(flow, gaussian(PROCESS), data, generator(), kind="other")  # type: ignore[arg-type]
