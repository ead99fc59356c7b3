"""Detections against the truth: assignment, the set loss of training, and the measures of a finished detector."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor

from consilience.diffusion.applications.boxes.geometry import corners, overlaps, pairwise_iou

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0


class Predictions(NamedTuple):
    """A head's boxes [batch, n, 4] and the logits of its classes [batch, n, classes]."""

    boxes: Tensor
    logits: Tensor


class Detections(NamedTuple):
    """What was found in one scene: boxes [n, 4], scores [n] in [0, 1], labels [n]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """The focal loss of each logit (Lin et al. 2017, arXiv:1708.02002, equation 5, alpha 1/4 and gamma 2)."""
    chance = logits.sigmoid()
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    missed = target * (1 - chance) + (1 - target) * chance
    return (target * ALPHA + (1 - target) * (1 - ALPHA)) * missed**GAMMA * cross


def costs(found: Predictions, boxes: Tensor, labels: Tensor) -> Tensor:
    """What it costs to assign each prediction to each true object: [batch, n, objects], for labels >= 0.

    The set loss itself: focal class cost (hit less miss), L1 distance of the corners, and minus generalised IoU, with
    DETR's weights (arXiv:2005.12872, and DiffusionDet, arXiv:2211.09788).
    """
    hit, miss = focal(found.logits, torch.ones_like(found.logits)), focal(found.logits, torch.zeros_like(found.logits))
    batch = torch.arange(len(boxes), device=boxes.device)[:, None]
    of_class = (hit - miss).transpose(1, 2)[batch, labels.clamp(min=0)].transpose(1, 2)
    a, b = found.boxes[:, :, None], boxes[:, None]
    apart = (corners(a) - corners(b)).abs().sum(-1)
    return CLASS_WEIGHT * of_class + L1_WEIGHT * apart - GIOU_WEIGHT * overlaps(a, b)[1]


@torch.no_grad()
def assign(cost: Tensor, counts: Tensor, repeat: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest assignment in which each true object has ``repeat`` predictions of its own: (scene, place, object).

    ``cost`` is [batch, n, objects]; scene k has ``counts[k]`` objects. Raises ValueError where there are fewer
    predictions than ``repeat`` times a scene's objects.
    """
    n = cost.shape[1]
    if repeat < 1 or repeat * int(counts.max()) > n:
        raise ValueError(f"{n} predictions cannot be shared by {int(counts.max())} objects, {repeat} each")
    rows: list[np.ndarray] = []
    for scene, (matrix, count) in enumerate(zip(cost.double().cpu().numpy(), counts.tolist(), strict=True)):
        place, column = linear_sum_assignment(np.tile(matrix[:, :count], (1, repeat)))
        rows.append(np.stack([np.full(len(place), scene), place, column % max(count, 1)]))
    scene, place, column = torch.from_numpy(np.concatenate(rows, 1)).to(cost.device)
    return scene, place, column


def set_loss(found: Predictions, boxes: Tensor, labels: Tensor, counts: Tensor, repeat: int = 1) -> Tensor:
    """Focal loss of all predictions, L1 and generalised IoU loss of those assigned, per assigned prediction; 0-d."""
    scene, place, column = assign(costs(found, boxes, labels), counts, repeat)
    target = torch.zeros_like(found.logits)
    target[scene, place, labels[scene, column]] = 1.0
    mine, true = found.boxes[scene, place], boxes[scene, column]
    apart = (corners(mine) - corners(true)).abs().sum()
    unlike = (1 - overlaps(mine, true)[1]).sum()
    total = CLASS_WEIGHT * focal(found.logits, target).sum() + L1_WEIGHT * apart + GIOU_WEIGHT * unlike
    return total / max(len(scene), 1)


# ------------------------------------------------------------------------------------------------------- measures


def average_precision(
    found: list[Detections], boxes: Tensor, labels: Tensor, counts: Tensor, threshold: float = 0.5
) -> float:
    """The mean over classes of the area under precision against recall, a hit being an IoU above ``threshold``.

    Precision is made to fall with recall, as in PASCAL VOC since 2010; of several detections of one object the best
    scored counts, the others are wrong. Raises ValueError where no scene has an object.
    """
    present = sorted({label for label in labels.flatten().tolist() if label >= 0})
    if not present:
        raise ValueError("there are no objects to find")
    return float(np.mean([_precision(found, boxes, labels, counts, label, threshold) for label in present]))


def _precision(
    found: list[Detections], boxes: Tensor, labels: Tensor, counts: Tensor, label: int, threshold: float
) -> float:
    claims, total = [], 0
    for scene, seen in enumerate(found):
        true = boxes[scene, : counts[scene]][labels[scene, : counts[scene]] == label]
        total += len(true)
        mine = seen.labels == label
        order = seen.scores[mine].argsort(descending=True, stable=True)
        hits = _hits(seen.boxes[mine][order], true, threshold)
        claims += list(zip(seen.scores[mine][order].tolist(), hits, strict=True))
    claims.sort(key=lambda claim: -claim[0])
    hit = np.cumsum([claim[1] for claim in claims])
    precision = hit / np.arange(1, len(hit) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    recall = np.diff(hit, prepend=0) / total
    return float((best * recall).sum())


def _hits(mine: Tensor, true: Tensor, threshold: float) -> list[bool]:
    """Which boxes, best score first, are the first to claim the object they overlap most."""
    taken: set[int] = set()
    hits = []
    for row in pairwise_iou(mine, true).tolist():
        best = max(range(len(row)), key=row.__getitem__, default=-1)
        hit = best >= 0 and row[best] > threshold and best not in taken
        taken |= {best} if hit else set()
        hits.append(hit)
    return hits


def mean_iou(found: list[Detections], boxes: Tensor, counts: Tensor) -> float:
    """The mean overlap of true objects with the detections they are best assigned to, one to one in each scene.

    Of a scene's detections only as many as there are objects take part, those scored best, whatever their class: an
    object that is left without one, or with one elsewhere, counts as 0. Raises ValueError where there is no object.
    """
    total = 0.0
    for seen, true, count in zip(found, boxes, counts.tolist(), strict=True):
        best = seen.scores.argsort(descending=True, stable=True)[:count]
        iou = pairwise_iou(seen.boxes[best], true[:count]).double().cpu().numpy()
        rows, columns = linear_sum_assignment(-iou)
        total += float(iou[rows, columns].sum())
    objects = int(counts.sum())
    if objects == 0:
        raise ValueError("there are no objects to find")
    return total / objects
