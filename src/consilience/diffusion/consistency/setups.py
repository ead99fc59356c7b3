"""Every objective with its schedules, target average, process and sampler, by name: `SETUPS`.

An objective is a pure function of a batch; what its paper changes through a run, averages beside it or samples with is
here, so that a training loop needs nothing but the name, the step and the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from consilience.diffusion.consistency import samplers
from consilience.diffusion.consistency.curriculum import (
    TargetAverage,
    doubling_levels,
    ect_decay,
    ratio_range,
    smooth_decay,
    sqrt_levels,
)
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.objectives.ayf import ayf
from consilience.diffusion.consistency.objectives.cm import cm
from consilience.diffusion.consistency.objectives.consistency_fm import consistency_fm
from consilience.diffusion.consistency.objectives.ctm import ctm
from consilience.diffusion.consistency.objectives.dcm import dcm
from consilience.diffusion.consistency.objectives.ect import ect
from consilience.diffusion.consistency.objectives.epg import epg
from consilience.diffusion.consistency.objectives.ict import ict
from consilience.diffusion.consistency.objectives.lcm import lcm
from consilience.diffusion.consistency.objectives.meanflow import meanflow
from consilience.diffusion.consistency.objectives.mlcm import mlcm, progressive
from consilience.diffusion.consistency.objectives.multistepcm import multistepcm, teacher_steps
from consilience.diffusion.consistency.objectives.nct import nct
from consilience.diffusion.consistency.objectives.pcm import pcm
from consilience.diffusion.consistency.objectives.rcm import rcm
from consilience.diffusion.consistency.objectives.scflow import scflow
from consilience.diffusion.consistency.objectives.scm import scm
from consilience.diffusion.consistency.objectives.scott import scott
from consilience.diffusion.consistency.objectives.sct import sct
from consilience.diffusion.consistency.objectives.self_distillation import self_distillation
from consilience.diffusion.consistency.objectives.slct import slct
from consilience.diffusion.consistency.objectives.tcd import tcd
from consilience.diffusion.consistency.objectives.tdd import tdd
from consilience.diffusion.consistency.objectives.tlcm import tlcm
from consilience.diffusion.consistency.objectives.traflow import traflow
from consilience.diffusion.consistency.objectives.trajectory import times
from consilience.diffusion.consistency.objectives.vct import vct
from consilience.diffusion.consistency.shared import Result, split
from consilience.diffusion.consistency.straight import own_time
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.losses import Batch
from consilience.diffusion.processes import Process, TrigFlow, standard_normal
from consilience.diffusion.solvers.plan import Solution
from consilience.diffusion.training.ema import Decay, Profile

WARMUP = 0.1
"""The share of a run in which the tangent's second part is faded in (sCM, AYF, rCM)."""

CD_LEVELS = 18
"""N of consistency distillation, with mu = 0: both fixed, as in the authors' code for CIFAR-10 (arXiv:2303.01469).

Their larger images have N = 40 and mu = 0.95, under which what the target knows takes 800 steps to come to pure noise.
"""

GRID = 50
"""The steps of the grids that `pcm` and `mlcm` cut into phases: more phases than that there cannot be."""

TCD_GAMMA = 0.3
"""The share of the time that trajectory consistency distillation renoises (arXiv:2402.19159)."""


@dataclass(frozen=True, slots=True)
class At:
    """Where a training stands: ``step`` of ``steps``, with a teacher or not, on which process, in how many phases."""

    step: int
    steps: int
    taught: bool
    process: Process
    phases: int


@dataclass(frozen=True, slots=True)
class Setup:
    """An objective and how it is trained and sampled from.

    ``teacher`` says whether it takes one. With ``two_times`` the network must be told s; without, what it is asked for
    follows from t: the data, or where ``phases`` is above 1 the end of t's phase (``edges``, from the process and the
    number of phases), which with ``within`` is sampled in any multiple of as many steps. ``schedule`` gives the
    arguments that change through a run, ``average``, of the steps and of whether there is a teacher, the profile of
    the average of the student's weights that is the target (None: the student itself). ``needs`` names what else
    `loss` has to be given, and what that is. ``trig`` objectives are defined on `TrigFlow` alone.
    """

    objective: Callable[..., Result]
    teacher: Literal["needed", "possible", "none"] = "possible"
    two_times: bool = False
    sampler: Literal["multistep", "chain", "phased", "tcd"] = "multistep"
    schedule: Callable[[At], Mapping[str, Any]] = lambda at: {}
    average: Callable[..., Profile | None] = lambda steps, taught=False: None
    phases: int = 1
    edges: Callable[[Process, int], Tensor] | None = None
    within: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    trig: bool = False

    def process(self, own: Process, sigma_data: float = 0.5) -> Process:
        """The process that the objective trains on: the student's own, or TrigFlow of the same range of noise.

        Put a map of the own process on it with `FlowMap.on`. ``sigma_data`` is the data's standard deviation.
        """
        return TrigFlow(sigma_data, *ratio_range(own)) if self.trig else own

    def loss(
        self,
        student: FlowMap,
        teacher: Denoiser | None,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        step: int,
        steps: int,
        target: FlowMap | None = None,
        **parts: Any,
    ) -> Result:
        """The objective's loss and log at ``step`` (0 to ``steps``) of a run, on the student's process.

        The teacher may be on another one. ``parts`` are further arguments of the objective: what it ``needs``, and
        anything that is to differ from its schedule. Raises ValueError for a missing part, teacher, or one too many.
        """
        self.check(teacher is not None, parts)
        process = student.process
        if teacher is not None and teacher.process != process:
            teacher = teacher.on(process)
        scheduled = self.schedule(At(step, steps, teacher is not None, process, self.phases))
        return self.objective(student, teacher, batch, generator, target=target, **{**scheduled, **parts})

    def check(self, taught: bool, parts: Mapping[str, Any]) -> None:
        """Raise ValueError where a part that is needed is missing, or a teacher, or there is one too many."""
        name = getattr(self.objective, "__name__", "this objective").strip("_")
        for part, what in self.needs.items():
            if part not in parts:
                raise ValueError(f"{name} needs {part}, {what}: give it to the loss")
        if self.teacher == "needed" and not taught:
            raise ValueError(f"{name} distils a teacher: give one")
        if self.teacher == "none" and taught:
            raise ValueError(f"{name} trains from data alone: leave the teacher out")

    def grid(self, process: Process, steps: int, sigma_data: float = 0.5) -> Tensor:
        """The times [steps + 1] that `sample` visits: the phases' edges, or those of `few_grid`.

        Raises ValueError for a number of steps that the phases do not allow.
        """
        if self.edges is None:
            return few_grid(process, steps, sigma_data)
        if self.within and steps > 0 and steps % self.phases == 0:
            return self.edges(process, steps)
        if steps != self.phases:
            many = "a multiple of as many" if self.within else "as many"
            raise ValueError(f"trained in {self.phases} phases this is sampled in {many} steps, not in {steps}")
        return self.edges(process, self.phases)

    def sample(
        self,
        model: FlowMap,
        x: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        sigma_data: float = 0.5,
        **cond: Any,
    ) -> Solution:
        """Samples of the finished map from x [batch, ...] at ``t_max`` by the objective's own sampler."""
        grid = self.grid(model.process, steps, sigma_data)
        match self.sampler:
            case "multistep":
                return samplers.multistep(model, x, grid, generator=generator, **cond)
            case "tcd":
                return samplers.tcd_sample(model, x, grid, TCD_GAMMA, generator=generator, **cond)
        if self.within:
            return samplers.segmented(model, x, grid, self.phases, **cond)
        return samplers.phased(model, x, grid, **cond)


def few_grid(process: Process, steps: int, sigma_data: float = 0.5) -> Tensor:
    """``steps`` + 1 decreasing times from t_max to no noise, even on the straight path of data scaled to unit size.

    sigma / alpha is ``sigma_data`` tau / (1 - tau), tau = k / ``steps``. Raises ValueError below one step.
    """
    if steps < 1:
        raise ValueError(f"need at least one step, got {steps}")
    tau = torch.arange(steps - 1, -1, -1, dtype=torch.float64) / steps
    top = torch.tensor([process.t_max], dtype=torch.float64)
    return torch.cat([top, process.time(sigma_data * tau / (1 - tau))])


def warmed(at: At) -> float:
    """From 0 to 1 in the first `WARMUP` of the run."""
    return min(1.0, at.step / max(WARMUP * at.steps, 1.0))


# ------------------------------------------------------------------------------------------------------ schedules


def cm_levels(step: int, steps: int) -> int:
    """N(k) from 2 to half the root of the number of steps, between 18 and the published 150.

    What the target knows travels by one level in the lag of its average, about 5 N steps, so that 5 N^2 steps pass
    before it comes from the data to pure noise.
    """
    return sqrt_levels(step, steps, s1=min(150, max(18, math.isqrt(steps) // 2)))


def _cm_levels(at: At) -> Mapping[str, Any]:
    return {"levels": CD_LEVELS if at.taught else cm_levels(at.step, at.steps)}


def _ict_levels(at: At) -> Mapping[str, Any]:
    return {"levels": doubling_levels(at.step, at.steps)}


def _slct_levels(at: At) -> Mapping[str, Any]:
    return {"levels": doubling_levels(at.step, at.steps, s1=640)}


def _ect_gaps(at: At) -> Mapping[str, Any]:
    return {"decay": ect_decay(at.step, at.steps)}


def _smooth_gaps(at: At) -> Mapping[str, Any]:
    return {"decay": smooth_decay(at.step, at.steps)}


def _multistep_grid(at: At) -> Mapping[str, Any]:
    return {"segments": at.phases, "grid": times(at.process, teacher_steps(at.step, at.steps, at.phases))}


def _mlcm_segments(at: At) -> Mapping[str, Any]:
    return {"segments": progressive(at.step, at.steps, [min(k * at.phases, GRID) for k in (4, 2, 1)])}


def _anchors(at: At) -> Mapping[str, Any]:
    """The data are the target everywhere in the first half, then near the end alone (the authors' two trainings)."""
    return {"segments": at.phases, "anchored": 1.0 if 2 * at.step < at.steps else 0.1}


def _fading(at: At) -> Mapping[str, Any]:
    return {"warmup": warmed(at)}


def _fading_short_of_one(at: At) -> Mapping[str, Any]:
    """AYF's, which ends at 0.99 (arXiv:2506.14603)."""
    return {"warmup": min(warmed(at), 0.99)}


def _constant(**values: Any) -> Callable[[At], Mapping[str, Any]]:
    return lambda at: values


# ---------------------------------------------------------------------------------------------------------- edges


def _grid_edges(steps: Callable[[int], int]) -> Callable[[Process, int], Tensor]:
    return lambda process, phases: samplers.phase_grid(times(process, steps(phases)), phases)


def _straight_edges(process: Process, phases: int) -> Tensor:
    inner = own_time(process, torch.arange(phases - 1, 0, -1, dtype=torch.float64) / phases)
    ends = torch.tensor([process.t_max, float(process.time(torch.zeros((), dtype=torch.float64)))], dtype=torch.float64)
    return torch.cat([ends[:1], inner, ends[1:]])


# ------------------------------------------------------------------------------------------------------- averages


def _cm_average(steps: int, taught: bool = False) -> Profile | None:
    """Training's rate mu follows its levels; distillation's is as fixed as its levels are, and 0: no average."""
    return None if taught else TargetAverage(cm_levels, steps, mu0=0.9)


def _average(rate: float) -> Callable[..., Profile | None]:
    return lambda steps, taught=False: Decay(rate)


# ---------------------------------------------------------------------- objectives whose arguments are put together


def _ctm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    **parts: Any,
) -> Result:
    """`ctm`, taught by the target's own denoiser where there is no teacher (arXiv:2310.02279, from scratch)."""
    own = (student if target is None else target).denoiser
    return ctm(student, teacher or own, batch, generator, target=target, **parts)


def _lcm(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    target: FlowMap | None = None,
    **parts: Any,
) -> Result:
    """`lcm` at the scale of the teacher as it is given, which is not told to the student."""
    if "null" not in parts:
        student, target = _untold(student), None if target is None else _untold(target)
        parts |= {"null": {}, "w": (0.0, 0.0)}
    return lcm(student, teacher, batch, generator, target=target, **parts)


def _untold(model: FlowMap) -> FlowMap:
    def function(x: Tensor, t: Tensor, s: Tensor, w: Tensor | None = None, **cond: Any) -> Tensor:
        return model.function(x, t, s, **cond)

    return FlowMap(function, model.process, model.prediction)


def _nct(
    student: FlowMap,
    teacher: Denoiser | None,
    batch: Batch,
    generator: torch.Generator | None = None,
    *,
    base: FlowMap,
    control: Callable[[Tensor], Tensor],
    target: FlowMap | None = None,
    **parts: Any,
) -> Result:
    """`nct` of the student's one step under its condition ``control``, from the one step of ``base``."""
    x0, cond = split(batch)
    noise = standard_normal(x0.shape, x0, generator)

    def one_step(model: FlowMap, z: Tensor, **more: Any) -> Tensor:
        t = torch.full((len(z),), model.process.t_max, dtype=z.dtype, device=z.device)
        return model.x0(model.process.sigma(t[0]) * z, t, **cond, **more)

    return nct(
        lambda z, c: one_step(student, z, control=c),
        lambda z: one_step(base, z),
        control,
        noise,
        generator,
        target=None if target is None else lambda z, c: one_step(target, z, control=c),
        **parts,
    )


# ---------------------------------------------------------------------------------------------------------- table

SETUPS: dict[str, Setup] = {
    "cm": Setup(cm, schedule=_cm_levels, average=_cm_average),
    "ict": Setup(ict, schedule=_ict_levels),
    "ect": Setup(ect, schedule=_ect_gaps),
    "sct": Setup(sct, teacher="none", schedule=_smooth_gaps),
    "slct": Setup(slct, teacher="none", schedule=_slct_levels),
    "scm": Setup(scm, schedule=_fading, trig=True),
    "vct": Setup(
        vct, teacher="none", schedule=_ect_gaps, needs={"encoder": "the law of a datum's noise: x0 -> mean, deviation"}
    ),
    "epg": Setup(epg, schedule=_ect_gaps),
    "lcm": Setup(_lcm, average=_average(0.95)),
    "scott": Setup(scott, teacher="needed", average=_average(0.95)),
    "ctm": Setup(_ctm, two_times=True, sampler="chain", average=_average(0.999)),
    "tcd": Setup(tcd, two_times=True, sampler="tcd", average=_average(0.95)),
    "tdd": Setup(tdd, two_times=True, sampler="chain", average=_average(0.95)),
    "pcm": Setup(
        pcm,
        sampler="phased",
        schedule=lambda at: {"phases": at.phases},
        average=_average(0.95),
        phases=4,
        edges=_grid_edges(lambda phases: GRID),
    ),
    "multistepcm": Setup(
        multistepcm,
        sampler="phased",
        schedule=_multistep_grid,
        phases=4,
        edges=_grid_edges(lambda phases: teacher_steps(1, 1, phases)),
    ),
    "mlcm": Setup(
        mlcm,
        teacher="needed",
        sampler="phased",
        schedule=_mlcm_segments,
        phases=2,
        edges=_grid_edges(lambda phases: GRID),
    ),
    "tlcm": Setup(tlcm, teacher="needed"),
    "consistency-fm": Setup(
        consistency_fm,
        sampler="phased",
        schedule=_anchors,
        phases=2,
        edges=_straight_edges,
        within=True,
    ),
    "traflow": Setup(traflow, teacher="needed", two_times=True, sampler="chain"),
    "meanflow": Setup(meanflow, two_times=True, sampler="chain"),
    "lsd": Setup(self_distillation, two_times=True, sampler="chain", schedule=_constant(kind="lagrangian")),
    "esd": Setup(self_distillation, two_times=True, sampler="chain", schedule=_constant(kind="eulerian")),
    "psd": Setup(self_distillation, two_times=True, sampler="chain", schedule=_constant(kind="progressive")),
    "ayf": Setup(ayf, teacher="needed", two_times=True, sampler="chain", schedule=_fading_short_of_one),
    "rcm": Setup(rcm, teacher="needed", schedule=_fading),
    "scflow": Setup(scflow, teacher="needed", average=_average(0.9)),
    "nct": Setup(
        _nct,
        teacher="none",
        needs={"base": "the one-step generator to which the condition is added", "control": "data -> its condition"},
    ),
    "dcm": Setup(
        dcm,
        teacher="needed",
        needs={"boundary": "the time between the two experts", "expert": "which of them is trained: semantic, detail"},
    ),
}
"""By the register's ids where there is one; ``lsd``, ``esd`` and ``psd`` are the three kinds of self-distilled maps."""
