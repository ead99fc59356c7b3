"""Inference: random boxes are denoised in a few steps, poor ones renewed between them, and all steps' finds joined."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.diffusion.applications.boxes.geometry import suppress
from consilience.diffusion.applications.boxes.matching import Detections, Predictions
from consilience.diffusion.applications.boxes.model import CONSISTENCY, Detector, Noising
from consilience.diffusion.applications.boxes.training import padding
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.maps import ddim_step
from consilience.diffusion.grids import linear_grid
from consilience.diffusion.processes import standard_normal

RENEWED_BELOW = 0.5
SUPPRESSED_ABOVE = 0.5


def step_grid(noising: Noising, steps: int) -> Tensor:
    """The times [steps + 1] of so many steps: Karras levels for the consistency model, even times for the other."""
    if noising is CONSISTENCY:
        return karras_levels(noising.process, steps + 1).flip(0)
    return linear_grid(steps, noising.process)


@torch.no_grad()
def detect(
    detector: Detector,
    images: Tensor,
    noising: Noising,
    steps: int,
    generator: torch.Generator | None = None,
    proposals: int = 24,
) -> list[Detections]:
    """The objects of each image [batch, 3, size, size] by so many evaluations of the decoder, one of the backbone.

    A step is DDIM's from the state to the next time; boxes scored below `RENEWED_BELOW` are replaced by new random
    ones at that time. The finds of all steps are joined and go through non-maximum suppression.
    """
    grid = step_grid(noising, steps)
    features = detector.features(images)
    process = noising.process
    x = process.prior((len(images), proposals, 4), generator, dtype=images.dtype, device=images.device)
    found: list[Predictions] = []
    for t, s in zip(grid[:-1].to(x), grid[1:].to(x), strict=True):
        found.append(detector.look(features, x, t, noising).last)
        limit = noising.scale
        signal = noising.signal(found[-1].boxes).clamp(-limit, limit)
        x = renewed(ddim_step(x, signal, t, s, process, "x0"), found[-1].logits, s, noising, generator)
    return joined(found)


def renewed(x: Tensor, logits: Tensor, s: Tensor, noising: Noising, generator: torch.Generator | None = None) -> Tensor:
    """The state x [batch, n, 4] at time s with boxes that hold nothing replaced by the noised padding of training."""
    fresh = noising.signal(padding(tuple(x.shape[:2]), generator, x.device))
    noise = standard_normal(tuple(x.shape), x, generator)
    poor = logits.sigmoid().amax(-1) < RENEWED_BELOW
    return torch.where(poor[..., None], noising.process.add_noise(fresh, noise, s.expand(len(x))), x)


def joined(found: list[Predictions]) -> list[Detections]:
    """The predictions of all steps for each scene, one box per object: the best class of each, suppressed."""
    boxes = torch.cat([step.boxes for step in found], 1)
    scores, labels = torch.cat([step.logits for step in found], 1).sigmoid().max(-1)
    kept = [suppress(*scene, SUPPRESSED_ABOVE) for scene in zip(boxes, scores, labels, strict=True)]
    return [Detections(b[k], s[k], c[k]) for b, s, c, k in zip(boxes, scores, labels, kept, strict=True)]
