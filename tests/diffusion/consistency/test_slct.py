"""Latent consistency training: Cauchy distance, adaptive c, coupled noise, early denoising."""

import itertools
import math

import pytest
import torch

from consilience.diffusion import EDM, Process, RectifiedFlow
from consilience.diffusion.consistency import exact_map
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.objectives.ict import draw
from consilience.diffusion.consistency.objectives.slct import adaptive_c, coupled, early_loss, little_noise, slct
from consilience.diffusion.consistency.shared import pair

from .exact import EIGENVALUES, Net, check_gradient, gaussian, generator, student, z_score


def test_coupled_noise_is_the_best_of_all_orders() -> None:
    for seed in range(5):
        data, noise = torch.randn(2, 6, 2, dtype=torch.float64, generator=generator(seed))
        orders = (noise[list(order)] for order in itertools.permutations(range(6)))
        best = min(float((data - order).square().sum()) for order in orders)
        found = coupled(data, noise)
        assert float((data - found).square().sum()) == pytest.approx(best, rel=1e-12)
        assert sorted(found[:, 0].tolist()) == sorted(noise[:, 0].tolist())


def test_c_falls_with_the_number_of_levels() -> None:
    """At 2 levels log(N - 1) is 0: sqrt(2) exp(-0.85); ten times the steps divide c by 10^1.15."""
    assert adaptive_c(2) == pytest.approx(1.41421356 * 0.42741493, rel=1e-7)
    assert adaptive_c(11) / adaptive_c(101) == pytest.approx(10**1.15, rel=1e-12)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_the_loss_is_its_two_terms(process: Process) -> None:
    """Against the loss put together without the shared functions, from the same draws in the same order."""
    net, data = Net(), gaussian().sample(16, generator())
    loss, log = slct(student(net, process), None, data, generator(1), levels=11, diffusion_weight=0.7, sigma_data=0.8)
    clock, grid, flow = generator(1), karras_levels(process, 11), student(net, process)
    lower = draw(process, grid, 16, clock, -1.1, 2.0)
    noise = coupled(data, torch.randn(16, 2, generator=clock, dtype=torch.float64))
    t, s = grid[lower + 1], grid[lower]
    near, far = (flow.x0(process.add_noise(data, noise, u), u) for u in (t, s))
    cauchy = torch.log(1 + (near - far).square().mean(1) / (2 * adaptive_c(11) ** 2))
    few = lower <= 1  # of the ten pairs of neighbours
    assert bool(few.any())
    weight = process.ratio(t[few]) ** -2 + 0.8**-2
    error = (weight * (near[few] - data[few]).square().mean(1)).mean()
    expected = (cauchy / (process.ratio(t) - process.ratio(s))).mean() + 0.7 * error
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert log["diffusion"] == pytest.approx(float(error.detach()), rel=1e-9)


def test_an_outlier_pulls_less_the_farther_it_is() -> None:
    """The Cauchy distance's slope falls beyond sqrt(2) c, the pseudo-Huber's never does."""
    from consilience.diffusion.consistency.shared import cauchy, pseudo_huber

    def slope(distance: object, size: float) -> float:
        a = torch.tensor([[size]], dtype=torch.float64, requires_grad=True)
        value = distance(a, torch.zeros(1, 1, dtype=torch.float64))  # type: ignore[operator]
        return float(torch.autograd.grad(value.sum(), a)[0])

    c = adaptive_c(11)
    assert slope(cauchy(c), math.sqrt(2) * c) > slope(cauchy(c), 3 * c) > 5 * slope(cauchy(c), 30 * c)
    assert slope(pseudo_huber(c), 30 * c) > slope(pseudo_huber(c), 3 * c)


def test_early_denoising_has_the_exact_maps_floor_where_it_is_taken() -> None:
    """E (f(x_t) - x0)^2 per value = mean of 2 v (1 - sqrt(v / (v + t^2))), times the weight; false alarm below 1e-4."""
    flow, values = exact_map(gaussian()), []
    t = torch.cat([torch.full((200,), 0.5), torch.full((200,), 3.0)]).double()
    for seed in range(30):
        data = gaussian().sample(400, generator(seed))
        p = pair(EDM(), data, t, t, generator(100 + seed))
        values.append(float(early_loss(EDM(), p, flow.x0(p.x_t, p.t), t < 1)))
    floor = (2 * EIGENVALUES * (1 - torch.sqrt(EIGENVALUES / (EIGENVALUES + 0.25)))).mean() * (1 / 0.25 + 1 / 0.25)
    assert abs(z_score(values, float(floor))) < 5
    assert float(early_loss(EDM(), p, flow.x0(p.x_t, p.t), t > 9)) == 0.0


def test_a_quarter_of_the_levels_is_of_little_noise() -> None:
    """The authors count the pairs from much noise: those from int(0.75 N) on, of N - 1."""
    for levels in (2, 5, 11, 21, 641):
        counted = [i for i in range(levels - 1) if i >= int(levels * 0.75)]
        assert little_noise(levels) == len(counted)


def test_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="coupled"):
        slct(exact_map(gaussian()), gaussian(), gaussian().sample(4, generator()), generator())


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: slct(student(net), None, data, generator(3), target=student(held), levels=6)[0], Net()
    )
