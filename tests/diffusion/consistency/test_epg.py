"""EPG: the contrast's values in closed form, what is and is not differentiated, and the tuning stage."""

import math

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import EDM
from consilience.diffusion.consistency import exact_map
from consilience.diffusion.consistency.objectives.ect import jump
from consilience.diffusion.consistency.objectives.epg import contrast, epg, normalised_error, representation_loss
from consilience.diffusion.consistency.shared import gap

from .exact import Net, check_gradient, gaussian, generator, student

BATCH = {name: gaussian().sample(16, generator(k)) for k, name in enumerate(("x", "view", "other_view"))}


class Encoder(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 8))
        self.double()

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both = self.layers(torch.cat([x / (1 + t[:, None]), t[:, None].log()], 1))
        return both[:, :4], both[:, 4:]


def test_the_contrast_of_orthogonal_rows_equal_rows_and_swapped_rows() -> None:
    rows = 5 * torch.eye(6, dtype=torch.float64)
    assert float(contrast(rows, 2 * rows, 0.5)) == pytest.approx(math.log1p(5 * math.exp(-2)))
    same = torch.ones(6, 4, dtype=torch.float64)
    assert float(contrast(same, same, 0.1)) == pytest.approx(math.log(6))
    assert float(contrast(rows, rows.roll(1, 0), 0.5)) == pytest.approx(2 + math.log1p(5 * math.exp(-2)))


def test_an_encoder_that_tells_nothing_apart_has_the_logarithm_of_the_batch() -> None:
    one = torch.ones(16, 4, dtype=torch.float64)
    loss, log = representation_loss(lambda x, t: (one, one), EDM(), BATCH, generator())
    assert float(loss) == pytest.approx(3 * math.log(16))
    assert log["views"] == pytest.approx(2 * math.log(16))


def test_an_encoder_of_the_datum_alone_has_the_least_path_loss() -> None:
    """Neighbouring levels share the noise: an encoder that finds the datum, here by looking it up, is consistent."""
    code = torch.eye(16, dtype=torch.float64)
    loss, log = representation_loss(lambda x, t: (code, code), EDM(), BATCH, generator(), temperature=0.1)
    assert log["path"] == pytest.approx(math.log1p(15 * math.exp(-10)))
    assert float(loss) == pytest.approx(2 * math.log1p(15 * math.exp(-5)) + log["path"])


def test_neighbours_share_the_noise_and_views_theirs_at_the_lowest_level() -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def encoder(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((x, t))
        return x, x

    representation_loss(encoder, EDM(), BATCH, generator())
    (a, ta), (b, tb), (_, _), (_, _), (near, t), (far, s) = calls
    assert float(ta[0]) == float(tb[0]) == pytest.approx(0.002)
    torch.testing.assert_close(a - BATCH["view"], b - BATCH["other_view"])
    assert bool((t > s).all())
    torch.testing.assert_close((near - BATCH["x"]) / t[:, None], (far - BATCH["x"]) / s[:, None])


def test_targets_have_no_gradient_and_an_average_may_supply_the_views() -> None:
    """By finite differences: with the target held the path's other side must be held as well, so a copy is called."""
    net, held = Encoder(), Encoder()
    loss = representation_loss(net, EDM(), BATCH, generator(), target=held)[0]
    grads = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert all(part.grad is None for part in held.parameters())
    calls = iter([net, net, net, held])  # views (their targets are held's own), then near, then far

    def switched(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = next(calls)(x, t)
        return found

    def value() -> Tensor:
        nonlocal calls
        calls = iter([net, net, net, held])
        return representation_loss(switched, EDM(), BATCH, generator(), target=held)[0]

    along = [torch.randn(p.shape, dtype=p.dtype, generator=generator(7)) for p in net.parameters()]
    values = []
    for sign in (1.0, -2.0):
        with torch.no_grad():
            for part, v in zip(net.parameters(), along, strict=True):
                part.add_(v, alpha=sign * 1e-5)
        values.append(float(value().detach()))
    slope = sum(float((g * v).sum()) for g, v in zip(grads, along, strict=True))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_the_error_is_divided_by_its_root_without_gradient() -> None:
    error = torch.tensor([0.0, 9.0], dtype=torch.float64, requires_grad=True)
    value = normalised_error(error, 4.0)
    assert value.tolist() == [0.0, pytest.approx(9 / 5)]
    (grad,) = torch.autograd.grad(value.sum(), error)
    assert grad.tolist() == [pytest.approx(1 / 4), pytest.approx(1 / 5)]


def test_the_tuning_loss_falls_with_the_jump_at_the_exact_map() -> None:
    """A Heun step's error: c makes the distance quadratic near 0."""
    teacher = gaussian()
    flow, data = exact_map(teacher), teacher.sample(500, generator())
    losses = [float(epg(flow, teacher, data, generator(1), decay=decay)[0]) for decay in (0.1, 0.05, 0.01)]
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 1e-5


def test_weights_and_errors_by_hand() -> None:
    net, data = Net(), gaussian().sample(12, generator())
    flow = student(net)
    loss, _ = epg(flow, None, data, generator(1), decay=1.0, c=0.3)
    p = jump(EDM(), data, generator(1), 1.0, -1.1, 2.0)
    error = (flow.x0(p.x_t, p.t) - data).square().sum(1)
    expected = (error / torch.sqrt(error + 0.09) / gap(EDM(), p.t, p.s)).mean()
    torch.testing.assert_close(loss, expected)


def test_features_of_the_frozen_encoder_are_compared_with_the_datas() -> None:
    net, data = Net(), gaussian().sample(12, generator())
    flow = student(net)
    plain, _ = epg(flow, None, data, generator(1))
    loss, log = epg(flow, None, data, generator(1), features=lambda x: 2 * x)
    p = jump(EDM(), data, generator(1), 0.5, -1.1, 2.0)
    torch.testing.assert_close(loss - plain, contrast(flow.x0(p.x_t, p.t), data, 0.1))
    assert log["features"] > 0


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    """With a c so large that the denominator does not move."""
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: 1e6 * epg(student(net), None, data, generator(3), target=student(held), c=1e6)[0], Net()
    )


def test_views_are_needed() -> None:
    with pytest.raises(ValueError, match="two views"):
        representation_loss(Encoder(), EDM(), {"x": BATCH["x"]}, generator())
