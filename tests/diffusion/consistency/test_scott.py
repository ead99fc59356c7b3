"""Stochastic consistency distillation: the SDE teacher against the library's solver, and its known floor."""

import pytest
import torch

from consilience.diffusion import EDM, RectifiedFlow, VPLinear, solve
from consilience.diffusion.consistency.objectives.lcm import lcm
from consilience.diffusion.consistency.objectives.scott import discriminator_loss, scott, sde_step
from consilience.diffusion.consistency.objectives.trajectory import ddim
from consilience.diffusion.consistency.shared import pair, squared
from consilience.diffusion.solvers.sde import SDEDPM

from .exact import EIGENVALUES, check_gradient, gaussian, generator, z_score
from .jumps import PROCESS, Notes, TwoTime, exact, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)


@pytest.mark.parametrize("process", [VPLinear(), EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_is_the_solvers_from_pure_noise_too(process, eta: float) -> None:
    teacher = gaussian(process)
    for t, u in ((process.t_max, 0.3), (0.6, 0.0)):
        grid = torch.tensor([t, u], dtype=torch.float64)
        z = torch.randn(60, 2, dtype=torch.float64, generator=generator(3))
        truth = solve(teacher, DATA, grid, SDEDPM(1, eta), noise=lambda *_, z=z: z).x
        found = sde_step(eta, generator(3))(teacher, DATA, *(v.expand(60) for v in grid))
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_without_noise_it_is_latent_consistency_distillation_without_guidance() -> None:
    """eta 0 and one substep is DDIM; the draws come in another order, so both see one noise and one time."""
    net, grid = TwoTime(), torch.tensor([0.7, 0.0], dtype=torch.float64)
    noise = torch.randn(60, 2, dtype=torch.float64, generator=generator(9))

    class Fixed(type(PROCESS)):
        def noise(self, shape, t, generator=None):
            return noise

    process = Fixed()
    teacher = gaussian(process)
    one = scott(flow(net, process), teacher, DATA, generator(1), eta=0.0, substeps=1, grid=grid)[0]
    two = lcm(flow(net, process), teacher, DATA, generator(1), null={}, w=(0.0, 0.0), skip=1, grid=grid, step=ddim)[0]
    torch.testing.assert_close(one, two)


def test_the_exact_map_has_the_known_floor() -> None:
    """Along an axis of variance v the reverse SDE's x_t and x_u correlate as the forward process's: the loss is
    sum 2 v (1 - alpha_t / alpha_u sd_u / sd_t). With 24 substeps within 5 standard errors plus 2 % of 20 batches.
    """
    grid = torch.tensor([0.3, 0.2], dtype=torch.float64)
    a, s = PROCESS.alpha(grid), PROCESS.sigma(grid)
    sd = torch.sqrt(a[:, None] ** 2 * EIGENVALUES + s[:, None] ** 2)
    correlation = a[0] / a[1] * sd[1] / sd[0]
    # the map goes on from the grid's end to itself: the states at u are compared, of variances sd_u^2
    expected = float((2 * sd[1] ** 2 * (1 - correlation)).sum())
    values = [
        float(
            scott(
                exact(), TEACHER, gaussian().sample(500, generator(k)), generator(100 + k), eta=1.0, substeps=24,
                grid=grid, distance=squared,
            )[0]
        )
        for k in range(20)
    ]  # fmt: skip
    mean = sum(values) / 20
    assert abs(z_score(values, expected)) < 5 or abs(mean / expected - 1) < 0.02
    quiet = scott(exact(), TEACHER, DATA, generator(1), eta=0.0, substeps=24, grid=grid, distance=squared)[0]
    assert float(quiet) < 1e-3 * expected


def test_every_strength_keeps_the_marginal_law() -> None:
    """20000 samples in 24 steps: each variance within 5 standard errors (7 %) of the exact one."""
    data = gaussian().sample(20000, generator(2))
    t, u = torch.full((20000,), 0.5, dtype=torch.float64), torch.full((20000,), 0.2, dtype=torch.float64)
    x = pair(PROCESS, data, t, u, generator(3)).x_t
    covariance = PROCESS.alpha(u)[0] ** 2 * TEACHER.covariance + PROCESS.sigma(u)[0] ** 2 * torch.eye(2)
    for eta in (0.0, 0.5, 1.0, 1.5):
        step, state = sde_step(eta, generator(4)), x
        for i in range(24):
            state = step(TEACHER, state, t + (u - t) * i / 24, t + (u - t) * (i + 1) / 24)
        torch.testing.assert_close(torch.cov(state.T), covariance, rtol=0.07, atol=0.01)


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    check_gradient(
        lambda net, held: scott(
            flow(net), TEACHER, DATA, generator(3), target=flow(held), discriminator=lambda x, t: (1 + t) * x.sum(1)
        )[0],
        TwoTime(),
    )


def test_jumps_end_at_the_data_and_the_adversary_is_optional() -> None:
    """Its term is -D of the student's data and their times, its gradient the student's alone, 0 when off."""
    notes, net = Notes(), TwoTime()
    scott(notes.map, TEACHER, DATA, generator(1))
    assert bool((notes.calls[0][2] == 0).all())
    form, seen = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True), []

    def discriminator(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x, t))
        return t * torch.tanh(x @ form)

    def slopes(**arguments: object) -> tuple[torch.Tensor, dict, list[torch.Tensor]]:
        loss, log = scott(flow(net), TEACHER, DATA, generator(1), **arguments)
        return loss.detach(), log, list(torch.autograd.grad(loss, [*net.parameters(), form], allow_unused=True))

    plain, _, bare = slopes()
    loss, log, found = slopes(discriminator=discriminator, adversarial=0.7)
    ((made, t),) = seen
    term = -(t * torch.tanh(made @ form)).mean()
    torch.testing.assert_close(loss - plain, 0.7 * term.detach())
    assert log["adversarial"] == pytest.approx(float(term.detach()))
    torch.testing.assert_close(t, notes.calls[0][1])
    assert found[-1] is None
    assert max(float((a - b).abs().max()) for a, b in zip(found[:-1], bare[:-1], strict=True)) > 1e-5
    for a, b in zip(slopes(discriminator=discriminator, adversarial=0.0)[2][:-1], bare[:-1], strict=True):
        torch.testing.assert_close(a, b)


def test_the_discriminator_learns_from_the_students_data_and_the_true_ones_at_the_same_times() -> None:
    net, form, seen = TwoTime(), torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True), []

    def discriminator(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x, t))
        return x @ form

    loss, _ = discriminator_loss(flow(net), DATA, generator(1), discriminator=discriminator)
    (made, one), (true, other) = seen
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(true, DATA, rtol=0, atol=0)
    assert not made.requires_grad
    expected = torch.relu(1 + made @ form).mean() + torch.relu(1 - true @ form).mean()
    torch.testing.assert_close(loss, expected)
    scott(flow(net), TEACHER, DATA, generator(1), discriminator=discriminator)
    torch.testing.assert_close(seen[2][0].detach(), made)  # the same draws: the states that the student is judged by


@pytest.mark.parametrize("bad", [{"teacher": None}, {"eta": -1.0}, {"substeps": 0}])
def test_what_cannot_be_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="need"):
        scott(exact(), bad.pop("teacher", TEACHER), DATA, generator(), **bad)
