"""Phased consistency models: sub-trajectories with their own ends."""

import pytest
import torch

from consilience.diffusion import EDM, Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives.pcm import discriminator_loss, noised, pcm
from consilience.diffusion.consistency.objectives.trajectory import Route, times
from consilience.diffusion.consistency.samplers import phase_grid
from consilience.diffusion.consistency.shared import elementwise_huber, squared

from .exact import COVARIANCE, MEAN, check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)


@pytest.mark.parametrize("phases", [1, 3, 50])
def test_zero_at_the_exact_map(phases: int) -> None:
    loss, _ = pcm(exact(), TEACHER, DATA, generator(1), phases=phases, step=exact_step(), distance=squared)
    assert float(loss) < 1e-18


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    check_gradient(lambda net, held: pcm(flow(net), TEACHER, DATA, generator(3), target=flow(held))[0], TwoTime())


def test_jumps_end_at_the_edges_that_phased_sampling_visits() -> None:
    notes, grid = Notes(), times(PROCESS, 50)
    for seed in range(5):
        pcm(notes.map, TEACHER, DATA, generator(seed), phases=4, grid=grid)
    ends = {float(s) for _, _, call, _ in notes.calls for s in call}
    assert ends == set(phase_grid(grid, 4)[1:].tolist())
    edges = phase_grid(grid, 4)
    for _, t, s, _ in notes.calls[::2]:
        above = edges[torch.searchsorted(-edges, -s) - 1]
        assert bool((t > s).all())
        assert bool((t <= above).all())


def test_one_phase_ends_at_the_data() -> None:
    notes = Notes()
    pcm(notes.map, TEACHER, DATA, generator(), phases=1)
    assert bool((notes.calls[0][2] == 0).all())


def test_as_many_phases_as_steps_are_the_teachers_own_steps() -> None:
    """The teacher's prediction, used as a map, is then the minimiser: its DDIM step is the target."""
    as_map = FlowMap(lambda x, t, s: TEACHER.predict("flow", x, t), PROCESS, "flow")
    assert float(pcm(as_map, TEACHER, DATA, generator(), phases=50, distance=squared)[0]) < 1e-24
    assert float(pcm(as_map, TEACHER, DATA, generator(), phases=4, distance=squared)[0]) > 1e-5


def test_the_distance_is_taken_value_by_value() -> None:
    """sqrt(d^2 + c^2) - c of each value with c = 0.001, against the two states that the map was asked for."""
    net, grid = TwoTime(), torch.tensor([0.7, 0.4, 0.0], dtype=torch.float64)
    default, named = (
        pcm(flow(net), TEACHER, DATA, generator(2), phases=1, grid=grid, distance=d)[0]
        for d in (None, elementwise_huber(1e-3))
    )
    torch.testing.assert_close(default, named, rtol=0, atol=0)
    a, b = torch.tensor([[3e-3, 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    by_hand = ((9e-6 + 1e-6) ** 0.5 - 1e-3) / 2
    assert float(elementwise_huber(1e-3)(a, b)) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("process", [PROCESS, RectifiedFlow(), EDM(0.002, 8.0)], ids=lambda p: type(p).__name__)
def test_states_noised_on_have_the_law_of_their_later_time(process: Process) -> None:
    """States of the exact law at an edge, 40,000 of them carried to one time: mean and covariance of the exact law
    there, each entry within 5 standard errors (false alarm below 1e-5), and times within one phase from the edge.
    """
    grid, count = times(process, 12), 40_000
    s = grid[8].expand(count)
    x = process.add_noise(gaussian().sample(count, generator()), process.noise((count, 2), s, generator(1)), s)
    t, (far,) = noised(process, Route((s,), s), grid, 3, (x,), generator(2))
    span = float(grid[0] - grid[-1]) / 3
    assert bool((t >= s).all())
    assert float(t.max()) <= min(float(grid[8]) + span, float(grid[0]))
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    away = far - alpha * MEAN
    covariance = alpha[:, :, None] ** 2 * COVARIANCE + sigma[:, :, None] ** 2 * torch.eye(2, dtype=torch.float64)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), away[:, :, None], upper=False)[:, :, 0]
    assert float(white.mean(0).abs().max()) < 5 / count**0.5
    spread = white.T @ white / count - torch.eye(2)
    assert float(spread.abs().max()) < 5 * (2 / count) ** 0.5


def test_the_adversary_is_optional_and_sees_the_students_states_noised() -> None:
    net, seen = TwoTime(), []

    def discriminator(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x, t))
        return 0.1 * x.sum(1)

    plain = pcm(flow(net), TEACHER, DATA, generator(1))[0]
    loss, log = pcm(flow(net), TEACHER, DATA, generator(1), discriminator=discriminator, adversarial=0.5)
    ((made, t),) = seen
    hinge = torch.relu(1 - 0.1 * made.sum(1)).mean()
    torch.testing.assert_close(loss - plain, 0.5 * hinge)
    assert log["adversarial"] == pytest.approx(float(hinge.detach()))
    assert made.requires_grad
    assert t.shape == (60,)


def test_the_discriminator_learns_from_both_states_and_the_student_does_not() -> None:
    net, weight = TwoTime(), torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    seen: list[torch.Tensor] = []

    def discriminator(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x @ weight

    loss, log = discriminator_loss(flow(net), TEACHER, DATA, generator(1), discriminator=discriminator)
    made, true = seen
    expected = torch.relu(1 + made @ weight).mean() + torch.relu(1 - true @ weight).mean()
    torch.testing.assert_close(loss, expected)
    assert log["loss"] == pytest.approx(float(loss.detach()))
    assert not made.requires_grad
    assert not true.requires_grad
    (slope,) = torch.autograd.grad(loss, weight)
    assert float(slope.abs().sum()) > 0


def test_at_the_exact_map_nothing_tells_the_two_states_apart() -> None:
    """Both are then the teacher's states at the edge, each with noise of its own: a linear discriminator's mean over
    40 batches of 60 is that of equal laws, within 5 standard errors (false alarm below 1e-5); off it, it is not.
    """
    off = FlowMap(lambda x, t, s: exact().function(x, t, s) + 0.8, PROCESS, "flow")

    def difference(model: FlowMap, seed: int) -> float:
        means: list[float] = []

        def discriminator(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            means.append(float(x.mean()))
            return torch.zeros(len(x), dtype=torch.float64)

        arguments = {"discriminator": discriminator, "target": exact(), "step": exact_step(), "phases": 2}
        loss, _ = discriminator_loss(model, TEACHER, DATA, generator(seed), **arguments)
        assert float(loss) == 2
        return means[0] - means[1]

    scores = []
    for model in (exact(), off):
        values = torch.tensor([difference(model, seed) for seed in range(40)], dtype=torch.float64)
        scores.append(abs(float(values.mean() / (values.std() / 40**0.5))))
    assert scores[0] < 5 < scores[1]
