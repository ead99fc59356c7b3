"""GUIDE: replay of old classes in continual learning, guided to where the classifier forgets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.potential import potential_guidance
from consilience.diffusion.solve import solve


def rehearsal_guidance(
    model: Denoiser, classifier: Callable[[Tensor], Tensor], recent: Sequence[int], scale: float
) -> Denoiser:
    """score + scale * grad_x log P(c | x0(x, t)), where c is the likeliest of the ``recent`` classes at x0(x, t).

    Samples of an old class, which the model is conditioned on, so move to what ``classifier`` (clean data to logits
    over all classes so far) is about to take for a recent class. Scale 0 is plain generative replay. Source: Cywinski
    et al. 2024, arXiv:2403.03938, by their code (train_util.py, guid_to_new_classes; scale 0.2 to 1).
    """
    if not recent:
        raise ValueError("name at least one recent class to guide to")

    def log_probability(x0: Tensor, _t: Tensor) -> Tensor:
        logits = classifier(x0)
        chosen = torch.tensor(list(recent), device=logits.device)[logits[:, list(recent)].argmax(1)]
        return functional.log_softmax(logits, 1).gather(1, chosen[:, None])[:, 0]

    return potential_guidance(model, log_probability, scale, on="x0")


def rehearsal(
    guided: Denoiser,
    old: Sequence[int],
    per_class: int,
    shape: tuple[int, ...],
    grid_or_count: Tensor | int,
    generator: torch.Generator | None = None,
    condition: str = "labels",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``per_class`` samples of every old class from a class-conditional denoiser, and their labels.

    ``shape`` is that of one sample; the classes go to the denoiser as ``condition``, int64 [batch]. Other options,
    and ``grid_or_count``, are those of `solve`. Returns x [len(old) * per_class, ...] and labels of that length.
    """
    device = torch.device("cpu") if generator is None else generator.device
    labels = torch.tensor(list(old), device=device).repeat_interleave(per_class)
    x = guided.process.prior((len(labels), *shape), generator, device=device)
    every: dict[str, Any] = options | {condition: labels}
    return solve(guided, x, grid_or_count, generator=generator, **every).x, labels
