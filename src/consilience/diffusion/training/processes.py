"""The processes of one run, started by ``accelerate launch`` or torchrun: averaged gradients, one state, one writer.

The model is not wrapped: gradients are averaged once per step, after the last backward pass. A loss may so call the
model as often and in whatever way it likes, forward-mode derivatives included.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class Processes:
    """This process among those of the run; ``device`` is where it computes, by default the one accelerate chose."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        from accelerate import PartialState  # type: ignore[import-untyped]

        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        cpu = "cpu" in str(device) or (several and not torch.cuda.is_available())
        self._state = PartialState(cpu=cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
        self.count = int(self._state.num_processes)
        self.index = int(self._state.process_index)
        self.main = bool(self._state.is_main_process)
        self.device = torch.device(self._state.device if device is None else device)

    def same(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first."""
        from accelerate.utils import broadcast  # type: ignore[import-untyped]

        if self.count > 1:
            with torch.no_grad():
                for part in [*module.parameters(), *module.buffers()]:
                    part.copy_(broadcast(part.detach().clone(), from_process=0))

    def average_gradients(self, parameters: Sequence[nn.Parameter], flag: bool) -> bool:
        """Replace every gradient by its mean over the processes; returns whether ``flag`` was set in any of them."""
        if self.count == 1:
            return flag
        has = torch.tensor([p.grad is not None for p in parameters] + [flag], device=self.device).float()
        has = self._mean(has)
        kinds = {p.dtype for p in parameters}
        for kind in sorted(kinds, key=str):  # the same order everywhere
            used = [p for p, any_has in zip(parameters, has, strict=False) if any_has > 0 and p.dtype == kind]
            if not used:
                continue
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
            mean = self._mean(torch.cat([grad.flatten() for grad in grads]))
            for parameter, part in zip(used, torch.split(mean, [p.numel() for p in used]), strict=True):
                parameter.grad = part.view_as(parameter).clone()
        return bool(has[-1] > 0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        return values if self.count == 1 else self._mean(values)

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, in the order of the processes."""
        from accelerate.utils import gather_object

        return [value] if self.count == 1 else list(gather_object([value]))

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def _mean(self, values: Tensor) -> Tensor:
        from accelerate.utils import reduce

        return cast(Tensor, reduce(values, "mean"))
