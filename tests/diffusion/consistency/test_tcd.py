"""Trajectory consistency distillation, and what all trajectory objectives take from `trajectory`."""

import itertools

import pytest
import torch

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives import trajectory
from consilience.diffusion.consistency.objectives.ctm import ctm
from consilience.diffusion.consistency.objectives.lcm import lcm
from consilience.diffusion.consistency.objectives.mlcm import mlcm
from consilience.diffusion.consistency.objectives.multistepcm import multistepcm
from consilience.diffusion.consistency.objectives.pcm import pcm
from consilience.diffusion.consistency.objectives.scott import scott
from consilience.diffusion.consistency.objectives.tcd import tcd
from consilience.diffusion.consistency.objectives.tdd import tdd
from consilience.diffusion.consistency.shared import pair, teacher_step

from .exact import check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow, squares

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(), TrigFlow()]
DATA = gaussian().sample(60, generator())


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_zero_at_the_exact_map_from_pure_noise_to_pure_data(process: Process) -> None:
    loss, log = tcd(exact(process), gaussian(process), DATA, generator(1), step=exact_step(process))
    assert float(loss) < 1e-18
    assert log["distance"] == float(loss)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_teachers_steps_leave_the_square_of_their_error(process: Process) -> None:
    """DDIM's step is of second order and its square of fourth, Heun's of sixth, on the finer half of even times."""
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    middle = float(process.time(torch.tensor(0.6, dtype=torch.float64)))
    for step, fall in ((trajectory.ddim, 12), (teacher_step, 40)):
        coarse, fine = (
            float(
                tcd(
                    exact(process),
                    gaussian(process),
                    gaussian().sample(1000, generator()),
                    generator(1),
                    grid=torch.linspace(middle, middle / 2 + end / 2, n + 1, dtype=torch.float64),
                    step=step,
                )[0]
            )
            for n in (4, 8)
        )
        assert coarse > fall * fine > 0


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    teacher = gaussian(PROCESS) if taught else None
    check_gradient(lambda net, held: tcd(flow(net), teacher, DATA, generator(3), target=flow(held))[0], TwoTime())


@pytest.mark.parametrize("objective", [ctm, lcm, mlcm, multistepcm, pcm, scott, tcd, tdd], ids=lambda f: f.__name__)
@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_every_objective_trains_in_float32_from_pure_noise_down(objective, process: Process) -> None:
    """Data in single precision, times of the whole range: loss and gradients are finite, and not all zero."""
    data, net = DATA.float(), TwoTime().float()
    teacher = GaussianMixture(torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2)[None], process)
    model = FlowMap(lambda x, t, s, w=None: net(x, t / 80, s / 80), process, "flow")
    loss, _ = objective(model, teacher, data, generator(2), **({"null": {}} if objective is lcm else {}))
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
    assert all(bool(g.isfinite().all()) for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0


def test_at_the_end_of_the_trajectory_it_is_consistency_distillation() -> None:
    """One hop to the grid's last step forces s = u = end: the loss is the distance to where the teacher lands."""
    net, teacher = TwoTime(), gaussian(PROCESS)
    grid = torch.tensor([0.7, 0.0], dtype=torch.float64)
    loss, _ = tcd(flow(net), teacher, DATA, generator(4), grid=grid)
    gen = generator(4)
    torch.randint(1, (60,), generator=gen)
    torch.rand(60, generator=gen, dtype=torch.float64)
    x = pair(PROCESS, DATA, torch.full((60,), 0.7, dtype=torch.float64), torch.zeros(60), gen).x_t
    by_hand = squares(flow(net).x0(x, 0.7), teacher.x0(x, 0.7)).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-10, atol=1e-12)


def test_both_jumps_share_noise_go_down_and_end_together() -> None:
    notes = Notes()
    grid = trajectory.times(PROCESS, 6)
    tcd(notes.map, None, DATA, generator(5), grid=grid)
    (x_t, t, s, _), (x_u, u, s_too, _) = notes.calls
    noise = (x_t - PROCESS.alpha(t)[:, None] * DATA) / PROCESS.sigma(t)[:, None]
    moving = (u < t) & (u > PROCESS.t_min)  # where u = s the map is asked for nothing, and the state itself is taken
    again = (x_u - PROCESS.alpha(u)[:, None] * DATA) / PROCESS.sigma(u)[:, None]
    torch.testing.assert_close(noise[moving & (u > s)], again[moving & (u > s)])
    assert bool((s == s_too).all())
    assert bool((t > s).all())
    assert int((moving & (u > s)).sum()) > 10
    following = {float(a): float(b) for a, b in itertools.pairwise(grid)}
    assert all(following[float(a)] == float(b) for a, b in zip(t[moving & (u > s)], u[moving & (u > s)], strict=True))
    assert len(s.unique()) == 6


def test_a_map_that_ignores_its_input_does_not_please_it() -> None:
    """The boundary: at u = s the target is the state itself, whatever the target's network says."""
    constant = FlowMap(lambda x, t, s: torch.zeros_like(x), PROCESS, "x0")
    grid = torch.tensor([0.7, 0.0], dtype=torch.float64)
    assert float(tcd(constant, gaussian(PROCESS), DATA, generator(), grid=grid)[0]) > 0.1


def test_edges_cut_evenly_and_routes_stay_in_their_segment() -> None:
    assert trajectory.edges(50, 4).tolist() == [13, 25, 38, 50]
    assert trajectory.edges(8, 8).tolist() == list(range(1, 9))
    grid = torch.linspace(1, 0, 13, dtype=torch.float64)
    route = trajectory.within_segments(grid, 3, 500, generator(), skip=3)
    (t, u), s = route.path, route.s
    assert set(s.tolist()) == set(grid[[4, 8, 12]].tolist())
    assert bool((t > u).all())
    assert bool((u >= s).all())
    assert float((t - s).max()) < 4.001 / 12
    assert bool(((t - u - torch.minimum(t - s, torch.tensor(3 / 12))).abs() < 1e-12).all())


def test_a_walk_takes_no_steps_of_no_length() -> None:
    path = tuple(torch.tensor(row, dtype=torch.float64) for row in ([0.5, 0.5], [0.2, 0.0], [0.0, 0.0]))
    x = DATA[:2]
    found = trajectory.walk(gaussian(PROCESS), x, path, teacher_step)
    direct = trajectory.walk(gaussian(PROCESS), x[1:], (path[0][1:], path[1][1:]), teacher_step)
    torch.testing.assert_close(found[1:], direct)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("call", [lambda: trajectory.edges(3, 4), lambda: trajectory.hop(3, 2, None, 4)])
def test_what_cannot_be_is_refused(call) -> None:
    with pytest.raises(ValueError, match="need 1 <="):
        call()
