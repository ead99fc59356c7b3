"""Noise consistency training: the noises' law, closed forms for linear generators, and a condition that is learned."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion.consistency.objectives.nct import dual_step, nct, spread

from .exact import check_gradient, generator, z_score

A = torch.tensor([[1.0, 0.5], [0.0, 2.0]], dtype=torch.float64)


def base(noise: Tensor) -> Tensor:
    return noise @ A.T


def plain(noise: Tensor, condition: Tensor) -> Tensor:
    return base(noise)


def none(data: Tensor) -> Tensor:
    return torch.zeros(len(data), 1, dtype=data.dtype)


def test_noises_start_at_the_noise_end_at_a_fresh_one_and_are_normal_between() -> None:
    """Covariances within 5 standard errors: false alarm below 1e-5."""
    noise, fresh = torch.randn(2, 20000, 2, dtype=torch.float64, generator=generator())
    first, last = (spread(noise, fresh, torch.full((20000,), n), 8) for n in (0, 8))
    torch.testing.assert_close(first, noise)
    torch.testing.assert_close(last, fresh)
    for n in range(9):
        z = spread(noise, fresh, torch.full((20000,), n), 8)
        off = z.T @ z / 20000 - torch.eye(2)
        assert float(off.abs().max()) < 5 * math.sqrt(2 / 20000)
        bound = float((z * noise).mean()) - math.cos(n * math.pi / 16)
        assert abs(bound) < 5 * math.sqrt(2 / 40000)


def test_the_base_generator_has_the_known_loss() -> None:
    """E |A (z_n - z_{n-1})|^2 = |A|^2 2 (1 - cos(pi / 2N)), and no boundary term: within 5 standard errors, 1e-4."""
    values = [
        float(
            nct(
                plain, base, none, torch.randn(500, 2, dtype=torch.float64, generator=generator(k)), generator(100 + k)
            )[0]
        )
        for k in range(30)
    ]
    assert abs(z_score(values, float(A.square().sum()) * 2 * (1 - math.cos(math.pi / 20)))) < 5


class Linear(nn.Module):
    """z -> A B z, B to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.eye(2, dtype=torch.float64))

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return noise @ self.b.T @ A.T


def test_with_nothing_to_condition_on_the_base_generator_is_a_fixed_point_in_the_limit() -> None:
    """The expected gradient at B = 1 is 2 (1 - cos(pi / 2N)) A^T A: halved steps, a quarter.

    Within 5 standard errors by the sum of entries: false alarm below 1e-4.
    """
    for levels in (5, 10):
        gaps = []
        for k in range(30):
            net = Linear()
            noise = torch.randn(500, 2, dtype=torch.float64, generator=generator(k))
            loss = nct(net, base, none, noise, generator(100 + k), levels=levels, boundary=0.0)[0]
            (grad,) = torch.autograd.grad(loss, net.b)
            gaps.append(float((grad - 2 * (1 - math.cos(math.pi / 2 / levels)) * A.T @ A).sum()))
        assert abs(z_score(gaps, 0.0)) < 5


class Adapter(nn.Module):
    """f(z, c) = A (z + a network of z and c), the base generator with an adapter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2))
        self.double()

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        return base(noise + self.layers(torch.cat([noise, condition], 1)))


def sign(data: Tensor) -> Tensor:
    return torch.sign(data[:, :1])


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    noise = torch.randn(12, 2, dtype=torch.float64, generator=generator())
    check_gradient(lambda net, held: nct(net, base, sign, noise, generator(3), target=held, boundary=0.3)[0], Adapter())


def trained(boundary: float, steps: int = 150) -> Adapter:
    net, draws = Adapter(), generator(1)
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    for _ in range(steps):
        noise = torch.randn(256, 2, dtype=torch.float64, generator=draws)
        optimizer.zero_grad()
        loss: Any = nct(net, base, sign, noise, draws, levels=6, boundary=boundary)[0]
        loss.backward()
        optimizer.step()
    return net


def test_the_adapter_learns_the_conditions_law_and_without_the_boundary_collapses() -> None:
    """Samples for signs from fresh noise: half of the base's have the wanted one; together they have the base's law."""
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=generator(5))
    wanted = torch.sign(torch.randn(2000, 1, dtype=torch.float64, generator=generator(6)))
    widths = {}
    for boundary in (1.0, 0.0):
        net = trained(boundary)
        with torch.no_grad():
            made = net(noise, wanted)
        widths[boundary] = made.std(0) / A.square().sum(1).sqrt()
        if boundary:
            assert float((sign(made) == wanted).double().mean()) > 0.9
    assert float(widths[1.0].min()) > 0.6
    assert float(widths[1.0].max()) < 1.3
    assert float(widths[0.0].min()) < 0.4


def test_bad_levels_are_refused() -> None:
    for levels, boundary in ((1, 1.0), (4, -1.0)):
        with pytest.raises(ValueError, match="at least two levels"):
            nct(plain, base, none, torch.zeros(2, 2).double(), generator(), levels=levels, boundary=boundary)


def test_the_dual_weight_settles_where_the_constraint_is_met() -> None:
    """Of min a^2 + b (a - 2)^2 by a at every weight b, a = 2 b / (1 + b): the margin 1 is met first at b = 1."""
    weight, term = 0.0, math.inf
    for _ in range(400):
        a = 2 * weight / (1 + weight)
        term = (a - 2) ** 2
        weight = dual_step(weight, term, 1.0, 0.2)
    assert weight == pytest.approx(1.0, abs=1e-6)
    assert term == pytest.approx(1.0, abs=1e-5)
    assert dual_step(0.05, 0.2, 1.0, 0.1) == 0.0
    assert dual_step(0.5, 1.3, 1.3, 9.0) == 0.5
    with pytest.raises(ValueError, match="at least 0"):
        dual_step(-0.1, 1.0, 1.0, 0.1)
