"""Diffusion and flow models: processes, exact denoisers, solvers, guidance, training. Needs torch alone to sample."""

from consilience.diffusion.denoisers import Denoiser, precondition
from consilience.diffusion.grids import arcsinh_grid, exponential_grid, karras_grid, linear_grid, on_process
from consilience.diffusion.mixture import GaussianMixture
from consilience.diffusion.processes import (
    EDM,
    PFGMPP,
    VE,
    Process,
    RectifiedFlow,
    TrigFlow,
    VPCosine,
    VPLinear,
    VPScaledLinear,
    VPTable,
)
from consilience.diffusion.solve import METHODS, solve
from consilience.diffusion.solvers.plan import Plan, Solution, Solver, Stage

__all__ = [
    "EDM",
    "METHODS",
    "PFGMPP",
    "VE",
    "Denoiser",
    "GaussianMixture",
    "Plan",
    "Process",
    "RectifiedFlow",
    "Solution",
    "Solver",
    "Stage",
    "TrigFlow",
    "VPCosine",
    "VPLinear",
    "VPScaledLinear",
    "VPTable",
    "arcsinh_grid",
    "exponential_grid",
    "karras_grid",
    "linear_grid",
    "on_process",
    "precondition",
    "solve",
]
