"""MeanFlow: the identity at the exact map, its floor without a teacher, weights, guidance, and the limit s = t."""

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap, exact_map, pair, same_dropout
from consilience.diffusion.consistency.objectives.meanflow import Guidance, adaptive_weight, guided, meanflow
from consilience.diffusion.consistency.shared import dropout_seed, random_states
from consilience.diffusion.consistency.straight import logit_normal_pair, mean_flow, straight_time

from .exact import EIGENVALUES, check_gradient, gaussian, generator, z_score
from .two_times import TwoTimes, flow_map, named, shrink, spread_of_flow, swapped


@named
def test_the_loss_is_zero_at_the_exact_map_of_the_teacher_and_not_with_swapped_times(process: Process) -> None:
    teacher = gaussian(process)
    flow, data = exact_map(teacher), teacher.sample(64, generator())
    right, wrong = (
        float(meanflow(map_, teacher, data, generator(1), instantaneous=0.0, power=0.0)[0])
        for map_ in (flow, swapped(flow))
    )
    assert right < 1e-12
    assert wrong > 1e-2


def test_without_a_teacher_the_exact_map_has_the_known_floor() -> None:
    """The residual is df/dy (noise - x0 - its mean), df/dy the exact map's stretch.

    Within 5 standard errors of 40 batches: false alarm below 1e-4.
    """
    process = RectifiedFlow()
    flow, values = exact_map(gaussian(process)), []
    for k in range(40):
        data = gaussian(process).sample(400, generator(k))
        t, s = logit_normal_pair()(400, process, generator(100 + k))
        v = EIGENVALUES[:, None]
        expected = (shrink(t, s) * v / ((1 - t) ** 2 * v + t**2)).sum(0).mean()
        found = meanflow(flow, None, data, generator(100 + k), instantaneous=0.0, power=0.0)[0]
        values.append(float(found) - float(expected))
    assert abs(z_score(values, 0.0)) < 5


def test_with_all_ends_at_the_start_it_is_flow_matching() -> None:
    process = RectifiedFlow()
    flow, values = exact_map(gaussian(process)), []
    for k in range(40):
        data = gaussian(process).sample(400, generator(k))
        t, _ = logit_normal_pair()(400, process, generator(100 + k))
        found = meanflow(flow, None, data, generator(100 + k), instantaneous=1.0, power=0.0)[0]
        values.append(float(found) - float(spread_of_flow(t).mean()))
    assert abs(z_score(values, 0.0)) < 5


def test_the_weight_is_the_inverse_power_and_has_no_gradient() -> None:
    error = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    weight = adaptive_weight(error, 0.5, 1e-2)
    assert weight.tolist() == pytest.approx([10.0, 1.01**-0.5, 3.01**-0.5])
    assert not weight.requires_grad
    data, flow = gaussian().sample(20, generator()), flow_map(TwoTimes())
    plain, log = meanflow(flow, None, data, generator(2), power=0.0)
    assert float(plain.detach()) == pytest.approx(log["error"])
    one = meanflow(flow, None, data, generator(2), power=1.0, constant=0.0)[0]
    assert float(one.detach()) == pytest.approx(1.0)


def test_the_gradient_of_the_weighted_loss_is_that_of_the_errors_over_themselves() -> None:
    data, net = gaussian().sample(1, generator()), TwoTimes()
    losses = {power: meanflow(flow_map(net), None, data, generator(2), power=power)[0] for power in (0.0, 1.0)}
    plain, weighted = (torch.autograd.grad(losses[power], list(net.parameters())) for power in (0.0, 1.0))
    error = float(losses[0.0].detach())
    for a, b in zip(plain, weighted, strict=True):
        torch.testing.assert_close(b, a / (error + 1e-3))


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    """Both are held by not weighting, as the weight has no gradient, and by a target for the derivative."""
    data, net = gaussian().sample(12, generator()), TwoTimes()
    teacher = gaussian(RectifiedFlow()) if taught else None
    check_gradient(
        lambda mine, held: meanflow(
            flow_map(mine), teacher, data, generator(3), target=flow_map(held), instantaneous=0.0, power=0.0
        )[0],
        net,
    )


def over_the_whole_batch(flow: FlowMap, data: Tensor, seed: int, share: float) -> tuple[Tensor, Tensor]:
    """The loss with power 0.5 by reverse-mode derivatives of every row, from the same draws, and which rows move."""
    process, draws = RectifiedFlow(), generator(seed)
    t, s = logit_normal_pair()(len(data), process, draws)
    s = torch.where(torch.rand(len(data), generator=draws) < share, t, s)
    p = pair(process, data, t, s, draws)
    mask = dropout_seed(draws)

    def function(x: Tensor, time: Tensor) -> Tensor:
        with same_dropout(mask):
            found: Tensor = flow.function(x, time, p.s)
            return found

    v = p.noise - p.x0
    _, slope = torch.autograd.functional.jvp(function, (p.x_t, p.t), (v, torch.ones_like(t)))
    error = (function(p.x_t, p.t) - (v - (t - s)[:, None] * slope)).square().sum(1)
    return (error / (error.detach() + 1e-3) ** 0.5).mean(), s < t


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_and_gradient_are_those_with_the_derivative_of_every_row(share: float, dropout: float) -> None:
    """In double precision, with rows that move and rows that do not, and under one mask of dropout."""
    data, net = gaussian().sample(40, generator()), TwoTimes(dropout=dropout).train()
    before = torch.get_rng_state()
    found = meanflow(flow_map(net), None, data, generator(5), instantaneous=share, power=0.5)[0]
    assert torch.equal(torch.get_rng_state(), before)
    wanted, moving = over_the_whole_batch(flow_map(net), data, 5, share)
    assert int(moving.sum()) == {0.0: 40, 0.4: 24, 1.0: 0}[share]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_derivative_is_taken_of_the_rows_that_move_alone_unless_units_are_dropped(dropout: float) -> None:
    net, sizes = TwoTimes(dropout=dropout).train(), []
    inner = flow_map(net)

    def noted(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        sizes.append((len(x), bool((s < t).all()), bool((s == t).any())))
        found: Tensor = inner.function(x, t, s)
        return found

    flow = FlowMap(noted, inner.process, "flow")
    data = gaussian().sample(40, generator())
    meanflow(flow, None, data, generator(5))
    (whole, _, still), (part, moves, _) = sizes
    assert whole == 40
    assert still
    assert (part == 40, moves) == ((False, True) if dropout == 0 else (True, False))
    sizes.clear()
    meanflow(flow, None, data, generator(5), instantaneous=1.0)
    assert [size for size, *_ in sizes] == [40]


def test_the_states_of_the_generators_tell_dropout() -> None:
    x, t = torch.zeros(4, 2).double(), torch.ones(4).double()
    for dropout, training, drawn in ((0.5, True, True), (0.5, False, False), (0.0, True, False)):
        before = random_states()
        TwoTimes(dropout=dropout).train(training)(x, t, t)
        assert (random_states() != before) == drawn


def test_exact_and_finite_derivatives_give_one_loss() -> None:
    data, flow = gaussian().sample(30, generator()), flow_map(TwoTimes())
    exact = float(meanflow(flow, None, data, generator(2))[0].detach())
    assert float(meanflow(flow, None, data, generator(2), jvp="finite")[0].detach()) == pytest.approx(exact, rel=1e-4)


def test_guidance_mixes_the_flow_with_the_models_own_and_drops_conditions() -> None:
    process, flow = RectifiedFlow(), flow_map(TwoTimes())
    count = 4000
    batch = {
        "x": gaussian(process).sample(count, generator()),
        "shift": torch.rand(count, generator=generator(9)).double(),
    }
    t, s = logit_normal_pair()(count, process, generator(1))
    p = pair(process, batch, t, s, generator(2))
    v = p.noise - p.x0
    guidance = Guidance(scale=2.5, null={"shift": 0.0}, mix=0.4, drop=0.25)
    found, cond = guided(flow, p, v, guidance, generator(3), 0)
    with torch.no_grad():
        without = mean_flow(flow, {"shift": torch.zeros(count).double()})(p.x_t, p.t, p.t)
        given = mean_flow(flow, {"shift": p.cond["shift"]})(p.x_t, p.t, p.t)
    dropped = cond["shift"] == 0
    share = float(dropped.double().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5  # false alarm below 1e-6
    torch.testing.assert_close(found[dropped], v[dropped])
    torch.testing.assert_close(found[~dropped], (2.5 * v + 0.4 * given - 1.9 * without)[~dropped])
    torch.testing.assert_close(cond["shift"][~dropped], p.cond["shift"][~dropped])


def test_scale_one_is_no_guidance() -> None:
    flow = flow_map(TwoTimes())
    batch: dict[str, Tensor] = {
        "x": gaussian().sample(16, generator()),
        "shift": torch.rand(16, generator=generator(9)).double(),
    }
    plain, none = (
        float(meanflow(flow, None, batch, generator(2), guidance=guidance)[0].detach())
        for guidance in (None, Guidance(1.0, {"shift": 0.0}, drop=0.0))
    )
    assert plain == pytest.approx(none)


def test_bad_arguments_are_refused() -> None:
    flow, data = flow_map(TwoTimes()), gaussian().sample(4, generator())
    with pytest.raises(ValueError, match="share of samples"):
        meanflow(flow, None, data, generator(), instantaneous=-0.1)
    with pytest.raises(ValueError, match="0 <= mix < 1"):
        Guidance(2.0, {}, mix=1.0)
    with pytest.raises(ValueError, match="no condition named label"):
        meanflow(flow, None, data, generator(), guidance=Guidance(2.0, {"label": 0}))


@named
def test_times_are_ordered_and_logit_normal_on_the_straight_path(process: Process) -> None:
    """The mean logit of two draws is that of the normal: within 5 standard errors, false alarm below 1e-6."""
    t, s = logit_normal_pair(-0.4, 1.0)(4000, process, generator())
    assert bool((t >= s).all())
    assert float(s.min()) >= process.t_min
    assert float(t.max()) <= process.t_max
    both = torch.logit(straight_time(process, torch.cat([t, s])))
    assert abs(float(both.mean()) + 0.4) < 5 / 8000**0.5
