"""Guidance: functions from denoisers to a denoiser, so that every solver runs them unchanged and they nest.

A scale of 1 is no guidance wherever two predictions are extrapolated; a gradient's scale of 0 is none.
"""

from consilience.diffusion.guidance.apg import apg
from consilience.diffusion.guidance.autoguidance import autoguidance
from consilience.diffusion.guidance.classifier_free import classifier_free, extrapolate, with_condition
from consilience.diffusion.guidance.density import (
    density_guidance,
    divergence,
    quantile_excess,
    quantile_guidance,
    score_alignment,
)
from consilience.diffusion.guidance.interval import interval
from consilience.diffusion.guidance.minority import (
    fit_minority_classifier,
    minority_guidance,
    minority_score,
    ordinal_bins,
)
from consilience.diffusion.guidance.potential import classifier_guidance, potential_guidance
from consilience.diffusion.guidance.rehearsal import rehearsal, rehearsal_guidance
from consilience.diffusion.guidance.self_minority import every, self_minority
from consilience.diffusion.guidance.stochastic_density import stochastic_density_guidance

__all__ = [
    "apg",
    "autoguidance",
    "classifier_free",
    "classifier_guidance",
    "density_guidance",
    "divergence",
    "every",
    "extrapolate",
    "fit_minority_classifier",
    "interval",
    "minority_guidance",
    "minority_score",
    "ordinal_bins",
    "potential_guidance",
    "quantile_excess",
    "quantile_guidance",
    "rehearsal",
    "rehearsal_guidance",
    "score_alignment",
    "self_minority",
    "stochastic_density_guidance",
    "with_condition",
]
