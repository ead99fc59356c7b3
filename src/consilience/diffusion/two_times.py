"""A UNet of diffusers that is told two times: where the state stands, and where to land."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

__all__ = ["ModelMixin", "TwoTimeUNet2DModel"]  # diffusers' pipelines look for the kind of a class in its module


class TwoTimeUNet2DModel(UNet2DModel):
    """A `UNet2DModel` for flow maps: its ``timestep`` may have two rows, [2, batch] or [2, 1].

    The first is the time of the state, as the plain network takes it; the second says where to land and is 0 at the
    data (`huggingface.Trained.timesteps`). A timestep of one row, or a number, asks for the data. The embedding of the
    second time starts at zero, so that a model made `of` a plain one starts as that. Its configuration is that of a
    `UNet2DModel`. Raises ValueError for another time embedding than the sinusoidal one.
    """

    @functools.wraps(UNet2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config["time_embedding_type"] != "positional" or self.config["class_embed_type"] == "timestep":
            raise ValueError("a network of two times needs the sinusoidal time embedding, for its time alone")
        first, embedding = cast(Any, self.time_proj), cast(Any, self.time_embedding)
        rows: Any = _Rows(first, Timesteps(first.num_channels, True, 0))
        self.time_proj = rows
        self.time_embedding = _Sum(embedding.linear_1.in_features, embedding.linear_1.out_features)

    @classmethod
    def of(cls, network: UNet2DModel) -> TwoTimeUNet2DModel:
        """One that gives what ``network`` does, wherever it is to land."""
        made = cast(TwoTimeUNet2DModel, cls.from_config(network.config))
        own = made.state_dict()
        made.load_state_dict(own | network.state_dict())
        return made


class _Rows(nn.Module):
    """The features of one row of times, or of two side by side: [batch, 2 channels]."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, times: Tensor) -> Tensor:
        t, s = times if times.ndim == 2 else (times, torch.zeros_like(times))
        return torch.cat([self.first(t), self.second(s)], 1)


class _Sum(TimestepEmbedding):
    """The embedding of the first time, and one of the second that starts at zero."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__(channels, size)
        self.second = TimestepEmbedding(channels, size)
        nn.init.zeros_(self.second.linear_2.weight)
        nn.init.zeros_(self.second.linear_2.bias)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        t, s = sample.chunk(2, 1)
        found: Tensor = super().forward(t, condition) + self.second(s)
        return found
