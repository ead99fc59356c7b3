"""The named setups: every objective runs at every stage of a run, on every process, and asks what its setup says."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.curriculum import ratio_range, sqrt_levels
from consilience.diffusion.consistency.setups import SETUPS, cm_levels, few_grid
from consilience.diffusion.denoisers import PREDICTIONS

from .exact import gaussian, generator
from .jumps import Notes
from .two_times import TwoTimes, flow_map

PROCESSES: list[Process] = [RectifiedFlow(), EDM(), VPLinear()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
every = pytest.mark.parametrize("name", SETUPS)
DATA = gaussian().sample(32, generator())
STEPS = 200


def teacher_of(name: str, process: Process, taught: bool = True) -> GaussianMixture | None:
    """The exact teacher where the setup takes one and this run has one."""
    setup = SETUPS[name]
    return gaussian(process) if setup.teacher == "needed" or (setup.teacher == "possible" and taught) else None


def parts_of(name: str, process: Process) -> dict[str, Any]:
    """What the setups that need more are given."""
    if name == "vct":
        return {"encoder": lambda x: (0.1 * x, torch.full_like(x, 0.9))}
    if name == "nct":
        return {"base": flow_map(TwoTimes(5), process), "control": lambda x: x[:, 0]}
    if name == "dcm":
        return {"boundary": 0.5 * (process.t_min + process.t_max), "expert": "semantic"}
    return {}


def student_of(name: str, net: nn.Module, own: Process, process: Process) -> FlowMap:
    """A network that lives on its own process, seen on the setup's; it takes nct's condition as ``shift``."""
    model = flow_map(net, own)
    if name == "nct":
        inner = model.function
        model = replace(model, function=lambda x, t, s, control=None: inner(x, t, s, shift=control))
    return model if own == process else model.on(process)


@named
@every
@pytest.mark.parametrize("taught", [False, True], ids=["untaught", "taught"])
def test_losses_and_gradients_are_finite_from_the_first_step_to_the_last(
    name: str, process: Process, taught: bool
) -> None:
    setup = SETUPS[name]
    if (setup.teacher, taught) in {("needed", False), ("none", True)}:
        with pytest.raises(ValueError, match=r"teacher"):
            setup.loss(
                flow_map(TwoTimes(), setup.process(process)),
                gaussian(process) if taught else None,
                DATA,
                step=0,
                steps=STEPS,
                **parts_of(name, process),
            )
        return
    on, net = setup.process(process, 0.6), TwoTimes()
    for step in (0, STEPS // 2, STEPS):
        student, target = (student_of(name, part, process, on) for part in (net, TwoTimes(1)))
        loss, log = setup.loss(
            student,
            teacher_of(name, process, taught),
            DATA,
            generator(step),
            step=step,
            steps=STEPS,
            target=target if setup.average(STEPS) is not None else None,
            **parts_of(name, on),
        )
        grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        assert loss.ndim == 0
        assert math.isfinite(float(loss.detach()))
        assert all(math.isfinite(value) for value in log.values())
        found = [grad for grad in grads if grad is not None]
        assert found
        assert all(bool(torch.isfinite(grad).all()) for grad in found)
        assert sum(float(grad.square().sum()) for grad in found) > 0


@every
def test_what_a_setup_needs_is_asked_for(name: str) -> None:
    setup, process = SETUPS[name], RectifiedFlow()
    for part in setup.needs:
        given = {k: v for k, v in parts_of(name, process).items() if k != part}
        with pytest.raises(ValueError, match=part):
            setup.loss(flow_map(TwoTimes(), process), teacher_of(name, process), DATA, step=0, steps=STEPS, **given)


@every
@pytest.mark.parametrize("taught", [False, True], ids=["untaught", "taught"])
def test_what_a_network_without_s_is_asked_follows_from_t(name: str, taught: bool) -> None:
    """Calls of one loss with different ends s lie in disjoint intervals [s, t] of time, or else s must be told."""
    setup = SETUPS[name]
    if name == "nct" or (setup.teacher == "needed" and not taught) or (setup.teacher == "none" and taught):
        return
    process = setup.process(VPLinear(), 0.6)
    spans: list[tuple[float, float]] = []
    for seed in range(4):
        notes = Notes(process)
        setup.loss(
            notes.map,
            teacher_of(name, process, taught),
            DATA,
            generator(seed),
            step=STEPS,
            steps=STEPS,
            **parts_of(name, process),
        )
        for x, t, s, _ in notes.calls:
            spans += zip(t.expand(len(x)).tolist(), s.expand(len(x)).tolist(), strict=True)
    ends = sorted({s for t, s in spans if t > s})
    if setup.two_times:
        assert len(ends) > max(setup.phases, 2)
        return
    assert len(ends) <= (setup.phases if name != "dcm" else 1)
    if setup.phases == 1 and name != "dcm":
        assert all(float(process.ratio(torch.tensor(s, dtype=torch.float64))) < 1e-12 for s in ends)
    for low, high in itertools.pairwise(ends):
        assert max(t for t, s in spans if s == low) <= high + 1e-12


CHEAP = ["cm", "ict", "ect", "scm", "epg", "meanflow", "lsd", "esd", "psd", "ayf", "rcm"]


@pytest.mark.parametrize("name", CHEAP)
def test_the_exact_map_of_the_teacher_is_the_floor_at_the_last_step(name: str) -> None:
    """With the exact teacher the loss there is that of a Heun step or of rounding, and far below a wrong map's."""
    setup, process = SETUPS[name], SETUPS[name].process(EDM(), 0.6)
    teacher = gaussian(process)
    wrong = GaussianMixture(torch.ones(1, dtype=torch.float64), 1 + teacher.means, 2 * teacher.covariances, process)
    at_exact, at_wrong = (
        float(setup.loss(model, teacher, DATA, generator(3), step=STEPS, steps=STEPS)[0].detach())
        for model in (exact_map(teacher), exact_map(wrong))
    )
    assert 0 <= at_exact < 1e-2 * at_wrong


@named
@every
def test_grids_go_from_all_noise_to_none(name: str, process: Process) -> None:
    setup = SETUPS[name]
    on = setup.process(process)
    steps = setup.phases if setup.edges else 3
    grid = setup.grid(on, steps)
    assert len(grid) == steps + 1
    assert float(grid[0]) == pytest.approx(on.t_max, rel=1e-12)
    assert float(on.sigma(grid[-1:])) == pytest.approx(0, abs=1e-12)
    assert bool((grid[1:] < grid[:-1]).all())
    if setup.edges:
        with pytest.raises(ValueError, match="phases"):
            setup.grid(on, steps + 1)


@every
def test_the_exact_map_sampled_by_a_setup_makes_the_data(name: str) -> None:
    """Mean and covariance of 4000 samples of the exact map; six standard errors, so a false alarm in 10^8."""
    setup = SETUPS[name]
    process = setup.process(RectifiedFlow(), 0.6)
    model = gaussian(process)
    x = process.prior((4000, 2), generator(1), dtype=torch.float64)
    steps = setup.phases if setup.edges else 2
    found = setup.sample(exact_map(model), x, steps, generator(2))
    assert found.nfe == steps
    assert bool(((found.x.mean(0) - model.mean).abs() < 6 * (model.covariance.diagonal() / 4000).sqrt() + 1e-2).all())
    torch.testing.assert_close(torch.cov(found.x.T), model.covariance, rtol=0.15, atol=0.03)


def test_few_grid_is_even_on_the_straight_path() -> None:
    process = RectifiedFlow()
    torch.testing.assert_close(few_grid(process, 4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    ratios = EDM().ratio(few_grid(EDM(), 2, 0.5))
    torch.testing.assert_close(ratios, torch.tensor([80.0, 0.5, 0.0]).double())
    with pytest.raises(ValueError, match="one step"):
        few_grid(process, 0)


def test_trigonometric_setups_keep_the_range_of_noise() -> None:
    found = SETUPS["scm"].process(EDM(0.01, 50.0), 0.7)
    assert isinstance(found, TrigFlow)
    assert found.sigma_data == 0.7
    assert ratio_range(found) == pytest.approx((0.01, 50.0))
    assert SETUPS["cm"].process(EDM(), 0.7) == EDM()


def test_parts_replace_what_the_schedule_says() -> None:
    student, setup = flow_map(TwoTimes()), SETUPS["ect"]
    by_schedule, _ = setup.loss(student, None, DATA, generator(1), step=0, steps=STEPS)
    same, _ = setup.loss(student, None, DATA, generator(1), step=STEPS, steps=STEPS, decay=0.5)
    late, _ = setup.loss(student, None, DATA, generator(1), step=STEPS, steps=STEPS)
    assert float(by_schedule.detach()) == float(same.detach())
    assert float(late.detach()) != float(same.detach())


def test_consistency_training_has_the_published_levels_in_long_runs_and_fewer_in_short_ones() -> None:
    long, short = ([cm_levels(step, steps) for step in (0, steps // 2, steps)] for steps in (800_000, 2500))
    assert long == [sqrt_levels(step, 800_000) for step in (0, 400_000, 800_000)]
    assert long[-1] == 151
    assert short[0] == 2
    assert short[-1] == 26
    assert cm_levels(50, 50) == 19
    profile = SETUPS["cm"].average(2500)
    assert profile is not None
    assert profile.beta(2501) == pytest.approx(0.9 ** (2 / 26), rel=1e-12)


def test_consistency_distillation_has_fixed_levels_and_no_target_average() -> None:
    """Published with N = 18 and mu = 0 from the first step to the last; the levels' average is training's alone."""
    setup, teacher = SETUPS["cm"], gaussian(EDM())
    student = flow_map(TwoTimes(), EDM())
    for steps in (50, 800_000):
        assert setup.average(steps, True) is None
        assert setup.average(steps) is not None
    for step in (0, STEPS // 2, STEPS):
        found, wanted = (
            float(setup.loss(student, teacher, DATA, generator(1), step=step, steps=STEPS, **parts)[0].detach())
            for parts in ({}, {"levels": 18})
        )
        assert found == wanted
    alone, wanted = (
        float(setup.loss(student, None, DATA, generator(1), step=STEPS, steps=STEPS, **parts)[0].detach())
        for parts in ({}, {"levels": 18})
    )
    assert alone != wanted


@pytest.mark.parametrize("name", [name for name in SETUPS if SETUPS[name].edges is not None])
def test_phases_can_be_as_many_as_a_grid_has_steps(name: str) -> None:
    """The loss and the edges exist for 1 to 50 phases, and what is jumped to are edges that it is sampled at."""
    for phases in (1, 3, 50):
        setup, process = replace(SETUPS[name], phases=phases), RectifiedFlow()
        notes = Notes(process)
        setup.loss(notes.map, gaussian(process), DATA, generator(3), step=STEPS, steps=STEPS)
        edges = setup.grid(process, phases)
        assert len(edges) == phases + 1
        ends = {s for _, t, s, _ in notes.calls for s in s.flatten().tolist()}
        near = [min(abs(end - float(edge)) for edge in edges) for end in ends]
        assert max(near) < 1e-9


def test_consistency_fm_is_anchored_everywhere_in_the_first_half() -> None:
    """There the loss is half-way's with every target the datum's own state; later it is not."""
    student, setup = flow_map(TwoTimes()), SETUPS["consistency-fm"]
    half: dict[str, Any] = {"anchored": 1.0}
    early, late, anchored = (
        float(setup.loss(student, None, DATA, generator(1), step=step, steps=STEPS, **parts)[0].detach())
        for step, parts in ((99, {}), (100, {}), (100, half))
    )
    assert early == anchored
    assert early != late


def test_ctm_without_a_teacher_is_taught_by_the_targets_denoiser() -> None:
    student, target = flow_map(TwoTimes()), flow_map(TwoTimes(1))
    alone, _ = SETUPS["ctm"].loss(student, None, DATA, generator(1), step=0, steps=STEPS, target=target)
    taught, _ = SETUPS["ctm"].loss(student, target.denoiser, DATA, generator(1), step=0, steps=STEPS, target=target)
    assert float(alone.detach()) == float(taught.detach())


# ------------------------------------------------------------------------------------------- a map on another process


@pytest.mark.parametrize("own", [EDM(), VPLinear(), RectifiedFlow(2.0), TrigFlow()], ids=lambda p: type(p).__name__)
@named
def test_the_exact_map_on_another_process_is_its_exact_map(own: Process, process: Process) -> None:
    there, expected = exact_map(gaussian(own)).on(process), exact_map(gaussian(process))
    for first, last in ((20.0, 0.5), (3.0, 0.0), (0.5, 0.05), (1.0, 1.0)):
        t, s = (process.time(torch.tensor(r, dtype=torch.float64)).expand(6) for r in (first, last))
        x = process.add_noise(gaussian().sample(6, generator(1)), torch.randn(6, 2, generator=generator(2)).double(), t)
        torch.testing.assert_close(there(x, t, s), expected(x, t, s), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(there(x, t, t), x, rtol=1e-12, atol=1e-12)


def test_pure_noise_on_both_processes_is_exact_and_against_a_finite_end_nearly() -> None:
    process = RectifiedFlow()
    x = torch.randn(50, 2, generator=generator()).double()
    expected = exact_map(gaussian(process)).x0(x, 1.0)
    both = exact_map(gaussian(RectifiedFlow(3.0))).on(process).x0(x, 1.0)
    torch.testing.assert_close(both, expected, rtol=1e-9, atol=1e-9)
    finite = exact_map(gaussian(EDM(0.002, 1e5))).on(process).x0(x, 1.0)
    torch.testing.assert_close(finite, expected, rtol=0, atol=1e-4)
    assert float((finite - expected).abs().max()) > 1e-9


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_on_moves_every_prediction(prediction: Any) -> None:
    own, process = VPLinear(), EDM()
    inner = exact_map(gaussian(own))
    model = flow_map(TwoTimes(), own, prediction)
    there = model.on(process)
    x = torch.randn(6, 2, generator=generator()).double()
    t, s = (process.time(torch.tensor(r, dtype=torch.float64)).expand(6) for r in (2.0, 0.3))
    own_t, own_s = own.time(process.ratio(t)), own.time(process.ratio(s))
    keep_t, keep_s = own.alpha(own_t)[:, None], own.alpha(own_s)[:, None]
    torch.testing.assert_close(there(x, t, s), model(keep_t * x, own_t, own_s) / keep_s, rtol=1e-9, atol=1e-10)
    assert inner.on(process).prediction == "flow"


def test_gradients_and_tangents_pass_through_a_moved_map_at_pure_noise() -> None:
    net = TwoTimes()
    model = flow_map(net, TrigFlow(0.6)).on(RectifiedFlow())
    x = torch.randn(4, 2, generator=generator()).double()
    t = torch.tensor([1.0, 0.9, 1.0, 0.3], dtype=torch.float64)
    zero = torch.zeros_like(t)
    value, slope = torch.func.jvp(lambda y, u: model(y, u, zero), (x, t), (x, torch.ones_like(t)))  # type: ignore[misc]
    assert bool(torch.isfinite(slope).all())
    grads = torch.autograd.grad(value.square().sum(), list(net.parameters()))
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
