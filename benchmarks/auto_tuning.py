"""Why `auto` takes the grids and coefficients it takes: the fit, on mixtures and networks that nothing is judged by.

Seventeen random mixtures of 3 to 12 Gaussians in 2, 8 and 32 dimensions and six small networks trained on drawn
strokes, three told the angle arctan(sigma) and three log sigma, each from sigma / alpha = 14.6, 80 and infinity ("from
80": from there alone). For each count, the grid's positions, the variable of the polynomials and corrections of the
Adams-Bashforth coefficients are fitted by gradient descent through the whole run on the mean logarithm of the error;
corrections of a step sum to zero, so that constant slopes stay exact. What is printed is the error before (what the fit
begins from, without corrections) and after, on the sets that were fitted and on others that the fit has not seen. One
fit can be made again alone: it begins from another in the package's file, or from none.

    python benchmarks/auto_tuning.py [--fit "33 from 80,24"] [--write src/consilience/diffusion/solvers/auto.json]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, emit, parser, table
from torch import Tensor

STARTS = torch.tensor([math.atan(14.6146), math.atan(80.0), math.pi / 2], dtype=torch.float64)
"""arctan(sigma / alpha) where runs begin."""
_NODES, _GAUSS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(16))
FILE = ROOT / "src" / "consilience" / "diffusion" / "solvers" / "auto.json"
"""The fits in the package."""
Rows = list[list[Tensor]]
"""For every step the weights [starts] of the newest slope, the one before, ..."""


# ------------------------------------------------------------------------------------------------ what is fitted on


class Mixtures:
    """Random mixtures of one dimension, all at once: states are [mixture, sample, dim] at arctan(sigma) [sample]."""

    def __init__(
        self, dim: int, kinds: list[tuple[int, float, float]], samples: int, generator: torch.Generator
    ) -> None:
        self.generator, most = generator, max(kind[0] for kind in kinds)
        parts = [self._one(dim, most, *kind) for kind in kinds]
        self.weights, self.means, self.variances, self.axes = (torch.stack(part) for part in zip(*parts, strict=True))
        self.noise = self._normal(len(kinds), samples, dim)
        self.exact = exact(self)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def _one(self, dim: int, most: int, count: int, low: float, high: float) -> tuple[Tensor, ...]:
        """``count`` Gaussians, the rest of weight zero; ``low`` = 0 puts them along a closed curve."""
        weights = torch.cat([self._uniform(count) + 0.2, torch.full((most - count,), 1e-290, dtype=torch.float64)])
        means = self._normal(most, dim)
        scales = torch.exp(math.log(low or 0.04) + math.log(high / (low or 0.04)) * self._uniform(most, dim))
        if low == 0:
            angle = torch.arange(most, dtype=torch.float64)[:, None] * (2 * math.pi / count)
            waves = [torch.cos(angle), torch.sin(angle), 0.6 * torch.sin(2 * angle)]
            means = sum((wave * self._normal(dim) for wave in waves), torch.zeros_like(means))
        axes = torch.linalg.qr(self._normal(most, dim, dim))[0]
        weights = weights / weights.sum()
        means = means - weights @ means
        spread = (weights @ means.square()).mean() + (weights @ scales.square()).mean()
        size = (0.4 + 0.7 * self._uniform(1)) / spread.sqrt()
        return weights, means * size + 0.2 * self._normal(dim), (scales * size) ** 2, axes

    def x0(self, x: Tensor, angle: Tensor) -> Tensor:
        """The expected data."""
        cos, sin = (part(angle).reshape(1, -1, 1, 1) for part in (torch.cos, torch.sin))
        variance = cos**2 * self.variances[:, None] + sin**2
        away = torch.einsum("mkij,mnki->mnkj", self.axes, x[:, :, None] - cos * self.means[:, None])
        scaled = away / variance
        logs = self.weights.log()[:, None] - 0.5 * ((away * scaled).sum(-1) + variance.log().sum(-1))
        gain = torch.einsum("mkij,mnkj->mnki", self.axes, cos * self.variances[:, None] * scaled)
        return (torch.softmax(logs, 2)[..., None] * (self.means[:, None] + gain)).sum(2)


class Strokes:
    """A network trained on 6 x 6 pictures of straight strokes; ``seed`` sets their number, their width and its own.

    It is told the noise level as arctan(sigma), in which it is smooth at no noise, or, with ``spread``, as Fourier
    features of log(sigma) / 4, as EDM's networks are, at random frequencies of that standard deviation: those networks
    keep changing however small sigma is.
    """

    def __init__(self, samples: int, seed: int, spread: float = 0.0, steps: int = 2000) -> None:
        torch.manual_seed(seed)
        self.logarithm = spread > 0
        self.frequencies = 2 * math.pi * spread * torch.randn(8) if self.logarithm else torch.arange(1, 9)
        rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
        width, wide, drawn = 0.7 + 1.3 * float(torch.rand(1)), 128 + 32 * (seed % 3), torch.zeros(20000, 6, 6)
        for ends in 6 * torch.rand(1 + seed % 3, 2, 20000, 2):
            for at in torch.linspace(0, 1, 7):
                centre = (ends[0] + (ends[1] - ends[0]) * at)[:, :, None, None]
                away = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2
                drawn = torch.maximum(drawn, torch.exp(-away / width))
        data = (2 * drawn - 1).reshape(-1, 36)
        self.scale = float(data.std())
        layers = [torch.nn.Linear(52, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide), torch.nn.GELU()]
        self.network = torch.nn.Sequential(*layers, torch.nn.Linear(wide, 36))
        optimiser = torch.optim.Adam(self.network.parameters(), lr=3e-3)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps) + 1e-5
            x0, t = data[torch.randint(20000, (128,))], torch.atan(torch.exp(1.4 * torch.randn(128) - 0.8) / self.scale)
            cos, sin, noise = torch.cos(t)[:, None], torch.sin(t)[:, None], torch.randn_like(x0)
            wanted = cos * noise - sin * x0 / self.scale
            loss = (self._v(cos * x0 / self.scale + sin * noise, t) - wanted).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.network.double().requires_grad_(False)
        self.noise = torch.randn(1, samples, 36, dtype=torch.float64)
        self.exact = exact(self)

    def _v(self, y: Tensor, t: Tensor) -> Tensor:
        level = torch.log(self.scale * torch.tan(t).clamp(1e-6, 1e6)) / 4 if self.logarithm else t
        waves = torch.outer(level, self.frequencies.to(y.dtype))
        return self.network(torch.cat([y, waves.sin(), waves.cos()], 1))

    def x0(self, x: Tensor, angle: Tensor) -> Tensor:
        """The network's expected data."""
        t = torch.atan2(angle.sin(), self.scale * angle.cos())
        y = x[0] / torch.hypot(angle.sin(), self.scale * angle.cos())[:, None]
        return (self.scale * (t.cos()[:, None] * y - t.sin()[:, None] * self._v(y, t)))[None]


Model = Mixtures | Strokes
SPREADS = (0.0, 0.0, 0.0, 1.0, 0.5, 0.25)
"""Of the frequencies that the networks have, one network each; 0: those told the angle."""
NETWORKS, LOGARITHMS, WEIGHT = len(SPREADS), 3, 3
"""How many of the sets are networks, the last; how many of them are told log sigma; for how many mixtures each counts.
"""


def models(seed: int, samples: int) -> list[Model]:
    """The sets of one seed."""
    generator = torch.Generator().manual_seed(seed)
    kinds = {
        2: [
            (4, 0.03, 0.3),
            (7, 0.05, 0.2),
            (12, 0, 0.08),
            (6, 0.04, 0.5),
            (3, 0.1, 0.11),
            (9, 0.03, 0.1),
            (12, 0, 0.1),
        ],
        8: [(6, 0.05, 0.5), (12, 0, 0.08), (12, 0.02, 0.6), (9, 0.1, 0.5), (4, 0.05, 0.2)],
        32: [(12, 0.05, 0.8), (12, 0, 0.08), (10, 0.01, 1.0), (12, 0.1, 1.2), (12, 0.02, 0.5)],
    }
    made: list[Model] = [Mixtures(dim, kind, samples, generator) for dim, kind in kinds.items()]
    return [*made, *(Strokes(2 * samples, seed + k, spread) for k, spread in enumerate(SPREADS))]


def slopes(model: Model, x: Tensor, angle: Tensor) -> Tensor:
    """eps - x0 at x [set, sample, dim] on the circle cos x0 + sin eps."""
    x0 = model.x0(x, angle)
    return (x - angle.cos()[:, None] * x0) / angle.sin()[:, None] - x0


def exact(model: Model, count: int = 384) -> Tensor:
    """Where the ODE takes the noise from each start: [set, start, sample, dim], by classical Runge-Kutta of order 4.

    The last step, shorter than 1e-4, is one of order 1: the slope at no noise cannot be computed.
    """
    with torch.no_grad():
        grid, sets = (
            soft_grid(torch.linspace(0, 1, count + 1).double(), torch.tensor([0.002, 3.0]).double()),
            len(model.noise),
        )
        samples, dim = model.noise.shape[1:]
        x = model.noise[:, None].expand(sets, len(STARTS), samples, dim).reshape(sets, -1, dim)

        def turn(x: Tensor, angle: Tensor) -> Tensor:
            angles = angle.repeat_interleave(samples)
            cos, sin = angles.cos()[:, None], angles.sin()[:, None]
            x0 = model.x0(x, angles)
            return cos * (x - cos * x0) / sin - sin * x0

        for here, there in zip(grid.T[:-1], grid.T[1:], strict=True):
            step = (there - here).repeat_interleave(samples)[:, None]
            one = turn(x, here)
            if not bool(there.any()):
                x = x + step * one
                break
            two = turn(x + step / 2 * one, (here + there) / 2)
            three = turn(x + step / 2 * two, (here + there) / 2)
            x = x + step / 6 * (one + 2 * two + 2 * three + turn(x + step * three, there))
        return x.reshape(sets, len(STARTS), samples, dim)


# ------------------------------------------------------------------------------------------------ what is fitted


def soft(angle: Tensor, ends: Tensor) -> Tensor:
    """log (sigma + low) / (1 + sigma / high) at arctan(sigma)."""
    return torch.log((angle.sin() + ends[0] * angle.cos()) / (angle.cos() + angle.sin() / ends[1]))


def soft_grid(at: Tensor, ends: Tensor, starts: Tensor = STARTS) -> Tensor:
    """arctan(sigma) [start, n + 1] at the fractions ``at`` of the way from each start to 0 in `soft`."""
    top = soft(starts, ends)
    value = torch.exp(top[:, None] + (ends[0].log() - top)[:, None] * at[1:-1])
    inner = torch.atan((value - ends[0]) / (1 - value / ends[1]))
    return torch.cat([starts[:, None], inner, torch.zeros(len(starts), 1).double()], 1)


def flow(angle: Tensor) -> Tensor:
    """sigma / (1 + sigma), the time of the straight path."""
    return angle.sin() / (angle.sin() + angle.cos())


def adams(grid: Tensor, ends: Tensor, order: int) -> Rows:
    """Adams-Bashforth coefficients for dy/du = eps - x0, u the straight path's time, polynomials in `soft`."""
    u, w, rows = flow(grid), soft(grid, ends), []
    for i in range(grid.shape[1] - 1):
        nodes = [w[:, i - j] for j in range(min(order, i + 1))]
        step = u[:, i + 1] - u[:, i]
        between = u[:, i, None] + step[:, None] * (_NODES + 1) / 2
        value = soft(torch.atan2(between, 1 - between), ends)
        row = []
        for node in nodes:
            basis = torch.ones_like(value)
            for other in nodes:
                if other is not node:
                    basis = basis * (value - other[:, None]) / (node - other)[:, None]
            row.append((basis * _GAUSS / 2).sum(1) * step)
        rows.append(row)
    return rows


class Fit:
    """The parameters for one count; ``parameters`` are what gradient descent changes, ``starts`` those it is for."""

    def __init__(self, count: int, order: int, kept: int, near: dict[str, Any] | None, starts: slice) -> None:
        self.count, self.order, self.starts = count, order, starts
        near = near or {"ends": [0.004, 7.0], "variable": [0.05, 8.0], "at": [0.5], "corrections": [[0.0]]}
        self.ends, self.variable = (torch.tensor(near[key]).double().log() for key in ("ends", "variable"))
        old = np.interp(np.linspace(0, 1, count + 1), np.linspace(0, 1, len(near["at"]) + 2), [0, *near["at"], 1])
        self.steps = torch.from_numpy(np.diff(old)).log()
        rows = stretched(near["corrections"], count)
        filled = [
            [*row, *[0.0] * kept][: min(kept, i + 1)] + [0.0] * (kept - min(kept, i + 1)) for i, row in enumerate(rows)
        ]
        self.shift = torch.tensor(filled, dtype=torch.float64)
        self.able = torch.tril(torch.ones(count, max(count, kept))).double()[:, :kept]
        for part in self.parameters():
            part.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """What is fitted."""
        return [self.ends, self.variable, self.steps, self.shift]

    def at(self) -> Tensor:
        """The grid's positions, from 0 to 1."""
        return torch.cat([torch.zeros(1).double(), torch.softmax(self.steps, 0).cumsum(0)])

    def corrections(self) -> Tensor:
        """[count, kept], every row summing to zero."""
        rows = self.shift * self.able
        return (rows - rows.sum(1, keepdim=True) / self.able.sum(1, keepdim=True)) * self.able

    def rows(self) -> tuple[Tensor, Rows]:
        """Grid and coefficients."""
        grid = soft_grid(self.at(), self.ends.exp(), STARTS[self.starts])
        rows, extra, u = adams(grid, self.variable.exp(), self.order), self.corrections(), flow(grid)
        for i, row in enumerate(rows):
            step = u[:, i + 1] - u[:, i]
            row += [torch.zeros_like(step)] * (min(extra.shape[1], i + 1) - len(row))
            rows[i] = [weight + extra[i, j] * step if j < extra.shape[1] else weight for j, weight in enumerate(row)]
        return grid, rows

    def found(self) -> dict[str, Any]:
        """As it is written."""
        alone = {"start": round(float(STARTS[self.starts].tan()), 4)} if self.starts == ALONE else {}
        with torch.no_grad():
            return {
                **alone,
                "order": self.order,
                "ends": rounded(self.ends.exp()),
                "variable": rounded(self.variable.exp()),
                "at": rounded(self.at()[1:-1]),
                "corrections": [rounded(row[: i + 1]) for i, row in enumerate(self.corrections())],
            }


def rounded(values: Tensor) -> list[float]:
    """Four digits after the point, the last taking what rounding leaves so that a row still sums to zero."""
    shown = [round(value, 4) for value in values.tolist()]
    if abs(float(values.sum())) < 1e-9:
        shown[-1] = round(-sum(shown[:-1]), 4)
    return shown


def stretched(rows: list[list[float]], count: int) -> list[list[float]]:
    """Rows for another count: those of the first steps, the middle and the last steps stay where they are."""
    have = len(rows)
    places = [min(i, have // 2) if i < count / 2 else max(have - (count - i), have // 2) for i in range(count)]
    return [rows[place] for place in places]


def errors(model: Model, made: Fit) -> Tensor:
    """Mean logarithm of the distance to the exact sample, per root of dimension and times sqrt(2): [set]."""
    (grid, rows), exact = made.rows(), model.exact[:, made.starts]
    sets, samples, dim = model.noise.shape
    scale = grid.sin() + grid.cos()
    y = (model.noise[:, None] / scale[:, 0, None, None]).expand(sets, len(grid), samples, dim)
    seen: list[Tensor] = []
    for i, row in enumerate(rows):
        x = (y * scale[:, i, None, None]).reshape(sets, -1, dim)
        slope = slopes(model, x, grid[:, i].repeat_interleave(samples)).reshape(y.shape)
        seen = [slope, *seen[:5]]
        y = y + sum(weight[:, None, None] * old for weight, old in zip(row, seen, strict=False))
    distance = (y - exact).norm(dim=-1) * math.sqrt(2 / dim)
    return (distance + 1e-8).log().mean((1, 2))


def judged(sets: list[Model], made: Fit) -> Tensor:
    """`errors` of all sets."""
    return torch.cat([errors(model, made) for model in sets])


def weighed(values: Tensor) -> Tensor:
    """Their mean, networks counted `WEIGHT` times."""
    return (values.sum() + (WEIGHT - 1) * values[-NETWORKS:].sum()) / (len(values) + NETWORKS * (WEIGHT - 1))


def fit(made: Fit, sets: list[Model], steps: int, rate: float = 0.06, last: float = 0.003) -> Fit:
    """Gradient descent (Adam) from where it stands; the learning rate falls from ``rate`` + ``last`` to ``last``."""
    optimiser = torch.optim.Adam(made.parameters(), lr=rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps) + last
        loss = weighed(judged(sets, made))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 2.0)
        optimiser.step()
    return made


# ------------------------------------------------------------------------------------------------------ the run


ALL, ALONE = slice(None), slice(1, 2)
"""Of `STARTS`: every one, and 80 alone."""
ORDER = ("33", "33 from 80", "65", "24", "17", "9", "5", "12", "7", "48", "96", "14", "10", "8", "6", "4", "3", "2")
"""The fits by count; the first two begin from a plain method, each other one from that of the nearest count before it.
"""


def begun_from(name: str) -> str | None:
    """The name of the fit that this one begins from."""
    count, before = int(name.split()[0]), [one for one in ORDER[: ORDER.index(name)] if "from" not in one]
    return None if "from" in name else min(before, key=lambda one: abs(math.log(int(one) / count)), default=None)


def fitted(name: str, sets: list[Model], options: argparse.Namespace, table_of: dict[str, Any]) -> tuple[Fit, Fit]:
    """The fit of that name, and what it begins from without its corrections.

    One for a single start, which is cheaper, is refined: from its rounded numbers, at a rate that falls to nothing.
    """
    near, count, starts = begun_from(name), int(name.split()[0]), ALONE if "from" in name else ALL
    begin = None if near is None else table_of[near]
    order, kept = (3, 4) if count < 24 else (4, 5)
    plain = Fit(count, order, 1, begin, starts)
    made = fit(Fit(count, order, kept, begin, starts), sets, options.first_steps if near is None else options.steps)
    if starts == ALONE:
        made = fit(Fit(count, order, kept, made.found(), starts), sets, options.refining_steps, 0.0015, 0.0)
    return plain, made


def main() -> None:
    """Run it."""
    shown = parser(__doc__, samples=16, first_steps=120, steps=50, refining_steps=31)
    shown.add_argument("--fit", default=",".join(ORDER), help="the fits to make, default all")
    shown.add_argument("--write", type=Path, help="a JSON file that takes the fits")
    options = shown.parse_args()
    torch.set_num_threads(1)
    begun, table_of = time.process_time(), json.loads(FILE.read_text())
    seen, made, rows = models(5, options.samples), {}, []
    for name in options.fit.split(","):
        made[name] = fitted(name, seen, options, table_of)
        found = made[name][1].found()
        same = "as in the package" if found == table_of.get(name) else "not as in the package"
        print(f"<!-- {name}: {same}, {time.process_time() - begun:.0f} CPU seconds -->", flush=True)
        table_of[name] = found
        if options.write:
            ordered = {key: table_of[key] for key in sorted(table_of, key=lambda key: (int(key.split()[0]), key))}
            options.write.write_text(json.dumps(ordered) + "\n")
    unseen = models(905, options.samples)
    for name, pair in sorted(made.items(), key=lambda item: int(item[0].split()[0])):
        rows.append([name, pair[1].order, *shown_errors(pair, seen), *shown_errors(pair, unseen)])
    kinds = ("mixtures", "networks told the angle", "networks told log sigma")
    head = [f"{known} {kind}, {how}" for known in ("seen", "unseen") for kind in kinds for how in ("before", "after")]
    emit(options, {"fits": table_of}, table(["evaluations", "order", *head], rows))
    print(f"<!-- {time.process_time() - begun:.0f} CPU seconds -->")


def shown_errors(pair: tuple[Fit, Fit], sets: list[Model]) -> list[str]:
    """Geometric mean errors on each kind of set, before and after the fit."""
    with torch.no_grad():
        found = [judged(sets, one) for one in pair]
    kinds = (slice(-NETWORKS), slice(-NETWORKS, -LOGARITHMS), slice(-LOGARITHMS, None))
    return [f"{math.exp(float(value[kind].mean())):.2e}" for kind in kinds for value in found]


if __name__ == "__main__":
    main()
