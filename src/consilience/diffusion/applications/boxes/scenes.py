"""Generated scenes: rectangles and ellipses on a textured ground with lines and blobs that are no objects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 48
MOST = 8
SIDES = (5, 20)
CLUTTER = 4
RECTANGLE, ELLIPSE = 0, 1
CLASSES = 2


class Scenes(NamedTuple):
    """``images`` [n, 3, SIZE, SIZE] about 0; ``boxes`` [n, MOST, 4], ``labels`` [n, MOST], ``counts`` [n].

    What is beyond a scene's count is padding: boxes of 0 and labels of -1.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    counts: Tensor


def scenes(count: int, rng: np.random.Generator) -> Scenes:
    """So many scenes of 1 to `MOST` objects with sides within `SIDES` in pixels, that hide each other little.

    A scene has fewer objects than were drawn for it where no place is left after a few tries.
    """
    images = np.stack([_ground(rng) for _ in range(count)])
    boxes, labels = torch.zeros(count, MOST, 4), torch.full((count, MOST), -1)
    counts = torch.zeros(count, dtype=torch.long)
    for row in range(count):
        for box in _places(int(rng.integers(1, MOST + 1)), rng):
            label, place = int(rng.integers(CLASSES)), int(counts[row])
            inside = object_mask(box, label)
            images[row][inside] = _colour(rng) + rng.normal(0, 0.08, (int(inside.sum()), 3))
            boxes[row, place], labels[row, place] = torch.from_numpy(box / SIZE).float(), label
            counts[row] += 1
    return Scenes(torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous(), boxes, labels, counts)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A direction of colour, 0.5 to 1 long."""
    found = rng.normal(size=3)
    return np.asarray(found / np.linalg.norm(found) * rng.uniform(0.5, 1.0))


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Waves and noise, and four lines and four soft blobs of the colours that objects have."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    turns, phase = rng.normal(0, 3, 2), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * (turns[0] * x + turns[1] * y) + phase)
    image = rng.normal(0, 0.12, (SIZE, SIZE, 3)) + rng.uniform(-0.2, 0.2, 3)
    image += wave[..., None] * rng.uniform(-0.15, 0.15, 3)
    for _ in range(CLUTTER):
        begin, end = rng.uniform(0, SIZE, (2, 2))
        row, column = (begin + (end - begin) * np.linspace(0, 1, 2 * SIZE)[:, None]).astype(int).T
        image[row, column] = _colour(rng)
        centre, width = rng.uniform(0, 1, 2), rng.uniform(0.02, 0.06)
        share = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * width**2))[..., None]
        image = image * (1 - share) + share * _colour(rng)
    return np.asarray(image)


def _places(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Boxes in pixels (centre and size), with edges on pixel edges; two share a tenth of the smaller one at most."""
    found: list[np.ndarray] = []
    for _ in range(6 * count):
        size = rng.integers(SIDES[0], SIDES[1] + 1, 2)
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
