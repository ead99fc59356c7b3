"""Which data a step sees: a function of the seed and the step alone, so that nothing has to be saved for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Batch = Any
"""A tensor [batch, ...], or a dict, tuple or list of them."""


class Batches:
    """The batches of a run over ``data``.

    ``data`` is a tensor, or a dict or tuple of tensors, of N rows each; a map-style torch Dataset of such items; or a
    function (count, generator) that makes a batch. Rows come in a fresh random order in each epoch, none twice before
    all have come. Raises ValueError for anything else, or where there is no row.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.seed = seed
        self.data = data
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.draws = callable(data) and not hasattr(data, "__getitem__")
        self.length = 0 if self.draws else _length(data)
        if not self.draws and self.length == 0:
            raise ValueError("there are no data to train on")

    def get(self, start: int, count: int, generator: torch.Generator, device: torch.device) -> Batch:
        """``count`` items from place ``start`` in the run's sequence of items."""
        if self.draws:
            return _map(self.data(count, generator), lambda part: part.to(device))
        rows = self.rows(start, count)
        return _map(_take(self.data, rows), lambda part: part.to(device))

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """The row numbers at places ``start`` ... of the sequence: epochs of random order, one after the other."""
        places = np.arange(start, start + count)
        epochs = places // self.length
        found = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            found[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch] % self.length]
        return found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = np.random.default_rng((self.seed, 1, epoch)).permutation(self.length)
        return self._orders[epoch]


def shard_seed(seed: int, step: int, shard: int) -> int:
    """The seed of the noise that a part of a step's batch gets."""
    return int(np.random.SeedSequence((seed, 2, step, shard)).generate_state(1, np.uint64)[0])


def _length(data: Any) -> int:
    if isinstance(data, Mapping | tuple | list):
        parts = list(data.values()) if isinstance(data, Mapping) else list(data)
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise ValueError("data must be tensors, a Dataset with a length, or a function (count, generator)")
        lengths = {len(part) for part in parts}
        if len(lengths) > 1:
            raise ValueError(f"the tensors of the data must have equally many rows, they have {sorted(lengths)}")
        return lengths.pop()
    if isinstance(data, Tensor) or (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return len(data)
    raise ValueError(f"data must be tensors, a Dataset with a length, or a function, got {type(data).__name__}")


def _take(data: Any, rows: NDArray[np.int64]) -> Batch:
    if isinstance(data, Tensor | Mapping | tuple | list):
        index = torch.from_numpy(rows)
        return _map(data, lambda part: part[index.to(part.device)])
    if hasattr(data, "__getitems__"):
        items = data.__getitems__(rows.tolist())
        if isinstance(items, Tensor):
            return items
    else:
        items = [data[int(row)] for row in rows]
    return torch.utils.data.default_collate(items)


def _map(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _map(part, change) for name, part in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return type(batch)(_map(part, change) for part in batch)  # type: ignore[call-arg]
    return batch
