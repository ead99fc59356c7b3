"""Target-driven distillation: which targets are drawn, and conditions taken away."""

import numpy as np
import pytest
import torch

from consilience.diffusion import Denoiser
from consilience.diffusion.consistency.objectives.tdd import select, target_steps, tdd, without
from consilience.diffusion.consistency.objectives.trajectory import times
from consilience.diffusion.consistency.shared import squared

from .exact import check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)


def test_zero_at_the_exact_map() -> None:
    assert float(tdd(exact(), TEACHER, DATA, generator(1), step=exact_step(), distance=squared)[0]) < 1e-18


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    check_gradient(lambda net, held: tdd(flow(net), TEACHER, DATA, generator(3), target=flow(held))[0], TwoTime())


def test_targets_are_the_times_of_the_even_schedules() -> None:
    """By the definition: K times evenly spaced from the top of a grid counted from the data, the union over K."""
    steps, union = 50, set()
    for k in range(4, 9):
        union |= {int(i) for i in np.floor(np.linspace(0, steps, num=k, endpoint=False))}
    assert target_steps(steps, 4, 8).tolist() == sorted((union - {0}) | {steps})
    assert target_steps(10, 1, 1).tolist() == [10]


def test_targets_are_uniform_among_those_in_the_window() -> None:
    """20000 draws at one index: each frequency within 5 standard errors, false alarm below 1e-5."""
    targets = torch.tensor([4, 8, 10, 20])
    found = select(torch.full((20000,), 5), targets, 3, generator())
    assert set(found.tolist()) == {8, 10}
    assert abs(float((found == 8).double().mean()) - 0.5) < 5 * 0.5 / 20000**0.5
    assert set(select(torch.full((50,), 11), targets, 3, generator()).tolist()) == {20}
    assert set(select(torch.full((50,), 8), targets, 0, generator()).tolist()) == {8}


@pytest.mark.parametrize("stray", [0.0, 0.3])
def test_jumps_go_to_targets_or_a_little_beyond(stray: float) -> None:
    notes, grid = Notes(), times(PROCESS, 50)
    for seed in range(5):
        tdd(notes.map, TEACHER, DATA, generator(seed), stray=stray, grid=grid)
    targets = grid[target_steps(50, 4, 8)]
    for _, t, s, _ in notes.calls[::2]:
        assert bool((s < t).all())
        share = s[:, None] / targets[None].clamp(min=1e-12)
        near = (share <= 1 + 1e-12) & (share >= 1 - stray - 1e-12)
        assert bool((near.any(1) | (s == 0)).all())
        assert stray == 0 or not bool(torch.isin(s[s > 0], targets).any())


def test_a_share_of_the_conditions_goes_for_student_and_teacher_alike() -> None:
    seen: list[torch.Tensor] = []

    def function(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        seen.append(shift)
        return TEACHER.x0(x, t) + shift[:, None]

    notes = Notes()
    batch = {"x": DATA, "shift": torch.ones(60, dtype=torch.float64)}
    tdd(notes.map, Denoiser(function, PROCESS, "x0"), batch, generator(1), null={"shift": 0.0}, drop=0.4)
    gone = int((seen[0] == 0).sum())
    assert 10 < gone < 40
    assert all(torch.equal(seen[0], call[3]["shift"]) for call in notes.calls)
    assert int((without({"shift": torch.ones(2000)}, {"shift": -1}, 0.4, generator())["shift"] < 0).sum()) in range(
        800 - 110,
        800 + 110,  # 5 standard deviations of a binomial
    )
    kept = without({"shift": torch.ones(9)}, {"shift": -1}, 0.0, generator())
    assert bool((kept["shift"] == 1).all())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="drop must be"):
        tdd(exact(), TEACHER, DATA, generator(), drop=1.5)
    with pytest.raises(ValueError, match="least <= most"):
        target_steps(5, 4, 8)
