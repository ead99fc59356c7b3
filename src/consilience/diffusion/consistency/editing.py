"""Zero-shot editing with a map to the data: what is measured is put back after every jump, the rest is sampled.

Consistency Models (arXiv:2303.01469), section 5 and algorithm 4: x is turned by an orthogonal map into coordinates
some of which are known. `edit` does it for any such `Measurement`; inpainting, colourisation and super-resolution
are three of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.samplers import multistep, normal, renoise
from consilience.diffusion.solvers.plan import Noise, Solution

LUMA = (0.2989, 0.5870, 0.1140)
"""The shares of red, green and blue in grey (ITU-R BT.601)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Orthogonal coordinates of x [batch, ...], and a mask, broadcast over them, of those that are known.

    ``inverse(forward(x))`` is x, and both keep lengths.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    known: Tensor

    def impose(self, x: Tensor, y: Tensor) -> Tensor:
        """x with the known coordinates of y."""
        return self.inverse(torch.where(self.known.to(x.device), self.forward(y), self.forward(x)))


def edit(
    model: FlowMap,
    y: Tensor,
    measurement: Measurement,
    grid: Tensor,
    *,
    sigma_min: float = 0.0,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    **cond: Any,
) -> Solution:
    """Data that agree with ``y`` [batch, ...] in its known coordinates; the others of y are not looked at.

    Each time but the last of the decreasing ``grid`` is one evaluation: noise to it, jump to the data, put the known
    coordinates back (algorithm 4; ``sigma_min`` as in `multistep`). With the exact map, small levels late in the grid
    are steps of Langevin dynamics whose law is the conditional one; few large levels mix it with the marginal law.
    Raises ValueError for a grid that is not decreasing or starts where no signal is left.
    """
    process, grid = model.process, grid.detach().double().cpu()
    if grid.ndim != 1 or len(grid) < 2 or not bool((grid[1:] < grid[:-1]).all()):
        raise ValueError("a grid must be a strictly decreasing row of at least two times")
    end = float(process.time(torch.zeros((), dtype=torch.float64)))
    draw = normal(generator, noise)
    x, states = measurement.impose(torch.zeros_like(y), y), []
    for i, t in enumerate(grid[:-1].tolist()):
        x = renoise(x, end, t, process, draw(x, end, t), sigma_min if i else 0.0)
        x = measurement.impose(model.x0(x, t, **cond), y)
        states.append(x)
    return Solution(x, len(grid) - 1, grid, "edit", "", tuple(states))


def inpainting(known: Tensor) -> Measurement:
    """The entries where the boolean ``known``, broadcast over x, is true."""
    return Measurement(lambda x: x, lambda x: x, known.bool())


def colourisation(luma: tuple[float, float, float] = LUMA) -> Measurement:
    """The grey part of pictures [batch, 3, height, width]: the sum of the channels with the weights ``luma``."""
    turn = completed(torch.tensor(luma, dtype=torch.float64))

    def along(matrix: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.einsum("ij,njhw->nihw", matrix.to(x), x)

    return Measurement(along(turn), along(turn.T), torch.tensor([True, False, False])[:, None, None])


def superresolution(factor: int) -> Measurement:
    """The mean of every ``factor`` x ``factor`` patch of pictures [batch, channels, height, width].

    Of a small picture, ``y`` is the enlargement that repeats each pixel. Raises ValueError for a factor below 2, and
    in use for sizes that the factor does not divide.
    """
    if factor < 2:
        raise ValueError(f"factor must be at least 2, got {factor}")
    turn = completed(torch.ones(factor**2, dtype=torch.float64))

    def forward(x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        if height % factor or width % factor:
            raise ValueError(f"pictures of {height} x {width} cannot be cut into patches of {factor} x {factor}")
        patches = x.reshape(count, channels, height // factor, factor, width // factor, factor)
        return patches.permute(0, 1, 2, 4, 3, 5).flatten(4) @ turn.T.to(x)

    def inverse(v: Tensor) -> Tensor:
        count, channels, rows, columns, _ = v.shape
        patches = (v @ turn.to(v)).reshape(count, channels, rows, columns, factor, factor)
        return patches.permute(0, 1, 2, 4, 3, 5).reshape(count, channels, rows * factor, columns * factor)

    known = torch.zeros(factor**2, dtype=torch.bool)
    known[0] = True
    return Measurement(forward, inverse, known)


def completed(first: Tensor) -> Tensor:
    """An orthogonal matrix [n, n] in float64 whose first row points along ``first`` [n]."""
    basis = torch.eye(len(first), dtype=torch.float64)
    basis[:, 0] = first
    q, r = torch.linalg.qr(basis)
    return (q * torch.sign(torch.diagonal(r))).T.contiguous()


def interpolate(
    model: FlowMap,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    grid: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: Noise | None = None,
    **cond: Any,
) -> Solution:
    """Data between those of two noises ``a`` and ``b``, one state [...] each at the grid's first time.

    For each of ``weights`` [k], from 0 for a to 1 for b, the map takes their spherical interpolation to the data:
    [k, ...] (appendix D). A grid of more than one step refines by `multistep`.
    """
    return multistep(model, spherical(a, b, weights), grid, generator=generator, noise=noise, **cond)


def spherical(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """sin((1 - w) angle) / sin(angle) a + sin(w angle) / sin(angle) b for each of ``weights`` [k]: [k, ...].

    ``angle`` is that between a and b; where it is 0 the interpolation is linear. Raises ValueError for opposite
    directions, between which there is no shortest way.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.to(a).reshape(-1, *(1,) * a.ndim)
    if float(torch.sin(angle)) < 1e-7:
        if cosine < 0:
            raise ValueError("the two noises point in opposite directions")
        return (1 - w) * a + w * b
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
