"""`solve`: from noise to a sample with a given number of model evaluations, or on a given grid."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion import grids
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.processes import Process, standard_normal
from consilience.diffusion.solvers.auto import Choice, choose
from consilience.diffusion.solvers.dpm import Multistep, Singlestep
from consilience.diffusion.solvers.dualfast import DualFast
from consilience.diffusion.solvers.jumps import Jumps
from consilience.diffusion.solvers.multistep import Adams
from consilience.diffusion.solvers.plan import Noise, Solution, Solver, run
from consilience.diffusion.solvers.rungekutta import RungeKutta
from consilience.diffusion.solvers.unipc import UniPC

METHODS: dict[str, Solver] = {
    "euler": Adams(1, "eps"),
    "ddim": Adams(1, "x0"),
    **{f"ab{k}": Adams(k, "eps", "sigma") for k in (2, 3, 4)},
    **{f"expab{k}": Adams(k, "x0", "lambda") for k in (1, 2, 3, 4)},
    **{f"flow-ab{k}": Adams(k, "flow", "flow") for k in (2, 3, 4)},
    **{f"deis{k}": Adams(k, "eps", "time") for k in (1, 2, 3, 4)},
    "heun": RungeKutta("heun", "eps"),
    "flow-heun": RungeKutta("heun", "flow"),
    "flow-midpoint": RungeKutta("midpoint", "flow"),
    "flow-rk4": RungeKutta("rk4", "flow"),
    "dualfast": DualFast(),
    **{f"dpmpp-{k}m": Multistep(k) for k in (2, 3)},
    **{f"dpmpp-{k}s": Singlestep(k) for k in (2, 3)},
    **{f"unipc{k}": UniPC(k) for k in (1, 2, 3)},
    **{f"unipc{k}-bh1": UniPC(k, "bh1") for k in (1, 2, 3)},
    "consistency": Jumps(1.0),
    "tcd": Jumps(0.3),
    "chain": Jumps(0.0),
}
"""The methods by name; any object with a `plan` will do in their place."""

OnStep = Callable[[int, int, Tensor], None]
"""Told after every stage: how many are done, of how many, and the state."""


def solve(
    model: Denoiser,
    x: Tensor,
    grid_or_count: Tensor | int,
    method: str | Solver = "auto",
    sigma_max: float | None = None,
    sigma_min: float | None = None,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    trajectory: bool = False,
    on_step: OnStep | None = None,
    **cond: Any,
) -> Solution:
    """Take ``x`` [batch, ...] along the model's reverse process, to data.

    With a count, that many evaluations of ``model`` are spent (``auto``: exactly, other methods at most) from
    sigma / alpha = ``sigma_max`` down, by default the process's range. With a grid, a decreasing tensor of the
    process's own time whose first entry is where x stands, the grid is kept. ``noise(x, t, s)`` replaces the normal
    noise of ``generator`` for methods that add any; ``cond`` goes to the model. A multistep method of a higher order
    than there are steps is taken at the order they carry, with a warning; there is one, too, where the evaluations
    carry no whole step of a method that takes several per step. Raises ValueError for a grid, a count or a method that
    cannot be.
    """
    process = model.process
    name, solver, grid, why = steps_of(method, process, grid_or_count, sigma_max, sigma_min)
    plan = solver.plan(grid, process)
    noise = noise or _normal(generator)
    states = []
    nfe = sum(model.cost(stage.t) for stage in plan.stages if stage.t is not None)
    state = x
    for done, (_stage, state) in enumerate(run(plan, model, x, noise, float(grid[0]), **cond), 1):
        if trajectory:
            states.append(state)
        if on_step is not None:
            on_step(done, len(plan.stages), state)
    return Solution(state, nfe, grid, name, why, tuple(states))


def steps_of(
    method: str | Solver,
    process: Process,
    grid_or_count: Tensor | int,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> Choice:
    """The solver and grid that `solve` takes for these arguments; raises ValueError as it does."""
    top, low = _range(process, sigma_max, sigma_min)
    if isinstance(grid_or_count, Tensor):
        steps: Tensor | int = _checked(grid_or_count, process)
    elif isinstance(grid_or_count, bool) or not isinstance(grid_or_count, int) or grid_or_count < 1:
        raise ValueError(f"the number of evaluations must be a whole number of at least 1, got {grid_or_count!r}")
    else:
        steps = grid_or_count
    return _method(method, process, steps, top, low)


def _method(method: str | Solver, process: Process, steps: Tensor | int, top: float, low: float) -> Choice:
    if method == "auto":
        return choose(process, steps, top, low)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; there are: auto, {', '.join(METHODS)}")
        name, solver = method, METHODS[method]
    else:
        name, solver = type(method).__name__, method
    grid = steps if isinstance(steps, Tensor) else _grid(process, solver, _steps(solver, steps), top, low)
    _warn_of_no_whole_step(name, solver, grid, process)
    return Choice(name, _capped(name, solver, len(grid) - 1), grid, "")


def _grid(process: Process, solver: Solver, n: int, sigma_max: float, sigma_min: float) -> Tensor:
    """The solver's own grid of n steps, or the usual one."""
    own: Callable[[int, Process, float], Tensor] | None = getattr(solver, "grid", None)
    return default_grid(process, n, sigma_max, sigma_min) if own is None else own(n, process, sigma_max)


def _warn_of_no_whole_step(name: str, solver: Solver, grid: Tensor, process: Process) -> None:
    """The step from pure noise and the last one may take fewer evaluations than others, at a lower order."""
    each = getattr(solver, "evaluations_per_step", 1)
    if each == 1:
        return
    plan = solver.plan(grid, process)
    if all(stage.anchor < each - 1 for stage in plan.stages):
        warnings.warn(
            f"{name}: no step here takes its {each} evaluations (the last one, or the first from pure noise, takes "
            f"fewer): {plan.evaluations} in all, at a lower order",
            stacklevel=5,
        )


def _capped(name: str, solver: Solver, steps: int) -> Solver:
    """A multistep method of no higher order than ``steps`` steps carry, with a warning where it was of a higher one."""
    order = getattr(solver, "order", 1)
    if getattr(solver, "evaluations_per_step", 1) > 1 or not dataclasses.is_dataclass(solver) or order <= steps:
        return solver
    warnings.warn(f"{name}: {steps} steps cannot carry order {order}, order {steps} was used", stacklevel=5)
    return dataclasses.replace(solver, order=steps)


def default_grid(process: Process, n: int, sigma_max: float, sigma_min: float) -> Tensor:
    """Karras' grid in sigma / alpha; from pure noise, where that is infinite, evenly spaced times."""
    if math.isinf(sigma_max):
        return grids.linear_grid(n, process)
    return grids.on_process(grids.karras_grid(n, sigma_min, sigma_max), process)


def _steps(solver: Solver, evaluations: int) -> int:
    """How many steps of a method the evaluations buy."""
    each, saved = getattr(solver, "evaluations_per_step", 1), getattr(solver, "evaluations_saved", 0)
    if evaluations + saved < each:
        raise ValueError(f"one step of this method takes {each - saved} evaluations, got {evaluations}")
    return int(evaluations + saved) // int(each)


def _range(process: Process, sigma_max: float | None, sigma_min: float | None) -> tuple[float, float]:
    ends = process.ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).tolist()
    top, low = ends[0] if sigma_max is None else sigma_max, ends[1] if sigma_min is None else sigma_min
    if not 0 < low < top or math.isnan(top):
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {low} and {top}")
    return top, low


def _checked(grid: Tensor, process: Process) -> Tensor:
    grid = grid.detach().double().cpu()
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid[1:] < grid[:-1]).all()):
        raise ValueError("a grid must be a strictly decreasing row of at least two times")
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    if float(grid[-1]) < end - 1e-9 or not bool(torch.isfinite(grid).all()):
        raise ValueError(f"the grid's times must be finite and at least {end}, where no noise is left")
    return grid


def _normal(generator: torch.Generator | None) -> Noise:
    def normal(x: Tensor, _t: float, _s: float) -> Tensor:
        return standard_normal(x.shape, x, generator)

    return normal
