"""Generated scenes: rectangles and ellipses of several colours on a noisy ground, with their boxes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 32
MOST = 6
RECTANGLE, ELLIPSE = 0, 1
CLASSES = 2
COLOURS = np.array(
    [[0.9, 0.2, 0.2], [0.2, 0.8, 0.2], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2], [0.8, 0.3, 0.8], [0.2, 0.8, 0.8]]
)


class Scenes(NamedTuple):
    """``images`` [n, 3, SIZE, SIZE] about 0; ``boxes`` [n, MOST, 4], ``labels`` [n, MOST], ``counts`` [n].

    What is beyond a scene's count is padding: boxes of 0 and labels of -1.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    counts: Tensor


def scenes(count: int, rng: np.random.Generator) -> Scenes:
    """So many scenes of 1 to `MOST` objects, 6 to 14 pixels wide and high, that hide each other little.

    A scene has fewer objects than were drawn for it where no place is left after a few tries.
    """
    images = rng.normal(0, 0.12, (count, SIZE, SIZE, 3)) + rng.uniform(-0.3, 0.3, (count, 1, 1, 3))
    boxes, labels = torch.zeros(count, MOST, 4), torch.full((count, MOST), -1)
    counts = torch.zeros(count, dtype=torch.long)
    for row in range(count):
        for box in _places(int(rng.integers(1, MOST + 1)), rng):
            label, place = int(rng.integers(CLASSES)), int(counts[row])
            colour = 2 * COLOURS[rng.integers(len(COLOURS))] - 1 + rng.normal(0, 0.08, 3)
            inside = object_mask(box, label)
            images[row][inside] = colour + rng.normal(0, 0.06, (int(inside.sum()), 3))
            boxes[row, place], labels[row, place] = torch.from_numpy(box / SIZE).float(), label
            counts[row] += 1
    return Scenes(torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous(), boxes, labels, counts)


def _places(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Boxes in pixels (centre and size), with edges on pixel edges; two share a tenth of the smaller one at most."""
    found: list[np.ndarray] = []
    for _ in range(6 * count):
        size = rng.integers(6, 15, 2)
        corner = rng.integers(0, SIZE - size + 1)
        box = np.concatenate([corner + size / 2, size])
        if all(_shared(box, other) <= 0.1 for other in found):
            found.append(box)
        if len(found) == count:
            break
    return found


def _shared(box: np.ndarray, other: np.ndarray) -> float:
    """The intersection of two boxes as a part of the smaller one."""
    sides = (box[2:] + other[2:]) / 2 - abs(box[:2] - other[:2])
    common = np.minimum(np.maximum(sides, 0), np.minimum(box[2:], other[2:])).prod()
    return float(common / min(box[2:].prod(), other[2:].prod()))


def object_mask(box: np.ndarray, label: int) -> np.ndarray:
    """The pixels [SIZE, SIZE] of an object: its middle lies in the box, or in the ellipse that the box bounds."""
    middle = np.arange(SIZE) + 0.5
    x, y = (middle[None, :] - box[0]) / (box[2] / 2), (middle[:, None] - box[1]) / (box[3] / 2)
    inside = x**2 + y**2 <= 1 if label == ELLIPSE else (abs(x) <= 1) & (abs(y) <= 1)
    return np.asarray(inside)
