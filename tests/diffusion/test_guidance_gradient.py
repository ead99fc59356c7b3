"""Guidance by gradients: potentials, classifiers, minority guidance and guided rehearsal, on exact mixtures."""

from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow, VPLinear, solve
from consilience.diffusion.guidance import (
    classifier_guidance,
    every,
    fit_minority_classifier,
    interval,
    minority_guidance,
    minority_score,
    ordinal_bins,
    potential_guidance,
    rehearsal,
    rehearsal_guidance,
    self_minority,
)

torch.set_num_threads(1)
PROCESSES = [EDM(), VPLinear(), RectifiedFlow(shift=2.0)]
STD = 0.2
CENTRES = torch.tensor([[-1.5, 0.0], [1.5, 0.0], [0.0, 2.5]], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(weights: list[float], process: Process, std: float = STD) -> GaussianMixture:
    """Components at the first centres, those of weight 0 left out."""
    kept = [i for i, weight in enumerate(weights) if weight]
    covariances = std**2 * torch.eye(2, dtype=torch.float64).expand(len(kept), 2, 2)
    share = torch.tensor([weights[i] for i in kept], dtype=torch.float64)
    return GaussianMixture(share / share.sum(), CENTRES[kept], covariances, process)


# ------------------------------------------------------------------------------------------- potentials, classifiers


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_exact_classifier_makes_the_unconditional_score_the_conditional_one(process: Process) -> None:
    both, one = mixture([0.6, 0.3, 0.1], process, 0.7), mixture([0.6, 0.0, 0.1], process, 0.7)

    def log_probability(x: Tensor, t: Tensor) -> Tensor:
        return both.responsibilities(x, t)[:, [0, 2]].sum(1).log()

    guided = classifier_guidance(both, log_probability)
    x = torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        for kind in ("x0", "score", "velocity", "eps"):
            want = one.predict(kind, x, t)  # type: ignore[arg-type]
            torch.testing.assert_close(guided.predict(kind, x, t), want, rtol=1e-8, atol=1e-8)  # type: ignore[arg-type]


def test_samples_under_the_exact_classifier_are_those_of_the_class() -> None:
    process = EDM(sigma_max=20.0)
    both, one = mixture([0.6, 0.3, 0.1], process), mixture([0.6, 0.0, 0.1], process)
    guided = classifier_guidance(both, lambda x, t: both.responsibilities(x, t)[:, [0, 2]].sum(1).log())
    x = 20 * torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(solve(guided, x, 30, "ab2").x, solve(one, x, 30, "ab2").x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("prediction", ["x0", "eps", "velocity", "v"])
def test_a_quadratic_potential_of_x0_has_its_closed_form_gradient(process: Process, prediction: Any) -> None:
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    exact = GaussianMixture(torch.ones(1, dtype=torch.float64), CENTRES[:1], covariance[None], process)
    model = Denoiser(lambda x, t: exact.predict(prediction, x, t), process, prediction)
    aim, t = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    guided = potential_guidance(model, lambda x0, t: -(x0 - aim).square().sum(1) / 2 / 0.3, scale=1.7)
    x = torch.randn(8, 2, generator=seeded(), dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    jacobian = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2).double())
    want = exact.score(x, t) + 1.7 * (aim - exact.x0(x, t)) / 0.3 @ jacobian
    torch.testing.assert_close(guided.score(x, t), want, rtol=1e-9, atol=1e-9)


def test_a_gradient_of_scale_zero_is_no_guidance_and_none_is_added_without_signal() -> None:
    model = mixture([0.6, 0.3, 0.1], RectifiedFlow())
    assert potential_guidance(model, lambda x0, t: x0.sum(1), scale=0.0) is model
    guided = potential_guidance(model, lambda x0, t: -x0.square().sum(1))
    x = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    assert torch.equal(guided.x0(x, 1.0), model.x0(x, 1.0))
    assert torch.isfinite(solve(guided, x, 12, "flow-ab2").x).all()
    assert not torch.equal(guided.x0(x, 0.5), model.x0(x, 0.5))
    with pytest.raises(ValueError, match="one of x or of x0"):
        potential_guidance(model, lambda x0, t: x0.sum(1), on="eps")  # type: ignore[arg-type]


def test_guidance_takes_its_gradient_without_one_around_it_and_leaves_none_behind() -> None:
    layer = nn.Linear(2, 2).double()
    model = Denoiser(lambda x, t: layer(x), EDM())
    x = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        inside = potential_guidance(model, lambda x0, t: -x0.square().sum(1)).x0(x, 0.5)
    outside = potential_guidance(model, lambda x0, t: -x0.square().sum(1)).x0(x, 0.5)
    assert torch.equal(inside, outside)
    assert not outside.requires_grad
    assert layer.weight.grad is None


# -------------------------------------------------------------------------------------------------------- minority

RARE = [0.475, 0.475, 0.05]


def labelled(count: int) -> tuple[Tensor, Tensor]:
    generator = seeded(1)
    which = torch.multinomial(torch.tensor(RARE), count, replacement=True, generator=generator)
    return CENTRES[which] + STD * torch.randn(count, 2, generator=generator, dtype=torch.float64), which


def shares(x: Tensor) -> tuple[float, float]:
    """The share of samples nearest to the rare centre, and of those within four standard deviations of any."""
    away = (x[:, None] - CENTRES).norm(dim=2) / STD
    nearest, which = away.min(1)
    return float((which == 2).double().mean()), float((nearest < 4).double().mean())


class NoisyClassifier(nn.Module):
    """Logits of bins from a noisy state and its time."""

    def __init__(self, bins: int, process: Process) -> None:
        super().__init__()
        self.process = process
        widths = (nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, bins))
        self.layers = nn.Sequential(*widths).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t)[:, None], self.process.sigma(t)[:, None]
        return self.layers(torch.cat([x / torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)], 1))


def test_the_minority_score_ranks_the_rare_component_first() -> None:
    data, which = labelled(2000)
    score = minority_score(mixture(RARE, EDM()), data, 2.0, seeded())
    rare = which == 2
    statistic = mannwhitneyu(score[rare].numpy(), score[~rare].numpy()).statistic
    assert statistic / (rare.sum() * (~rare).sum()) > 0.95  # the area under the ROC curve


def test_the_minority_score_is_the_expected_distance_to_the_restoration() -> None:
    model = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 1).double(), torch.full((1, 1, 1), 0.5).double())
    x0, gain = torch.tensor([[0.0], [2.0], [-2.0]]).double(), 0.5 / (0.5 + 1.0)
    many = minority_score(model, x0.repeat(20_000, 1), 1.0, seeded(), 2, lambda a, b: (a - b).square().sum(1))
    squared = many.reshape(-1, 3).mean(0)
    want = (x0[:, 0] * (1 - gain)) ** 2 + gain**2
    # the variance of (bias + gain z)^2 is 4 bias^2 gain^2 + 2 gain^4; six of its standard errors
    error = (4 * (x0[:, 0] * (1 - gain) * gain) ** 2 + 2 * gain**4).sqrt() / 200
    assert ((squared - want).abs() < 6 * error).all()
    with pytest.raises(ValueError, match="repeats"):
        minority_score(model, x0, 1.0, repeats=0)


def test_ordinal_bins_are_equal_shares_in_the_order_of_the_scores() -> None:
    scores = torch.randperm(1000, generator=seeded()).double()
    bins = ordinal_bins(scores, 8)
    assert bins.bincount().tolist() == [125] * 8
    assert torch.equal(bins[scores.argsort()], bins.sort().values)
    with pytest.raises(ValueError, match="two bins"):
        ordinal_bins(scores, 1)


@pytest.fixture(scope="module")
def trained() -> tuple[GaussianMixture, NoisyClassifier]:
    model = mixture(RARE, EDM(sigma_min=0.01, sigma_max=10.0))
    data, _ = labelled(3000)
    torch.manual_seed(0)
    network = NoisyClassifier(20, model.process)
    bins = ordinal_bins(minority_score(model, data, 2.0, seeded()), 20)
    losses = fit_minority_classifier(network, model, data, bins, seeded(), steps=250)
    assert losses[-1] < losses[0]
    return model, network


def test_minority_guidance_raises_the_rare_share_and_stays_at_the_data(
    trained: tuple[GaussianMixture, NoisyClassifier],
) -> None:
    model, network = trained
    x = 10 * torch.randn(400, 2, generator=seeded(2), dtype=torch.float64)
    plain, near = shares(solve(model, x, 20, "ab2").x)
    assert plain < 0.1
    guided, still_near = shares(solve(minority_guidance(model, network, 19, 1.5), x, 20, "ab2").x)
    assert guided > 0.5  # 0.05 of the data
    assert still_near > 0.95 <= near
    common, _ = shares(solve(minority_guidance(model, network, 0, 1.5), x, 20, "ab2").x)
    assert common < plain


def test_self_guided_minority_sampling_raises_the_rare_share_and_stays_at_the_data() -> None:
    model = mixture(RARE, EDM(sigma_min=0.01, sigma_max=10.0))
    x = 10 * torch.randn(1000, 2, generator=seeded(2), dtype=torch.float64)
    plain, _ = shares(solve(model, x, 25, "ab2").x)
    guided = interval(self_minority(model, 4.0, 0.5, seeded()), model, 1.0, 99.0)
    rare, near = shares(solve(guided, x, 25, "ab2").x)
    assert plain < 0.08
    assert rare > 0.16  # three times the data's; about 0.26 here
    assert near > 0.95


def test_the_self_guided_shift_has_the_chosen_size_in_every_process() -> None:
    for process, t in ((EDM(), 1.5), (VPLinear(), 0.5), (RectifiedFlow(), 0.6)):
        model = mixture(RARE, process)
        x = torch.randn(30, 2, generator=seeded(), dtype=torch.float64)
        shift = self_minority(model, 3.0, t, seeded()).score(x, t) - model.score(x, t)
        at = torch.tensor(t, dtype=torch.float64)
        norm = torch.hypot(process.alpha(at), process.sigma(at))
        torch.testing.assert_close(shift.abs().amax(1) * norm, torch.full((30,), 3.0).double(), rtol=1e-6, atol=0)


def test_self_guidance_counts_two_evaluations_where_it_is_active() -> None:
    calls = []
    exact = mixture(RARE, EDM())

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t))
        return exact.x0(x, t)

    grid = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    model = self_minority(Denoiser(counted, EDM()), 0.5, 1.0, seeded(), every(grid, 3))
    x = torch.randn(3, 2, generator=seeded(), dtype=torch.float64)
    assert solve(model, x, grid, "ddim").nfe == len(calls) == 8
    assert calls == pytest.approx([5.0, 1.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.2])
    assert self_minority(exact, 0.0, 1.0) is exact
    with pytest.raises(ValueError, match="at least 1"):
        every(grid, 0)


# ------------------------------------------------------------------------------------------------------- rehearsal


def by_label(process: Process) -> Denoiser:
    """A wide Gaussian per label."""
    models = [mixture([float(i == k) for i in range(3)], process, 0.7) for k in range(3)]

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([model.x0(x.double(), t) for model in models])[labels, torch.arange(len(x))]

    return Denoiser(function, process)


def logits(x: Tensor) -> Tensor:
    """The exact classifier of three equal classes of standard deviation 0.7."""
    return -(x[:, None].double() - CENTRES).square().sum(2) / 2 / 0.49


def test_guided_rehearsal_comes_nearer_to_the_recent_class_and_stays_in_the_old_one() -> None:
    model = by_label(EDM(sigma_max=20.0))
    drawn = {}
    for scale in (0.0, 0.2, 0.5):
        guided = rehearsal_guidance(model, logits, [2], scale)
        x, labels = rehearsal(guided, [0, 1], 150, (2,), 15, seeded(3), method="ab2")
        assert labels.tolist() == [0] * 150 + [1] * 150
        own = logits(x).softmax(1)
        drawn[scale] = own[:, 2].mean(), (own[:, :2].argmax(1) == labels).double().mean()
    plain, some, more = (drawn[scale] for scale in (0.0, 0.2, 0.5))
    assert plain[0] * 1.3 < some[0] < more[0] / 1.3
    assert min(plain[1], some[1], more[1]) > 0.85


def test_rehearsal_guides_to_the_likeliest_recent_class() -> None:
    model = by_label(EDM())
    x = torch.tensor([[-1.4, 0.2], [1.4, 0.1]], dtype=torch.float64)
    labels = torch.tensor([2, 2])
    together = rehearsal_guidance(model, logits, [0, 1], 1.0).score(x, 1.0, labels=labels)
    alone = [rehearsal_guidance(model, logits, [k], 1.0).score(x, 1.0, labels=labels)[k] for k in (0, 1)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="recent class"):
        rehearsal_guidance(model, logits, [], 1.0)
