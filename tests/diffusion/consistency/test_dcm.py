"""DCM: the two parts of the path, the experts' routing, phases, and each expert's own terms."""

from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Process, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.objectives.dcm import (
    Expert,
    coherence,
    dcm,
    discriminator_loss,
    noised_alike,
    part,
    renoised,
    states,
    two_experts,
)

from .exact import check_gradient, gaussian, generator
from .two_times import TwoTimes, flow_map

PROCESS = RectifiedFlow()
EXPERTS: tuple[Expert, ...] = ("semantic", "detail")


def constant(value: float, process: Process = PROCESS) -> FlowMap:
    return FlowMap(lambda x, t, s: torch.full_like(x, value), process, "flow")


def test_each_time_goes_to_its_expert() -> None:
    both = two_experts(constant(1.0), constant(2.0), 0.6)
    x, s = torch.zeros(4, 2).double(), torch.zeros(4).double()
    t = torch.tensor([0.9, 0.6, 0.61, 0.1], dtype=torch.float64)
    assert both.function(x, t, s)[:, 0].tolist() == [1.0, 2.0, 1.0, 2.0]

    def never(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        raise AssertionError("the other expert was run")

    idle = FlowMap(never, PROCESS, "flow")
    assert two_experts(constant(1.0), idle, 0.6).function(x, t + 1, s)[0, 0] == 1.0
    assert two_experts(idle, constant(2.0), 0.6).function(x, t - 0.5, s)[0, 0] == 2.0
    with pytest.raises(ValueError, match="one process"):
        two_experts(constant(1.0), constant(1.0, EDM()), 0.6)


@pytest.mark.parametrize(("phases", "ends"), [(1, [0.6]), (2, [0.6, 0.8])])
def test_the_parts_meet_at_the_boundary_and_phases_divide_them(phases: int, ends: list[float]) -> None:
    t, s, end = part(PROCESS, 0.6, "semantic", 10, phases, 2000, generator())
    assert sorted(set((10 * t).round().int().tolist())) == [7, 8, 9, 10]
    torch.testing.assert_close(t - s, torch.full_like(t, 0.1))
    assert sorted({round(e, 9) for e in end.tolist()}) == ends
    assert bool((end <= s + 1e-12).all())
    t, _, end = part(PROCESS, 0.6, "detail", 10, 1, 2000, generator())
    assert sorted(set((10 * t).round().int().tolist())) == [1, 2, 3, 4, 5, 6]
    assert set(end.tolist()) == {0.0}


@pytest.mark.parametrize("process", [RectifiedFlow(3.0), VPLinear()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("expert", EXPERTS)
def test_at_the_exact_map_an_euler_steps_error_is_left(expert: Any, process: Process) -> None:
    teacher = gaussian(process)
    flow, data = exact_map(teacher), teacher.sample(1000, generator())
    losses = [
        float(dcm(flow, teacher, data, generator(1), boundary=0.5, expert=expert, levels=n, phases=2)[0])
        for n in (40, 160, 640)
    ]
    assert losses[1] < losses[0] / 4
    assert losses[2] < losses[1] / 4
    assert losses[2] < 1e-4


@pytest.mark.parametrize("expert", EXPERTS)
def test_gradients_are_those_of_differences_with_the_target_held(expert: Any) -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: dcm(
            flow_map(net),
            gaussian(PROCESS),
            data,
            generator(3),
            boundary=0.5,
            expert=expert,
            target=flow_map(held),
            levels=8,
        )[0],
        TwoTimes(),
    )


def test_only_the_expert_of_the_part_learns() -> None:
    nets = TwoTimes(0), TwoTimes(1)
    both = two_experts(flow_map(nets[0]), flow_map(nets[1]), 0.5)
    for which, expert in enumerate(EXPERTS):
        loss = dcm(
            both, gaussian(PROCESS), gaussian().sample(12, generator()), generator(3), boundary=0.5, expert=expert
        )[0]
        grads = [
            torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True) for net in nets
        ]
        assert all(g is not None and bool(g.abs().sum() > 0) for g in grads[which])
        assert all(g is None for g in grads[1 - which])


def test_coherence_is_of_changes_over_frames() -> None:
    far = torch.randn(2, 1, 8, 2, dtype=torch.float64, generator=generator())
    assert float(coherence(far + 5.0, far, 2, 3)) == pytest.approx(0.0, abs=1e-20)  # the same change everywhere
    ramp = torch.arange(8).double()[:, None].expand(2, 1, 8, 2)
    assert float(coherence(far + 2 * ramp, far, 2, 3)) == pytest.approx(36.0)
    assert float(coherence(far[:, :, :3] + 1, far[:, :, :3], 2, 3)) == 0.0


def test_the_semantic_expert_adds_coherence() -> None:
    process = RectifiedFlow()
    like = torch.randn(6, 1, 5, dtype=torch.float64, generator=generator())
    student = FlowMap(lambda x, t, s: torch.sin(x), process, "flow")
    from consilience.diffusion import Denoiser

    teacher = Denoiser(lambda x, t: 0.5 * x, process, "x0")
    plain, _ = dcm(student, teacher, like, generator(1), boundary=0.5)
    loss, log = dcm(student, teacher, like, generator(1), boundary=0.5, frames=2)
    near, far, _ = states(student, teacher, like, generator(1), boundary=0.5, expert="semantic")
    torch.testing.assert_close(loss - plain, coherence(near, far, 2, 3))
    assert log["coherence"] > 0


@pytest.mark.parametrize("process", [EDM(), VPLinear(), RectifiedFlow(2.0)], ids=lambda p: type(p).__name__)
def test_a_state_renoised_keeps_its_datum_and_adds_the_noise_of_the_path(process: Process) -> None:
    """With the state's own noise it is the path's state at the later time."""
    data, noise = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator())
    s, t = (process.time(torch.full((5,), r).double()) for r in (0.3, 2.0))
    x_s, x_t = process.add_noise(data, noise, s), process.add_noise(data, noise, t)
    torch.testing.assert_close(renoised(process, x_s, s, t, noise), x_t)


def test_the_detail_expert_adds_the_adversary_and_the_features() -> None:
    teacher, student = gaussian(PROCESS), flow_map(TwoTimes())
    data = teacher.sample(12, generator())
    where: dict[str, Any] = {"boundary": 0.5, "expert": "detail"}
    plain, _ = dcm(student, teacher, data, generator(1), **where)
    loss, log = dcm(
        student, teacher, data, generator(1), **where,
        discriminator=lambda x, t: x.sum(1), features=lambda x, t: 3 * x, adversarial=0.2,
    )  # fmt: skip
    draws = generator(1)
    near, far, end = states(student, teacher, data, draws, **where)
    t, made, true = noised_alike(PROCESS, near, far, end, 0.5, draws)
    assert bool(((t >= end) & (t <= 0.5)).all())
    hinge, match = torch.relu(1 - made.sum(1)).mean(), (9 * (made - true).square()).mean()
    torch.testing.assert_close(loss - plain, 0.2 * (5 * hinge + 10 * match))
    assert log["adversarial"] == pytest.approx(float(hinge.detach()))
    value, _ = discriminator_loss(PROCESS, lambda x, t: x.sum(1), near, far, end, 0.5, generator(4))
    _, made, true = noised_alike(PROCESS, near, far, end, 0.5, generator(4))
    torch.testing.assert_close(value, (torch.relu(1 + made.sum(1)) + torch.relu(1 - true.sum(1))).mean().detach())
    assert not value.requires_grad


def test_bad_arguments_are_refused() -> None:
    student, teacher, data = flow_map(TwoTimes()), gaussian(PROCESS), gaussian().sample(4, generator())
    with pytest.raises(ValueError, match="distils a teacher"):
        dcm(student, None, data, generator(), boundary=0.5)
    with pytest.raises(ValueError, match="boundary must lie"):
        dcm(student, teacher, data, generator(), boundary=1.0)
    with pytest.raises(ValueError, match="no place for 30 phases"):
        dcm(student, teacher, data, generator(), boundary=0.5, phases=30)
    with pytest.raises(ValueError, match="semantic expert's"):
        dcm(student, teacher, data, generator(), boundary=0.5, expert="detail", frames=2)
    with pytest.raises(ValueError, match="the detail's"):
        dcm(student, teacher, data, generator(), boundary=0.5, features=lambda x, t: x)
