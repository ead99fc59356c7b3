"""Averages of weights in closed form, noise assignment, the search over checkpoints, and the pool of denoised data."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from consilience.diffusion import EDM, Denoiser, GaussianMixture, RectifiedFlow, VPLinear
from consilience.diffusion.losses import denoising_loss, uniform_times
from consilience.diffusion.training import (
    EMA,
    Decay,
    DenoisedPool,
    Power,
    assign,
    assigned,
    combine,
    lcsc,
    reconstruct,
    snapshots,
    train,
)
from consilience.diffusion.training.ema import coefficients, correlation, exponent
from consilience.diffusion.training.online_sfbd import backward

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- averages


def followed(profile: Any, values: Tensor) -> Tensor:
    """The average after each of the values [steps], of one parameter that begins at 0."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()
    average = EMA(model, profile)
    seen = []
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            model.weight.fill_(float(value))
        average.update(model, step)
        seen.append(float(average.module.weight))
    return torch.tensor(seen, dtype=torch.float64)


def test_plain_decay_in_closed_form():
    """(1 - r) sum_k r^(t-k) x_k, which is 1 - r^t for x = 1."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    powers = 0.9 ** torch.arange(59, -1, -1, dtype=torch.float64)
    assert followed(Decay(0.9, warmup=False), values)[-1] == pytest.approx(
        float(0.1 * (powers * values).sum()), abs=1e-14
    )
    ones = followed(Decay(0.9, warmup=False), torch.ones(60))
    torch.testing.assert_close(ones, 1 - 0.9 ** torch.arange(1.0, 61.0, dtype=torch.float64))


def test_the_warm_up_rule():
    """1 - prod_k beta_k for x = 1, with beta_k = min(rate, (1 + k) / (10 + k))."""
    steps = torch.arange(1.0, 201.0, dtype=torch.float64)
    kept = torch.minimum(torch.tensor(0.9).double(), (1 + steps) / (10 + steps)).cumprod(0)
    torch.testing.assert_close(followed(Decay(0.9), torch.ones(200)), 1 - kept)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.25])
def test_the_power_average_has_its_weights_and_its_length(sigma_rel: float):
    """The weight of step k at step t is (k^(g+1) - (k-1)^(g+1)) / t^(g+1), and the profile's deviation sigma_rel."""
    gamma, count = exponent(sigma_rel), 2000
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    weights = torch.diff(edges ** (gamma + 1))
    values = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert followed(Power(sigma_rel), values)[-1] == pytest.approx(float(weights @ values), abs=1e-12)
    middle = (edges[1:] + edges[:-1]) / 2
    spread = (weights @ middle**2 - (weights @ middle) ** 2).sqrt()
    assert float(spread) == pytest.approx(sigma_rel, rel=1e-3)


def test_the_inner_product_of_profiles_is_their_integral():
    from scipy.integrate import quad

    for (a, g), (b, h) in itertools.product([(3.0, 1.5), (5.0, 6.9), (5.0, 0.2)], repeat=2):
        both = quad(
            lambda x, a=a, b=b, g=g, h=h: (g + 1) * x**g / a ** (g + 1) * (h + 1) * x**h / b ** (h + 1), 0, min(a, b)
        )
        assert correlation(a, g, b, h) == pytest.approx(both[0], rel=1e-8)


def test_a_saved_profile_is_reconstructed_by_itself():
    saved = [(100.0 * k, length) for k in range(1, 7) for length in (0.05, 0.1)]
    for i, (step, length) in enumerate(saved):
        np.testing.assert_allclose(coefficients(saved, step, length), np.eye(len(saved))[i], atol=1e-6)


def test_any_length_afterwards_is_close_to_the_one_followed_directly(tmp_path: Path):
    """Training with snapshots of 0.05 and 0.10, against averages of other lengths kept from the beginning: within 2 %
    of how far apart the averages of 0.05 and 0.10 themselves are (20 % where the length was not between them)."""
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.shape, generator=generator, dtype=torch.float64)
        return (model(batch + noise) - batch).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    lengths = (0.05, 0.1, 0.07, 0.15)
    kept = train(
        model,
        loss,
        rows,
        steps=480,
        batch_size=16,
        lr=0.02,
        ema=[Power(length) for length in lengths],
        out=tmp_path,
        snapshot_every=20,
        progress=False,
    )
    shots = [shot | {"sigma_rel": shot["sigma_rel"][:2], "ema": shot["ema"][:2]} for shot in snapshots(tmp_path)]

    def gap(one: Any, other: Any) -> float:
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    direct = [average.state_dict() for average in kept.averages]
    for length, state in zip(lengths, direct, strict=True):
        found, weights = reconstruct(shots, length)
        assert weights.sum() == pytest.approx(1)
        assert gap(found, state) <= (0.02 if length <= 0.1 else 0.2) * gap(direct[0], direct[1])


def test_averages_keep_counters_and_refuse_what_cannot_be():
    model = nn.BatchNorm1d(2)
    average = EMA(model, Decay(0.9))
    model(torch.randn(8, 2))
    average.update(model, 1)
    assert int(average.module.num_batches_tracked) == 1
    assert not average.module.training
    mixed = combine([model.state_dict(), average.module.state_dict()], [0.25, 0.75])
    assert int(mixed["num_batches_tracked"]) == 1
    with pytest.raises(ValueError, match="names or shapes"):
        combine([{"a": torch.ones(2)}, {"a": torch.ones(3)}], [0.5, 0.5])
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="rate"):
            Decay(rate)
    for length in (0.0, 0.3):
        with pytest.raises(ValueError, match="sigma_rel"):
            Power(length)
    with pytest.raises(ValueError, match="at or before step 5"):
        coefficients([(10.0, 0.1)], 5, 0.1)
    with pytest.raises(ValueError, match="power-function"):
        reconstruct([{"step": 1, "ema": [{}], "sigma_rel": [None]}], 0.1)


# ----------------------------------------------------------------------------------------------------- immiscible


def test_assignment_is_the_best_of_all_orders():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x0, noise = torch.randn(2, 5, 3, generator=generator)
        cost = {order: float((x0 - noise[list(order)]).norm(dim=1).sum()) for order in itertools.permutations(range(5))}
        best = min(cost, key=lambda order: cost[order])
        assert torch.equal(assign(x0, noise), noise[list(best)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_assignment_keeps_the_noises_and_follows_the_data(seed: int, count: int):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(count, 1, 2, 2, generator=generator), torch.randn(count, 1, 2, 2, generator=generator)
    found = assign(x0, noise)
    assert sorted(map(tuple, found.flatten(1).tolist())) == sorted(map(tuple, noise.flatten(1).tolist()))
    order = torch.randperm(count, generator=generator)
    assert torch.equal(assign(x0[order], noise), found[order])


def test_the_noise_stays_normal_and_comes_nearer():
    """Kolmogorov-Smirnov of 4 x 6400 values, which are independent over batches and, taken together, standard normal:
    below 1e-3 for one of four by chance in 0.4 % of the runs. The distance shrinks, and noise and data correlate."""
    generator = torch.Generator().manual_seed(1)
    x0 = 0.5 * torch.randn(100, 64, 2, generator=generator)
    noise = torch.randn(100, 64, 2, generator=generator)
    found = torch.stack([assign(a, b) for a, b in zip(x0, noise, strict=True)])
    assert min(stats.kstest(part.flatten().numpy(), "norm").pvalue for part in found.split(25)) > 1e-3
    assert float((x0 - found).norm(dim=2).mean()) < 0.8 * float((x0 - noise).norm(dim=2).mean())
    assert float((x0 * found).mean()) > 0.2


def test_a_loss_takes_assigned_noise():
    """The loss of a model that knows the data is the mean squared velocity error, computed by hand from the pairs."""
    process = RectifiedFlow()
    x0 = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    model = Denoiser(lambda x, t: torch.zeros_like(x), process, "flow")
    found = denoising_loss(model, x0, torch.Generator().manual_seed(1), noise=assigned(process))
    generator = torch.Generator().manual_seed(1)
    times = uniform_times(16, process, generator)
    pairs = assign(x0, process.noise((16, 2), times.float(), generator))
    assert float(found) == pytest.approx(float((pairs - x0).square().mean()), rel=1e-6)
    independent = denoising_loss(model, x0, torch.Generator().manual_seed(1))
    assert float(found) < float(independent)


def test_assignment_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="one shape"):
        assign(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="not finite"):
        assign(torch.full((3, 2), torch.nan), torch.ones(3, 2))


# ----------------------------------------------------------------------------------------------------------- lcsc


def states_and_target() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Six states and a target that needs a negative coefficient: outside their convex hull."""
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    states = [{"w": row[:8].reshape(4, 2), "b": row[8:], "count": torch.tensor(i)} for i, row in enumerate(rows)]
    return states, torch.tensor([0.1, -0.5, 0.2, 0.0, 0.6, 0.6]) @ rows


def distance_to(target: Tensor) -> Any:
    return lambda state: float((torch.cat([state["w"].flatten(), state["b"]]) - target).square().sum())


def test_the_search_finds_a_combination_with_negative_coefficients():
    states, target = states_and_target()
    found = lcsc.search(states, distance_to(target), np.random.default_rng(0), evaluations=2000)
    assert found.coefficients.sum() == pytest.approx(1)
    assert found.coefficients.min() < -0.3
    assert found.value < 0.05 * min(found.starts)
    assert distance_to(target)(found.state) == pytest.approx(found.value, rel=1e-5)
    assert len(found.best) == 2000
    assert list(found.best) == sorted(found.best, reverse=True)
    direct = combine(states, found.coefficients)
    torch.testing.assert_close(direct["w"], found.state["w"], rtol=1e-5, atol=1e-6)
    assert int(found.state["count"]) == 5


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 60))
def test_the_search_never_loses_to_its_starts_and_repeats_itself(seed: int, evaluations: int):
    states, target = states_and_target()
    runs = [
        lcsc.search(states, distance_to(target), np.random.default_rng(seed), evaluations=evaluations) for _ in range(2)
    ]
    assert runs[0].value <= min(runs[0].starts)
    assert runs[0].starts[0] == pytest.approx(distance_to(target)(states[-1]), rel=1e-5)
    assert (runs[0].coefficients == runs[1].coefficients).all()


def test_starts_are_averages_and_a_metric_that_fails_loses():
    for start in lcsc.starts(10):
        assert start.sum() == pytest.approx(1)
        assert (np.diff(start) >= 0).all()
    states, _ = states_and_target()
    calls = itertools.count()
    found = lcsc.search(
        states, lambda state: float("nan") if next(calls) else 3.0, np.random.default_rng(0), evaluations=20
    )
    assert found.value == 3.0
    for bad in ({"parents": 1}, {"mutation": 0.0}, {"evaluations": 2}):
        with pytest.raises(ValueError, match="need parents"):
            lcsc.search(states, lambda state: 0.0, np.random.default_rng(0), **bad)
    with pytest.raises(ValueError, match="at least 2"):
        lcsc.search(states[:1], lambda state: 0.0, np.random.default_rng(0))


# ---------------------------------------------------------------------------------------------------- online sfbd

WEIGHTS, MEANS = torch.tensor([0.3, 0.7]).double(), torch.tensor([[-1.0], [1.0]]).double()
MIXTURE = GaussianMixture(WEIGHTS, MEANS, torch.full((2, 1, 1), 0.05).double())


@pytest.mark.parametrize("process", [EDM(), VPLinear()])
def test_backward_draws_from_the_posterior(process: Any):
    """x0 given x is a mixture with known weights, means and variances: z of share and mean below 4.5 (1 in 150,000
    each, with the discretisation of 200 steps well inside)."""
    sigma, count = 0.8, 4000
    x = torch.full((count, 1), 0.3).double()
    made = backward(MIXTURE.on(process), x, sigma, 200, torch.Generator().manual_seed(0))[:, 0]
    variance = 0.05 + sigma**2
    share = WEIGHTS * torch.exp(-((0.3 - MEANS[:, 0]) ** 2) / (2 * variance))
    share = share / share.sum()
    means = MEANS[:, 0] + 0.05 / variance * (0.3 - MEANS[:, 0])
    right = (made > 0).double()
    assert abs(float(right.mean() - share[1])) < 4.5 * float(torch.sqrt(share[0] * share[1] / count))
    for k, part in ((0, made[made < 0]), (1, made[made > 0])):
        spread = (0.05 * sigma**2 / variance) ** 0.5
        assert abs(float(part.mean() - means[k])) < 4.5 * spread / len(part) ** 0.5 + 0.004
        assert float(part.std()) == pytest.approx(spread, rel=0.1)


def exact_view(module: nn.Module) -> Denoiser:
    return MIXTURE


def test_a_pool_filled_by_the_exact_model_has_the_law_of_clean_data():
    """Two-sample Kolmogorov-Smirnov against clean data; p < 1e-3 by chance once in 1000. Noisy data fail it by far."""
    generator = torch.Generator().manual_seed(3)
    clean, noisy = MIXTURE.sample(50, generator), MIXTURE.sample(3000, generator)
    noisy = noisy + 0.5 * torch.randn(noisy.shape, generator=generator, dtype=torch.float64)
    pool = DenoisedPool(clean, noisy, 0.5, exact_view, evaluations=100)
    assert torch.equal(pool.denoised, noisy)
    pool.fill(nn.Linear(1, 1))
    fresh = MIXTURE.sample(3000, generator)[:, 0].numpy()
    assert stats.ks_2samp(pool.denoised[:, 0].numpy(), fresh).pvalue > 1e-3
    assert stats.ks_2samp(noisy[:, 0].numpy(), fresh).pvalue < 1e-9
    assert torch.equal(pool.rows[:50], clean)
    assert len(pool) == 3050
    assert torch.equal(pool[3], clean[3])


def test_the_pool_renews_every_row_in_turn_and_no_other():
    noisy = MIXTURE.sample(10, torch.Generator().manual_seed(0))
    pool = DenoisedPool(noisy[:2], noisy, 0.5, exact_view, every=3, share=0.3, evaluations=2)
    pool.fill(nn.Linear(1, 1))
    changed = []
    for step in range(1, 37):
        before = pool.denoised.clone()
        pool.on_step(step, nn.Linear(1, 1))
        changed.append(int((pool.denoised != before).sum()))
    assert [count for step, count in enumerate(changed, 1) if step % 3] == [0] * 24
    assert [count for step, count in enumerate(changed, 1) if step % 3 == 0] == [3] * 12
    turns = np.concatenate([pool._turn(3 * k) for k in range(10)])
    assert (np.bincount(turns, minlength=10) == 3).all()


def test_a_run_on_a_pool_is_taken_up_bit_equal(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(40, 1, generator=generator)

    def view(module: nn.Module) -> Denoiser:
        return Denoiser(lambda x, t, **_: module(x), EDM())

    def run(out: Path | None, steps: int) -> tuple[Any, DenoisedPool]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))
        pool = DenoisedPool(noisy[:4], noisy, 0.5, view, every=2, share=0.2, evaluations=3)
        pool.fill(model)

        def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
            return (model(batch + torch.randn(batch.shape, generator=generator)) - batch).square().mean()

        settings = {"batch_size": 8, "lr": 0.05, "ema": 0.9, "progress": False, "out": out}
        return train(model, loss, pool, steps=steps, on_step=pool.on_step, **settings), pool

    whole, pool = run(None, 14)
    run(tmp_path, 7)
    resumed, resumed_pool = run(tmp_path, 14)
    assert torch.equal(pool.rows, resumed_pool.rows)
    assert not torch.equal(pool.rows[4:], noisy)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_pool_refuses_what_cannot_be():
    rows = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="one shape"):
        DenoisedPool(rows, torch.zeros(4, 2), 0.5, exact_view)
    for bad in ({"sigma": 0.0}, {"every": 0}, {"share": 0.0}, {"share": 1.5}, {"evaluations": 0}):
        with pytest.raises(ValueError, match="need sigma"):
            DenoisedPool(rows, rows, **{"sigma": 0.5, "view": exact_view} | bad)


# ------------------------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size_and_its_tables_agree_with_its_numbers():
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "benchmarks" / "training_tricks.py"
    flags = ["--steps", "20", "--seeds", "1", "--evaluations", "8", "--json"]
    done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(run["data"], run["noise"]) for run in result["immiscible"]] == [
        (data, noise) for data in ("mixture", "digits") for noise in ("independent", "assigned")
    ]
    assert [point["step"] for point in result["immiscible"][0]["curve"]] == [4, 8, 12, 16, 20]
    assert result["lcsc"][0]["checkpoints"] == 20
    visible = result["lcsc"][0]["visible"]
    assert visible["lcsc"] <= visible["last checkpoint"] * (1 + 1e-4)
    assert result["sfbd"][0]["pool"]["denoised once"] != result["sfbd"][0]["pool"]["online sfbd"]
