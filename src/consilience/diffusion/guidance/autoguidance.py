"""Autoguidance: guide a model with a worse version of itself."""

from __future__ import annotations

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.classifier_free import extrapolate


def autoguidance(model: Denoiser, weaker: Denoiser, scale: float) -> Denoiser:
    """D = D_weaker + scale (D - D_weaker), both under the same condition.

    ``weaker`` is a smaller or less trained model of the same data: where the two differ, it is wrong in the direction
    that is left. Scale 1 is no guidance, and the model guided by itself is the model. Two evaluations per call. Source:
    Karras et al. 2024, arXiv:2406.02507, section 3.
    """
    return extrapolate(model, weaker, scale)
