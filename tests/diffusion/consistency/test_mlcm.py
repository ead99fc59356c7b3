"""Multistep latent consistency models: the teacher's own states, and fewer and fewer segments."""

import pytest
import torch

from consilience.diffusion import EDM, Process, RectifiedFlow, solve
from consilience.diffusion.consistency.objectives.mlcm import mlcm, progressive, teacher_state
from consilience.diffusion.consistency.objectives.pcm import pcm
from consilience.diffusion.consistency.objectives.trajectory import at, ddim, times
from consilience.diffusion.consistency.shared import squared, teacher_step

from .exact import check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)


@pytest.mark.parametrize("segments", [8, 2])
def test_zero_at_the_exact_map(segments: int) -> None:
    assert float(mlcm(exact(), TEACHER, DATA, generator(1), segments=segments, step=exact_step())[0]) < 1e-18


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    check_gradient(lambda net, held: mlcm(flow(net), TEACHER, DATA, generator(3), target=flow(held))[0], TwoTime())


def test_without_a_rollout_it_is_the_phased_loss() -> None:
    net = TwoTime()
    one = mlcm(flow(net), TEACHER, DATA, generator(1), segments=4, rollout=0)[0]
    two = pcm(flow(net), TEACHER, DATA, generator(1), phases=4, distance=squared)[0]
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_with_a_rollout_the_data_do_not_matter_and_the_states_lie_on_the_teachers_trajectory() -> None:
    process = RectifiedFlow()
    notes = Notes(process)
    teacher = gaussian(process)
    first = mlcm(notes.map, teacher, DATA, generator(2), step=exact_step(process))[0]
    assert float(first) == float(mlcm(notes.map, teacher, DATA + 5, generator(2), step=exact_step(process))[0])
    gen = generator(2)
    torch.randint(50, (60,), generator=gen)
    noise = torch.randn(60, 2, dtype=torch.float64, generator=gen)
    x_t, t, _, _ = notes.calls[0]
    torch.testing.assert_close(x_t, exact(process)(noise, process.t_max, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", [RectifiedFlow(), PROCESS, EDM()], ids=lambda p: type(p).__name__)
def test_the_states_are_those_that_the_solver_reaches_in_the_parts_number_of_equal_steps(process: Process) -> None:
    noise = torch.randn(5, 2, dtype=torch.float64, generator=generator())
    grid, index = times(process, 12), torch.tensor([1, 3, 4, 8, 11])
    found = teacher_state(gaussian(process), noise, grid, index, 4, ddim)
    for i, (place, count) in enumerate(((1, 1), (3, 2), (4, 2), (8, 3), (11, 4))):
        own = at(grid, torch.linspace(0, place, count + 1, dtype=torch.float64))
        visited = solve(gaussian(process), process.sigma(grid[0]) * noise, own, "ddim").x
        torch.testing.assert_close(found[i], visited[i], rtol=1e-9, atol=1e-10)


def test_the_number_of_steps_is_that_of_the_segments_from_the_noise_on() -> None:
    """Algorithm 1: L = M - s in segment s, counted from the data."""

    def counted(teacher: object, x: torch.Tensor, t: torch.Tensor, u: torch.Tensor, **_: object) -> torch.Tensor:
        return x + 1

    start = torch.zeros(48, 1, dtype=torch.float64)
    moves = teacher_state(TEACHER, start, times(PROCESS, 48), torch.arange(48), 8, counted)[:, 0]
    from_data = (48 - 1 - torch.arange(48)) // 6  # the segment that the step below each time is in
    expected = 8 - from_data
    expected[0] = 0  # at the noise itself there is no way to go
    assert moves.tolist() == expected.tolist()


def test_rollouts_near_the_exact_state_with_their_number_of_steps() -> None:
    noise = torch.randn(50, 2, dtype=torch.float64, generator=generator())
    process = RectifiedFlow()
    teacher, grid, index = gaussian(process), times(process, 50), torch.arange(50)
    truth = exact(process)(noise, 1.0, grid[:-1])
    errors = [float((teacher_state(teacher, noise, grid, index, n, ddim) - truth).abs().max()) for n in (8, 16, 32)]
    assert errors[0] > 1.7 * errors[1] > 2.9 * errors[2]
    assert float((teacher_state(teacher, noise, grid, index, 32, teacher_step) - truth).abs().max()) < errors[2] / 3


def test_times_between_those_of_a_grid_are_linear() -> None:
    grid = torch.tensor([1.0, 0.6, 0.5, 0.0], dtype=torch.float64)
    found = at(grid, torch.tensor([0.0, 0.5, 1.0, 2.25, 3.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.8, 0.6, 0.375, 0.0], dtype=torch.float64))


def test_a_longer_hop_stays_within_its_segment() -> None:
    notes, grid = Notes(), times(PROCESS, 12)
    mlcm(notes.map, TEACHER, DATA, generator(), segments=3, grid=grid, skip=3)
    (_, t, s, _), (_, u, _, _) = notes.calls
    place = {float(v): i for i, v in enumerate(grid)}
    for a, b, c in zip(t.tolist(), u.tolist(), s.tolist(), strict=True):
        assert place[c] % 4 == 0
        assert 0 < place[c] - place[a] <= 4
        stop = min(place[a] + 3, place[c])
        assert place[b] == stop or (stop == 12 and b == PROCESS.t_min)  # without noise the map is not asked


def test_segments_fall_in_equal_stages() -> None:
    assert [progressive(k, 9) for k in range(10)] == [8, 8, 8, 4, 4, 4, 2, 2, 2, 2]


def test_it_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        mlcm(exact(), None, DATA, generator())
