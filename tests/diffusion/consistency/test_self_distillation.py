"""Flow maps on the straight path, and the Lagrangian, Eulerian and progressive equations at the exact map."""

from typing import Any

import pytest
import torch
from scipy.stats import kstest

from consilience.diffusion import EDM, Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.maps import Jvp
from consilience.diffusion.consistency.objectives.self_distillation import residual, self_distillation
from consilience.diffusion.consistency.straight import (
    along_end,
    along_path,
    mean_flow,
    own_time,
    pace,
    step_size,
    straight_time,
    uniform_time,
)
from consilience.diffusion.denoisers import Prediction
from consilience.diffusion.processes import expand

from .exact import check_gradient, gaussian, generator, z_score
from .two_times import TwoTimes, example, flow_map, named, spread_of_flow, swapped

HOW: tuple[Jvp, ...] = ("exact", "finite")
KINDS = ["lagrangian", "eulerian", "progressive"]


@named
def test_the_straight_time_is_its_own_inverse_and_derivative(process: Process) -> None:
    t = torch.linspace(process.t_min, process.t_max * 0.98, 40, dtype=torch.float64)
    tau = straight_time(process, t)
    torch.testing.assert_close(own_time(process, tau), t, rtol=1e-9, atol=1e-9)
    step = 1e-6 * t
    slope = (straight_time(process, t + step) - straight_time(process, t - step)) / (2 * step)
    torch.testing.assert_close(pace(process, t), slope, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(step_size(process, t, t.flip(0)), tau - tau.flip(0), rtol=1e-9, atol=1e-12)
    ends = own_time(process, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([process.t_min, process.t_max], rel=1e-9)


@named
def test_the_average_flow_is_the_straight_path_between_the_states(process: Process) -> None:
    """y_s = y_t + (tau_s - tau_t) u, and at s = t it is the flow."""
    flow, p = exact_map(gaussian(process)), example(process)
    u = mean_flow(flow, {})(p.x_t, p.t, p.s)
    y_t, y_s = (
        x / expand(process.alpha(t) + process.sigma(t), x) for x, t in ((p.x_t, p.t), (flow(p.x_t, p.t, p.s), p.s))
    )
    torch.testing.assert_close(y_s, y_t - expand(step_size(process, p.t, p.s), u) * u, rtol=1e-9, atol=1e-9)
    there = mean_flow(flow, {})(p.x_t, p.t, p.t)
    torch.testing.assert_close(there, gaussian(process).predict("flow", p.x_t, p.t), rtol=1e-8, atol=1e-8)


@named
def test_both_derivatives_are_those_of_differences_whatever_is_predicted(process: Process) -> None:
    p = example(process, 16)
    t = own_time(process, 0.1 + 0.8 * straight_time(process, p.t))
    s = own_time(process, torch.full((16,), 0.05, dtype=torch.float64))
    x = process.add_noise(p.x0, p.noise, t)
    predictions: tuple[Prediction, ...] = ("flow", "x0", "v")
    for prediction in predictions:
        model = flow_map(TwoTimes(), process, prediction)
        flow = torch.ones_like(x)
        for name, found, wanted in (
            ("path", along_path(model, x, t, s, flow, {}), along_path(model, x, t, s, flow, {}, "finite")),
            ("end", along_end(model, x, t, s, {}), along_end(model, x, t, s, {}, "finite")),
        ):
            torch.testing.assert_close(found[0], mean_flow(model, {})(x, t, s), msg=name)
            scale = float(found[1].detach().abs().max()) + 1
            assert float((found[1] - wanted[1]).detach().abs().max()) < 2e-3 * scale, name


@named
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_equations_hold_at_the_exact_map_and_not_with_swapped_times(kind: Any, own: bool, process: Process) -> None:
    flow, p = exact_map(gaussian(process)), example(process)
    teacher = None if own else gaussian(process)
    found = residual(kind, flow, flow, teacher, p, generator())
    assert float(found.abs().max()) < 1e-6
    other = swapped(flow)
    assert float(residual(kind, other, flow, teacher, p, generator()).abs().max()) > 0.05


@named
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_zero_at_the_exact_map_of_the_teacher(kind: Any, process: Process) -> None:
    teacher = gaussian(process)
    data = teacher.sample(64, generator())
    loss, log = self_distillation(exact_map(teacher), teacher, data, generator(1), kind=kind, diagonal=0.5)
    assert float(loss) < 1e-12
    assert set(log) == {"loss", "diagonal", kind}


def test_without_a_teacher_the_diagonal_has_the_known_floor() -> None:
    """The spread of noise - x0 given x_t; within 5 standard errors of 40 batches: false alarm below 1e-4."""
    process = RectifiedFlow()
    flow, values, expected = exact_map(gaussian(process)), [], []
    for k in range(40):
        data = gaussian(process).sample(500, generator(k))
        values.append(float(self_distillation(flow, None, data, generator(100 + k), diagonal=1.0)[0]))
        expected.append(float(spread_of_flow(uniform_time(500, process, generator(100 + k))).mean()))
    assert abs(z_score([a - b for a, b in zip(values, expected, strict=True)], 0.0)) < 5


@named
def test_equal_times_are_uniform_on_the_straight_path_and_others_in_the_triangle(process: Process) -> None:
    """Kolmogorov and Smirnov's test of equal times, of t^2 and of s / t below it, which are uniform then: at a level
    of 10^-6 each.
    """
    calls = []

    def noted(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        calls.append((straight_time(process, t), straight_time(process, s)))
        return torch.zeros_like(x)

    data = gaussian(process).sample(4000, generator())
    self_distillation(
        FlowMap(noted, process, "flow"), None, data, generator(1), kind="progressive", diagonal=0.5, jvp="finite"
    )
    (same, end), (t, s) = calls[0], calls[-1]
    torch.testing.assert_close(same, end)
    for found in (same, t**2, s / t):
        assert kstest(found.numpy(), "uniform").pvalue > 1e-6
    assert kstest(t.numpy(), "uniform").pvalue < 1e-6


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences_with_the_target_held(kind: Any, taught: bool) -> None:
    data = gaussian().sample(12, generator())
    teacher = gaussian() if taught else None
    check_gradient(
        lambda net, held: self_distillation(
            flow_map(net), teacher, data, generator(3), target=flow_map(held), kind=kind, diagonal=0.0
        )[0],
        TwoTimes(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_do_as_well(kind: Any) -> None:
    data, flow = gaussian().sample(12, generator()), flow_map(TwoTimes())
    exact, finite = (
        float(self_distillation(flow, None, data, generator(3), kind=kind, jvp=how)[0].detach()) for how in HOW
    )
    assert finite == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_drop_the_same_units(kind: Any) -> None:
    """With s = t everywhere all three equations are about u(x, t, t) alone, and hold only under one mask."""
    net = TwoTimes(dropout=0.5).train()
    flow = flow_map(net)
    p = example(RectifiedFlow(), 16)
    found = residual(kind, flow, flow, None, p._replace(s=p.t), generator())
    assert float(found.detach().abs().max()) < 1e-10


def test_bad_shares_and_kinds_are_refused() -> None:
    data, flow = gaussian().sample(4, generator()), flow_map(TwoTimes(), EDM())
    with pytest.raises(ValueError, match="share of samples"):
        self_distillation(flow, None, data, generator(), diagonal=1.5)
    with pytest.raises(ValueError, match="no kind 'other'"):
        self_distillation(flow, None, data, generator(), kind="other", diagonal=0.0)  # type: ignore[arg-type]
