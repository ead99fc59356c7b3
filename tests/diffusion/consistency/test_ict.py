"""Improved consistency training: its levels, its weight, its distance, its floor."""

import itertools
import math

import pytest
import torch

from consilience.diffusion import EDM, Process, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.objectives.ict import draw, ict, interval_probabilities

from .exact import Net, check_gradient, floor, gaussian, generator, student, z_score


@pytest.mark.parametrize("process", [EDM(), VPLinear(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_levels_are_drawn_with_the_normal_mass_of_their_interval(process: Process) -> None:
    """Against math.erf on sigma / alpha; counts of 40,000 draws within 5 deviations: false alarm below 1e-5."""
    grid = karras_levels(process, 9)
    edges = [0.5 * math.erf((math.log(float(r)) + 1.1) / (2 * math.sqrt(2))) for r in process.ratio(grid)]
    masses = torch.tensor([b - a for a, b in itertools.pairwise(edges)], dtype=torch.float64)
    expected = masses / masses.sum()
    torch.testing.assert_close(interval_probabilities(process, grid, -1.1, 2.0), expected, rtol=1e-9, atol=1e-12)
    counts = torch.bincount(draw(process, grid, 40_000, generator(), -1.1, 2.0), minlength=8).double()
    spread = (40_000 * expected * (1 - expected)).sqrt()
    assert float(((counts - 40_000 * expected) / spread).abs().max()) < 5


def test_the_weight_is_one_over_the_gap() -> None:
    """At two levels every pair has the same gap: loss = pseudo-Huber / gap, worked out from the exact map's ends."""
    process = EDM(sigma_min=0.5, sigma_max=2.0)
    flow, data = exact_map(gaussian(process)), gaussian().sample(64, generator())
    loss, log = ict(flow, None, data, generator(1), levels=2)
    assert float(loss) == pytest.approx(log["distance"] / 1.5, rel=1e-12)
    narrow = EDM(sigma_min=1.0, sigma_max=1.001)
    flow = exact_map(gaussian(narrow))
    loss, log = ict(flow, None, data, generator(1), levels=2)
    assert float(loss) == pytest.approx(log["distance"] / 0.001, rel=1e-9)


@pytest.mark.parametrize("c", [None, 1e-2])
def test_the_loss_is_its_formula(c: float | None) -> None:
    """c = 0.00054 sqrt(12) for images of 12 values and ends near enough to feel it, or as given; same draws."""
    flow = FlowMap(lambda x, t, s: 1e-4 * x / t[:, None, None, None], EDM(), "x0")
    data = torch.randn(16, 3, 2, 2, dtype=torch.float64, generator=generator())
    loss, _ = ict(flow, None, data, generator(1), levels=11, c=c)
    clock, grid = generator(1), karras_levels(EDM(), 11)
    lower = draw(EDM(), grid, 16, clock, -1.1, 2.0)
    noise = torch.randn(data.shape, generator=clock, dtype=torch.float64)
    t, s = grid[lower + 1], grid[lower]
    near, far = (1e-4 * (data / u[:, None, None, None] + noise) for u in (t, s))
    c = 0.00054 * math.sqrt(12) if c is None else c
    huber = torch.sqrt((near - far).square().sum((1, 2, 3)) + c**2) - c
    torch.testing.assert_close(loss, (huber / (t - s)).mean(), rtol=1e-9, atol=1e-12)


def test_far_from_its_corner_the_distance_is_the_length_of_the_difference() -> None:
    """c = 0.00054 sqrt(2) is small here: the mean distance is E||d|| - c, and E||d||^2 is the floor's."""
    process = EDM(sigma_min=0.5, sigma_max=2.0)
    flow = exact_map(gaussian(process))
    logs = [ict(flow, None, gaussian().sample(500, generator(k)), generator(50 + k), levels=2)[1] for k in range(30)]
    t, s = torch.tensor(2.0).double(), torch.tensor(0.5).double()
    assert abs(z_score([2 * log["difference"] ** 2 for log in logs], float(floor(t, s)))) < 5  # false alarm < 1e-4
    assert all(log["distance"] < math.sqrt(2) * log["difference"] for log in logs)


def test_the_loss_of_the_exact_map_vanishes_with_a_teacher_and_not_without() -> None:
    """With its exact teacher the weighted loss goes to 0; without, the ends move apart in proportion to the gap."""
    teacher = gaussian()
    flow, data = exact_map(teacher), teacher.sample(3000, generator())
    taught = [float(ict(flow, teacher, data, generator(1), levels=n)[0]) for n in (40, 160)]
    alone = float(ict(flow, None, data, generator(1), levels=160)[0])
    assert taught[1] < 0.15 * taught[0]
    assert taught[1] < 2e-3
    assert alone > 50 * taught[1]


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: ict(student(net), None, data, generator(3), target=student(held), levels=6)[0], Net()
    )
