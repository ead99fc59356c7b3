"""Classifier-free guidance: go from the unconditional prediction to the conditional one, and on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.wrapping import Function, on_process_of, wrap
from consilience.diffusion.processes import expand


def classifier_free(model: Denoiser, scale: float, unconditional: Denoiser | Mapping[str, Any]) -> Denoiser:
    """D = D_uncond + scale (D_cond - D_uncond): scale 0 is unconditional, 1 conditional, more is guidance.

    ``unconditional`` is a denoiser of its own, or what replaces the condition in the second call of ``model``
    (``{"labels": 10}``, see `with_condition`). The paper's w is scale - 1 (Ho and Salimans, arXiv:2207.12598, eq. 6).
    Two evaluations per call, one at scales 0 and 1.
    """
    other = unconditional if isinstance(unconditional, Denoiser) else with_condition(model, unconditional)
    return extrapolate(model, other, scale)


def extrapolate(strong: Denoiser, weak: Denoiser, scale: float | Tensor) -> Denoiser:
    """weak + scale (strong - weak), the same in every prediction; ``scale`` is one number or [batch].

    Scales 0 and 1 give ``weak`` and ``strong`` themselves.
    """
    weak = on_process_of(strong, weak)
    if not isinstance(scale, Tensor) and scale in (0, 1):
        return strong if scale == 1 else weak

    def build(strong: Denoiser, weak: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            base = weak.predict(strong.prediction, x, t, **cond)
            by = expand(scale.to(x), x) if isinstance(scale, Tensor) else scale
            return base + by * (strong.function(x, t, **cond) - base)

        return function

    return wrap(build, strong, weak)


def with_condition(model: Denoiser, condition: Mapping[str, Any]) -> Denoiser:
    """The model with these conditions in place of, or beside, those it is called with.

    A number, or a tensor that broadcasts, is spread to the shape of the tensor it replaces.
    """

    def build(model: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            new = {name: _like(value, cond.get(name)) for name, value in condition.items()}
            return model.function(x, t, **(cond | new))

        return function

    return wrap(build, model)


def _like(value: Any, given: Any) -> Any:
    if not isinstance(given, Tensor):
        return value
    if isinstance(value, Tensor):
        return value.to(given.device).expand_as(given)
    return torch.full_like(given, value) if isinstance(value, int | float) else value
