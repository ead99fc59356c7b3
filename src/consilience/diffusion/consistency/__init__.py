"""Few steps: consistency models and flow maps, their objectives, samplers, schedules and editing."""

from consilience.diffusion.consistency.curriculum import (
    Finding,
    TargetAverage,
    boundary_error,
    diagnose,
    doubling_levels,
    ect_decay,
    ema_rate,
    karras_levels,
    linear_levels,
    smooth_decay,
    sqrt_levels,
)
from consilience.diffusion.consistency.editing import (
    Measurement,
    colourisation,
    completed,
    edit,
    inpainting,
    interpolate,
    superresolution,
)
from consilience.diffusion.consistency.maps import FlowMap, consistency_map, ddim_step, derivative, exact_map
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
from consilience.diffusion.consistency.objectives.mlcm import mlcm
from consilience.diffusion.consistency.objectives.multistepcm import multistepcm
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
from consilience.diffusion.consistency.objectives.vct import vct
from consilience.diffusion.consistency.samplers import (
    Levels,
    gamma_sample,
    multistep,
    one_step,
    phase_grid,
    phased,
    search_levels,
    segmented,
    tcd_sample,
)
from consilience.diffusion.consistency.setups import SETUPS, Setup
from consilience.diffusion.consistency.shared import (
    Objective,
    Pair,
    cauchy,
    elementwise_huber,
    pair,
    pseudo_huber,
    same_dropout,
    squared,
    teacher_step,
)

__all__ = [
    "SETUPS",
    "Finding",
    "FlowMap",
    "Levels",
    "Measurement",
    "Objective",
    "Pair",
    "Setup",
    "TargetAverage",
    "ayf",
    "boundary_error",
    "cauchy",
    "cm",
    "colourisation",
    "completed",
    "consistency_fm",
    "consistency_map",
    "ctm",
    "dcm",
    "ddim_step",
    "derivative",
    "diagnose",
    "doubling_levels",
    "ect",
    "ect_decay",
    "edit",
    "elementwise_huber",
    "ema_rate",
    "epg",
    "exact_map",
    "gamma_sample",
    "ict",
    "inpainting",
    "interpolate",
    "karras_levels",
    "lcm",
    "linear_levels",
    "meanflow",
    "mlcm",
    "multistep",
    "multistepcm",
    "nct",
    "one_step",
    "pair",
    "pcm",
    "phase_grid",
    "phased",
    "pseudo_huber",
    "rcm",
    "same_dropout",
    "scflow",
    "scm",
    "scott",
    "sct",
    "search_levels",
    "segmented",
    "self_distillation",
    "slct",
    "smooth_decay",
    "sqrt_levels",
    "squared",
    "superresolution",
    "tcd",
    "tcd_sample",
    "tdd",
    "teacher_step",
    "tlcm",
    "traflow",
    "vct",
]
