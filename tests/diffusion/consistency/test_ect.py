"""Easy consistency tuning: its mapping, its weight, plain denoising at its start."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.diffusion import EDM, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import exact_map
from consilience.diffusion.consistency.objectives.ect import earlier, ect, jump

from .exact import Net, check_gradient, gaussian, generator, student

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(), TrigFlow()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 80), st.floats(1e-4, 1))
def test_the_earlier_time_is_the_papers_mapping(t: float, decay: float) -> None:
    expected = max(t * (1 - decay * (1 + 8 / (1 + math.exp(t)))), 0.0)
    found = float(earlier(torch.tensor(t, dtype=torch.float64), decay))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 0 <= found < t


@pytest.mark.parametrize("decay", [0.0, -0.1, 1.5])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        earlier(torch.ones(1), decay)


@named
def test_at_decay_one_it_is_plain_denoising(process: Process) -> None:
    """Every r is 0, so the loss is E ||f(x_t) - x0|| / (sigma / alpha), worked out from the pair by hand."""
    net, data = Net(), gaussian().sample(32, generator())
    loss, log = ect(student(net, process), None, data, generator(1), decay=1.0)
    p = jump(process, data, generator(1), 1.0, -1.1, 2.0)
    assert float(process.ratio(p.s).abs().max()) < 1e-12
    assert log["ratio"] < 1e-12
    error = (student(net, process).x0(p.x_t, p.t) - data).norm(dim=1)
    torch.testing.assert_close(loss, (error / process.ratio(p.t)).mean(), rtol=1e-9, atol=1e-12)


@named
def test_the_gap_weights_each_sample(process: Process) -> None:
    """Against the same loss put together from pairs, without the shared functions."""
    net, data = Net(), gaussian().sample(32, generator())
    loss, log = ect(student(net, process), None, data, generator(1), decay=0.05, c=0.1)
    p = jump(process, data, generator(1), 0.05, -1.1, 2.0)
    flow = student(net, process)
    near, far = flow.x0(p.x_t, p.t), torch.where((process.ratio(p.s) > 0)[:, None], flow.x0(p.x_s, p.s), data)
    huber = torch.sqrt((near - far).square().sum(1) + 0.01) - 0.1
    expected = huber / (process.ratio(p.t) - process.ratio(p.s))
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-9, atol=1e-12)
    assert log["distance"] == pytest.approx(float(huber.mean()), rel=1e-9)
    assert abs(float(loss.detach()) - log["distance"]) > 0.5 * log["distance"]  # a missing weight would be seen


@named
def test_the_weighted_loss_of_the_exact_map_has_a_limit(process: Process) -> None:
    """Without a teacher the ends of one noise differ in proportion to the gap: loss / 1 stays, and 0 with it."""
    teacher = gaussian(process)
    flow, data = exact_map(teacher), teacher.sample(2000, generator())
    alone = [float(ect(flow, None, data, generator(1), decay=d)[0]) for d in (2**-7, 2**-9)]
    taught = [float(ect(flow, teacher, data, generator(1), decay=d)[0]) for d in (2**-5, 2**-7)]
    assert alone[1] == pytest.approx(alone[0], rel=0.1)
    assert taught[1] < 0.1 * taught[0]
    assert taught[1] < 1e-3 * alone[1]


def test_times_are_lognormal_within_the_processs_range() -> None:
    """Mean and deviation of log t of 20,000 draws within 5 standard errors (false alarm 1e-6), in a wide range."""
    p = jump(EDM(1e-9, 1e9), torch.zeros(20_000, 2, dtype=torch.float64), generator(), 0.5, -1.1, 2.0)
    logs = p.t.log()
    assert abs(float(logs.mean()) + 1.1) < 5 * 2 / 20_000**0.5
    assert abs(float(logs.std()) - 2) < 5 * 2 / 40_000**0.5
    near = jump(EDM(0.1, 1.0), torch.zeros(500, 2, dtype=torch.float64), generator(), 0.5, -1.1, 2.0).t
    assert float(near.min()) == pytest.approx(0.1)
    assert float(near.max()) == pytest.approx(1.0)


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = {"x": gaussian().sample(12, generator()), "shift": torch.linspace(-1, 1, 12, dtype=torch.float64)}
    check_gradient(
        lambda net, held: ect(student(net), None, data, generator(3), target=student(held), decay=0.05)[0], Net()
    )
