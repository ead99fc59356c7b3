"""Consistency flow matching: zero for straight flows, plain flow matching in the limit, segments, both terms."""

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Process, RectifiedFlow
from consilience.diffusion.consistency import SETUPS, FlowMap, exact_map, pair, phased, segmented
from consilience.diffusion.consistency.objectives.consistency_fm import consistency_fm, levels
from consilience.diffusion.consistency.straight import mean_flow, own_time, straight_time

from .exact import MEAN, check_gradient, gaussian, generator, point
from .two_times import PROCESSES, TwoTimes, flow_map

PROCESS = RectifiedFlow()
finite = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


@finite
def test_both_terms_are_zero_where_the_flow_is_straight(process: Process) -> None:
    flow, data = exact_map(point(process)), MEAN.expand(64, 2)
    loss, log = consistency_fm(flow, None, data, generator(1), weight=1.0, step=1e-2)
    assert float(loss) < 1e-12
    assert set(log) == {"loss", "distance", "velocity"}


def test_where_it_is_curved_the_ends_agree_and_the_velocities_do_not() -> None:
    """With the exact teacher the ends differ by a Heun step's error, third order, the velocities by order one."""
    teacher = gaussian(PROCESS)
    flow, data = exact_map(teacher), teacher.sample(2000, generator())
    logs = [consistency_fm(flow, teacher, data, generator(1), step=step)[1] for step in (0.04, 0.02)]
    assert logs[1]["distance"] < logs[0]["distance"] / 16
    assert 2 < logs[0]["velocity"] / logs[1]["velocity"] < 6  # the square of a difference over the step


def test_anchored_everywhere_it_is_flow_matching_with_the_squared_length_for_a_weight() -> None:
    flow, data = flow_map(TwoTimes()), gaussian().sample(32, generator())
    loss, _ = consistency_fm(flow, None, data, generator(1), anchored=1.0, weight=0.0)
    draws = generator(1)
    tau, end, _ = levels(32, 2, 1e-3, draws)
    p = pair(PROCESS, data, own_time(PROCESS, tau), tau, draws)
    error = mean_flow(flow, {})(p.x_t, p.t, end) - (p.noise - p.x0)
    expected = ((p.t - end) ** 2 * error.square().sum(1)).mean()
    torch.testing.assert_close(loss, expected)


def test_times_stay_in_their_segment() -> None:
    tau, end, low = levels(5000, 4, 0.01, generator())
    assert bool(((end <= low) & (low <= tau) & (tau < end + 0.25)).all())
    assert sorted(set(end.tolist())) == [0.0, 0.25, 0.5, 0.75]
    assert bool(((tau - low - 0.01).abs() < 1e-12).logical_or(low == end).all())


def test_the_velocity_term_is_away_from_the_segments_end_and_above_the_anchor() -> None:
    """Per sample: a student whose velocity is its own time has the term (step)^2 x 2 there, and none elsewhere."""
    flow = FlowMap(lambda x, t, s: t[:, None].expand_as(x), PROCESS, "flow")
    _, log = consistency_fm(flow, None, torch.zeros(5000, 2).double(), generator(1), step=0.05, anchored=0.2)
    tau, end, _ = levels(5000, 2, 0.05, generator(1))
    inside = (tau > 0.2) & (tau - end > 1.01 * 0.05)
    assert log["velocity"] == pytest.approx(2 * 0.05**2 * float(inside.double().mean()))


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: consistency_fm(
            flow_map(net),
            gaussian(PROCESS) if taught else None,
            data,
            generator(3),
            target=flow_map(held),
            weight=0.5,
            step=0.1,
        )[0],
        TwoTimes(),
    )


def test_noise_of_its_own_at_the_second_time_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: at a straight flow the loss is no longer zero."""

    module = importlib.import_module("consilience.diffusion.consistency.objectives.consistency_fm")

    def unshared(process: Process, batch: Tensor, t: Tensor, s: Tensor, draws: torch.Generator) -> object:
        return pair(process, batch, t, s, draws)._replace(x_s=pair(process, batch, t, s, draws).x_s)

    monkeypatch.setattr(module, "pair", unshared)
    loss, _log = consistency_fm(exact_map(point(PROCESS)), None, MEAN.expand(64, 2), generator(1))
    assert float(loss) > 0.01


def test_bad_segments_are_refused() -> None:
    flow, data = flow_map(TwoTimes()), gaussian().sample(4, generator())
    for segments, step in ((0, 1e-3), (2, 0.5), (2, 0.0)):
        with pytest.raises(ValueError, match="at least one segment"):
            consistency_fm(flow, None, data, generator(), segments=segments, step=step)


def test_the_straight_times_of_the_path_are_those_of_rectified_flow() -> None:
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(straight_time(PROCESS, t), t)


def even(process: Process, steps: int) -> Tensor:
    """A grid of 0 to 1 in tau, whose second half and first are two segments."""
    return SETUPS["consistency-fm"].grid(process, steps)


@finite
@pytest.mark.parametrize("segments", [1, 2])
def test_one_step_of_eulers_in_each_segment_is_the_jump_to_its_end(process: Process, segments: int) -> None:
    flow, grid = exact_map(gaussian(process)), even(process, 2)[:: 3 - segments]
    x = process.prior((16, 2), generator(1), dtype=torch.float64)
    found = segmented(flow, x, grid, segments)
    torch.testing.assert_close(found.x, phased(flow, x, grid).x, rtol=1e-9, atol=1e-9)
    assert found.nfe == segments == len(found.states)
    assert torch.equal(found.grid, grid)


@pytest.mark.parametrize(("method", "order", "each"), [("euler", 1, 1), ("flow-midpoint", 2, 2)])
def test_more_steps_within_the_segments_come_to_the_ode_at_the_methods_order(
    method: str, order: int, each: int
) -> None:
    """At least, of a model of the Gaussian's own flow, whose map is known; three halvings of the step."""
    exact = gaussian(PROCESS)
    flow = FlowMap(lambda x, t, s: exact.predict("flow", x, t), PROCESS, "flow")
    x = PROCESS.prior((64, 2), generator(1), dtype=torch.float64)
    there = exact_map(exact)(x, 1.0, 0.0)
    errors = []
    for steps in (16, 32, 64, 128):
        found = segmented(flow, x, even(PROCESS, steps), 2, method)
        assert found.nfe == each * steps
        errors.append(float((found.x - there).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert 0.8 * 2**order < coarse / fine
        assert order > 1 or coarse / fine < 2.5


@finite
@pytest.mark.parametrize("method", ["euler", "flow-midpoint"])
def test_a_straight_flow_needs_no_more_than_one_step(method: str, process: Process) -> None:
    """Where training would end: all numbers of steps, and both methods, land on the datum."""
    flow, x = exact_map(point(process)), process.prior((16, 2), generator(1), dtype=torch.float64)
    for steps in (2, 4, 6):
        found = segmented(flow, x, even(process, steps), 2, method).x
        torch.testing.assert_close(found, MEAN.expand(16, 2), rtol=1e-6, atol=1e-6)


def test_the_model_is_asked_within_a_segment_for_its_end() -> None:
    asked = []

    def noted(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        asked.append((float(t), float(s)))
        return torch.zeros_like(x)

    x = torch.zeros(1, 2, dtype=torch.float64)
    segmented(FlowMap(noted, PROCESS, "flow"), x, even(PROCESS, 4), 2, "flow-midpoint")
    times = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
    assert [t for t, _ in asked] == pytest.approx(times)
    assert [s for _, s in asked] == [0.5] * 4 + [0.0] * 4
    asked.clear()
    setup = SETUPS["consistency-fm"]
    assert setup.sample(FlowMap(noted, PROCESS, "flow"), x, 6).nfe == 6
    assert [s for _, s in asked] == [0.5] * 3 + [0.0] * 3


def test_steps_that_segments_cannot_share_are_refused() -> None:
    flow, x = exact_map(gaussian(PROCESS)), torch.zeros(1, 2, dtype=torch.float64)
    for segments in (0, 2, 5):
        with pytest.raises(ValueError, match="cannot be shared"):
            segmented(flow, x, even(PROCESS, 4)[:-1], segments)
    with pytest.raises(ValueError, match="a multiple of as many steps, not in 3"):
        SETUPS["consistency-fm"].sample(flow, x, 3)


def test_a_students_folder_has_the_levels_of_one_to_three_steps_per_segment() -> None:
    schedulers = pytest.importorskip("diffusers", reason="needs diffusers (extra diffusion) for its schedulers")
    from consilience.diffusion.few_steps import scheduler_for

    setup, stock = SETUPS["consistency-fm"], schedulers.FlowMatchEulerDiscreteScheduler()
    kept = scheduler_for(stock, setup, 1.0).config["levels"]
    assert sorted(kept) == ["2", "4", "6"]
    for n, ratios in kept.items():
        tau = torch.arange(int(n) - 1, 0, -1, dtype=torch.float64) / int(n)
        torch.testing.assert_close(torch.tensor(ratios, dtype=torch.float64), tau / (1 - tau))
    assert sorted(scheduler_for(stock, SETUPS["pcm"], 1.0).config["levels"]) == ["4"]
