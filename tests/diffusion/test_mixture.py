"""The exact mixture against torch.distributions, closed forms and its own semigroup."""

from typing import Any

import pytest
import torch
from torch import distributions

from consilience.diffusion import EDM, PFGMPP, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear

torch.set_num_threads(1)

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[0.8, 0.2, -0.4], [-0.9, 0.5, 0.0], [0.0, -1.0, 1.0]], dtype=torch.float64)
ROOTS = torch.randn(3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 0.4
COVARIANCES = ROOTS @ ROOTS.transpose(1, 2) + 0.02 * torch.eye(3, dtype=torch.float64)
PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(2.0), TrigFlow()]


def mixture(process: Process) -> GaussianMixture:
    return GaussianMixture(WEIGHTS, MEANS, COVARIANCES, process)


def noised(process: Process, t: float) -> Any:
    """The law of alpha x0 + sigma eps, by torch."""
    at = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = process.alpha(at), process.sigma(at)
    covariances = alpha**2 * COVARIANCES + sigma**2 * torch.eye(3, dtype=torch.float64)
    parts = distributions.MultivariateNormal(alpha * MEANS, covariances)
    return distributions.MixtureSameFamily(distributions.Categorical(WEIGHTS), parts)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("ratio", [0.01, 0.5, 3.0, 50.0])
def test_density_score_and_denoiser_are_those_of_torch(process: Process, ratio: float) -> None:
    t = float(process.time(torch.tensor(ratio, dtype=torch.float64)))
    model, law = mixture(process), noised(process, t)
    x = law.sample((7,)).requires_grad_(True)
    log_density = law.log_prob(x)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    torch.testing.assert_close(model.log_density(x, t), log_density.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.score(x, t), score, rtol=1e-7, atol=1e-9)
    at = torch.tensor(t, dtype=torch.float64)
    tweedie = (x + process.sigma(at) ** 2 * score) / process.alpha(at)
    torch.testing.assert_close(model.x0(x, t), tweedie, rtol=1e-8, atol=1e-8)
    parts = law.component_distribution.log_prob(x[:, None]) + WEIGHTS.log()
    torch.testing.assert_close(model.responsibilities(x, t), torch.softmax(parts, 1), rtol=1e-9, atol=1e-12)


def test_moments_are_those_of_torch_and_of_samples() -> None:
    """Mean and covariance of 100,000 draws within 5 standard errors: false alarm below 1e-5."""
    model, law = mixture(EDM()), noised(EDM(), 0.0)
    torch.testing.assert_close(model.mean, law.mean)
    torch.testing.assert_close(model.covariance.diagonal(), law.variance)
    draws = model.sample(100_000, torch.Generator().manual_seed(0))
    error = (draws.mean(0) - model.mean) / (model.covariance.diagonal() / 100_000).sqrt()
    assert float(error.abs().max()) < 5
    products = (draws - model.mean)[:, :, None] * (draws - model.mean)[:, None, :]
    error = (products.mean(0) - model.covariance) / (products.std(0) / 100_000**0.5)
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_map_of_a_single_gaussian_is_affine(process: Process) -> None:
    """(x - alpha mu) per axis times the ratio of the deviations, then alpha mu."""
    root = torch.diag(torch.tensor([0.3, 1.0, 0.05], dtype=torch.float64))
    turn = torch.linalg.qr(ROOTS[0])[0]
    model = GaussianMixture(WEIGHTS[:1] * 2, MEANS[:1], (turn @ root @ root @ turn.T)[None], process)
    ends = [float(process.time(torch.tensor(r, dtype=torch.float64))) for r in (40.0, 0.0)]
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor(ends, dtype=torch.float64)
    x = x * process.sigma(at[0])
    alpha, sigma = process.alpha(at), process.sigma(at)
    deviations = torch.sqrt(alpha[:, None] ** 2 * root.diagonal() ** 2 + sigma[:, None] ** 2)
    expected = alpha[1] * MEANS[0] + ((x - alpha[0] * MEANS[0]) @ turn * deviations[1] / deviations[0]) @ turn.T
    torch.testing.assert_close(model.ode_map(x, *ends), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_maps_compose_and_invert(process: Process) -> None:
    model = mixture(process)
    top, middle, low = (float(process.time(torch.tensor(r, dtype=torch.float64))) for r in (20.0, 1.0, 0.05))
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * process.sigma(torch.tensor(top, dtype=torch.float64))
    half = model.ode_map(x, top, middle)
    torch.testing.assert_close(model.ode_map(half, middle, low), model.ode_map(x, top, low), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(model.ode_map(half, middle, top), x, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.ode_map(x, top, top), x)


def test_the_map_carries_the_density() -> None:
    """log p_s(X(x)) + log |det dX/dx| = log p_t(x), the determinant by finite differences."""
    model, h = mixture(VPLinear()), 1e-5
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moves = h * torch.eye(3, dtype=torch.float64)
    columns = [(model.ode_map(x + move, 0.8, 0.2) - model.ode_map(x - move, 0.8, 0.2)) / (2 * h) for move in moves]
    gained = torch.linalg.slogdet(torch.stack(columns, 2))[1]
    after = model.log_density(model.ode_map(x, 0.8, 0.2), 0.2)
    torch.testing.assert_close(after + gained, model.log_density(x, 0.8), rtol=1e-5, atol=1e-5)


def test_the_map_from_pure_noise_to_data() -> None:
    """Between the ends of a flow, where one conversion divides by alpha = 0 and the other by sigma = 0."""
    model = mixture(RectifiedFlow())
    x = torch.randn(2_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = model.ode_map(x, 1.0, 0.0, 1e-7, 1e-8)
    error = (data.mean(0) - model.mean) / (model.covariance.diagonal() / 2_000).sqrt()
    assert float(error.abs().max()) < 5


def test_points_and_lines_are_distributions_too() -> None:
    """Singular covariances: a component without any spread, and one on a line."""
    flat = torch.zeros(2, 2, 2, dtype=torch.float64)
    flat[1, 0, 0] = 1.0
    means = torch.tensor([[1.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    model = GaussianMixture(torch.tensor([0.5, 0.5], dtype=torch.float64), means, flat)
    x = torch.tensor([[1.1, 2.05], [0.4, -1.9]], dtype=torch.float64)
    found = model.x0(x, 0.1)
    torch.testing.assert_close(found[0], means[0])
    torch.testing.assert_close(found[1], torch.tensor([0.4 / 1.01, -2.0], dtype=torch.float64))
    draws = model.sample(50, torch.Generator().manual_seed(0))
    assert bool(((draws[:, 1] - 2).abs().lt(1e-12) | (draws[:, 1] + 2).abs().lt(1e-12)).all())


def test_shapes_dtypes_and_times_per_sample() -> None:
    model = mixture(EDM())
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = x.reshape(4, 1, 3, 1)
    t = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64)
    together = model.x0(images, t)
    assert together.shape == images.shape
    apart = torch.cat([model.x0(x[i : i + 1], t[i]) for i in range(4)])
    torch.testing.assert_close(together.reshape(4, 3), apart)
    single = GaussianMixture(WEIGHTS.float(), MEANS.float(), COVARIANCES.float())
    assert single.x0(x.float(), 0.5).dtype == torch.float32
    assert single.ode_map(x.float(), 1.0, 0.1).dtype == torch.float32
    assert single.process == EDM()


def test_moved_to_another_process_the_data_stay() -> None:
    model = mixture(EDM()).on(VPLinear())
    assert isinstance(model, GaussianMixture)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.log_density(x, 0.4), mixture(VPLinear()).log_density(x, 0.4))


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (WEIGHTS, MEANS[:2], COVARIANCES, "got shapes"),
        (WEIGHTS, MEANS, COVARIANCES[:, :2], "got shapes"),
        (2 * WEIGHTS, MEANS, COVARIANCES, "sum to 1"),
        (torch.tensor([1.5, -0.3, -0.2], dtype=torch.float64), MEANS, COVARIANCES, "positive"),
        (WEIGHTS, MEANS, -COVARIANCES, "semidefinite"),
        (WEIGHTS, MEANS, COVARIANCES + torch.arange(9.0, dtype=torch.float64).reshape(3, 3), "symmetric"),
    ],
)
def test_what_is_no_mixture_is_refused(
    weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances)


def test_a_process_of_other_than_normal_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="normal noise"):
        mixture(PFGMPP(dim=3))


def test_float32_float64_and_lists_work_together_to_float32s_rounding() -> None:
    wide = mixture(EDM())
    mixed = GaussianMixture(WEIGHTS.float(), MEANS, COVARIANCES.float(), EDM())
    listed = GaussianMixture(WEIGHTS.tolist(), MEANS.numpy(), COVARIANCES.tolist(), EDM())  # type: ignore[arg-type]
    assert (mixed.means.dtype, listed.means.dtype) == (torch.float64, torch.float64)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for model in (wide, mixed, listed):
        for value in (model.x0(x, 0.7), model.score(x, 0.7), model.log_density(x, 0.7), model.responsibilities(x, 0.7)):
            assert value.dtype == torch.float32
        torch.testing.assert_close(model.x0(x, 0.7), wide.x0(x.double(), 0.7).float(), rtol=1e-5, atol=1e-6)
    narrow = GaussianMixture(WEIGHTS.float(), MEANS.float(), COVARIANCES.float(), EDM())
    assert narrow.x0(x.double(), 0.7).dtype == torch.float64
    torch.testing.assert_close(narrow.x0(x.double(), 0.7), wide.x0(x.double(), 0.7), rtol=1e-4, atol=1e-5)
    whole = GaussianMixture(torch.tensor([1]), torch.tensor([[0, 1]]), torch.eye(2, dtype=torch.long)[None])
    assert whole.x0(torch.tensor([[1, 1]]), 1.0).tolist() == [[0.5, 1.0]]  # halfway between the mean and x
    half = GaussianMixture(WEIGHTS.half(), MEANS.half(), COVARIANCES.half(), EDM())
    torch.testing.assert_close(half.x0(x, 0.7), wide.x0(x, 0.7), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"weights": "equal"}, "weights: expected numbers"),
        ({"means": [[1.0, 2.0], [3.0]]}, "means: expected numbers"),
        ({"means": MEANS * 1j}, "means: expected real numbers"),
        ({"weights": torch.tensor([0.5, 0.5])}, r"need weights \[K\]"),
        ({"weights": torch.tensor([0.5, 0.3, float("nan")])}, "finite"),
        ({"covariances": COVARIANCES * float("inf")}, "finite"),
        ({"weights": torch.tensor([0.5, 0.5, 0.5])}, "sum to 1"),
        ({"weights": [], "means": torch.zeros(0, 2), "covariances": torch.zeros(0, 2, 2)}, "weights must be positive"),
    ],
)
def test_what_is_no_mixture_is_said(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GaussianMixture(**({"weights": WEIGHTS, "means": MEANS, "covariances": COVARIANCES} | parts))


@pytest.mark.parametrize("shape", [(), (3,), (4, 2), (4, 3, 2), (4, 1)])
def test_states_that_do_not_fit_are_named_by_shape(shape: tuple[int, ...]) -> None:
    model, x = mixture(EDM()), torch.zeros(shape)
    for call in (model.log_density, model.responsibilities, model.x0, lambda x, t: model.ode_map(x, t, 0.0)):
        with pytest.raises(ValueError, match=r"states have 3 values each, \[batch, 3\]; got shape"):
            call(x, 1.0)
    with pytest.raises(ValueError, match="one for each of 4 states"):
        model.x0(torch.zeros(4, 3), torch.ones(3))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        model.sample(0)
