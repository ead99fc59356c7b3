"""Consistency distillation and training: exact maps, the known floor, gradients, and training as a limit."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Denoiser, Process, RectifiedFlow, TrigFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map, pair, shared
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.objectives import cm as module
from consilience.diffusion.consistency.objectives.cm import cm
from consilience.diffusion.consistency.shared import Pair

from .exact import Net, check_gradient, floor, gaussian, generator, student, z_score

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(), TrigFlow()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_distillation_is_zero_at_the_exact_map_up_to_the_teachers_steps(process: Process) -> None:
    """What is left is the square of a Heun step's error, third order: halving the steps divides it by 64 or more."""
    teacher = gaussian(process)
    flow, data = exact_map(teacher), teacher.sample(2000, generator())
    coarse, fine, finest = (float(cm(flow, teacher, data, generator(1), levels=n)[0]) for n in (21, 41, 161))
    assert finest < 1e-7
    assert fine < coarse / 30
    assert finest < fine / 1000


def test_training_has_the_known_floor_at_the_exact_map() -> None:
    """Within 5 standard errors of 30 batches: false alarm below 1e-4."""
    flow, grid = exact_map(gaussian()), karras_levels(EDM(), 12)
    values = [
        float(cm(flow, None, gaussian().sample(400, generator(k)), generator(100 + k), levels=12)[0]) for k in range(30)
    ]
    assert abs(z_score(values, float(floor(grid[1:], grid[:-1]).mean()))) < 5


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    data = gaussian().sample(12, generator())
    teacher = gaussian() if taught else None
    check_gradient(
        lambda net, held: cm(student(net), teacher, data, generator(3), target=student(held), levels=6)[0], Net()
    )


@dataclass(frozen=True)
class Even(EDM):
    """Noise in even quantiles, so that means over a batch of two halves are integrals."""

    def noise(self, shape: tuple[int, ...], t: Tensor, generator: torch.Generator | None = None) -> Tensor:
        half = (torch.arange(shape[0] // 2, dtype=torch.float64) + 0.5) / (shape[0] // 2)
        return torch.special.ndtri(half).repeat(2)[:, None]


def gradients(width: float) -> tuple[Tensor, Tensor]:
    """Of distillation from the exact teacher and of training, on data at -1 and 1, from 1 + width to 1."""
    process = Even(sigma_min=1.0, sigma_max=1.0 + width)
    data = torch.ones(20000, 1, dtype=torch.float64)
    data[:10000] = -1
    teacher = Denoiser(lambda x, t: torch.tanh(x / (t**2)[:, None]), process)
    found = []
    for taught in (teacher, None):
        net = Net(dim=1)
        plain = student(net, EDM())  # its boundary at 0.002, away from both times
        loss, _ = cm(FlowMap(plain.function, process, "x0"), taught, data, generator(), levels=2)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found.append(torch.cat([g.flatten() for g in grads]))
    return found[0], found[1]


def relative(width: float) -> float:
    distilled, trained = gradients(width)
    return float((trained - distilled).norm() / distilled.norm())


def test_the_gradient_of_training_tends_to_that_of_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theorem 2 of the paper: the relative difference is of first order. With unshared noise (planted) it grows."""
    shared_noise = [relative(width) for width in (0.04, 0.02, 0.01)]
    assert shared_noise[2] < 0.05
    assert shared_noise[2] < 0.6 * shared_noise[1] < 0.4 * shared_noise[0]
    honest = module.neighbours

    def unshared(*args: object) -> Pair:
        p: Pair = honest(*args)  # type: ignore[arg-type]
        mixed = p.noise[torch.randperm(len(p.noise), generator=generator(9))]
        return p._replace(x_s=p.x0 + p.s[:, None] * mixed)

    monkeypatch.setattr(module, "neighbours", unshared)
    assert relative(0.01) > 1


def test_the_student_is_at_the_later_time_and_the_target_at_the_earlier() -> None:
    """The gradient is that of ||f(x_2) - f(x_0.5)||^2 with the second held; swapped times (planted) have another."""
    process = EDM(sigma_min=0.5, sigma_max=2.0)
    net, data = Net(), gaussian().sample(16, generator())
    flow = FlowMap(student(net, EDM()).function, process, "x0")
    loss, log = cm(flow, None, data, generator(1), levels=2)
    assert log["ratio"] == pytest.approx(0.25)
    clock = generator(1)
    torch.randint(1, (16,), generator=clock)
    noise = torch.randn(16, 2, dtype=torch.float64, generator=clock)
    late, early = (flow.x0(data + u * noise, torch.full((16,), u, dtype=torch.float64)) for u in (2.0, 0.5))
    parameters = list(net.parameters())
    found, right, swapped = (
        torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
        for value in (
            loss,
            (late - early.detach()).square().sum(1).mean(),
            (late.detach() - early).square().sum(1).mean(),
        )
    )
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-13)
    assert float((found - swapped).norm()) > 0.1 * float(found.norm())


def test_the_step_to_learn_from_is_a_heun_step_and_the_grid_needs_two_levels() -> None:
    """At two levels over a wide range, the loss of the exact map is its distance from one Heun step of its ODE."""
    process = EDM(sigma_min=0.5, sigma_max=2.0)
    teacher = gaussian(process)
    data = teacher.sample(50, generator())
    noise = torch.randn(50, 2, dtype=torch.float64, generator=generator(4))
    x = data + 2 * noise
    state, tau, low = x / 3, 2 / 3, 1 / 3  # x / (alpha + sigma) and sigma / (alpha + sigma)
    first = (x - teacher.x0(x, 2.0)) / 2 - teacher.x0(x, 2.0)
    guess = 1.5 * (state + (low - tau) * first)
    second = (guess - teacher.x0(guess, 0.5)) / 0.5 - teacher.x0(guess, 0.5)
    heun = 1.5 * (state + (low - tau) * (first + second) / 2)
    flow = exact_map(teacher)
    expected = (flow.x0(x, 2.0) - flow.x0(heun, 0.5)).square().sum(1).mean()
    p = pair(process, data, torch.full((50,), 2.0).double(), torch.full((50,), 0.5).double(), noise=noise)
    near, far = shared.ends(flow, None, module.stepped(teacher, p), generator())
    torch.testing.assert_close((near - far).square().sum(1).mean(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="two levels"):
        cm(flow, teacher, data, generator(), levels=1)
