"""Image sets from folders and arrays, and pictures of images: grids and trajectories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.errors import InputError
from consilience.record import replacing

SUFFIXES = (".png", ".jpg", ".jpeg")
_SHOWN = 64  # pixels of an image's side in a grid, at least


@dataclass(frozen=True, slots=True)
class Images:
    """``x`` [n, channels, height, width] in [-1, 1], ``labels`` [n] from 0 on or None, and what they are."""

    x: Tensor
    labels: Tensor | None
    source: str

    @property
    def classes(self) -> int | None:
        """How many classes there are; None without labels."""
        return None if self.labels is None else int(self.labels.max()) + 1


# ------------------------------------------------------------------------------------------------------------ reading


def read(source: str | Path) -> Images:
    """Images from ``digits``, a folder of PNG or JPEG files (sub-folders are classes), or an .npz or .pt file.

    A file holds ``images`` [n, h, w], [n, h, w, c] or [n, c, h, w], whole numbers from 0 to 255 or floats in [0, 1] or
    [-1, 1], and perhaps ``labels`` [n]; a .pt file may be the tensor itself. Raises InputError for anything else.
    """
    if str(source) == "digits":
        from consilience.diffusion.digits import digits

        x, labels = digits()
        return Images(x, labels, "scikit-learn's digits")
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise InputError(f"{path}: not found; expected a folder of images, an .npz or a .pt file, or digits")
    if path.suffix not in (".npz", ".pt"):
        raise InputError(f"{path}: expected a folder of images, an .npz or a .pt file")
    images, labels = _arrays(path)
    return Images(_scaled(_channels_first(images, path), path), _labels(labels, len(images), path), path.name)


def _folder(path: Path) -> Images:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in it")
    parents = sorted({file.parent for file in files})
    if len(parents) > 1 and path in parents:
        raise InputError(f"{path}: images both in the folder and in sub-folders; sub-folders are classes")
    first, pictures = None, []
    for file in files:
        picture = _picture(file)
        first = picture.shape if first is None else first
        if picture.shape != first:
            raise InputError(f"{file}: {_size(picture.shape)}, but {files[0].name} is {_size(first)}; make all alike")
        pictures.append(picture)
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor([parents.index(file.parent) for file in files]) if len(parents) > 1 else None
    return Images(x, labels, path.name)


def _picture(file: Path) -> np.ndarray:
    """[height, width, 1 or 3], uint8."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            grey = image.mode in ("1", "L")
            found = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file}: not an image that can be read ({error})") from error
    return found[:, :, None] if grey else found


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels of {'RGB' if shape[2] == 3 else 'grey'}"


def _arrays(path: Path) -> tuple[Tensor, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                held = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype.kind in "iufb"}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
            held = {"images": found} if isinstance(found, Tensor) else dict(found)
    except Exception as error:  # zipfile, pickle and torch raise many kinds for a damaged file
        # their texts are left out: they advise to read the file in a way that runs code in it
        reason = getattr(error, "strerror", None) or type(error).__name__
        writer = "numpy.savez" if path.suffix == ".npz" else "torch.save"
        raise InputError(
            f"{path}: cannot be read ({reason}); expected arrays alone, as {writer} writes them"
        ) from error
    if not isinstance(held.get("images"), Tensor):
        raise InputError(f"{path}: no array `images` in it; there are: {', '.join(map(str, held)) or 'none'}")
    return held["images"], held.get("labels")


def _channels_first(images: Tensor, path: Path) -> Tensor:
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.permute(0, 3, 1, 2)
    raise InputError(f"{path}: images of shape {tuple(images.shape)}; expected [n, h, w], [n, h, w, c] or [n, c, h, w]")


def _scaled(images: Tensor, path: Path) -> Tensor:
    if len(images) < 2 or not bool(torch.isfinite(images.float()).all()):
        raise InputError(f"{path}: fewer than two images, or values that are not finite")
    low, high = float(images.min()), float(images.max())
    if not images.is_floating_point() and low >= 0 and high <= 255:
        return images.float() / 127.5 - 1
    if images.is_floating_point() and low >= -1 and high <= 1:
        return images.float() * 2 - 1 if low >= 0 else images.float()
    raise InputError(f"{path}: values from {low:g} to {high:g}; expected whole 0-255, or floats in [0, 1] or [-1, 1]")


def _labels(labels: Any, count: int, path: Path) -> Tensor | None:
    if labels is None:
        return None
    found = torch.as_tensor(labels)
    if found.shape != (count,) or found.is_floating_point() or int(found.min()) < 0:
        raise InputError(f"{path}: labels must be {count} whole numbers from 0 on, got shape {tuple(found.shape)}")
    return found.long()


# ------------------------------------------------------------------------------------------------------------ writing


def grid(x: Tensor, columns: int | None = None) -> Any:
    """A PIL picture of images [n, 1 or 3, height, width] in [-1, 1], row by row, small ones enlarged in whole pixels.

    Raises ValueError for another number of channels.
    """
    from PIL import Image

    count, channels, height, width = x.shape
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 or 3 channels, these images have {channels}")
    columns = columns or math.ceil(math.sqrt(count))
    rows, scale = math.ceil(count / columns), max(1, _SHOWN // max(height, width))
    if scale * max(height, width) * max(rows, columns) > 4096:
        scale = 1
    gap = max(1, scale // 2)
    shown = ((x.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    shown = shown.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    high, wide = height * scale, width * scale
    page = torch.full((channels, rows * (high + gap) + gap, columns * (wide + gap) + gap), 128, dtype=torch.uint8)
    for i, image in enumerate(shown):
        top, left = i // columns * (high + gap) + gap, i % columns * (wide + gap) + gap
        page[:, top : top + high, left : left + wide] = image
    array = page.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if channels == 1 else array)


def strip(states: Sequence[Tensor], scales: Sequence[float]) -> Any:
    """A picture of a trajectory: a row per image, a column per state [n, c, h, w], each divided by its scale."""
    shown = torch.stack([state.float() / scale for state, scale in zip(states, scales, strict=True)], 1)
    return grid(shown.flatten(0, 1), len(states))


def save(picture: Any, path: Path) -> None:
    """Write a PNG beside ``path``, then rename it; raises InputError where that cannot be."""
    with replacing(path) as file:
        picture.save(file, format="PNG")
