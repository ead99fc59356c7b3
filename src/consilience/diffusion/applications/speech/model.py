"""The networks: an encoder from scores to mean spectrograms, and a decoder that denoises beside that mean.

The decoder's noise is centred on the encoder's mean, x_t = x0 + t (eps + mean), as in CoMoSpeech. The samplers and
objectives of this package keep y_t = x_t - t mean, which follows plain EDM; `about_mean` translates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from consilience.diffusion.applications.speech.tones import HIGH, LOW, MEL, REST, TIMBRES
from consilience.diffusion.consistency.maps import FlowMap, consistency_map
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.processes import EDM, expand

SIGMA_DATA = 0.5
PROCESS = EDM()


class Encoder(nn.Module):
    """Scores [batch, 4, frames] to mean spectrograms [batch, bands, frames], the durations given by the score."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.pitch = nn.Embedding(HIGH - LOW + 2, width)
        self.timbre = nn.Embedding(len(TIMBRES), width)
        self.place = nn.Linear(2, width)
        self.body = nn.Sequential(
            nn.Conv1d(width, width, 5, padding=2), nn.SiLU(), nn.Conv1d(width, width, 5, padding=2), nn.SiLU()
        )
        self.out = nn.Conv1d(width, MEL.bands, 1)

    def forward(self, score: Tensor) -> Tensor:
        pitch, timbre, since, left = score.unbind(1)
        token = torch.where(pitch == REST, pitch, pitch - LOW + 1)
        place = torch.stack([since, left], -1).to(self.place.weight.dtype)
        h = self.pitch(token) + self.timbre(timbre) + self.place(torch.exp(-place / 3))
        mean: Tensor = self.out(self.body(h.transpose(1, 2)))
        return mean


class Decoder(nn.Module):
    """The raw network F(x, c_noise, mean): x and mean [batch, bands, frames], c_noise [batch]."""

    frequencies: Tensor

    def __init__(self, width: int = 96, dilations: tuple[int, ...] = (1, 2, 4, 8, 1)) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 6) * math.pi)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Conv1d(2 * MEL.bands, width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in dilations)
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv1d(width, MEL.bands, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, mean: Tensor) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.first(torch.cat([x, mean], 1))
        for block in self.blocks:
            h = block(h, time)
        raw: Tensor = self.last(h)
        return raw


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.time = nn.Linear(width, 2 * width)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None].chunk(2, 1)
        h = self.conv(nn.functional.silu(self.norm(x)))
        h = self.second_norm(h) * (1 + scale) + shift
        out: Tensor = x + self.second(nn.functional.silu(h))
        return out


class Voice(nn.Module):
    """Encoder and decoder together: what the teacher's training trains, and the regression it is held against."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(width)


Model = TypeVar("Model", Denoiser, FlowMap)


def about_mean(model: Model) -> Model:
    """A model of x = y + t mean as one of y: both see the same noise levels, and x0 is x0.

    The model takes ``mean`` [batch, ...] as a condition; its process must have alpha = 1, its prediction be x0.
    """
    inner: Callable[..., Tensor] = model.function

    def function(y: Tensor, t: Tensor, *rest: Tensor, mean: Tensor) -> Tensor:
        return inner(y + expand(t, y) * mean, t, *rest, mean=mean)

    return replace(model, function=function)


def speech_map(decoder: Callable[..., Tensor]) -> FlowMap:
    """The decoder as a consistency model of y: with x = y + t mean, f(x, t_min) = x."""
    return about_mean(consistency_map(decoder, PROCESS, SIGMA_DATA))


def speech_denoiser(decoder: Callable[..., Tensor]) -> Denoiser:
    """The same function of the decoder as an x0 model: the teacher has the student's c_skip and c_out."""
    model = consistency_map(decoder, PROCESS, SIGMA_DATA)
    return about_mean(Denoiser(lambda x, t, **cond: model.function(x, t, t, **cond), PROCESS, "x0"))
