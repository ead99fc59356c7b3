"""Training on noised boxes: ground truth padded with random boxes, set losses, and consistency between levels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from consilience.diffusion.applications.boxes.matching import set_loss
from consilience.diffusion.applications.boxes.model import CONSISTENCY, DIFFUSION, Detector, Noising, Seen
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.consistency.objectives.ict import draw
from consilience.diffusion.consistency.shared import Result, pair
from consilience.diffusion.losses import noised, uniform_times
from consilience.diffusion.processes import standard_normal

Batch = Mapping[str, Tensor]


def padding(
    shape: tuple[int, ...], generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Random boxes [*shape, 4] in parts of the image: normal with mean 1/2 and a standard deviation of 1/6."""
    found = standard_normal((*shape, 4), torch.empty(0, device=device), generator) / 6 + 0.5
    return torch.cat([found[..., :2], found[..., 2:].clamp(min=1e-4)], -1)


def padded(boxes: Tensor, counts: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` boxes per scene [batch, count, 4]: the true ones of boxes [batch, most, 4], then random ones.

    Raises ValueError where a scene has more.
    """
    if int(counts.max()) > count:
        raise ValueError(f"a scene has {int(counts.max())} objects, more than {count} boxes")
    found = padding((len(boxes), count), generator, boxes.device)
    most = min(boxes.shape[1], count)
    real = torch.arange(most, device=boxes.device) < counts[:, None]
    found[:, :most] = torch.where(real[..., None], boxes[:, :most], found[:, :most])
    return found


def consistency_loss(
    detector: Detector,
    batch: Batch,
    generator: torch.Generator,
    *,
    levels: int = 6,
    mean: float = -1.1,
    std: float = 2.0,
    proposals: int = 24,
    repeat: int = 2,
    weight: float = 0.6,
) -> Result:
    """The set loss at both of two neighbouring noise levels of one noise, and the distance between their boxes.

    As in ConsistencyDet's published code both levels are looked at after one pass of the backbone and both are held
    to the ground truth, here by the mean of their set losses, there by the sum. The distance is this module's addition:
    the mean absolute difference of the boxes, in the signal's units and times ``weight``, of which only the noisier
    level's takes a gradient; it holds those boxes too that no object is assigned to. A scene's pair is one of
    ``levels`` of Karras, with rho 7, drawn as in iCT (`consistency.objectives.ict`, arXiv:2310.14189, section 3.5) with
    a normal of ``mean`` and ``std``; the published code has 40 levels, drawn evenly. Each object has ``repeat`` of the
    ``proposals`` boxes assigned to it.
    """
    noising = CONSISTENCY
    grid = karras_levels(noising.process, levels)
    lower = draw(noising.process, grid, len(batch["x"]), generator, mean, std).cpu()
    start = noising.signal(padded(batch["boxes"], batch["counts"], proposals, generator))
    p = pair(noising.process, start, grid[lower + 1], grid[lower], generator)
    seen = _looks(detector, batch, torch.cat([p.x_t, p.x_s]), torch.cat([p.t, p.s]), noising)
    detection = _set_losses(seen, batch, repeat)
    far, near = noising.signal(seen.last.boxes).chunk(2)
    apart = (far - near.detach()).abs().mean()
    return detection + weight * apart, {"detection": float(detection.detach()), "apart": float(apart.detach())}


def diffusion_loss(
    detector: Detector,
    batch: Batch,
    generator: torch.Generator,
    *,
    looks: int = 1,
    proposals: int = 24,
    repeat: int = 2,
) -> Tensor:
    """DiffusionDet's loss: the set loss at one uniform time of the cosine schedule.

    With several ``looks`` it is the mean over as many independent times, noises and paddings of each scene, after one
    pass of the backbone, which the paper does not do.
    """
    noising = DIFFUSION
    boxes, counts = (torch.cat([batch[name]] * looks) for name in ("boxes", "counts"))
    start = noising.signal(padded(boxes, counts, proposals, generator))
    example = noised(noising.process, start, generator, uniform_times)
    return _set_losses(_looks(detector, batch, example.x, example.t, noising), batch, repeat)


def _looks(detector: Detector, batch: Batch, x: Tensor, t: Tensor, noising: Noising) -> Seen:
    """One or several looks at each scene, for states x [looks * batch, n, 4], after one pass of the backbone."""
    features = detector.features(batch["x"])
    return detector.look(features.repeat(len(x) // len(features), 1, 1, 1), x, t, noising)


def _set_losses(seen: Seen, batch: Batch, repeat: int) -> Tensor:
    """The mean set loss of all stages and looks."""
    looks = len(seen.last.boxes) // len(batch["boxes"])
    boxes, labels, counts = (torch.cat([batch[name]] * looks) for name in ("boxes", "labels", "counts"))
    return torch.stack([set_loss(stage, boxes, labels, counts, repeat) for stage in seen.stages]).mean()
