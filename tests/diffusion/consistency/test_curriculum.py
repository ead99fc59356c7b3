"""Schedules against the papers' numbers, and the monitor on synthetic curves and on real ones with planted mistakes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from consilience.diffusion import EDM, Process, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, shared
from consilience.diffusion.consistency import curriculum as c
from consilience.diffusion.consistency.objectives import ect as module
from consilience.diffusion.consistency.objectives.cm import cm
from consilience.diffusion.losses import Batch
from consilience.diffusion.training import train
from consilience.diffusion.training.ema import EMA

from .exact import Net, generator, student


@pytest.mark.parametrize("process", [EDM(), VPLinear(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_levels_are_even_in_the_seventh_root_of_the_ratio(process: Process) -> None:
    grid = c.karras_levels(process, 18)
    roots = process.ratio(grid) ** (1 / 7)
    low, high = c.ratio_range(process)
    assert float(roots[0]) == pytest.approx(low ** (1 / 7), rel=1e-6)
    assert float(roots[-1]) == pytest.approx(high ** (1 / 7))
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(17) / 17, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="two levels"):
        c.karras_levels(process, 1)


def test_the_range_ends_at_edms_noise_where_the_process_ends_in_pure_noise() -> None:
    assert c.ratio_range(EDM(0.01, 7.0)) == (0.01, 7.0)
    assert c.ratio_range(RectifiedFlow())[1] == 80.0


def test_ends_of_the_schedules_are_the_papers() -> None:
    """CM: N from 2 to 151; iCT: 11 to 1281 in eight stages; ECT: q^-1 to q^-8 in eight stages."""
    assert (c.sqrt_levels(0, 1000), c.sqrt_levels(1000, 1000)) == (2, 151)
    assert (c.linear_levels(0, 1000), c.linear_levels(1000, 1000)) == (2, 151)
    assert sorted({c.doubling_levels(k, 4000) for k in range(4001)}) == [10 * 2**i + 1 for i in range(8)]
    assert [k for k in range(1, 4001) if c.doubling_levels(k, 4000) != c.doubling_levels(k - 1, 4000)] == [
        500 * i for i in range(1, 8)
    ]
    assert [c.ect_decay(k, 800) for k in range(50, 800, 100)] == [2.0**-a for a in range(1, 9)]
    assert c.ect_decay(800, 800) == 2.0**-8
    assert c.smooth_decay(0, 10) == 0.5
    assert c.smooth_decay(10, 10) == 2.0**-8


def test_the_square_of_the_number_of_levels_grows_evenly() -> None:
    """The formula of the paper at a third: ceil(sqrt((151^2 - 4) / 3 + 4) - 1) + 1."""
    assert c.sqrt_levels(1, 3) == math.ceil(math.sqrt((151**2 - 4) / 3 + 4) - 1) + 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.data())
def test_schedules_never_go_back(steps: int, data: st.DataObject) -> None:
    a = data.draw(st.integers(0, steps))
    b = data.draw(st.integers(a, steps))
    for levels in (c.sqrt_levels, c.linear_levels, c.doubling_levels):
        assert 2 <= levels(a, steps) <= levels(b, steps)
    for decay in (c.ect_decay, c.smooth_decay):
        assert 1 > decay(a, steps) >= decay(b, steps) > 0


def test_the_target_average_forgets_slower_with_more_levels() -> None:
    """mu(s0) = mu0; the trainer's average moves by 1 - mu(N(k))."""
    assert c.ema_rate(2) == pytest.approx(0.95)
    assert c.ema_rate(150) == pytest.approx(0.95 ** (2 / 150))
    profile = c.TargetAverage(c.sqrt_levels, 100)
    assert profile.beta(1) == pytest.approx(0.95)
    assert profile.beta(101) == pytest.approx(0.95 ** (2 / 151))
    assert repr(profile) == repr(c.TargetAverage(c.sqrt_levels, 200))  # a run may be asked to go on for more steps
    assert repr(profile) != repr(c.TargetAverage(c.linear_levels, 100))
    net = Net()
    average = EMA(net, profile)
    with torch.no_grad():
        before = net.last.bias.clone()
        net.last.bias.add_(1)
    average.update(net, 1)
    last: Any = average.module.last
    torch.testing.assert_close(last.bias, before + 0.05, rtol=1e-9, atol=1e-12)


def test_numbers_that_cannot_be_are_refused() -> None:
    calls: list[Callable[[], Any]] = [
        lambda: c.sqrt_levels(11, 10),
        lambda: c.doubling_levels(-1, 10),
        lambda: c.ect_decay(0, 10, stages=0),
        lambda: c.smooth_decay(0, 10, q=1.0),
        lambda: c.ema_rate(0),
        lambda: c.diagnose([{"loss": 1.0}] * 3),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"need|few"):
            call()


def curves(**powers: float) -> list[dict[str, float]]:
    """A healthy run of 16 rows whose gap shrinks a thousandfold; the values named are gap^power."""
    rows = []
    for i in range(16):
        gap = 0.5 * 1000 ** (-i / 15)
        row = {"log_gap": gap, "ratio": math.exp(-gap), "spread": 0.9, "gradient_norm": 1.0 + 0.1 * (i % 3)}
        rows.append(
            row
            | {name: gap**power for name, power in ({"distance": 1.0, "difference": 1.0, "loss": 0.0} | powers).items()}
        )
    return rows


def mistakes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [found.mistake for found in c.diagnose(rows)]


def test_healthy_curves_are_told_nothing() -> None:
    assert mistakes(curves()) == []
    assert mistakes(curves(distance=2.0, loss=1.0)) == []  # a squared distance over the gap
    assert mistakes([{"loss": 1.0 / (k + 1)} for k in range(10)]) == []  # numbers that are not logged are passed over


@pytest.mark.parametrize(
    ("rows", "mistake"),
    [
        (curves(difference=0.0, distance=0.0, loss=-1.0), "unshared noise"),
        (curves(loss=1.0), "missing weight"),
        ([row | {"spread": 0.05} for row in curves()], "no stop-gradient"),
        ([row | {"spread": 0.7 - 0.02 * i} for i, row in enumerate(curves())], "no stop-gradient"),
        ([row | {"ratio": 0.0, "log_gap": 10.0, "spread": 0.05} for row in curves()], "ratio stuck"),
        ([row | {"boundary": 0.8} for row in curves()], "no boundary"),
        ([row | {"gradient_norm": 10.0**i} for i, row in enumerate(curves())], "diverging gradients"),
        ([row | {"loss": float("nan")} for row in curves()], "diverging gradients"),
    ],
)
def test_each_mistakes_curve_is_named_alone(rows: list[dict[str, float]], mistake: str) -> None:
    assert mistakes(rows) == [mistake]
    assert c.diagnose(rows)[0].why


DATA = torch.tensor([[1.0, 0.0], [-1.0, 0.3], [0.0, -1.0]], dtype=torch.float64)


def run(flow_of: Callable[[Net], FlowMap] = student, decay: Callable[..., float] = c.ect_decay) -> list[dict[str, Any]]:
    """A real run of easy consistency tuning on three blurred points, logged as the trainer does; a second or less."""
    net, clock, rows, steps = Net(width=32), generator(0), [], 160
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    data = DATA.repeat(64, 1)
    for step in range(steps):
        x0 = data + 0.05 * torch.randn(data.shape, dtype=torch.float64, generator=clock)
        loss, log = module.ect(flow_of(net), None, x0, clock, decay=decay(step, steps), c=0.03, mean=-0.5, std=1.2)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.stack([part.grad.norm() for part in net.parameters() if part.grad is not None]).norm()
        optimizer.step()
        if step % 5 == 4:
            boundary = c.boundary_error(flow_of(net), x0)
            rows.append(log | {"loss": float(loss.detach()), "gradient_norm": float(norm), "boundary": boundary})
    return rows


def test_a_real_run_without_mistakes_is_told_nothing() -> None:
    assert mistakes(run()) == []


def test_a_real_run_with_unshared_noise_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module.jump

    def unshared(process: Process, batch: Any, clock: Any, *args: Any) -> shared.Pair:
        p = honest(process, batch, clock, *args)
        other = torch.randn(p.x0.shape, dtype=p.x0.dtype, generator=clock)
        return p._replace(x_s=process.add_noise(p.x0, other, p.s))

    monkeypatch.setattr(module, "jump", unshared)
    assert "unshared noise" in mistakes(run())


def test_a_real_run_without_the_weight_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gap", lambda process, t, s: torch.ones_like(t))
    assert mistakes(run()) == ["missing weight"]


def test_a_real_run_stuck_at_ratio_zero_is_recognised() -> None:
    assert mistakes(run(decay=lambda step, steps: 1.0)) == ["ratio stuck"]


def test_a_real_run_without_a_boundary_is_recognised() -> None:
    def free(net: Net) -> FlowMap:
        return FlowMap(lambda x, t, s: net(x / (1 + t[:, None]), t.clamp(min=1e-6).log() / 4), EDM(), "x0")

    assert "no boundary" in mistakes(run(free))


def test_a_real_run_without_the_stopped_gradient_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(flow: FlowMap, target: FlowMap | None, p: shared.Pair, clock: Any) -> tuple[Tensor, Tensor]:
        return flow.x0(p.x_t, p.t), flow.x0(p.x_s, p.s)

    monkeypatch.setattr(module, "ends", both)
    assert "no stop-gradient" in mistakes(run())


def test_the_trainer_carries_schedule_target_and_log() -> None:
    """Consistency training in float32 with the papers' N(k) and mu(N(k)), the trainer's average as the target."""
    steps, seen = 40, []

    def loss(net: torch.nn.Module, batch: Batch, clock: torch.Generator, context: Any) -> shared.Result:
        levels = c.sqrt_levels(context.step, context.steps, s1=20)
        seen.append(levels)
        return cm(student(net), None, batch, clock, target=student(context.ema), levels=levels)

    profile = c.TargetAverage(lambda k, of: c.sqrt_levels(k, of, s1=20), steps)
    done = train(Net().float(), loss, DATA.float(), steps=steps, batch_size=32, ema=profile, log_every=5, lr=1e-3)
    rows = done.log
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (2, 21)
    assert len(rows) == 8
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "difference", "spread", "gradient_norm"))
    assert isinstance(c.diagnose(rows), list)
