"""Quality of an image model against evaluations: how far its samples are from data, and its map from the exact one.

Distances are taken between the 16 hidden features of a small classifier of the data, each scaled to unit variance. The
data are split in halves: one is what samples are compared with, the other says what a perfect sample would get.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.diffusion import metrics
from consilience.diffusion.pictures import Images
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.sampling import Drawn, draw, noise_of
from consilience.diffusion.solve import default_grid, solve, steps_of
from consilience.errors import InputError
from consilience.record import replacing

FINE = 256
"""Steps of the reference solution (Adams-Bashforth of order 4)."""
MAPPED = 128
"""Images whose map is compared with the reference, at most."""


# ------------------------------------------------------------------------------------------------------ the classifier

FEATURES = b"2"
"""Which features a kept classifier has: another one is fitted anew."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A multilayer perceptron with ReLUs: ``layers`` of (matrix [in, out], bias [out]); ``scale`` [16] of features."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    scale: Tensor

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer of images [n, ...], over its standard deviation in the data: [n, 16]."""
        h = x.detach().double().cpu().flatten(1)
        for matrix, bias in self.layers[:-1]:
            h = torch.relu(h @ matrix + bias)
        return h / self.scale

    def probabilities(self, x: Tensor) -> Tensor:
        """[n, classes]."""
        matrix, bias = self.layers[-1]
        logits = (self.features(x) * self.scale) @ matrix + bias
        if logits.shape[1] == 1:
            return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
        return torch.softmax(logits, 1)


def classifier(data: Images, cache: Path | None = None) -> Classifier:
    """One with layers of 64 and 16 units, fitted to the labelled data by scikit-learn with a fixed seed.

    ``cache`` is a file that keeps it; one of other data is replaced. Raises InputError without labels, or
    where nothing can be told apart.
    """
    if data.labels is None:
        raise InputError(f"{data.source}: has no labels; quality needs a classifier, so put classes into sub-folders")
    mark = hashlib.sha256(FEATURES + data.x.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    kept = None if cache is None else _cached(cache, mark)
    if kept is not None:
        return kept
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped,unused-ignore]
    from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped,unused-ignore]

    flat = data.x.flatten(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = MLPClassifier((64, 16), alpha=1e-2, max_iter=100, random_state=0).fit(flat, data.labels.numpy())
    arrays = {f"matrix{i}": matrix for i, matrix in enumerate(fitted.coefs_)}
    arrays |= {f"bias{i}": bias for i, bias in enumerate(fitted.intercepts_)}
    made = _classifier(arrays, torch.ones(1, dtype=torch.float64))
    spread = made.features(data.x).std(0).numpy()
    alive = spread > 1e-6 * spread.max()  # a unit that no datum lights counts as the others do where a sample lights it
    if not alive.any():
        raise InputError(f"{data.source}: the classifier tells nothing apart; look at the images and their labels")
    arrays["scale"] = np.where(alive, spread, np.median(spread[alive]))
    if cache is not None:
        with replacing(cache) as file:
            np.savez(file, mark=np.array(mark), **arrays)
    return _classifier(arrays, torch.from_numpy(arrays["scale"]))


def _classifier(arrays: Any, scale: Tensor) -> Classifier:
    count = sum(name.startswith("matrix") for name in arrays)
    pairs = ((arrays[f"matrix{i}"], arrays[f"bias{i}"]) for i in range(count))
    layers = tuple((torch.from_numpy(matrix).double(), torch.from_numpy(bias).double()) for matrix, bias in pairs)
    return Classifier(layers, scale)


def _cached(cache: Path, mark: str) -> Classifier | None:
    try:
        with np.load(cache, allow_pickle=False) as file:
            if str(file["mark"]) != mark:
                return None
            arrays = {name: file[name] for name in file.files if name != "mark"}
            return _classifier(arrays, torch.from_numpy(arrays.pop("scale")))
    except Exception:  # not there, or damaged: it is made anew
        return None


# ------------------------------------------------------------------------------------------------------------ the rows


@dataclass(frozen=True, slots=True)
class Quality:
    """What a set of images is like beside data.

    ``frechet`` is the Frechet distance of the features, ``precision`` and ``recall`` are of their manifolds,
    ``confidence`` and ``entropy`` (nats) of the classifier.
    """

    frechet: float
    precision: float
    recall: float
    confidence: float
    entropy: float


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a number of evaluations, means over the seeds.

    ``nfe`` is what was spent; ``map_median`` and ``switched`` compare with a fine solution of the same model from the
    same noise: the median distance, and the share of images that the classifier sees in another class.
    """

    method: str
    evaluations: int
    nfe: int
    frechet: float
    frechet_spread: float
    precision: float
    recall: float
    confidence: float
    entropy: float
    map_median: float
    switched: float


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows; ``floor`` is data beside data, ``fine_error`` the fine solution's distance from one half as fine."""

    rows: tuple[Row, ...]
    floor: Quality
    fine_error: float
    count: int
    seeds: int

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def quality(judge: Classifier, real: Tensor, made: Tensor) -> Quality:
    """Images ``made`` beside ``real`` ones, each [n, channels, height, width]."""
    features, others = judge.features(made), judge.features(real)
    precision, recall = metrics.precision_recall(others, features)
    probabilities = judge.probabilities(made)
    return Quality(
        metrics.frechet_distance(features, others),
        precision,
        recall,
        metrics.confidence(probabilities),
        metrics.class_entropy(probabilities),
    )


def measure(
    pipe: ImagePipeline,
    data: Images,
    judge: Classifier,
    methods: Sequence[str],
    evaluations: Sequence[int],
    *,
    count: int | None = None,
    seeds: int = 1,
    on_row: Callable[[int, int], None] | None = None,
) -> Measured:
    """The rows of every method at every number of evaluations that it can spend; all of the same noise and classes.

    ``count`` images per seed, by default as many as half of the data has, at most. A method that has no step of so
    few evaluations is left out there. Raises InputError for data that are not of the model's shape or too few.
    """
    if tuple(data.x.shape[1:]) != pipe.shape(1)[1:]:
        raise InputError(f"{data.source}: images {tuple(data.x.shape[1:])}, the model makes {pipe.shape(1)[1:]}")
    real, other = (half.x for half in halves(data))
    count = min(count or len(other), len(other))
    if count < 4:
        raise InputError(
            f"{data.source}: {len(data.x)} images and a count of {count} are too few: 4 of a half at least"
        )
    starts = [_start(pipe, data, count, seed) for seed in range(seeds)]
    fine, fine_error = zip(*(_fine(pipe, *start) for start in starts), strict=True)
    jobs = list(_jobs(pipe, methods, evaluations))
    rows = []
    for done, (method, spent) in enumerate(jobs, 1):
        found = [draw(pipe, noise, spent, method, labels, seed=seed) for seed, (noise, labels) in enumerate(starts)]
        rows.append(_row(judge, real, found, fine, method, spent))
        if on_row is not None:
            on_row(done, len(jobs))
    return Measured(
        tuple(rows),
        quality(judge, real, other[:count]),
        float(np.mean(fine_error)),
        count,
        seeds,
    )


def halves(data: Images) -> tuple[Images, Images]:
    """Two halves in a random order that is always the same: one to compare with, one to compare."""
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))
    first, second = (
        Images(data.x[rows], None if data.labels is None else data.labels[rows], data.source)
        for rows in (order[::2], order[1::2])
    )
    return first, second


def _start(pipe: ImagePipeline, data: Images, count: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Noise, and classes as often as the data have them."""
    if not pipe.classes:
        return noise_of(pipe, count, seed), None
    if data.labels is None or (data.classes or 0) > pipe.classes:
        raise InputError(f"{data.source}: has {data.classes} classes, the model {pipe.classes}")
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    return noise_of(pipe, count, seed), data.labels[order[:count]]


@torch.no_grad()
def _fine(pipe: ImagePipeline, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, float]:
    """The fine solution of the first images, and its median distance from one of half as many steps."""
    some = slice(0, MAPPED)
    model = pipe.denoiser(None if labels is None else labels[some])
    process = model.process
    ends = process.ratio(torch.tensor([process.t_max, process.t_min], dtype=torch.float64)).tolist()
    x = noise[some].to(pipe.network.device)
    fine, half = (solve(model, x, default_grid(process, n, *ends)).x.cpu() for n in (FINE, FINE // 2))
    return fine, float((fine - half).flatten(1).norm(dim=1).median())


def _jobs(pipe: ImagePipeline, methods: Sequence[str], evaluations: Sequence[int]) -> Iterator[tuple[str, int]]:
    """What can be run; raises ValueError for an unknown method, or where nothing is left."""
    process = pipe.denoiser(torch.zeros(1, dtype=torch.long)).process
    steps_of("auto", process, min(evaluations))
    for method in methods:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps_of(method, process, max(evaluations))
            for spent in evaluations:
                try:
                    steps_of(method, process, spent)
                except ValueError:
                    continue
                yield method, spent


def _row(
    judge: Classifier, real: Tensor, found: Sequence[Drawn], fine: Sequence[Tensor], method: str, spent: int
) -> Row:
    each = [quality(judge, real, drawn.x) for drawn in found]
    errors = [
        metrics.map_error(drawn.x[: len(exact)], exact, lambda x: judge.probabilities(x).argmax(1))
        for drawn, exact in zip(found, fine, strict=True)
    ]
    distances = [one.frechet for one in each]
    return Row(
        method=method,
        evaluations=spent,
        nfe=found[0].nfe,
        frechet=float(np.mean(distances)),
        frechet_spread=max(distances) - min(distances),
        precision=float(np.mean([one.precision for one in each])),
        recall=float(np.mean([one.recall for one in each])),
        confidence=float(np.mean([one.confidence for one in each])),
        entropy=float(np.mean([one.entropy for one in each])),
        map_median=float(np.mean([error.median for error in errors])),
        switched=float(np.mean([error.switched for error in errors])),
    )


# ------------------------------------------------------------------------------------------------------------ the plot


def plot(measured: Measured, title: str) -> Any:
    """A matplotlib figure: Frechet distance and map error against evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, method in enumerate(dict.fromkeys(row.method for row in measured.rows)):
        rows = [row for row in measured.rows if row.method == method]
        style: dict[str, Any] = {"marker": "osD^vPX*"[i % 8], "color": f"C{i % 10}", "label": method, "markersize": 4}
        left.plot([row.nfe for row in rows], [row.frechet for row in rows], **style)
        right.plot([row.nfe for row in rows], [row.map_median for row in rows], **style)
    left.axhline(measured.floor.frechet, color="0.4", linestyle=":", label="data")
    right.axhline(measured.fine_error, color="0.4", linestyle=":")
    left.set_ylabel("Fréchet distance, 16 features")
    right.set_ylabel("median distance from the fine solution")
    right.set_yscale("log")
    counts = sorted({row.nfe for row in measured.rows})
    for axes in (left, right):
        axes.set(xscale="log", xlabel="evaluations per image")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    return figure
