"""Few-step samplers: exact laws under the exact map, the limits of gamma, diffusers' schedulers, the search."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, TrigFlow, VPLinear, VPTable
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.objectives.trajectory import edges
from consilience.diffusion.consistency.samplers import (
    gamma_sample,
    golden,
    multistep,
    one_step,
    phase_grid,
    phased,
    renoise,
    search_levels,
    tcd_sample,
)

from .exact import COVARIANCE, generator

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow(), TrigFlow()]


def centred(process: Process) -> GaussianMixture:
    zero = torch.zeros(1, 2, dtype=torch.float64)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), zero, COVARIANCE[None], process)


def grid(process: Process, *ratios: float) -> Tensor:
    inner = process.time(torch.tensor([*ratios, 0.0], dtype=torch.float64))
    return torch.cat([torch.tensor([process.t_max], dtype=torch.float64), inner])


def law(process: Process, sample) -> Tensor:
    """The exact covariance of a linear sampler's result: every source of noise is sent through as a unit vector."""
    times = torch.tensor(process.t_max, dtype=torch.float64)
    start = process.alpha(times) ** 2 * COVARIANCE + process.sigma(times) ** 2 * torch.eye(2, dtype=torch.float64)
    sources = 2 * 4
    x = torch.cat([torch.linalg.cholesky(start).T, torch.zeros(sources - 2, 2, dtype=torch.float64)])
    used = iter(range(2, sources, 2))

    def noise(state: Tensor, _s: float, _t: float) -> Tensor:
        unit = torch.zeros_like(state)
        i = next(used)
        unit[i : i + 2] = torch.eye(2)
        return unit

    found = sample(x, noise).x
    return found.T @ found


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_every_gamma_keeps_the_law_of_the_data_under_the_exact_map(process: Process, gamma: float) -> None:
    flow, steps = exact_map(centred(process)), grid(process, 3.0, 0.6, 0.1)
    for sampler in (gamma_sample, tcd_sample):
        found = law(process, lambda x, noise, s=sampler: s(flow, x, steps, gamma, noise=noise))
        torch.testing.assert_close(found, COVARIANCE, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_gamma_one_is_multistep_and_gamma_zero_the_chain_without_noise(process: Process) -> None:
    flow, steps = exact_map(centred(process)), grid(process, 3.0, 0.6, 0.1)
    x = process.prior((5, 2), generator(), dtype=torch.float64)
    for sampler in (gamma_sample, tcd_sample):
        torch.testing.assert_close(
            sampler(flow, x, steps, 1.0, generator=generator(1)).x, multistep(flow, x, steps, generator=generator(1)).x
        )
        torch.testing.assert_close(sampler(flow, x, steps, 0.0).x, phased(flow, x, steps).x, rtol=0, atol=0)
    torch.testing.assert_close(phased(flow, x, steps).x, one_step(flow, x).x, rtol=1e-7, atol=1e-8)  # a semigroup


def test_evaluations_and_states_are_counted() -> None:
    process, calls = VPLinear(), []
    inner = exact_map(centred(process))

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        calls.append((float(t), float(s)))
        return inner.function(x, t, s)

    flow, steps = FlowMap(function, process, "flow"), grid(process, 3.0, 0.6)
    x = torch.zeros(2, 2, dtype=torch.float64)
    ways = (one_step, lambda f, y: multistep(f, y, steps, generator=generator()), lambda f, y: phased(f, y, steps))
    for way, count in zip(ways, (1, 3, 3), strict=True):
        sample = way(flow, x)
        assert sample.nfe == count == len(sample.states) == len(sample.grid) - 1
        assert len(calls) == count
        assert all(t > s for t, s in calls)
        assert torch.equal(sample.states[-1], sample.x)
        calls.clear()


def test_a_consistency_models_value_is_noised_by_what_is_missing() -> None:
    """Algorithm 1: x + sqrt(tau^2 - epsilon^2) z."""
    x, z = torch.ones(3, 2), torch.full((3, 2), 2.0)
    torch.testing.assert_close(renoise(x, 0.0, 0.5, EDM(), z, 0.3), x + math.sqrt(0.25 - 0.09) * z)
    with pytest.raises(ValueError, match="cannot noise"):
        renoise(x, 0.0, 1.0, RectifiedFlow(), z)


def test_tcd_sampling_is_that_of_the_diffusers_scheduler() -> None:
    """An arbitrary noise prediction on a table of timesteps: four steps, their noise the same."""
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear")
    # at these times (1 - 1/3) of the way to no noise, time -1 here, is the scheduler's floor of 2/3 of the timestep
    scheduler.set_timesteps(timesteps=[959, 719, 479, 239])
    process = VPTable(scheduler.alphas_cumprod.double())

    def eps(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        return torch.tanh(x * 1.3 + t.expand(len(x))[:, None] / 500)

    x = torch.randn(6, 2, dtype=torch.float64, generator=generator())
    times = torch.tensor([959, 719, 479, 239, 0], dtype=torch.float64)  # the scheduler ends at timestep 0
    for gamma in (0.0, 1 / 3):
        state, gen = x, generator(5)
        scheduler.set_timesteps(timesteps=[959, 719, 479, 239])
        for t in scheduler.timesteps:
            state = scheduler.step(eps(state, t.double()), t, state, eta=gamma, generator=gen).prev_sample
        mine = tcd_sample(FlowMap(eps, process, "eps"), x, times, gamma, generator=generator(5)).x
        torch.testing.assert_close(mine, state, rtol=1e-4, atol=1e-4)  # the scheduler's table is float32


def test_multistep_is_that_of_the_diffusers_consistency_scheduler() -> None:
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False)
    scheduler.set_timesteps(timesteps=[39, 22, 8])
    process = EDM()
    sigmas = scheduler.sigmas.double()

    def raw(x: Tensor) -> Tensor:
        return torch.tanh(x)

    def predict(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        gap = t - process.sigma_min
        skip = 0.25 / (gap**2 + 0.25)
        return skip * x + gap * 0.5 / torch.sqrt(t**2 + 0.25) * raw(x)

    x = 80 * torch.randn(4, 2, dtype=torch.float64, generator=generator())
    state, gen = x, generator(3)
    for t in scheduler.timesteps:
        state = scheduler.step(raw(state), t, state, generator=gen).prev_sample
    draws = generator(3)
    steps = torch.cat([sigmas[:3], torch.zeros(1, dtype=torch.float64)])
    mine = multistep(FlowMap(predict, process, "x0"), x, steps, sigma_min=process.sigma_min, generator=draws).x
    # the scheduler adds sqrt(sigma_min^2 - sigma_min^2) noise, nothing, after its last step
    torch.testing.assert_close(mine, state, rtol=1e-4, atol=1e-4)


def test_phase_grids_are_the_edges_of_the_objectives() -> None:
    train = torch.linspace(1.0, 0.0, 51, dtype=torch.float64)
    for phases in (1, 4, 7, 50):
        found = phase_grid(train, phases)
        assert torch.equal(found[1:], train[edges(50, phases)])
        assert found[0] == 1


@pytest.mark.parametrize("process", [EDM(), VPLinear()], ids=lambda p: type(p).__name__)
def test_errors_of_the_jumps_multiply_in_the_chain_and_are_forgotten_with_the_noise(process: Process) -> None:
    """A map whose prediction of the flow is 5 % off: without noise n jumps have n factors, whose product is the
    error; with all noise put back, in between levels far apart, only the last jumps' errors are left.
    """
    inner = exact_map(centred(process))
    steps = grid(process, 6.0, 2.0, 0.7)
    product = torch.eye(2, dtype=torch.float64)
    flow = FlowMap(lambda x, t, s: inner.function(x, t, s) * 1.05, process, "flow")
    for t, s in itertools.pairwise(steps):
        product = flow(product, t, s)  # linear: each jump is a symmetric matrix of the covariance's axes
    top = steps[0]
    start = process.alpha(top) ** 2 * COVARIANCE + process.sigma(top) ** 2 * torch.eye(2, dtype=torch.float64)
    chained = law(process, lambda x, noise: tcd_sample(flow, x, steps, 0.0, noise=noise))
    torch.testing.assert_close(chained, product.T @ start @ product)
    noisy = [law(process, lambda x, noise, g=g: tcd_sample(flow, x, steps, g, noise=noise)) for g in (0.3, 0.6, 1.0)]
    errors = [float((found - COVARIANCE).norm()) for found in (chained, *noisy)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


def test_the_search_finds_the_valley_of_a_metric_one_level_after_the_other() -> None:
    wanted = [math.log(5.0), math.log(0.3)]

    def metric(times: Tensor) -> float:
        inner = times[1:-1].log().tolist()
        return sum((a - b) ** 2 for a, b in zip(inner, wanted, strict=False)) + 10 * (2 - len(inner))

    found = search_levels(metric, EDM(), 3, iterations=30)
    assert found.grid[[0, -1]].tolist() == [80.0, 0.0]
    assert found.evaluations == 2 * 32
    torch.testing.assert_close(found.grid[1:-1].log().tolist(), wanted, rtol=0, atol=1e-4)
    assert found.score == metric(found.grid)
    assert search_levels(lambda t: float(len(t)), EDM(), 1).score == 2


def test_golden_section_shrinks_by_its_ratio() -> None:
    calls: list[float] = []

    def f(x: float) -> float:
        calls.append(x)
        return (x - 0.7) ** 2

    x, value = golden(f, 0.0, 1.0, 20)
    assert abs(x - 0.7) < 0.62**20
    assert value == (x - 0.7) ** 2
    assert len(calls) == 22


def test_the_search_improves_two_step_sampling_of_a_biased_map() -> None:
    """Against the worst of three fixed levels and no worse than any: the metric is the exact covariance's error."""
    process = EDM()
    inner = exact_map(centred(process))
    flow = FlowMap(lambda x, t, s: inner.function(x, t, s) * (1 + 0.02 * t.log()), process, "flow")

    def metric(times: Tensor) -> float:
        return float((law(process, lambda x, noise: multistep(flow, x, times, noise=noise)) - COVARIANCE).norm())

    found = search_levels(metric, process, 2, iterations=16)
    fixed = [metric(grid(process, level)) for level in (20.0, 1.0, 0.05)]
    assert found.score <= min(fixed)
    assert found.score < 0.9 * max(fixed)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda f, x: gamma_sample(f, x, grid(EDM(), 1.0), 1.5), "gamma must"),
        (lambda f, x: phased(f, x, torch.tensor([1.0, 1.0])), "strictly decreasing"),
        (lambda f, x: phase_grid(torch.tensor([1.0, 0.0]), 2), "phases <= steps"),
        (lambda f, x: search_levels(lambda g: 0.0, RectifiedFlow(), 2), "give the search a top"),
        (lambda f, x: search_levels(lambda g: 0.0, EDM(), 0), "steps >= 1"),
    ],
)
def test_what_cannot_be_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(exact_map(centred(EDM())), torch.zeros(1, 2, dtype=torch.float64))
