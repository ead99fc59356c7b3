"""The detector: a small backbone with a feature pyramid, features pooled from boxes, and a decoder of two stages.

Boxes live in the signal's own units, [-1, 1] across the image times a scale, and are noised there. The decoder looks
at the image where the noisy boxes are, moves them, and says what they hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from consilience.diffusion.applications.boxes.geometry import LEAST, corners
from consilience.diffusion.applications.boxes.matching import Predictions
from consilience.diffusion.applications.boxes.scenes import CLASSES
from consilience.diffusion.consistency.maps import FlowMap, ddim_step
from consilience.diffusion.processes import EDM, Process, VPCosine, expand


@dataclass(frozen=True)
class Noising:
    """How boxes are noised: the process, and the signal's ``scale``, which DiffusionDet sets to 2.

    ``clamp`` shows the decoder the state clamped to the signal's range as DiffusionDet does; without it the state is
    shown divided by its own standard deviation where noise prevails, the c_in of EDM, as in ConsistencyDet.
    """

    process: Process
    scale: float = 1.0
    clamp: bool = False

    def signal(self, boxes: Tensor) -> Tensor:
        """Boxes [..., 4] in parts of the image, as data of the process."""
        return (2 * boxes - 1) * self.scale

    def boxes(self, signal: Tensor) -> Tensor:
        """The inverse of `signal`, kept within the image and not without extent."""
        found = (signal / self.scale + 1) / 2
        return torch.cat([found[..., :2].clamp(0, 1), found[..., 2:].clamp(LEAST, 1)], -1)

    def proposals(self, x: Tensor, t: Tensor) -> Tensor:
        """Where the decoder looks for a state x [batch, n, 4] at times t: boxes in parts of the image."""
        if self.clamp:
            return self.boxes(x.clamp(-self.scale, self.scale))
        half = self.scale / 2  # about the standard deviation of boxes in the signal's units
        alpha, sigma = expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)
        return self.boxes(x * half / torch.sqrt((alpha * half) ** 2 + sigma**2))


CONSISTENCY = Noising(EDM(0.002, 40.0))
"""ConsistencyDet's levels: sigma from 0.002 to 40."""

DIFFUSION = Noising(VPCosine(), 2.0, clamp=True)
"""DiffusionDet's: the cosine schedule, and a signal of scale 2."""


class Seen(NamedTuple):
    """All stages of the decoder, the last one last."""

    stages: tuple[Predictions, ...]

    @property
    def last(self) -> Predictions:
        """The finished prediction."""
        return self.stages[-1]


class Backbone(nn.Module):
    """Images [batch, 3, size, size] to features [batch, channels, size / 2, size / 2].

    What is seen at a quarter and at an eighth of the size, in twice as many channels, is added to the finer features
    after a 1 x 1 convolution: a feature pyramid, of which the finest level is used (Lin et al. 2017, arXiv:1612.03144).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.fine = nn.Sequential(_convolution(3, channels, 2), _convolution(channels, channels))
        self.middle = nn.Sequential(_convolution(channels, wide, 2), _convolution(wide, wide))
        self.coarse = nn.Sequential(_convolution(wide, wide, 2), _convolution(wide, wide))
        self.lateral = nn.ModuleList([nn.Conv2d(wide, wide, 1), nn.Conv2d(wide, channels, 1)])
        self.last = _convolution(channels, channels)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        middle = self.middle(fine)
        coarse = nn.functional.interpolate(self.coarse(middle), middle.shape[-2:])
        middle = nn.functional.interpolate(middle + self.lateral[0](coarse), fine.shape[-2:])
        found: Tensor = self.last(fine + self.lateral[1](middle))
        return found


def _convolution(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1), nn.GroupNorm(8, out), nn.SiLU())


class Detector(nn.Module):
    """Images [batch, 3, size, size] and noisy boxes to boxes and classes."""

    frequencies: Tensor

    def __init__(self, channels: int = 32, width: int = 96, stages: int = 2, pooled: int = 4) -> None:
        super().__init__()
        self.backbone = Backbone(channels)
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 4) * math.pi)
        self.time = nn.Sequential(nn.Linear(12, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.stages = nn.ModuleList(_Stage(channels, width, pooled) for _ in range(stages))

    def features(self, images: Tensor) -> Tensor:
        """What the decoder looks at [batch, channels, size / 2, size / 2]: once for all steps of a scene."""
        found: Tensor = self.backbone(images)
        return found

    def forward(self, features: Tensor, proposals: Tensor, c_noise: Tensor) -> Seen:
        angles = c_noise[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        found, memory, boxes = [], None, proposals
        for stage in self.stages:
            predicted, memory = stage(features, boxes.detach(), time, memory)
            found.append(predicted)
            boxes = predicted.boxes
        return Seen(tuple(found))

    def look(self, features: Tensor, x: Tensor, t: Tensor, noising: Noising) -> Seen:
        """All stages for a state x [batch, n, 4] of the noised boxes at times t, 0-d or [batch]."""
        c_noise = (noising.process.ratio(t).log() / 4).expand(len(x))
        return self(features, noising.proposals(x, t), c_noise)


class _Stage(nn.Module):
    """Boxes are looked at, compared with each other, moved, and named."""

    def __init__(self, channels: int, width: int, pooled: int) -> None:
        super().__init__()
        self.pooled = pooled
        self.seen = nn.Linear(channels * pooled**2, width)
        self.place = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.time = nn.Linear(width, 2 * width)
        self.classes = nn.Linear(width, CLASSES)
        self.move = nn.Linear(width, 4)
        nn.init.constant_(self.classes.bias, -2.0)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def forward(
        self, features: Tensor, boxes: Tensor, time: Tensor, memory: Tensor | None
    ) -> tuple[Predictions, Tensor]:
        seen = pool(features, boxes, self.pooled).flatten(2)
        h = self.norms[0](self.seen(seen) + self.place(2 * boxes - 1) + (0 if memory is None else memory))
        h = self.norms[1](h + self.attention(h, h, h, need_weights=False)[0])
        scale, shift = self.time(time)[:, None].chunk(2, -1)
        h = self.norms[2](h + self.feed(h)) * (1 + scale) + shift
        return Predictions(moved(boxes, self.move(h)), self.classes(h)), h


def moved(boxes: Tensor, by: Tensor) -> Tensor:
    """Boxes [..., 4] moved by R-CNN's deltas: the centre in parts of their size, the logarithm of their size.

    Width and height change by a factor of 8 at most.
    """
    size = boxes[..., 2:].clamp(min=LEAST)
    factor = torch.exp(by[..., 2:].clamp(-math.log(8), math.log(8)))
    return torch.cat([boxes[..., :2] + size * by[..., :2], size * factor], -1)


def pool(features: Tensor, boxes: Tensor, count: int) -> Tensor:
    """Features of each box [batch, n, 4] at ``count`` x ``count`` points: [batch, n, channels, count^2].

    Interpolated bilinearly in the middles of the box's cells, and 0 beyond the image: RoIAlign with one sample per cell
    (He et al. 2017, arXiv:1703.06870).
    """
    edges = corners(boxes)
    share = (torch.arange(count, dtype=boxes.dtype, device=boxes.device) + 0.5) / count
    x, y = (edges[..., k, None] + (edges[..., k + 2, None] - edges[..., k, None]) * share for k in (0, 1))
    n = boxes.shape[1]
    across, down = x[:, :, None, :].expand(-1, -1, count, -1), y[:, :, :, None].expand(-1, -1, -1, count)
    flat = (torch.stack([across, down], -1) * 2 - 1).reshape(len(boxes), n * count, count, 2)
    found = nn.functional.grid_sample(features, flat, align_corners=False)
    return found.reshape(len(boxes), -1, n, count**2).transpose(1, 2)


def box_map(detector: Detector, noising: Noising) -> FlowMap:
    """The detector as a consistency model of boxes: at t_min a state is taken as it is, whatever the image.

    Its conditions are ``features`` [batch, ...] from `Detector.features`. The step that is left after the decoder's
    boxes ends at t_min, so that the identity there is `FlowMap`'s own.
    """
    process = noising.process
    end = torch.tensor(process.t_min)

    def predict(x: Tensor, t: Tensor, s: Tensor, features: Tensor) -> Tensor:
        signal = noising.signal(detector.look(features, x, t, noising).last.boxes)
        return ddim_step(x, signal, t, end.to(x), process, "x0") / process.alpha(end.to(x))

    return FlowMap(predict, process, "x0")
