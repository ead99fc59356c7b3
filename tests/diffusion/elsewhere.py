"""A second device for machines that have none: tensors that say they are elsewhere, and hold real numbers.

Within `elsewhere` torch's device "meta" plays a GPU. Whatever is put there is computed on the CPU, so that every number
is what it would be there; what a GPU refuses is refused here: an operation between tensors of both devices (a 0-d
tensor of the CPU may take part in arithmetic, an index of the CPU may index), a generator of one device that draws on
the other, and an array made of a tensor that lies there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

THERE = torch.device("meta")
aten = torch.ops.aten

CROSSING = (aten._to_copy.default, aten.copy_.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)


class There(Tensor):
    """A tensor that says it is elsewhere; ``inner`` are its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class Generator(torch.Generator):
    """A generator of either device: what `torch.Generator` is within `elsewhere`."""

    where: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        made.where = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.where


_PLAIN = torch.Generator


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carry_out(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Refuses what a generator draws on another device than its own: torch would, were it a real one.

    Lists are made of the numbers, and tensors of lists on the CPU before they move: torch knows no numbers elsewhere.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return args[0].detach().cpu().tolist()
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in index))
        wanted = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and wanted is not None and not isinstance(args[0], Tensor):
            return func(*args, **{**kwargs, "device": "cpu"}).to(wanted)
        found = func(*args, **(kwargs or {}))
        for generator in tree_leaves((args, kwargs or {})):
            if isinstance(generator, _PLAIN) and isinstance(found, Tensor) and generator.device != found.device:
                raise RuntimeError(f"expected a {found.device} generator in {func}, found one of {generator.device}")
        return found


def _carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the numbers, its result where it would be."""
    parts = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    theirs = [part for part in parts if isinstance(part, There)]
    assert all(isinstance(part, There) or part.device != THERE for part in parts), f"{func}: numbers were lost"
    if theirs and len(theirs) < len(parts) and func not in CROSSING:
        _check(func, args, parts)
    if func is aten._efficientzerotensor.default:  # has no numbers
        func = aten.zeros.default
    wanted = kwargs.get("device")
    there = bool(theirs) if wanted is None else torch.device(wanted) == THERE
    if func is aten.copy_.default:
        there = isinstance(args[0], There)
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if not there:
        return found
    known = {id(part.inner): part for part in theirs}

    def placed(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        same = known.get(id(out))
        if same is None:
            return There(out)
        if same.shape != out.shape:  # changed in place
            same.data = There(out)
        return same

    return tree_map(placed, found)


def _inner(part: Any) -> Any:
    if isinstance(part, There):
        return part.inner
    return torch.device("cpu") if isinstance(part, torch.device) and part == THERE else part


def _check(func: Any, args: Any, parts: list[Tensor]) -> None:
    """Raise RuntimeError unless the tensors of the CPU are ones that a GPU takes."""
    others = [part for part in parts if not isinstance(part, There)]
    if func in INDEXING and isinstance(args[0], There):
        others = [part for part in args[2:3] if not isinstance(part, There)]
        scalars = True
    else:
        scalars = torch.Tag.pointwise in func.tags
    if any(part.ndim > 0 or not scalars for part in others):
        shapes = [tuple(part.shape) for part in others]
        raise RuntimeError(f"expected all tensors on one device: {func} got one elsewhere, and {shapes} on the CPU")


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While it is open, the device given has numbers."""
    with _Calls(), _Operations(), mock.patch.object(torch, "Generator", Generator):
        yield THERE


def numbers(found: Any) -> Any:
    """Tensors of either device, in any nest of containers, as plain ones of the CPU."""
    return tree_map(lambda part: part.detach().cpu() if isinstance(part, Tensor) else part, found)
