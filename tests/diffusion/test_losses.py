"""Training losses: identities, closed-form floors, and gradients against finite differences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow, VPLinear, precondition
from consilience.diffusion.denoisers import PREDICTIONS, weights
from consilience.diffusion.guidance import extrapolate
from consilience.diffusion.losses import (
    cfg_aligned_loss,
    denoising_loss,
    edm_weight,
    frozen,
    hidden,
    lognormal_times,
    min_snr_weight,
    self_perceptual_loss,
    uniform_times,
)

torch.set_num_threads(1)
PROCESSES = [EDM(sigma_max=5.0), VPLinear(), RectifiedFlow(shift=2.0)]
VARIANCE = 0.3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(t: float) -> Any:
    return lambda count, process, generator: torch.full((count,), t, dtype=torch.float64)


def gaussian(mean: float, process: Process, variance: float = VARIANCE) -> GaussianMixture:
    covariance = variance * torch.eye(2, dtype=torch.float64)[None]
    return GaussianMixture(torch.ones(1).double(), torch.full((1, 2), mean, dtype=torch.float64), covariance, process)


class Small(nn.Module):
    """A network with labels; float64."""

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.middle = nn.Tanh()
        self.embedding = nn.Embedding(labels, 5)
        self.last = nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        inside = self.first(torch.cat([x, t.expand(len(x))[:, None]], 1))
        return self.last(self.middle(inside if labels is None else inside + self.embedding(labels)))


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small()


# --------------------------------------------------------------------------------------------------- the plain loss


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_exact_denoiser_reaches_the_closed_form_floor(process: Process, prediction: Any) -> None:
    exact, count, t = gaussian(0.5, process), 40_000, torch.tensor(0.7, dtype=torch.float64)
    model = Denoiser(lambda x, t: exact.predict(prediction, x, t), process, prediction)
    x0 = exact.sample(count, seeded(1))
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = weights(prediction, process, t)
    floor = float((p - q * alpha / sigma) ** 2 * VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2))
    found = float(denoising_loss(model, x0, seeded(2), times=at(0.7)))
    # the mean of 80000 scaled chi-squares has relative standard error sqrt(2 / 80000) = 0.005
    assert found == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_any_other_model_is_worse_by_its_distance_from_the_exact_one(prediction: Any) -> None:
    process = VPLinear()
    exact, count = gaussian(0.5, process), 40_000
    x0 = exact.sample(count, seeded(1))

    def loss(by: float) -> Tensor:
        model = Denoiser(lambda x, t: exact.predict(prediction, x, t) + by * x.sin(), process, prediction)
        return denoising_loss(model, x0, seeded(2), times=at(0.7))

    noise = process.noise((count, 2), torch.full((count,), 0.7, dtype=torch.float64), seeded(2))
    state = process.add_noise(x0, noise, torch.tensor(0.7).double())
    extra = state.sin().square().mean()
    at_zero = loss(0.0)
    for by in (-0.5, 0.5):  # the cross term has mean zero; six standard errors of it
        error = 6 * 2 * 0.5 * float(at_zero.sqrt() * extra.sqrt()) / math.sqrt(2 * count)
        assert float(loss(by) - at_zero) == pytest.approx(float(0.25 * extra), abs=error)
        assert loss(by) > at_zero


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("weight", [edm_weight(0.5), min_snr_weight(5.0)], ids=["edm", "min-snr"])
def test_a_weighted_loss_is_the_same_in_every_prediction(process: Process, weight: Any) -> None:
    wrong, x0 = gaussian(1.0, process, 0.8), gaussian(0.0, process).sample(50, seeded())
    found = []
    for prediction in PREDICTIONS:
        model = Denoiser(lambda x, t, kind=prediction: wrong.predict(kind, x, t), process, prediction)
        found.append(denoising_loss(model, x0, seeded(4), weight=weight))
    torch.testing.assert_close(torch.stack(found), found[0].expand(len(found)), rtol=1e-8, atol=0)


def test_the_weights_are_the_published_ones() -> None:
    ratio = torch.tensor([0.05, 0.5, 2.0, math.inf], dtype=torch.float64)
    assert edm_weight(0.5)(ratio[:3]).tolist() == pytest.approx([(0.0025 + 0.25) / (0.025**2), 8.0, 4.25])
    assert min_snr_weight(5.0)(ratio).tolist() == pytest.approx([5.0, 4.0, 0.25, 0.0])


def test_edm_weighting_gives_an_untrained_preconditioned_network_about_unit_loss_at_all_noise() -> None:
    process, sigma_data = EDM(), 0.5
    model = precondition(lambda x, t: torch.zeros_like(x), process, sigma_data)
    x0 = sigma_data * torch.randn(20_000, 2, generator=seeded(), dtype=torch.float64)
    for t in (0.01, 0.3, 2.0, 40.0):
        loss = denoising_loss(model, x0, seeded(1), times=at(t), weight=edm_weight(sigma_data))
        assert float(loss) == pytest.approx(1.0, rel=0.05)  # ten standard errors of sqrt(2 / 40000)


def test_times_cover_what_they_say() -> None:
    drawn = uniform_times(5000, RectifiedFlow(), seeded())
    assert 1e-3 <= float(drawn.min()) < 0.01
    assert 0.99 < float(drawn.max()) <= 1.0
    for process in (EDM(), RectifiedFlow()):
        log = process.ratio(lognormal_times(-1.0, 0.7)(20_000, process, seeded())).log()
        assert float(log.mean()) == pytest.approx(-1.0, abs=6 * 0.7 / math.sqrt(20_000))
        assert float(log.std()) == pytest.approx(0.7, rel=0.03)


def test_conditions_of_a_batch_reach_the_model_and_noise_can_be_assigned() -> None:
    seen: dict[str, Any] = {}

    def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        seen.update(cond, x=x)
        return x

    x0, labels = torch.zeros(4, 2), torch.arange(4)
    model = Denoiser(function, EDM())
    denoising_loss(model, {"x": x0, "labels": labels}, seeded(), noise=lambda x0, t, g: 1 + x0, times=at(3.0))
    assert torch.equal(seen["labels"], labels)
    assert torch.equal(seen["x"], torch.full((4, 2), 3.0))
    assert torch.equal(denoising_loss(model, x0, seeded(7)), denoising_loss(model, x0, seeded(7)))
    assert not torch.equal(denoising_loss(model, x0, seeded(7)), denoising_loss(model, x0, seeded(8)))


# ------------------------------------------------------------------------------------------------- the aligned loss

LABELS = torch.tensor([0, 1] * 20)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(40, 2, generator=seeded(3), dtype=torch.float64), "labels": LABELS}


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_aligned_loss_at_w_zero_is_the_plain_one_and_with_all_dropped_the_unconditional(process: Process) -> None:
    model = Denoiser(small(), process, "eps")
    plain = denoising_loss(model, batch(), seeded(5))
    aligned = cfg_aligned_loss(model, batch(), seeded(5), null={"labels": 2}, w=(0.0, 0.0), drop=0.0)
    torch.testing.assert_close(aligned, plain, rtol=1e-12, atol=0)
    without = denoising_loss(model, {"x": batch()["x"], "labels": torch.full((40,), 2)}, seeded(5))
    dropped = cfg_aligned_loss(model, batch(), seeded(5), null={"labels": 2}, w=(1.0, 3.0), drop=1.0)
    torch.testing.assert_close(dropped, without, rtol=1e-12, atol=0)


def test_a_fixed_w_measures_the_guided_model() -> None:
    process = VPLinear()
    strong, weak = gaussian(1.0, process), gaussian(0.0, process, 1.0)

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.where((labels == 2)[:, None], weak.x0(x, t), strong.x0(x, t))

    model = Denoiser(function, process)
    found = cfg_aligned_loss(model, batch(), seeded(5), null={"labels": 2}, w=(1.5, 1.5), drop=0.0)
    want = denoising_loss(extrapolate(strong, weak, 2.5), batch()["x"], seeded(5))
    torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("w", [0.5, 3.0])
def test_the_minimiser_is_the_model_whose_guidance_gives_the_data(w: float) -> None:
    process = RectifiedFlow()
    exact, weak = gaussian(0.6, process), gaussian(0.0, process, 1.0)

    def loss(by: float) -> Tensor:
        def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            base = weak.velocity(x, t)
            best = (exact.velocity(x, t) + w * base) / (1 + w)
            return torch.where((labels == 2)[:, None], base, best + by)

        data = {"x": exact.sample(20_000, seeded(1)), "labels": torch.zeros(20_000, dtype=torch.int64)}
        model = Denoiser(function, process, "velocity")
        return cfg_aligned_loss(model, data, seeded(2), null={"labels": 2}, w=(w, w), drop=0.0)

    plain = denoising_loss(Denoiser(exact.velocity, process, "velocity"), exact.sample(20_000, seeded(1)), seeded(2))
    torch.testing.assert_close(loss(0.0), plain, rtol=1e-10, atol=0)
    assert min(loss(0.05), loss(-0.05)) > loss(0.0)


def test_wrong_settings_of_the_aligned_loss_are_refused() -> None:
    for wrong in ({"drop": 1.5}, {"w": (2.0, 1.0)}):
        with pytest.raises(ValueError, match="drop"):
            cfg_aligned_loss(Denoiser(small(), EDM()), batch(), null={"labels": 2}, **wrong)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------- self-perceptual


def test_features_of_the_input_give_the_distance_of_the_two_states() -> None:
    process = VPLinear()
    layer = nn.Identity()
    critic = Denoiser(lambda x, t: layer(x), process)
    model = Denoiser(small(), process, "v")
    times = at(0.6)
    found = self_perceptual_loss(model, batch()["x"], seeded(1), critic=critic, features=layer, times=times)
    x0, t = batch()["x"], torch.tensor(0.6, dtype=torch.float64)
    noise = process.noise((40, 2), t, seeded(1))
    x = process.add_noise(x0, noise, t)
    away = process.alpha(t) * (model.x0(x, t) - x0) + process.sigma(t) * (model.eps(x, t) - noise)
    torch.testing.assert_close(found, away.square().mean(), rtol=1e-10, atol=1e-30)


def test_the_second_time_is_another_one() -> None:
    seen: list[Tensor] = []
    layer = nn.Identity()

    def look(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return layer(x)

    model = Denoiser(look, VPLinear(), "v")
    self_perceptual_loss(model, batch()["x"], seeded(1), critic=model, features=layer)
    assert len(seen) == 3
    assert torch.equal(seen[1], seen[2])
    assert (seen[0] != seen[1]).all()


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_model_that_restores_the_data_has_no_loss(process: Process) -> None:
    network = frozen(small())
    exact = gaussian(0.7, process, 0.0)
    critic = Denoiser(network, process, "eps")
    data = torch.full((30, 2), 0.7, dtype=torch.float64)
    loss = self_perceptual_loss(exact, data, seeded(), critic=critic, features=network.middle)
    assert float(loss) < 1e-20
    other = self_perceptual_loss(exact, data + 0.5, seeded(), critic=critic, features=network.middle)
    assert float(other) > 1e-4


def test_the_hook_sees_the_named_layer_with_conditions_and_is_taken_away() -> None:
    network = small()
    x, t = batch()["x"], torch.full((40,), 0.3, dtype=torch.float64)
    found = hidden(Denoiser(network, EDM()), network.middle, x, t, {"labels": LABELS})
    inside = network.first(torch.cat([x, t[:, None]], 1)) + network.embedding(LABELS)
    assert torch.equal(found, inside.tanh())
    assert not network.middle._forward_hooks
    with pytest.raises(ValueError, match="does not pass"):
        hidden(Denoiser(network, EDM()), nn.Identity(), x, t, {})


def test_a_frozen_copy_takes_no_gradient_and_leaves_the_network_alone() -> None:
    network = small()
    copy = frozen(network)
    assert not any(part.requires_grad for part in copy.parameters())
    assert all(part.requires_grad for part in network.parameters())
    assert not copy.training
    assert network.training
    assert torch.equal(copy.last.weight, network.last.weight)
    assert copy.last.weight is not network.last.weight


# -------------------------------------------------------------------------------------------------------- gradients


def losses(network: Small, process: Process) -> dict[str, Any]:
    model, judge = Denoiser(network, process, "velocity"), frozen(small(1))
    critic = Denoiser(judge, process, "velocity")
    weight = edm_weight()
    return {
        "plain": lambda: denoising_loss(model, batch(), seeded(6)),
        "weighted": lambda: denoising_loss(model, batch(), seeded(6), weight=weight, times=lognormal_times()),
        "aligned": lambda: cfg_aligned_loss(model, batch(), seeded(6), null={"labels": 2}, drop=0.3),
        "perceptual": lambda: self_perceptual_loss(model, batch(), seeded(6), critic=critic, features=judge.middle),
    }


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("name", ["plain", "weighted", "aligned", "perceptual"])
def test_gradients_are_those_of_finite_differences(process: Process, name: str) -> None:
    network = small()
    loss = losses(network, process)[name]
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    generator = seeded(9)
    directions = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in parameters]
    slope = sum(float((one * other).sum()) for one, other in zip(gradients, directions, strict=True))
    ends = []
    with torch.no_grad():
        for by in (1e-5, -2e-5):
            for part, direction in zip(parameters, directions, strict=True):
                part.add_(direction, alpha=by)
            ends.append(float(loss()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert abs(slope) > 1e-6
