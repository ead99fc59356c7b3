"""Scikit-learn's handwritten digits, the small networks for images, and the models that ship with the package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.errors import InputError

if TYPE_CHECKING:
    from consilience.diffusion.pipeline import ImagePipeline

HERE = Path(__file__).parent
CLASSES = 10
"""Digits; a network's class number 10 stands for "none"."""
FEW = 4
"""Evaluations up to which a student is the better model."""


def digits() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] in [-1, 1], labels [1797]); raises InputError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise InputError("the digits need scikit-learn: pip install 'consilience[diffusion]'") from error
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(found.target).long()


def network(size: int | tuple[int, int] = 8, channels: int = 1, classes: int | None = CLASSES, width: int = 32) -> Any:
    """A small UNet2DModel of diffusers for images [batch, channels, size, size]; with ``classes`` it takes labels.

    The picture is halved until 4 pixels are left, three times at most, and the two coarsest levels have attention.
    Raises ValueError for a size that cannot be halved so often, or a width that is no multiple of 8.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    sides = (size, size) if isinstance(size, int) else size
    halved = min(3, max(1, math.ceil(math.log2(min(sides) / 4))))
    if any(side % 2**halved for side in sides) or width % 8:
        raise ValueError(f"need sides that are multiples of {2**halved} and a width of 8 k, got {sides} and {width}")
    plain, attention = max(1, halved - 1), halved + 1 - max(1, halved - 1)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, *[2 * width] * halved),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
        num_class_embeds=None if classes is None else classes + 1,
    )


def transformer(size: int = 8, channels: int = 1, classes: int | None = CLASSES, width: int = 32) -> Any:
    """A small DiTTransformer2DModel of diffusers in pixel space, patches of 2 x 2; its last class stands for "none".

    Raises ValueError for an odd size. Without ``classes`` there is one class that is always named.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    if size % 2 or width % 4:
        raise ValueError(f"need an even size and a width that is a multiple of 4, got {size} and {width}")
    made = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4 * 2,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=classes or 1,
    )
    return keeping_labels(made)


def keeping_labels(network: Any) -> Any:
    """The network, of which no part drops labels in training: a DiT's blocks would, each by itself, at random.

    Ours are dropped once, before they are shown.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for part in network.modules():
        if isinstance(part, LabelEmbedding):
            part.dropout_prob = 0.0
    return network


def shipped(evaluations: int) -> Path:
    """The folder of the model for so many evaluations: a student, where there is one, for a few, else the teacher."""
    student = HERE / "student"
    return student if evaluations <= FEW and student.is_dir() else HERE / "teacher"


def teacher() -> ImagePipeline:
    """The flow model of the digits that ships with the package, with classes."""
    from consilience.diffusion.pipeline import load

    return load(HERE / "teacher")
