"""Variational consistency training: a standard encoder is none, the divergence, its weight, its gradient."""

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, Process, RectifiedFlow
from consilience.diffusion.consistency import exact_map, multistep
from consilience.diffusion.consistency.objectives.ect import ect
from consilience.diffusion.consistency.objectives.vct import coupled_noise, kl, vct

from .exact import Net, check_gradient, gaussian, generator, student


class Encoder(nn.Module):
    """An affine mean and one positive deviation per value."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.3 * torch.eye(2, dtype=torch.float64))
        self.rise = nn.Parameter(torch.tensor([0.1, -0.2], dtype=torch.float64))

    def forward(self, x0: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x0 @ self.matrix, nn.functional.softplus(x0 + self.rise + 1)


def standard(x0: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x0), torch.ones_like(x0)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_with_a_standard_encoder_it_is_easy_consistency_tuning(process: Process) -> None:
    net, data = Net(), gaussian().sample(32, generator())
    found, log = vct(student(net, process), None, data, generator(1), encoder=standard, decay=0.05)
    plain, _ = ect(student(net, process), None, data, generator(1), decay=0.05)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    assert log["kl"] == 0


def test_the_divergence_is_that_of_torch() -> None:
    loc, scale = torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.1
    law = torch.distributions.kl_divergence(
        torch.distributions.Normal(loc, scale), torch.distributions.Normal(torch.zeros(5, 3).double(), 1.0)
    )
    torch.testing.assert_close(kl(loc, scale), law.sum(1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.01])
def test_the_divergence_is_weighted_as_the_greatest_noise_is(decay: float) -> None:
    """kl_weight / (80 - r(80)), with r(80) = 80 (1 - decay) as the sigmoid is 0 there."""
    net, data = Net(), gaussian().sample(16, generator())
    losses = [
        vct(student(net), None, data, generator(1), encoder=Encoder(), decay=decay, kl_weight=weight)
        for weight in (0.0, 10.0)
    ]
    gained = float(losses[1][0] - losses[0][0])
    assert gained == pytest.approx(10 * losses[1][1]["kl"] / (80 * decay), rel=1e-8)


def test_the_encoder_learns_from_the_student_end_and_the_divergence() -> None:
    """Its gradient is that of differences when the target's state is held: differences of everything are another."""
    net, data, encoder = Net(), gaussian().sample(24, generator()), Encoder()
    held = Encoder()

    def loss(late: Encoder, early: Encoder) -> Tensor:
        """By hand: the later state from one encoder, the earlier from the other."""
        flow, clock = student(net), generator(1)
        t = torch.exp(-1.1 + 2 * torch.randn(24, generator=clock, dtype=torch.float64)).clamp(0.002, 80)
        noise = torch.randn(24, 2, generator=clock, dtype=torch.float64)
        s = t * (1 - 0.05 * (1 + 8 * torch.sigmoid(-t)))
        (loc, scale), (loc_s, scale_s) = late(data), early(data)
        near = flow.x0(data + t[:, None] * (loc + scale * noise), t)
        far = flow.x0(data + s[:, None] * (loc_s + scale_s * noise), s)
        divergence = ((loc**2 + scale**2 - 1) / 2 - scale.log()).sum(1).mean()
        return ((near - far).norm(dim=1) / (t - s)).mean() + 10 / (80 * 0.05) * divergence

    parameters = list(encoder.parameters())
    found, _ = vct(student(net), None, data, generator(1), encoder=encoder, decay=0.05)
    torch.testing.assert_close(found, loss(encoder, held), rtol=1e-9, atol=1e-12)
    mine = torch.autograd.grad(found, parameters)
    honest = torch.autograd.grad(loss(encoder, held), parameters)
    moving = torch.autograd.grad(loss(encoder, encoder), parameters)
    for a, b, c in zip(mine, honest, moving, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert float((a - c).norm()) > 1e-2 * float(a.norm())


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = {"x": gaussian().sample(12, generator()), "shift": torch.linspace(-1, 1, 12, dtype=torch.float64)}
    encoder = Encoder()
    check_gradient(
        lambda net, held: vct(
            student(net), None, data, generator(3), encoder=encoder, target=student(held), decay=0.05
        )[0],
        Net(),
    )


def test_a_teacher_and_an_encoder_of_another_shape_are_refused() -> None:
    data = gaussian().sample(4, generator())
    with pytest.raises(ValueError, match="coupled"):
        vct(exact_map(gaussian()), gaussian(), data, generator(), encoder=standard)
    with pytest.raises(ValueError, match="mean and a deviation"):
        vct(exact_map(gaussian()), None, data, generator(), encoder=lambda x: (x, x[:, :1]))


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_between_steps_the_data_are_noised_as_in_training(process: Process) -> None:
    """By hand, and with an encoder of the standard normal the plain sampler."""
    flow, encoder = exact_map(gaussian(process)), Encoder()
    x = process.prior((30, 2), generator(3), dtype=torch.float64)
    grid = torch.tensor([process.t_max, 0.6, 0.0], dtype=torch.float64)
    found = multistep(flow, x, grid, noise=coupled_noise(encoder, generator(4))).x
    with torch.no_grad():
        first = flow.x0(x, process.t_max)
        loc, scale = encoder(first)
    noise = loc + scale * torch.randn(30, 2, dtype=torch.float64, generator=generator(4))
    t = torch.full((30,), 0.6, dtype=torch.float64)
    torch.testing.assert_close(found, flow.x0(process.add_noise(first, noise, t), t))
    assert not found.requires_grad
    plain = multistep(flow, x, grid, generator=generator(4)).x
    torch.testing.assert_close(multistep(flow, x, grid, noise=coupled_noise(standard, generator(4))).x, plain)
