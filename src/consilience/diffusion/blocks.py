"""Networks with blocks left out: a residual block that is skipped hands on what goes past it, and costs nothing.

What AutoDiffusion (Li et al., arXiv:2309.10438) searches over beside the timesteps, without any training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.guidance.wrapping import Function, wrap


def skippable(network: nn.Module) -> tuple[str, ...]:
    """The names of the residual blocks of a diffusers network that can be left out.

    Convolution and attention blocks of a UNet, transformer blocks of a DiT.
    """
    return tuple(name for name, module in network.named_modules() if _shortcut(module) is not None)


@contextmanager
def skipped(network: nn.Module, blocks: Collection[str]) -> Iterator[None]:
    """Within this context the network runs without these blocks; raises ValueError for one that cannot be left out."""
    modules, held = [], dict(network.named_modules()) if blocks else {}
    for name in dict.fromkeys(blocks):
        module = held.get(name)
        shortcut = None if module is None else _shortcut(module)
        if module is None or shortcut is None:
            raise ValueError(f"no block {name!r} to leave out; there are: {', '.join(skippable(network))}")
        modules.append((module, shortcut, vars(module).get("forward")))
    for module, shortcut, _ in modules:
        module.forward = partial(shortcut, module)
    try:
        yield
    finally:
        for module, _, own in modules:
            del module.forward
            if own is not None:  # a hook's, or that of a context around this one
                module.forward = own


def shares(network: nn.Module, call: Callable[[], Any]) -> dict[str, float]:
    """Each block's share of the multiplications and additions of an evaluation, by name; ``call`` makes one."""
    whole = _operations(call)
    found = {}
    for name in skippable(network):
        with skipped(network, (name,)):
            found[name] = 1 - _operations(call) / whole
    return found


def skip_blocks(model: Denoiser, network: nn.Module, times: Tensor, skips: Sequence[Collection[str]]) -> Denoiser:
    """The model, a `Denoiser` of ``network``, that leaves out the blocks ``skips[i]`` at times nearest to ``times[i]``.

    An evaluation still counts as one: see `shares` for what it costs. All samples of a call stand at one time. Raises
    ValueError where there are not as many times as sets, or a block cannot be left out.
    """
    at = times.detach().double().cpu()
    if len(at) != len(skips) or not len(at):
        raise ValueError(f"need a set of blocks for each of the {len(at)} times, got {len(skips)}")
    for blocks in skips:
        with skipped(network, blocks):
            pass

    def build(model: Denoiser) -> Function:
        def function(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            nearest = int((at - float(t.reshape(-1)[0])).abs().argmin())
            with skipped(network, skips[nearest]):
                return model.function(x, t, **cond)

        return function

    return wrap(build, model)


def _operations(call: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _shortcut(module: nn.Module) -> Callable[..., Tensor] | None:
    """What a block does when its residual branch gives zero; None for what is no residual block."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(module, ResnetBlock2D):
        return _past_convolutions
    if isinstance(module, Attention) and module.residual_connection:
        return _past_attention
    return _unchanged if isinstance(module, BasicTransformerBlock) else None


def _past_convolutions(block: Any, input_tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """The input, resampled and projected as the block does."""
    for part in (block.upsample, block.downsample, block.conv_shortcut):
        input_tensor = input_tensor if part is None else part(input_tensor)
    return input_tensor / block.output_scale_factor


def _past_attention(block: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    past: Tensor = hidden_states / block.rescale_output_factor
    return past


def _unchanged(_: Any, hidden_states: Tensor, *__: Any, **___: Any) -> Tensor:
    return hidden_states
