"""The losses of CoMoSpeech: teacher, student by consistency distillation, and the regression they are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from consilience.diffusion.applications.speech.model import (
    PROCESS,
    SIGMA_DATA,
    Decoder,
    Voice,
    speech_denoiser,
    speech_map,
)
from consilience.diffusion.consistency.objectives.cm import cm
from consilience.diffusion.consistency.samplers import multistep
from consilience.diffusion.consistency.shared import Result
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.grids import karras_grid
from consilience.diffusion.losses import denoising_loss, edm_weight, lognormal_times
from consilience.diffusion.solve import solve
from consilience.diffusion.training.trainer import Context

Batch = Mapping[str, Tensor]


def prior_loss(mean: Tensor, x: Tensor) -> Tensor:
    """Minus the log density of x, per value, under a normal law about the mean (Grad-TTS, arXiv:2105.06337)."""
    return 0.5 * ((x - mean).square() + math.log(2 * math.pi)).mean()


def teacher_loss(voice: Voice, batch: Batch, generator: torch.Generator) -> Result:
    """EDM's denoising loss and the prior loss, with the gradient of both in the encoder."""
    mean = voice.encoder(batch["score"])
    prior = prior_loss(mean, batch["x"])
    shown = {"x": batch["x"], "mean": mean}
    weight = edm_weight(SIGMA_DATA)
    loss = denoising_loss(speech_denoiser(voice.decoder), shown, generator, times=lognormal_times(), weight=weight)
    return loss + prior, {"diffusion": float(loss.detach()), "prior": float(prior.detach())}


def student_loss(teacher: Denoiser, levels: int) -> Callable[..., Result]:
    """Consistency distillation from a teacher on ``levels`` Karras levels, towards the trainer's first average.

    The batch holds spectrograms ``x`` and the frozen encoder's ``mean``. The published code has 50 levels, an average
    of rate 0.95, the squared distance and Euler steps (Heun steps were added to it later, and are taken here).
    """

    def loss(decoder: nn.Module, batch: Batch, generator: torch.Generator, context: Context) -> Result:
        target = None if context.ema is None else speech_map(context.ema)
        return cm(speech_map(decoder), teacher, batch, generator, target=target, levels=levels)

    return loss


def regression_loss(voice: Voice, batch: Batch, generator: torch.Generator) -> Tensor:
    """The squared error of `regressed`: the network of the teacher, taught to predict the spectrogram at once."""
    return (regressed(voice, batch["score"]) - batch["x"]).square().mean()


def regressed(voice: Voice, score: Tensor) -> Tensor:
    """The spectrogram [batch, bands, frames] that the regression predicts from scores: one, whatever the noise."""
    mean = voice.encoder(score)
    out: Tensor = mean + SIGMA_DATA * voice.decoder(torch.zeros_like(mean), mean.new_zeros(len(mean)), mean)
    return out


@torch.no_grad()
def taught(decoder: Decoder, mean: Tensor, noise: Tensor, evaluations: int) -> Tensor:
    """The teacher's spectrograms from normal ``noise`` [batch, bands, frames] by so many Euler steps."""
    start = noise * PROCESS.sigma_max
    found: Tensor = solve(speech_denoiser(decoder), start, _grid(evaluations), "euler", mean=mean).x
    return found


@torch.no_grad()
def spoken(
    decoder: Decoder, mean: Tensor, noise: Tensor, evaluations: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """The student's spectrograms from the same noise, with fresh noise of ``generator`` between its steps."""
    start, least = noise * PROCESS.sigma_max, PROCESS.sigma_min
    grid = _grid(evaluations)
    return multistep(speech_map(decoder), start, grid, sigma_min=least, generator=generator, mean=mean).x


def _grid(evaluations: int) -> Tensor:
    """Karras levels that end at the least noise, where the teacher was trained and the student is the identity."""
    return karras_grid(evaluations + 1, PROCESS.sigma_min, PROCESS.sigma_max)[:-1]
