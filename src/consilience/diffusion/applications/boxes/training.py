"""Training on noised boxes: ground truth padded with random boxes, set losses, and consistency between levels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from consilience.diffusion.applications.boxes.matching import set_loss
from consilience.diffusion.applications.boxes.model import CONSISTENCY, DIFFUSION, Detector, Seen
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.objectives.ict import draw
from consilience.diffusion.consistency.shared import Result, pair
from consilience.diffusion.losses import noised, uniform_times

Batch = Mapping[str, Tensor]


def padding(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Random boxes [*shape, 4] in parts of the image: normal with mean 1/2 and a standard deviation of 1/6."""
    found = torch.randn(*shape, 4, generator=generator) / 6 + 0.5
    return torch.cat([found[..., :2], found[..., 2:].clamp(min=1e-4)], -1)


def padded(boxes: Tensor, counts: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` boxes per scene [batch, count, 4]: the true ones of boxes [batch, most, 4], then random ones.

    Raises ValueError where a scene has more.
    """
    if int(counts.max()) > count:
        raise ValueError(f"a scene has {int(counts.max())} objects, more than {count} boxes")
    found = padding((len(boxes), count), generator)
    most = min(boxes.shape[1], count)
    real = torch.arange(most) < counts[:, None]
    found[:, :most] = torch.where(real[..., None], boxes[:, :most], found[:, :most])
    return found


def consistency_loss(
    detector: Detector,
    batch: Batch,
    generator: torch.Generator,
    *,
    levels: int = 18,
    mean: float = -1.1,
    std: float = 2.0,
    proposals: int = 16,
    repeat: int = 2,
    weight: float = 1.0,
) -> Result:
    """The set loss at a noise level, and the distance of its boxes from those of the next lower level, of one noise.

    ConsistencyDet's published code takes the set loss at both of two neighbouring levels of 40, drawn evenly, and no
    distance: the ground truth holds the two outputs together. Here the set loss is taken at the noisier one, which
    over many pairs visits the same levels, and the other is a target without gradient that costs a pass of the decoder
    and no backward one. Their mean absolute difference, in the signal's units and times ``weight``, holds the boxes
    together that no object is assigned to. A scene's pair is one of ``levels`` of Karras, with rho 7, drawn as in iCT
    (`consistency.objectives.ict`, arXiv:2310.14189, section 3.5) with a normal of ``mean`` and ``std``. Each object
    has ``repeat`` of the ``proposals`` boxes assigned to it. With a weight of 0 the lower level is not looked at.
    """
    noising = CONSISTENCY
    grid = karras_levels(noising.process, levels)
    lower = draw(noising.process, grid, len(batch["x"]), generator, mean, std)
    start = noising.signal(padded(batch["boxes"], batch["counts"], proposals, generator))
    p = pair(noising.process, start, grid[lower + 1], grid[lower], generator)
    features = detector.features(batch["x"])
    far = detector.look(features, p.x_t, p.t, noising)
    detection = _set_losses(far, batch, repeat)
    if weight == 0:
        return detection, {"detection": float(detection.detach())}
    with torch.no_grad():
        near = detector.look(features, p.x_s, p.s, noising)
    apart = (noising.signal(far.last.boxes) - noising.signal(near.last.boxes)).abs().mean()
    log = {"detection": float(detection.detach()), "apart": float(apart.detach())}
    return detection + weight * apart, log


def diffusion_loss(
    detector: Detector, batch: Batch, generator: torch.Generator, *, proposals: int = 16, repeat: int = 2
) -> Tensor:
    """DiffusionDet's loss: the set loss at one uniform time of the cosine schedule."""
    start = DIFFUSION.signal(padded(batch["boxes"], batch["counts"], proposals, generator))
    example = noised(DIFFUSION.process, start, generator, uniform_times)
    seen = detector.look(detector.features(batch["x"]), example.x, example.t, DIFFUSION)
    return _set_losses(seen, batch, repeat)


def _set_losses(seen: Seen, batch: Batch, repeat: int) -> Tensor:
    """The mean set loss of all stages."""
    losses = [set_loss(stage, batch["boxes"], batch["labels"], batch["counts"], repeat) for stage in seen.stages]
    return torch.stack(losses).mean()
