"""MNIST and CIFAR-10 from the files that they are published in: idx, binary records, and archives of pictures.

The name starts with an underscore so that `make bench` does not take it for a benchmark.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from consilience.diffusion.pictures import Images
from consilience.errors import InputError

WHERE = {
    "mnist": "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, and for more data the two files of train-, are "
    "at http://yann.lecun.com/exdb/mnist and https://ossci-datasets.s3.amazonaws.com/mnist",
    "cifar10": "cifar-10-binary.tar.gz is at https://www.cs.toronto.edu/~kriz/cifar.html; two archives of pictures "
    "train/CLASS/*.jpg and test/CLASS/*.jpg, with train and test in their names, do as well",
}
KEPT = 0.2
"""The share of the images that is kept back where there is one set alone."""
CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Sets:
    """Images to train on, and images kept back to compare with."""

    train: Images
    kept: Images


def read_sets(folder: Path, dataset: str, side: int) -> Sets:
    """The images of ``side`` x ``side`` pixels; raises InputError where the files are not there or not what they say.

    Without MNIST's training files a fifth of the test images, drawn at random, is kept back and the rest trained on.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; the files of {dataset} are expected in it: {WHERE[dataset]}")
    found = _mnist(folder) if dataset == "mnist" else _cifar10(folder)
    train, kept = (_resized(found[name], side) if name in found else None for name in ("train", "test"))
    if kept is None:
        raise InputError(f"{folder}: no test images of {dataset} in it; {WHERE[dataset]}")
    if train is not None:
        return Sets(train, kept)
    order = torch.randperm(len(kept.x), generator=torch.Generator().manual_seed(0))
    count = round(KEPT * len(order))
    return Sets(_rows(kept, order[count:]), _rows(kept, order[:count]))


def _rows(images: Images, rows: Tensor) -> Images:
    assert images.labels is not None
    return Images(images.x[rows], images.labels[rows], images.source)


def _resized(images: Images, side: int) -> Images:
    """Whole blocks of pixels averaged until ``side`` is not exceeded, then a frame of the darkest value."""
    x = images.x
    x = functional.avg_pool2d(x, -(-x.shape[-1] // side))
    frame = side - x.shape[-1]
    before, after = frame // 2, frame - frame // 2
    return Images(functional.pad(x, (before, after, before, after), value=-1.0), images.labels, images.source)


# ------------------------------------------------------------------------------------------------------------- MNIST


def _mnist(folder: Path) -> dict[str, Images]:
    found = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        paths = [_only(folder, f"*{prefix}-{kind}*ubyte*") for kind in ("images", "labels")]
        if paths[0] is not None and paths[1] is not None:
            pixels, labels = idx(paths[0]), idx(paths[1])
            if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
                raise InputError(f"{paths[0]}: {pixels.shape} beside labels {labels.shape}; expected [n, h, w] and [n]")
            found[name] = _images(pixels[:, None], labels, f"MNIST {prefix}")
    return found


def idx(path: Path) -> np.ndarray:
    """The array of bytes in an idx file, gzipped or not: two zeros, the type, how many dimensions, these, the data."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
    except (OSError, EOFError, struct.error) as error:
        raise InputError(f"{path}: not an idx file that can be read ({error})") from error
    start = 4 + 4 * dimensions
    if zeros != 0 or kind != 8 or len(content) - start != int(np.prod(shape)):
        raise InputError(f"{path}: not an idx file of bytes, or cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


def _cifar10(folder: Path) -> dict[str, Images]:
    binary = _only(folder, "cifar-10-binary.tar*")
    if binary is not None:
        return _records(binary)
    found = {}
    for name in ("train", "test"):
        archive = _only(folder, f"*cifar10*{name}*.tar*")
        if archive is not None:
            found[name] = _pictures(archive, name)
    return found


def _records(archive: Path) -> dict[str, Images]:
    """Records of a label and 3 x 32 x 32 bytes: five files to train on, one to test on."""
    parts: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for member, content in _members(archive, (".bin",)):
        rows = np.frombuffer(content, np.uint8)
        if len(rows) % CIFAR_RECORD:
            raise InputError(f"{archive}: {member.name} has not records of {CIFAR_RECORD} bytes")
        parts["test" if "test" in member.name else "train"].append(rows.reshape(-1, CIFAR_RECORD))
    held = {name: np.concatenate(rows) for name, rows in parts.items() if rows}
    return {
        name: _images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0], f"CIFAR-10 {name}") for name, rows in held.items()
    }


def _pictures(archive: Path, name: str) -> Images:
    """Pictures in a folder for each class, in the order of the alphabet."""
    from PIL import Image

    pixels, classes = [], []
    for member, content in _members(archive, (".jpg", ".jpeg", ".png")):
        try:
            with Image.open(io.BytesIO(content)) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise InputError(f"{archive}: {member.name} is not a picture that can be read ({error})") from error
        classes.append(member.parent.name)
    if len({one.shape for one in pixels}) != 1:
        raise InputError(f"{archive}: no pictures, or pictures of several sizes")
    numbers = {one: number for number, one in enumerate(sorted(set(classes)))}
    x = np.stack(pixels).transpose(0, 3, 1, 2)
    return _images(x, np.array([numbers[one] for one in classes]), f"CIFAR-10 {name}, as pictures")


def _members(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Names and contents of the files with these endings, read in memory and never unpacked."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                file = tar.extractfile(member) if member.isfile() and path.suffix.lower() in suffixes else None
                if file is not None:
                    yield path, file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{archive}: not an archive that can be read ({error})") from error


# ------------------------------------------------------------------------------------------------------------ common


def _images(pixels: np.ndarray, labels: np.ndarray, source: str) -> Images:
    x = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return Images(x, torch.from_numpy(labels.astype(np.int64)), source)


def _only(folder: Path, pattern: str) -> Path | None:
    """The one file of this name; None where there is none. Raises InputError where there are several."""
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise InputError(f"{folder}: {found[0].name} and {found[1].name}: leave one of them there")
    return found[0] if found else None
