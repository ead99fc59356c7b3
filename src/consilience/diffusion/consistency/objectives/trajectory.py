"""What the trajectory objectives share: a datum at t, the teacher's way to u, and two jumps to s that should agree.

Each of them chooses the times, the teacher's step, the distance and the weight; the rest is `matched`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.shared import Pair, dropout_seed, pair, same_dropout, teacher_step
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, expand
from consilience.diffusion.solve import default_grid

Step = Callable[..., Tensor]
"""``step(teacher, x, t, u, **cond)`` takes x [batch, ...] from t to u [batch] along the teacher's trajectory."""


class Route(NamedTuple):
    """The teacher goes through the times ``path``, from t to u; both jumps end at ``s``. [batch] each, t > u >= s."""

    path: tuple[Tensor, ...]
    s: Tensor


def times(process: Process, steps: int) -> Tensor:
    """The default decreasing grid [steps + 1] of the process's range down to where no noise is left."""
    top, low = process.ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).tolist()
    return default_grid(process, steps, top, low)


def ddim(teacher: Denoiser, x: Tensor, t: Tensor, u: Tensor, **cond: Any) -> Tensor:
    """`teacher_step` by Euler: one DDIM step of the teacher, one evaluation."""
    return teacher_step(teacher, x, t, u, heun=False, **cond)


@torch.no_grad()
def walk(teacher: Denoiser, x: Tensor, path: tuple[Tensor, ...], step: Step, **cond: Any) -> Tensor:
    """x [batch, ...] at path[0] taken by ``step`` from time to time to path[-1]; a step of no length is none."""
    for a, b in itertools.pairwise(path):
        moving = a > b
        x = torch.where(expand(moving, x), step(teacher, x, torch.where(moving, a, path[0]), b, **cond), x)
    return x


def matched(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None,
    route: Route,
    *,
    target: FlowMap | None = None,
    step: Step = teacher_step,
    start: Callable[[Pair], Tensor] | None = None,
    own: Mapping[str, Any] | None = None,
) -> tuple[Pair, Tensor, Tensor]:
    """(the states at t and u, where the student takes the first, where the target takes the second), the jumps to s.

    Without a teacher the state at u is the datum with the noise of the one at t. ``start`` replaces the state at t;
    ``own`` are conditions of the maps alone. The target's jump has no gradient and drops the student's units.
    """
    x0 = batch["x"] if isinstance(batch, Mapping) else batch
    path, s = tuple(t.to(x0) for t in route.path), route.s.to(x0)
    p = pair(student.process, batch, path[0], path[-1], generator)
    if start is not None:
        p = p._replace(x_t=start(p))
    if teacher is not None:
        p = p._replace(x_s=walk(teacher, p.x_t, path, step, **p.cond))
    cond, seed = p.cond | dict(own or {}), dropout_seed(generator)
    with same_dropout(seed):
        found = student(p.x_t, p.t, s, **cond)
    with torch.no_grad(), same_dropout(seed):
        wanted = (student if target is None else target)(p.x_s, p.s, s, **cond)
    return p, found, wanted


def hop(steps: int, count: int, generator: torch.Generator | None, skip: int = 1) -> tuple[Tensor, Tensor]:
    """Indices [count] into a grid of that many steps: t uniform, u ``skip`` steps on or at the grid's end."""
    if not 1 <= skip <= steps:
        raise ValueError(f"need 1 <= skip <= steps of the grid, got {skip} and {steps}")
    first = torch.randint(steps, (count,), generator=generator, device=device(generator))
    return first, (first + skip).clamp(max=steps)


def onward(index: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
    """Indices uniform from ``index`` [count] to the grid's end, both included."""
    u = torch.rand(len(index), generator=generator, device=index.device, dtype=torch.float64)
    return (index + (u * (steps - index + 1)).long()).clamp(max=steps)


def edges(steps: int, segments: int) -> Tensor:
    """The indices, increasing, where the segments of a grid of ``steps`` steps end: [segments], equal up to one step.

    Raises ValueError unless there is a step in each.
    """
    if not 1 <= segments <= steps:
        raise ValueError(f"need 1 <= segments <= steps of the grid, got {segments} and {steps}")
    return steps - torch.arange(segments - 1, -1, -1) * steps // segments


def within_segments(grid: Tensor, segments: int, count: int, generator: torch.Generator | None, skip: int = 1) -> Route:
    """t uniform on a decreasing grid, s the end of its segment, u ``skip`` steps after t but not beyond s."""
    first, second, last = indices_within(len(grid) - 1, segments, count, generator, skip)
    grid = grid.to(first.device)
    return Route((grid[first], grid[second]), grid[last])


def indices_within(
    steps: int, segments: int, count: int, generator: torch.Generator | None, skip: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Indices [count] of the times t, u and s of `within_segments` into a grid of that many steps."""
    first, second = hop(steps, count, generator, skip)
    ends = edges(steps, segments).to(first.device)
    last = ends[torch.searchsorted(ends, first + 1)]
    return first, torch.minimum(second, last), last


def at(grid: Tensor, index: Tensor) -> Tensor:
    """The times [batch] of a grid [steps + 1] at indices [batch] in float64 that need not be whole: linear between."""
    low = index.floor().long().clamp(0, len(grid) - 2)
    grid = grid.to(index.device)
    return torch.lerp(grid[low], grid[low + 1], index - low)


def device(generator: torch.Generator | None) -> torch.device:
    """Where the generator draws."""
    return torch.device("cpu") if generator is None else generator.device
