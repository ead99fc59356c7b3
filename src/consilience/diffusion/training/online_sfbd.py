"""Online SFBD: train on noisy data and a few clean ones, by data that the model itself denoises again and again.

SFBD (Lu et al., arXiv:2502.05446) denoises the noisy data with the model, trains on the result, and starts over. Its
continuous form (arXiv:2506.02371) keeps a pool of denoised data of which a small part is renewed every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.grids import karras_grid
from consilience.diffusion.processes import EDM, standard_normal


@torch.no_grad()
def backward(model: Denoiser, x: Tensor, sigma: float, evaluations: int, generator: torch.Generator) -> Tensor:
    """Draw from what x0 may have been, given x = x0 + sigma eps: x [batch, ...].

    The reverse SDE of the variance-exploding process from ``sigma`` to 0, in ancestral steps on Karras' grid. Raises
    ValueError unless sigma > 0 and evaluations >= 1.
    """
    model = model.on(EDM())
    grid = karras_grid(evaluations, min(0.002, sigma / 2), sigma)
    if evaluations == 1:
        grid = torch.tensor([sigma, 0.0], dtype=torch.float64)
    for here, there in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        share = (there / here) ** 2
        noise = standard_normal(x.shape, x, generator)
        x0 = model.x0(x, here)
        x = x0 + share * (x - x0) + there * (1 - share) ** 0.5 * noise
    return x


class DenoisedPool:
    """The data of an Online SFBD run: ``clean`` rows as they are, then a denoised copy of each of ``noisy``.

    ``noisy`` [N, ...] are data plus normal noise of standard deviation ``sigma``; ``view(module)`` makes a `Denoiser`
    of the module in training. Pretrain on ``clean``, call `fill` with that model, then
    ``train(model, loss, pool, on_step=pool.on_step)``: after every ``every`` steps the share ``share`` of the pool,
    the longest untouched rows first, is denoised anew with the averaged model. Raises ValueError for shapes, a
    sigma, an interval or a share that cannot be.
    """

    def __init__(
        self,
        clean: Tensor,
        noisy: Tensor,
        sigma: float,
        view: Callable[[nn.Module], Denoiser],
        *,
        every: int = 20,
        share: float = 0.02,
        evaluations: int = 20,
        seed: int = 0,
    ) -> None:
        if clean.shape[1:] != noisy.shape[1:] or len(clean) == 0 or len(noisy) == 0:
            raise ValueError(f"need clean and noisy rows of one shape, got {tuple(clean.shape)}, {tuple(noisy.shape)}")
        if sigma <= 0 or every < 1 or not 0 < share <= 1 or evaluations < 1:
            raise ValueError(
                f"need sigma > 0, every >= 1, 0 < share <= 1, evaluations >= 1; got {sigma}, {every}, {share}"
            )
        self.noisy, self.sigma, self.view, self.every, self.evaluations = noisy, sigma, view, every, evaluations
        self.rows = torch.cat([clean, noisy])
        self._clean, self._count = len(clean), max(1, round(share * len(noisy)))
        self._seed, self._renewed = seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Tensor:
        return self.rows[row]

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        """Many rows at once, [count, ...]."""
        return self.rows[torch.as_tensor(rows)]

    @property
    def denoised(self) -> Tensor:
        """The pool, [N, ...], in the order of the noisy data; noisy until it is filled."""
        return self.rows[self._clean :]

    def fill(self, model: nn.Module) -> None:
        """Denoise all."""
        self._renew(model, np.arange(len(self.noisy)))

    def on_step(self, step: int, model: nn.Module) -> None:
        """Renew a part after every ``every`` steps."""
        if step % self.every == 0:
            start = (step // self.every - 1) * self._count
            self._renew(model, self._turn(start))

    def state_dict(self) -> dict[str, Any]:
        """The pool and how often it was renewed, for a checkpoint."""
        return {"rows": self.rows, "renewed": self._renewed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows, self._renewed = state["rows"].to(self.rows), state["renewed"]

    def _turn(self, start: int) -> np.ndarray:
        """The next rows of a fixed random order that is gone through again and again."""
        order = np.random.default_rng((self._seed, 3)).permutation(len(self.noisy))
        return np.unique(order[np.arange(start, start + self._count) % len(order)])

    def _renew(self, model: nn.Module, which: np.ndarray) -> None:
        index = torch.from_numpy(which)
        device = next(model.parameters()).device
        seeds = np.random.SeedSequence((self._seed, 4, self._renewed)).generate_state(1, np.uint64)
        generator = torch.Generator(device).manual_seed(int(seeds[0]))
        noisy = self.noisy[index].to(device)
        denoised = backward(self.view(model), noisy, self.sigma, self.evaluations, generator)
        self.rows[self._clean + index] = denoised.to(self.rows)
        self._renewed += 1
