"""Blocks left out of real diffusers networks, and the search over timesteps and blocks against enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the extra diffusion")

from diffusers import FlowMatchEulerDiscreteScheduler

from consilience.diffusion.blocks import shares, skip_blocks, skippable, skipped
from consilience.diffusion.digits import network, transformer
from consilience.diffusion.huggingface import from_diffusers
from consilience.diffusion.search import Skips, autodiffusion_blocks
from consilience.diffusion.solve import solve

torch.set_num_threads(1)


def unet() -> Any:
    torch.manual_seed(0)
    return network(classes=None, width=8).eval()


def dit() -> Any:
    torch.manual_seed(0)
    net = transformer(8, 1, 10, 32).eval()
    for part in net.parameters():  # its output layer begins at zero
        torch.nn.init.normal_(part, std=0.2)
    return net


X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([500.0, 500.0, 500.0])


@torch.no_grad()
def run(net: Any) -> Tensor:
    extra = {} if hasattr(net, "down_blocks") else {"class_labels": torch.zeros(3, dtype=torch.long)}
    return net(X, timestep=T, return_dict=False, **extra)[0]


def test_a_skipped_block_is_one_whose_branch_gives_zero() -> None:
    """Convolutions whose last layer is zero, attention whose projection is zero: the same to the bit."""
    net = unet()
    names = skippable(net)
    assert len(names) == 12
    whole = run(net)
    for name in names:
        with skipped(net, (name,)):
            without = run(net)
        block = net.get_submodule(name)
        last = block.conv2 if hasattr(block, "conv2") else block.to_out[0]
        kept = [part.clone() for part in last.parameters()]
        with torch.no_grad():
            for part in last.parameters():
                part.zero_()
            zero = run(net)
            for part, old in zip(last.parameters(), kept, strict=True):
                part.copy_(old)
        torch.testing.assert_close(without, zero, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(without, whole)
        assert torch.equal(run(net), whole)


def test_a_skipped_transformer_block_is_one_taken_out() -> None:
    net = dit()
    assert skippable(net) == tuple(f"transformer_blocks.{i}" for i in range(4))
    with skipped(net, ("transformer_blocks.1", "transformer_blocks.2")):
        without = run(net)
    whole = run(net)
    del net.transformer_blocks[1:3]
    torch.testing.assert_close(run(net), without)
    assert not torch.allclose(without, whole)


def test_all_is_restored_and_what_is_no_block_is_named() -> None:
    net = unet()
    whole = run(net)
    with pytest.raises(RuntimeError, match="stop"), skipped(net, skippable(net)):
        raise RuntimeError("stop")
    assert torch.equal(run(net), whole)
    name = skippable(net)[0]
    with skipped(net, (name, name)):
        without = run(net)
        with skipped(net, (name,)):
            assert torch.equal(run(net), without)
        assert torch.equal(run(net), without)
    assert torch.equal(run(net), whole)
    for wrong in ("mid_block", "nowhere"):
        with pytest.raises(ValueError, match=f"no block '{wrong}' to leave out; there are: down_blocks.0"):
            skip_blocks(from_diffusers(net, FlowMatchEulerDiscreteScheduler()), net, torch.ones(1), [(wrong,)])
    with pytest.raises(ValueError, match="a set of blocks for each of the 2 times, got 1"):
        skip_blocks(from_diffusers(net, FlowMatchEulerDiscreteScheduler()), net, torch.ones(2), [()])


@pytest.mark.parametrize("make", [unet, dit])
def test_shares_add_up(make: Any) -> None:
    """Leaving out several blocks saves the sum of their shares, counted by torch; equal blocks have equal shares."""
    from torch.utils.flop_counter import FlopCounterMode

    net = make()
    each = shares(net, lambda: run(net))
    assert set(each) == set(skippable(net))
    assert all(0 < share < 1 for share in each.values())
    with FlopCounterMode(display=False) as whole:
        run(net)
    some = list(each)[1::2]
    with FlopCounterMode(display=False) as fewer, skipped(net, some):
        run(net)
    saved = 1 - fewer.get_total_flops() / whole.get_total_flops()
    assert saved == pytest.approx(sum(each[name] for name in some), abs=1e-9)
    assert 0 < sum(each.values()) < 1
    if make is dit:
        assert len({round(share, 12) for share in each.values()}) == 1


def test_each_step_leaves_out_its_own_blocks() -> None:
    net = unet()
    model = from_diffusers(net, FlowMatchEulerDiscreteScheduler())
    names = skippable(net)
    grid = torch.tensor([1.0, 0.7, 0.3, 0.0], dtype=torch.float64)
    skips = [frozenset(), frozenset(names[:2]), frozenset(names[3:5])]
    slim = skip_blocks(model, net, grid[:-1], skips)
    with torch.no_grad():
        found = solve(slim, X, grid, "euler")
        x = X.clone()
        for i, skip in enumerate(skips):
            with skipped(net, skip):
                x = x + float(grid[i + 1] - grid[i]) * model.predict("flow", x, float(grid[i]))
    torch.testing.assert_close(found.x, x, rtol=1e-4, atol=1e-5)
    assert found.nfe == 3


# ------------------------------------------------------------------------------------------------------------ search

TIMES = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
SHARES = {"a": 0.3, "b": 0.2}
SETS = [frozenset(part) for n in range(3) for part in itertools.combinations("ab", n)]


def toy(grid: Tensor, skips: Skips) -> float:
    """Long steps cost their square; "a" is dear early and "b" dear late."""
    gaps = (grid[:-1] - grid[1:]).tolist()
    harm = sum(0.05 * t * ("a" in skip) + 0.05 * (1 - t) * ("b" in skip) for t, skip in zip(grid.tolist(), skips))  # noqa: B905 - one more time
    return sum(gap**2 for gap in gaps) + harm


def cost(skips: Skips) -> float:
    return sum(1 - sum(SHARES[name] for name in skip) for skip in skips)


def test_the_search_finds_the_best_of_all_within_the_budget() -> None:
    """6 candidate times, 2 blocks, at most half of a step left out: all candidates are enumerated."""
    best = np.inf
    for n in range(5):
        for inner in itertools.combinations(TIMES[1:-1].tolist(), n):
            grid = torch.tensor([1.0, *inner, 0.0], dtype=torch.float64)
            for skips in itertools.product(SETS, repeat=n + 1):
                if cost(skips) <= 3 + 1e-9:
                    best = min(best, toy(grid, skips))
    seen = []

    def fitness(grid: Tensor, skips: Skips) -> float:
        seen.append((tuple(grid.tolist()), skips))
        return toy(grid, skips)

    found = autodiffusion_blocks(fitness, TIMES, 3.0, SHARES, np.random.default_rng(0), population=40, generations=30)
    assert found.fitness == pytest.approx(best, abs=1e-12)
    assert found.fitness == toy(found.grid, found.skips)
    assert found.cost == pytest.approx(cost(found.skips))
    assert len(found.skips) > 3  # more steps than whole evaluations
    assert max(cost(skips) for _, skips in seen) <= 3 + 1e-9
    for times, skips in seen:
        assert (times[0], times[-1], len(skips)) == (1.0, 0.0, len(times) - 1)
        assert all(a > b for a, b in itertools.pairwise(times))
        assert all(sum(SHARES[name] for name in skip) <= 0.5 + 1e-9 for skip in skips)
    assert len(set(seen)) == len(seen)  # none is evaluated twice
    assert list(found.history) == sorted(found.history, reverse=True)
    again = autodiffusion_blocks(toy, TIMES, 3.0, SHARES, np.random.default_rng(0), population=40, generations=30)
    assert torch.equal(again.grid, found.grid)
    assert again.skips == found.skips


def test_whole_steps_are_the_search_over_times_alone_and_bad_settings_are_refused() -> None:
    found = autodiffusion_blocks(toy, TIMES, 2.0, SHARES, np.random.default_rng(0), generations=8, most=0.0)
    assert found.skips == (frozenset(), frozenset())
    assert found.cost == 2
    for wrong in ({"budget": 0.5}, {"most": 1.0}, {"generations": 1}):
        with pytest.raises(ValueError, match="need budget >= 1"):
            autodiffusion_blocks(toy, TIMES, **({"budget": 2.0} | wrong), shares=SHARES, rng=np.random.default_rng(0))  # type: ignore[arg-type]
