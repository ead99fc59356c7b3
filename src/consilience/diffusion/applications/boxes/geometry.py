"""Boxes as tensors [..., 4] of (centre x, centre y, width, height) in parts of the image: overlap and suppression."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-3
"""The least width and height that a box is taken to have."""


def corners(boxes: Tensor) -> Tensor:
    """(x0, y0, x1, y1) of boxes [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:].clamp(min=LEAST) / 2
    return torch.cat([centre - half, centre + half], -1)


def area(edges: Tensor) -> Tensor:
    """The areas [...] of boxes given by their corners [..., 4]; 0 where a corner is beyond its opposite."""
    return (edges[..., 2:] - edges[..., :2]).clamp(min=0).prod(-1)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes ``a`` with ``b``, whose shapes broadcast, and its generalised form; [...] each.

    The generalised one is less by the share of the smallest enclosing box that neither covers, so that it lies in
    (-1, 1] and has a gradient for boxes that are apart (Rezatofighi et al. 2019, arXiv:1902.09630).
    """
    p, q = corners(a), corners(b)
    common = area(torch.cat([torch.maximum(p[..., :2], q[..., :2]), torch.minimum(p[..., 2:], q[..., 2:])], -1))
    union = area(p) + area(q) - common
    hull = area(torch.cat([torch.minimum(p[..., :2], q[..., :2]), torch.maximum(p[..., 2:], q[..., 2:])], -1))
    iou = common / union
    return iou, iou - (hull - union) / hull


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """The intersections over unions of boxes [..., n, 4] and [..., m, 4]: [..., n, m]."""
    return overlaps(a[..., :, None, :], b[..., None, :, :])[0]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression: the indices of boxes [n, 4] that are kept, best score first.

    A box is dropped where one of its own label with a better score is kept and overlaps it by more than ``threshold``.
    """
    order = scores.argsort(descending=True, stable=True)
    rivals = (pairwise_iou(boxes, boxes) > threshold) & (labels[:, None] == labels)
    kept: list[int] = []
    for place, row in enumerate(rivals[order][:, order].tolist()):
        if not any(row[other] for other in kept):
            kept.append(place)
    return order[kept]
