"""Zero-shot editing: what is measured stays, and the rest follows the conditional law where the levels are small."""

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, GaussianMixture, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.editing import (
    LUMA,
    colourisation,
    completed,
    edit,
    inpainting,
    interpolate,
    spherical,
    superresolution,
)
from consilience.diffusion.consistency.samplers import one_step

from .exact import COVARIANCE, MEAN, gaussian, generator

PICTURES = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=generator())


def shrink(process: VPLinear | EDM) -> FlowMap:
    """A map that is no one's: what stays must stay whatever the network says."""
    return FlowMap(lambda x, t, s: torch.tanh(x) + 0.3, process, "x0")


@pytest.mark.parametrize("process", [EDM(), VPLinear()], ids=lambda p: type(p).__name__)
def test_known_pixels_stay_exactly_and_the_others_do_not(process: VPLinear | EDM) -> None:
    known = torch.rand(4, 6, generator=generator(1)) < 0.5
    grid = process.time(torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64))
    found = edit(shrink(process), PICTURES, inpainting(known), grid, generator=generator(2))
    assert torch.equal(found.x[..., known], PICTURES[..., known])
    assert found.nfe == 2 == len(found.states)
    assert float((found.x[..., ~known] - PICTURES[..., ~known]).abs().min()) > 0


def test_what_is_not_known_is_not_looked_at() -> None:
    known = torch.rand(4, 6, generator=generator(1)) < 0.5
    grid = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)
    other = torch.where(known, PICTURES, torch.full_like(PICTURES, 9.0))
    one, two = (edit(shrink(EDM()), y, inpainting(known), grid, generator=generator(2)).x for y in (PICTURES, other))
    assert torch.equal(one, two)


def test_grey_stays() -> None:
    grid = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)
    found = edit(shrink(EDM()), PICTURES, colourisation(), grid, generator=generator(2)).x
    luma = torch.tensor(LUMA, dtype=torch.float64)
    torch.testing.assert_close(
        torch.einsum("c,nchw->nhw", luma, found), torch.einsum("c,nchw->nhw", luma, PICTURES), rtol=0, atol=1e-14
    )
    assert float((found - PICTURES).abs().mean()) > 0.1


def test_patch_means_stay_and_a_repeated_small_picture_will_do() -> None:
    grid = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64)
    small = torch.nn.functional.avg_pool2d(PICTURES, 2)
    enlarged = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    one, two = (
        edit(shrink(EDM()), y, superresolution(2), grid, generator=generator(2)).x for y in (PICTURES, enlarged)
    )
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(one, 2), small, rtol=0, atol=1e-14)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


@pytest.mark.parametrize("measurement", [colourisation(), superresolution(2)], ids=["colour", "size"])
def test_coordinates_are_orthogonal(measurement) -> None:
    turned = measurement.forward(PICTURES)
    torch.testing.assert_close(turned.square().sum(), PICTURES.square().sum())
    torch.testing.assert_close(measurement.inverse(turned), PICTURES)
    share = measurement.known.expand(turned.shape).double().mean()
    assert float(share) == pytest.approx(1 / 3 if turned.ndim == 4 else 1 / 4)


def test_a_completed_basis_starts_along_its_vector() -> None:
    first = torch.tensor([0.3, -0.4, 0.0, 1.2], dtype=torch.float64)
    basis = completed(first)
    torch.testing.assert_close(basis @ basis.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(basis[0], first / first.norm())


def filled_law(levels: Tensor, known: float) -> tuple[float, float]:
    """The exact mean and variance of the second coordinate that `edit` fills in, the first being ``known``.

    The exact map of a Gaussian is affine, so that the mean is that without noise and every noise adds its share.
    """
    flow, draws = exact_map(gaussian()), len(levels) - 1
    y = torch.zeros(1 + 2 * draws, 2, dtype=torch.float64)
    y[:, 0] = known
    count = iter(range(draws))

    def noise(x: Tensor, _s: float, _t: float) -> Tensor:
        unit = torch.zeros_like(x)
        i = 1 + 2 * next(count)
        unit[i : i + 2] = torch.eye(2)
        return unit

    found = edit(flow, y, inpainting(torch.tensor([True, False])), levels, noise=noise).x[:, 1]
    return float(found[0]), float((found[1:] - found[0]).square().sum())


def test_small_levels_fill_in_the_conditional_law() -> None:
    """Langevin steps: mean within 2 % of its way from the marginal mean, variance within 6 %; few levels do not."""
    known = float(MEAN[0]) + 0.8
    slope = COVARIANCE[1, 0] / COVARIANCE[0, 0]
    mean = float(MEAN[1] + slope * 0.8)
    variance = float(COVARIANCE[1, 1] - slope * COVARIANCE[0, 1])
    levels = torch.cat(
        [
            torch.logspace(1.9, -1, 20, dtype=torch.float64),
            torch.linspace(0.0999, 0.03, 200, dtype=torch.float64),
            torch.linspace(0.0299, 0.02, 100, dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
        ]
    )
    found, spread = filled_law(levels, known)
    assert abs(found - mean) < 0.02 * abs(mean - float(MEAN[1]))
    assert abs(spread / variance - 1) < 0.06
    few, wide = filled_law(torch.tensor([80.0, 0.5, 0.0], dtype=torch.float64), known)
    assert abs(few - mean) > 0.05 * abs(mean - float(MEAN[1])) or abs(wide / variance - 1) > 0.2


def test_a_consistency_models_value_is_noised_by_what_is_missing() -> None:
    """Algorithm 4: all of the first level, then sqrt(t^2 - epsilon^2)."""
    added: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        added.append(x)
        return torch.zeros_like(x)

    flow, y = FlowMap(predict, EDM(), "x0"), torch.zeros(1, 2, dtype=torch.float64)
    grid = torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)
    edit(flow, y, inpainting(torch.tensor([True, False])), grid, sigma_min=0.3, noise=lambda x, *_: torch.ones_like(x))
    torch.testing.assert_close(torch.cat(added)[:, 0], torch.tensor([2.0, 0.4], dtype=torch.float64))


def test_interpolations_begin_and_end_at_the_two_samples() -> None:
    process = RectifiedFlow()
    flow = exact_map(GaussianMixture(torch.ones(1), torch.zeros(1, 4), torch.eye(4)[None] * 0.3, process).on(process))
    a, b = torch.randn(2, 4, generator=generator())
    w = torch.linspace(0, 1, 5)
    found = interpolate(flow, a, b, w, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.x[[0, -1]], one_step(flow, torch.stack([a, b])).x)
    assert found.x.shape == (5, 4)
    assert found.nfe == 1


def test_the_spherical_way_keeps_the_length_and_turns_evenly() -> None:
    a, b = (v / v.norm() for v in torch.randn(2, 3, 5, dtype=torch.float64, generator=generator()))
    found = spherical(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    turns = torch.arccos((found[:-1] * found[1:]).flatten(1).sum(1))
    torch.testing.assert_close(turns, turns[:1].expand(4))
    torch.testing.assert_close(spherical(a, 3 * a, torch.tensor([0.5]))[0], 2 * a)
    with pytest.raises(ValueError, match="opposite"):
        spherical(a, -a, torch.tensor([0.5]))


def test_what_cannot_be_is_refused() -> None:
    flow = exact_map(gaussian(RectifiedFlow()))
    y = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot noise"):
        edit(flow, y, inpainting(torch.tensor([True, False])), torch.tensor([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match="strictly decreasing"):
        edit(flow, y, inpainting(torch.tensor([True, False])), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="factor must"):
        superresolution(1)
    with pytest.raises(ValueError, match="cannot be cut"):
        superresolution(3).forward(PICTURES)
