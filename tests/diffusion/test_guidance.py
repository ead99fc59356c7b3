"""Classifier-free, interval, projected and auto-guidance against what is known of Gaussians."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow, VPLinear, solve
from consilience.diffusion.grids import karras_grid, on_process
from consilience.diffusion.guidance import apg, autoguidance, classifier_free, extrapolate, interval, with_condition
from consilience.diffusion.guidance.apg import limited, split

torch.set_num_threads(1)
PROCESSES = [EDM(), VPLinear(), RectifiedFlow(shift=2.0)]
COVARIANCE = torch.tensor([[[0.5, 0.2], [0.2, 0.3]]], dtype=torch.float64)
MEANS = torch.tensor([[1.0, -0.5], [-0.4, 2.0], [0.0, 0.0]], dtype=torch.float64)


def gaussian(mean: Tensor, process: Process) -> GaussianMixture:
    return GaussianMixture(torch.ones(1, dtype=torch.float64), mean[None], COVARIANCE, process)


def by_label(process: Process) -> Denoiser:
    """A Gaussian per label; label 2 is the unconditional model."""
    models = [gaussian(mean, process) for mean in MEANS]

    def function(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        every = torch.stack([model.x0(x, t) for model in models])
        return every[labels, torch.arange(len(x))]

    return Denoiser(function, process)


def states(count: int = 6, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("scale", [-0.5, 0.3, 2.0, 7.5])
def test_classifier_free_guidance_of_two_gaussians_moves_the_mean_linearly(process: Process, scale: float) -> None:
    guided = classifier_free(gaussian(MEANS[0], process), scale, gaussian(MEANS[2], process))
    moved = gaussian(MEANS[2] + scale * (MEANS[0] - MEANS[2]), process)
    x = states()
    for t in (0.05, 0.4, 0.9):
        for kind in ("x0", "eps", "v", "velocity", "score"):
            want = moved.predict(kind, x, t)  # type: ignore[arg-type]
            torch.testing.assert_close(guided.predict(kind, x, t), want, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


def test_samples_of_guided_gaussians_are_those_of_the_moved_gaussian() -> None:
    process = EDM(sigma_min=0.002, sigma_max=10.0)
    moved = gaussian(3 * MEANS[0], process)
    x = 10 * states(40, 1.0)
    guided = classifier_free(gaussian(MEANS[0], process), 3.0, gaussian(MEANS[2], process))
    found = solve(guided, x, 200, method="ab3")
    assert found.nfe == 400
    torch.testing.assert_close(found.x, moved.ode_map(x, 10.0, 0.0), rtol=0, atol=2e-4)


def test_scales_zero_and_one_are_the_two_models_at_their_own_cost() -> None:
    process = EDM()
    model = by_label(process)
    labels, x = torch.tensor([0, 1, 0, 1, 0, 1]), states()
    for scale, cost in ((0, 1), (1, 1), (1.0, 1), (2.0, 2)):
        guided = classifier_free(model, scale, {"labels": 2})
        assert guided.cost(1.0) == cost
        if scale == 0:
            assert torch.equal(guided.x0(x, 0.7, labels=labels), model.x0(x, 0.7, labels=torch.full((6,), 2)))
        if scale == 1:
            assert torch.equal(guided.x0(x, 0.7, labels=labels), model.x0(x, 0.7, labels=labels))


def test_the_unconditional_model_may_be_a_condition_or_a_denoiser_on_another_process() -> None:
    labels, x = torch.tensor([0, 1, 0, 1, 0, 1]), states()
    model = by_label(EDM())
    by_value = classifier_free(model, 2.5, {"labels": 2}).x0(x, 0.7, labels=labels)
    by_tensor = classifier_free(model, 2.5, {"labels": torch.tensor(2)}).x0(x, 0.7, labels=labels)
    ignoring = Denoiser(lambda x, t, **_: gaussian(MEANS[2], RectifiedFlow()).x0(x, t), RectifiedFlow())
    by_model = classifier_free(model, 2.5, ignoring).x0(x, 0.7, labels=labels)
    assert torch.equal(by_value, by_tensor)
    torch.testing.assert_close(by_value, by_model, rtol=1e-12, atol=1e-12)


def test_with_condition_replaces_and_adds() -> None:
    def told(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return x * 0 + cond["a"] + cond["b"]

    model = with_condition(Denoiser(told, EDM()), {"b": 5.0})
    assert torch.equal(model.x0(torch.zeros(2, 1), 1.0, a=torch.ones(2, 1), b=torch.zeros(2, 1)), torch.full((2, 1), 6))
    assert torch.equal(model.x0(torch.zeros(2, 1), 1.0, a=2.0), torch.full((2, 1), 7.0))


def test_a_scale_per_sample_is_the_scales_one_by_one() -> None:
    strong, weak, x = gaussian(MEANS[0], EDM()), gaussian(MEANS[1], EDM()), states()
    scales = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    together = extrapolate(strong, weak, scales).x0(x, 0.5)
    for i, scale in enumerate(scales.tolist()):
        alone = extrapolate(strong, weak, scale).x0(x[i : i + 1], 0.5)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 100.0])
def test_a_model_guided_by_itself_is_the_model(scale: float) -> None:
    model, x = gaussian(MEANS[0], VPLinear()), states()
    assert torch.equal(autoguidance(model, model, scale).eps(x, 0.3), model.eps(x, 0.3))


def test_a_guided_model_moves_to_another_process_as_its_parts_do() -> None:
    parts = [gaussian(mean, EDM()) for mean in MEANS[:2]]
    there = [part.on(RectifiedFlow()) for part in parts]
    x = states()
    one = extrapolate(*parts, 3.0).on(RectifiedFlow()).velocity(x, 0.6)
    torch.testing.assert_close(one, extrapolate(*there, 3.0).velocity(x, 0.6), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ interval


def test_interval_guidance_is_guided_inside_plain_outside_and_counts_what_it_calls() -> None:
    process = EDM()
    plain, other = gaussian(MEANS[0], process), gaussian(MEANS[2], process)
    guided = classifier_free(plain, 4.0, other)
    model, x = interval(guided, plain, 0.2, 2.0), states()
    for t, inside in ((0.1, False), (0.2, False), (0.21, True), (2.0, True), (2.1, False)):
        assert torch.equal(model.x0(x, t), (guided if inside else plain).x0(x, t))
        assert model.cost(t) == (2 if inside else 1)
    mixed = torch.tensor([0.1, 0.5, 3.0, 1.0, 2.0, 0.2], dtype=torch.float64)
    rows = [model.x0(x[i : i + 1], float(t)) for i, t in enumerate(mixed)]
    torch.testing.assert_close(model.x0(x, mixed), torch.cat(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_evaluations_of_a_run_are_counted_step_by_step(process: Process) -> None:
    calls = []

    def counted(mean: Tensor) -> Denoiser:
        def function(x: Tensor, t: Tensor, **_: Any) -> Tensor:
            calls.append(float(t))
            return gaussian(mean, process).x0(x, t)

        return Denoiser(function, process)

    plain = counted(MEANS[0])
    grid = on_process(karras_grid(12, 0.05, 9.0), process)
    model = interval(classifier_free(plain, 4.0, counted(MEANS[2])), plain, 0.3, 3.0)
    assert solve(model, states(), grid, method="ddim").nfe == len(calls)
    assert 12 < len(calls) < 24


def test_an_interval_that_is_empty_is_refused() -> None:
    model = gaussian(MEANS[0], EDM())
    with pytest.raises(ValueError, match="low < high"):
        interval(model, model, 2.0, 2.0)


# ----------------------------------------------------------------------------------------------------------- apg


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_apg_with_the_parallel_part_without_memory_and_limit_is_classifier_free(process: Process) -> None:
    pair, x = (gaussian(MEANS[0], process), gaussian(MEANS[1], process)), states()
    same = apg(pair[0], 6.0, pair[1], eta=1.0, momentum=0.0)
    for t in (0.05, 0.5, 0.95):
        want = classifier_free(pair[0], 6.0, pair[1]).x0(x, t)
        torch.testing.assert_close(same.x0(x, t), want, rtol=1e-12, atol=1e-12)


def test_apg_moves_at_right_angles_to_the_conditional_prediction() -> None:
    process = EDM()
    model, x = gaussian(MEANS[0], process), states(50)
    target = model.x0(x, 0.6)
    moved = apg(model, 9.0, gaussian(MEANS[1], process), eta=0.0, momentum=0.0).x0(x, 0.6) - target
    cosine = (moved * target).sum(1) / moved.norm(dim=1) / target.norm(dim=1)
    assert cosine.abs().max() < 1e-12
    assert moved.norm(dim=1).min() > 0.1


def test_split_and_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    step, along = torch.randn(2, 7, 3, 4, 4, generator=generator, dtype=torch.float64)
    parallel, orthogonal = split(step, along)
    torch.testing.assert_close(parallel + orthogonal, step, rtol=0, atol=1e-12)
    assert (orthogonal * along).flatten(1).sum(1).abs().max() < 1e-12
    assert torch.linalg.matrix_rank(torch.stack([parallel[0].flatten(), along[0].flatten()])) == 1
    assert torch.equal(split(step, 0 * along)[1], step)
    lengths = step.flatten(1).norm(dim=1)
    short = limited(step, float(lengths.median())).flatten(1).norm(dim=1)
    torch.testing.assert_close(short, lengths.clamp(max=float(lengths.median())), rtol=1e-12, atol=0)
    assert torch.equal(limited(step, math.inf), step)


def test_the_norm_limit_bounds_the_update() -> None:
    process = EDM()
    model, x = gaussian(MEANS[0], process), states(50)
    limited_model = apg(model, 11.0, gaussian(MEANS[1], process), eta=1.0, momentum=0.0, norm_limit=0.1)
    moved = (limited_model.x0(x, 0.6) - model.x0(x, 0.6)).norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 10 * 0.1), rtol=1e-10, atol=0)


def test_momentum_is_the_running_sum_of_one_run_and_starts_anew_in_the_next() -> None:
    process = EDM()
    pair, x = (gaussian(MEANS[0], process), gaussian(MEANS[1], process)), states()
    model = apg(*_around(pair), eta=1.0, momentum=-0.5)
    one = model.run()
    running = torch.zeros_like(x)
    for t in (5.0, 2.0, 0.5):
        running = pair[0].x0(x, t) - pair[1].x0(x, t) - 0.5 * running
        want = pair[0].x0(x, t) + 3.0 * running
        torch.testing.assert_close(one.x0(x, t), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.x0(x, 0.5), model.x0(x, 0.5))
    first, second = (solve(model, 80 * x, 12, "ab2").x for _ in range(2))
    assert torch.equal(first, second)
    without = solve(apg(*_around(pair), eta=1.0, momentum=0.0), 80 * x, 12, "ab2").x
    assert (first - without).abs().max() > 1e-2


def _around(pair: tuple[Denoiser, Denoiser]) -> tuple[Denoiser, float, Denoiser]:
    return pair[0], 4.0, pair[1]


def test_memory_lives_inside_other_wrappers_too() -> None:
    pair, x = (gaussian(MEANS[0], EDM()), gaussian(MEANS[1], EDM())), 80 * states()
    inner = apg(*_around(pair), momentum=-0.7)
    nested = interval(inner, pair[0], 0.001, 100.0)
    torch.testing.assert_close(solve(nested, x, 15, "ab2").x, solve(inner, x, 15, "ab2").x, rtol=1e-9, atol=1e-9)
    assert torch.equal(solve(nested, x, 15, "ab2").x, solve(nested, x, 15, "ab2").x)


def test_apg_at_scale_one_is_the_model_and_wrong_settings_are_refused() -> None:
    pair = gaussian(MEANS[0], EDM()), gaussian(MEANS[1], EDM())
    assert apg(pair[0], 1.0, pair[1]) is pair[0]
    for wrong in ({"norm_limit": 0.0}, {"norm_limit": math.nan}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match="norm_limit"):
            apg(pair[0], 2.0, pair[1], **wrong)
