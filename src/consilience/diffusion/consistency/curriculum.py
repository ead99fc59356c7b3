"""How consistency training goes on from coarse to fine: levels, gaps, averages; and what a run's curves look like.

Schedules are functions of the step and the number of steps, the numbers that a trainer's loss gets in its context.
`diagnose` reads the numbers that the objectives log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consilience.diffusion.consistency.maps import NOISE_TOP, FlowMap
from consilience.diffusion.grids import karras_grid
from consilience.diffusion.processes import Process


def ratio_range(process: Process) -> tuple[float, float]:
    """The least and greatest sigma / alpha of the process's training times, the latter `NOISE_TOP` if infinite."""
    low, high = process.ratio(torch.tensor([process.t_min, process.t_max], dtype=torch.float64)).tolist()
    return low, high if math.isfinite(high) else NOISE_TOP


def karras_levels(process: Process, levels: int, rho: float = 7.0) -> Tensor:
    """Increasing times [levels] in float64 whose sigma / alpha are evenly spaced in their ``rho``-th root.

    Consistency Models (arXiv:2303.01469, appendix C), on any process. Raises ValueError below two levels.
    """
    if levels < 2:
        raise ValueError(f"a discretisation needs at least two levels, got {levels}")
    return process.time(karras_grid(levels, *ratio_range(process), rho)[:-1].flip(0))


def sqrt_levels(step: int, steps: int, s0: int = 2, s1: int = 150) -> int:
    """N(k) of Consistency Models: the square of the number of levels grows evenly from s0 to s1 (appendix C there)."""
    done = _progress(step, steps) * ((s1 + 1) ** 2 - s0**2)
    return max(math.ceil(math.sqrt(done + s0**2) - 1), 1) + 1


def linear_levels(step: int, steps: int, s0: int = 2, s1: int = 150) -> int:
    """The number of levels growing evenly from s0 to s1 + 1."""
    return s0 + math.floor(_progress(step, steps) * (s1 + 1 - s0))


def doubling_levels(step: int, steps: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k) of iCT: s0 steps doubled at equal intervals up to s1, plus one (arXiv:2310.14189, section 3.4)."""
    _progress(step, steps)
    every = max(math.floor(steps / (math.log2(math.floor(s1 / s0)) + 1)), 1)
    doubled = min(step // every, math.ceil(math.log2(s1 / s0)))
    return min(int(s0 * 2**doubled), s1) + 1


def ect_decay(step: int, steps: int, stages: int = 8, q: float = 2.0) -> float:
    """The part of t that easy consistency tuning jumps over, q^-1 in the first of equal stages to q^-stages.

    arXiv:2406.14548, section 3.2: 1 - r/t at large t. Raises ValueError unless stages >= 1 and q > 1.
    """
    _check_stages(stages, q)
    return q ** -(min(int(_progress(step, steps) * stages), stages - 1) + 1.0)


def smooth_decay(step: int, steps: int, stages: int = 8, q: float = 2.0) -> float:
    """The same from q^-1 to q^-stages without jumps: even in the logarithm."""
    _check_stages(stages, q)
    return q ** -(1 + _progress(step, steps) * (stages - 1))


def ema_rate(levels: int, s0: int = 2, mu0: float = 0.95) -> float:
    """mu(N) = exp(s0 log(mu0) / N), the target average's rate for N levels (arXiv:2303.01469, appendix C)."""
    if levels < 1 or not 0 < mu0 < 1:
        raise ValueError(f"need at least one level and mu0 between 0 and 1, got {levels} and {mu0}")
    return math.exp(s0 * math.log(mu0) / levels)


@dataclass(frozen=True, slots=True)
class TargetAverage:
    """A profile for the trainer's average whose rate follows the number of levels: mu(N(k)) of `ema_rate`.

    ``levels(step, steps)`` is one of this module's schedules.
    """

    levels: Callable[[int, int], int]
    steps: int
    s0: int = 2
    mu0: float = 0.95

    def __repr__(self) -> str:
        """What the trainer holds against a checkpoint's: functions by name, and no steps, of which more may follow."""
        levels = f"{self.levels.__module__}.{self.levels.__qualname__}"
        return f"TargetAverage({levels}, {self.s0}, {self.mu0})"

    def beta(self, step: int) -> float:
        """The share of the old average that is kept at update ``step``."""
        return ema_rate(self.levels(min(step - 1, self.steps), self.steps), self.s0, self.mu0)


Mistake = Literal[
    "unshared noise", "no stop-gradient", "no boundary", "ratio stuck", "missing weight", "diverging gradients"
]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a run's curves look like, and the numbers that say so."""

    mistake: Mistake
    why: str


def diagnose(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Known mistakes that a run's log looks like, from rows in the order of training; empty for a healthy run.

    Read are ``distance``, ``difference``, ``log_gap``, ``ratio`` and ``spread`` as the objectives log them, the
    trainer's ``loss`` and ``gradient_norm``, and ``boundary`` (see `boundary_error`) where it is logged; rules whose
    numbers are missing are passed over. The rules on how the loss and the difference follow the gap need a run whose
    gap shrank by four. The published weight 1 of consistency distillation and training (`cm`) is a "missing weight"
    here too. Raises ValueError for fewer than four rows.
    """
    if len(rows) < 4:
        raise ValueError(f"{len(rows)} rows are too few to see a curve; log at least four")
    rules = (_stuck, _unshared, _unweighted, _collapsed, _no_boundary, _diverging)
    return [found for found in (rule(rows) for rule in rules) if found is not None]


@torch.no_grad()
def boundary_error(model: FlowMap, x0: Tensor) -> float:
    """How far the map moves states without noise: rms of f(x, t_min) - x over that of the data [batch, ...]."""
    t = torch.full((len(x0),), model.process.t_min, dtype=x0.dtype, device=x0.device)
    alpha = model.process.alpha(t[0])
    moved = model.x0(alpha * x0, t) - x0
    return float((moved.square().mean() / x0.square().mean()).sqrt())


def _stuck(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    ratio = _column(rows, "ratio")
    if ratio is None or ratio.max() > 0.05:
        return None
    return Finding("ratio stuck", f"s / t never rose above {ratio.max():.3f}: this is plain denoising")


def _unshared(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    slope = _slope(rows, "difference")
    if slope is None or slope > 0.3:
        return None
    return Finding(
        "unshared noise",
        f"the ends of a pair differ by gap^{slope:.2f}, not in proportion to the gap: they do not share their noise",
    )


def _unweighted(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    if _column(rows, "loss") is None or _column(rows, "distance") is None:
        return None
    slope = _slope([row | {"weight": row["loss"] / row["distance"]} for row in map(dict, rows)], "weight")
    if slope is None or slope < -0.5:
        return None
    return Finding(
        "missing weight", f"the loss over the distance goes as gap^{slope:.2f}, not as 1 / gap: it is not weighted"
    )


def _collapsed(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    spread, ratio = _column(rows, "spread"), _column(rows, "ratio")
    if spread is None or ratio is None:
        return None
    late, bootstrapped = float(np.median(_last(spread))), float(np.median(_last(ratio)))
    fallen = late < 0.75 and late < 0.9 * spread.max()
    # where s is far below t the ends are posterior means, and a narrow spread is theirs
    if bootstrapped < 0.5 or not (late < 0.3 or fallen):
        return None
    return Finding(
        "no stop-gradient",
        f"from much noise the map makes {late:.2f} of the data's variance, {spread.max():.2f} at most: its ends agree "
        "by drawing together",
    )


def _no_boundary(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    error = _column(rows, "boundary")
    if error is None or np.median(_last(error)) < 0.1:
        return None
    return Finding("no boundary", f"states without noise are moved by {np.median(_last(error)):.2f} of their size")


def _diverging(rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    norm, loss = _column(rows, "gradient_norm"), _column(rows, "loss")
    if loss is not None and not np.isfinite(loss).all():
        return Finding("diverging gradients", "the loss is no longer finite")
    if norm is None:
        return None
    before, after = float(np.median(norm[: len(norm) // 2])), float(np.median(_last(norm)))
    if math.isfinite(after) and after <= 100 * before:
        return None
    return Finding("diverging gradients", f"their norm grew from {before:.3g} to {after:.3g}")


def _slope(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The exponent p in value ~ gap^p, or None where there is no gap to see it by."""
    gap, value = _column(rows, "log_gap"), _column(rows, name)
    if gap is None or value is None or not np.isfinite(value).all() or (value <= 0).any() or (gap <= 0).any():
        return None
    small = gap < 1  # where the ends are near each other
    if small.sum() < 4 or gap[small].max() < 4 * gap[small].min():
        return None
    return float(np.polyfit(np.log(gap[small]), np.log(value[small]), 1)[0])


def _last(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[-max(len(values) // 4, 1) :]


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64] | None:
    if any(name not in row for row in rows):
        return None
    return np.array([float(row[name]) for row in rows])


def _progress(step: int, steps: int) -> float:
    if steps < 1 or not 0 <= step <= steps:
        raise ValueError(f"need 0 <= step <= steps, got {step} of {steps}")
    return step / steps


def _check_stages(stages: int, q: float) -> None:
    if stages < 1 or q <= 1:
        raise ValueError(f"need at least one stage and q above 1, got {stages} and {q}")
