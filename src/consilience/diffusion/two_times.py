"""Networks of diffusers that are told two times: where the state stands, and where to land."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

# diffusers' pipelines look for the kind of a class in its module
__all__ = ["ModelMixin", "TwoTimeDiTTransformer2DModel", "TwoTimeUNet2DModel", "two_times_of"]


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
        self.time_proj, self.time_embedding = _both(self.time_proj, self.time_embedding)

    @classmethod
    def of(cls, network: UNet2DModel) -> TwoTimeUNet2DModel:
        """One that gives what ``network`` does, wherever it is to land."""
        return cast(TwoTimeUNet2DModel, _made(cls, network))


class TwoTimeDiTTransformer2DModel(DiTTransformer2DModel):
    """A `DiTTransformer2DModel` for flow maps, told its two times as `TwoTimeUNet2DModel` is.

    The second time enters, with an embedding that starts at zero, wherever the first does: in every block.
    """

    @functools.wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            told = cast(Any, block).norm1.emb
            told.time_proj, told.timestep_embedder = _both(told.time_proj, told.timestep_embedder)

    @classmethod
    def of(cls, network: DiTTransformer2DModel) -> TwoTimeDiTTransformer2DModel:
        """One that gives what ``network`` does, wherever it is to land."""
        return cast(TwoTimeDiTTransformer2DModel, _made(cls, network))


def two_times_of(network: Any) -> Any:
    """The network of two times that gives what ``network`` does; raises ValueError where there is no such kind."""
    kinds: dict[str, Any] = {"UNet2DModel": TwoTimeUNet2DModel, "DiTTransformer2DModel": TwoTimeDiTTransformer2DModel}
    kind = kinds.get(type(network).__name__)
    if kind is None:
        raise ValueError(f"a {type(network).__name__} cannot be told two times here; expected a {' or a '.join(kinds)}")
    return kind.of(network)


def _made(kind: Any, network: Any) -> Any:
    made = kind.from_config(network.config)
    made.load_state_dict(made.state_dict() | network.state_dict())
    return made


def _both(features: Any, embedding: Any) -> tuple[Any, Any]:
    """Features and embedding of two times for those of one."""
    sizes = embedding.linear_1.in_features, embedding.linear_1.out_features
    return _Rows(features, Timesteps(features.num_channels, True, 0)), _Sum(*sizes)


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
