"""What a backbone learns before its detector: at each place what is there, and how far the box's sides are.

DiffusionDet and ConsistencyDet begin from backbones that have learned to classify images; this is the small detector's
way to begin alike. The task is that of FCOS (Tian et al. 2019, arXiv:1904.01355, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from consilience.diffusion.applications.boxes.geometry import corners
from consilience.diffusion.applications.boxes.model import Backbone
from consilience.diffusion.applications.boxes.scenes import CLASSES

SIDES_WEIGHT = 5.0


class Dense(nn.Module):
    """A backbone with logits of the classes and of the ground, and four distances, at each place."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.backbone = Backbone(channels)
        self.head = nn.Conv2d(channels, CLASSES + 1 + 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, size / 2, size / 2, classes + 1], the ground last, and distances [batch, ..., 4]."""
        found = self.head(self.backbone(images)).movedim(1, -1)
        return found[..., : CLASSES + 1], found[..., CLASSES + 1 :]


def targets(boxes: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Labels [batch, size, size], `CLASSES` on the ground, and distances [batch, size, size, 4] in parts of the image.

    The distances lead from the middle of a place to the left, top, right and bottom of its box; where boxes share a
    place it belongs to the smallest of them.
    """
    middle = (torch.arange(size, dtype=boxes.dtype, device=boxes.device) + 0.5) / size
    at = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1)
    edges = corners(boxes)[:, :, None, None]
    sides = torch.cat([at - edges[..., :2], edges[..., 2:] - at], -1)
    covered = (sides.amin(-1) > 0) & (labels >= 0)[..., None, None]
    extent = boxes[..., 2:].prod(-1)[..., None, None].expand(covered.shape)
    smallest, owner = torch.where(covered, extent, torch.inf).min(1)
    scene = torch.arange(len(boxes), device=boxes.device)[:, None, None]
    found = torch.where(smallest.isfinite(), labels[scene, owner], CLASSES)
    y, x = torch.meshgrid(*[torch.arange(size, device=boxes.device)] * 2, indexing="ij")
    return found, sides[scene, owner, y, x]


def dense_loss(model: Dense, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Cross-entropy of what is at each place, and the mean absolute error of the distances on objects; 0-d.

    Nothing is drawn; the generator is there for trainers.
    """
    logits, distances = model(batch["x"])
    labels, sides = targets(batch["boxes"], batch["labels"], logits.shape[1])
    covered = labels < CLASSES
    entropy = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    return entropy + SIDES_WEIGHT * (distances[covered] - sides[covered]).abs().mean()
