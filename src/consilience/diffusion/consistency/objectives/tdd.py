"""Target-driven distillation (Wang et al. 2024, arXiv:2409.01347)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.trajectory import Route, Step, ddim, device, hop, matched, times
from consilience.diffusion.consistency.shared import Distance, Result, compared, elementwise_huber, split
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import expand


def tdd(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    schedules: tuple[int, int] = (4, 8),
    window: float = 0.26,
    stray: float = 0.3,
    null: Mapping[str, Any] | None = None,
    drop: float = 0.2,
    grid: Tensor | None = None,
    step: Step = ddim,
    distance: Distance | None = None,
) -> Result:
    """`tcd` to the times that sampling in few steps will visit, with part of the conditions taken away.

    s is drawn from the union of the even schedules of ``schedules[0]`` to ``schedules[1]`` steps: from those at u or
    below, no further down than a share ``window`` of the grid from the first, and then moved by up to a share
    ``stray`` of its own towards the end. Where ``null`` is given, a share ``drop`` of the samples has its conditions
    replaced by it for student and teacher alike, so that a student of a guided teacher can be guided anew.
    The distance is the code's pseudo-Huber of 0.001, value by value; shares and schedules are those of its runs, whose
    grid has 250 steps (here 50 by default). Raises ValueError for shares outside [0, 1].
    """
    if not (0 <= window <= 1 and 0 <= stray <= 1 and 0 <= drop <= 1):
        raise ValueError(f"window, stray and drop must be in [0, 1], got {window}, {stray} and {drop}")
    x0, cond = split(batch)
    grid = times(student.process, 50) if grid is None else grid
    steps = len(grid) - 1
    first, second = hop(steps, len(x0), generator)
    chosen = select(second, target_steps(steps, *schedules), int(window * steps), generator)
    grid = grid.to(first.device)
    moved = 1 - stray * torch.rand(len(x0), generator=generator, dtype=torch.float64, device=first.device)
    route = Route((grid[first], grid[second]), grid[-1] + (grid[chosen] - grid[-1]) * moved)
    if null is not None:
        batch = {"x": x0, **without(cond, null, drop, generator)}
    p, found, wanted = matched(student, teacher, batch, generator, route, target=target, step=step)
    return compared(student.process, p, found, wanted, distance or elementwise_huber(1e-3))


def target_steps(steps: int, least: int, most: int) -> Tensor:
    """The indices of a decreasing grid of ``steps`` steps that even schedules of least to most steps end a step at.

    Increasing, with the grid's end, without its top. Raises ValueError unless 1 <= least <= most <= steps.
    """
    if not 1 <= least <= most <= steps:
        raise ValueError(f"need 1 <= least <= most <= {steps}, got {least} and {most}")
    found = {i * steps // k for k in range(least, most + 1) for i in range(1, k + 1)}
    return torch.tensor(sorted(found))


def select(index: Tensor, targets: Tensor, window: int, generator: torch.Generator | None) -> Tensor:
    """For each of the indices [count] one of ``targets``, uniform among the first at or after it and those at most
    ``window`` steps further.
    """
    targets = targets.to(index.device)
    nearest = targets[torch.searchsorted(targets, index)][:, None]
    allowed = (targets >= nearest) & (targets <= nearest + window)
    return targets[torch.multinomial(allowed.double(), 1, generator=generator)[:, 0]]


def without(
    cond: Mapping[str, Any], null: Mapping[str, Any], share: float, generator: torch.Generator | None
) -> dict[str, Any]:
    """The conditions, tensors [batch, ...], with those named in ``null`` replaced in a random share of the samples."""
    new = dict(cond)
    if not null:
        return new
    count = len(cond[next(iter(null))])
    gone = torch.rand(count, generator=generator, device=device(generator)) < share
    for name, value in null.items():
        given = cond[name]
        new[name] = torch.where(expand(gone.to(given.device), given), torch.as_tensor(value).to(given), given)
    return new
