"""Few steps: consistency models and flow maps, their objectives and samplers."""

from consilience.diffusion.consistency.maps import FlowMap, consistency_map, ddim_step, derivative, exact_map
from consilience.diffusion.consistency.shared import Objective, Pair, pair, same_dropout, teacher_step

__all__ = [
    "FlowMap",
    "Objective",
    "Pair",
    "consistency_map",
    "ddim_step",
    "derivative",
    "exact_map",
    "pair",
    "same_dropout",
    "teacher_step",
]
