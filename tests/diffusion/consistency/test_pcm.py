"""Phased consistency models: sub-trajectories with their own ends."""

import pytest
import torch

from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives.pcm import pcm
from consilience.diffusion.consistency.objectives.trajectory import times
from consilience.diffusion.consistency.samplers import phase_grid
from consilience.diffusion.consistency.shared import squared

from .exact import check_gradient, gaussian, generator
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
