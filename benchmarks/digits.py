"""The digits model of the package: quality against evaluations for several methods, and guidance at a high scale.

The two tables of docs/results/digits.md. Images are compared with half of scikit-learn's digits by 16 features of a
small classifier; the other half says what data themselves would get. All methods see the same noise and classes.

    python benchmarks/digits.py [--plot plot.png] [--pictures folder]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import COLOURS, emit, parser, picture, table
from torch import Tensor

from consilience.diffusion.digits import teacher
from consilience.diffusion.pictures import Images, grid, read, save
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.quality import Classifier, Measured, classifier, halves, measure, quality
from consilience.diffusion.sampling import Guidance, draw, noise_of, usual_difference

METHODS = ("auto", "ddim", "dpmpp-2m", "unipc2", "ab3", "deis3", "heun", "flow-heun", "flow-midpoint")
EVALUATIONS = (4, 8, 16, 32)
SCALES = (4.0, 12.0)


def guidance_rows(
    pipe: ImagePipeline, data: Images, judge: Classifier, count: int, evaluations: int, pictures: str | None
) -> list[dict[str, Any]]:
    """Without guidance, classifier-free, and apg with and without its limit, from the same noise."""
    real, other = halves(data)
    labels = torch.arange(count) % pipe.classes
    noise = noise_of(pipe, count, 0)
    limit = usual_difference(pipe, labels[:32])
    hows = {"no guidance": Guidance()}
    for scale in SCALES:
        hows[f"classifier-free, {scale:g}"] = Guidance(scale)
        hows[f"apg without limit, {scale:g}"] = Guidance(scale, True)
        hows[f"apg, limit {limit:.2f}, {scale:g}"] = Guidance(scale, True, limit)
    rows = []
    for name, how in hows.items():
        x = draw(pipe, noise, evaluations, "auto", labels, how).x
        rows.append({"guidance": name, **guided_row(x, labels, real, judge)})
        if pictures and (how.scale in (1.0, SCALES[-1])) and "without" not in name:
            file = "none" if how.scale == 1 else "apg" if how.projected else "plain"
            save(grid(x[: 4 * pipe.classes], pipe.classes), Path(pictures) / f"digits-guidance-{file}.png")
    return [*rows, {"guidance": "data", **guided_row(other.x[:count], other.labels[:count], real, judge)}]


def guided_row(x: Tensor, labels: Tensor, real: Images, judge: Classifier) -> dict[str, Any]:
    """Of images and the classes they should be of."""
    found = quality(judge, real.x, x)
    right = (judge.probabilities(x).argmax(1) == labels).double().mean()
    spread = torch.stack([torch.pdist(x[labels == k].flatten(1)).mean() for k in labels.unique()]).mean()
    return {
        "frechet": found.frechet,
        "precision": found.precision,
        "recall": found.recall,
        "right": float(right),
        "spread": float(spread),
        "outside": float((x.abs() > 1.1).double().mean()),
    }


def markdown(measured: Measured, guided: Sequence[dict[str, Any]]) -> str:
    """Both tables and the figures between them."""
    rows = [
        [
            row.method,
            row.nfe,
            f"{row.frechet:.3f}",
            f"{row.precision:.3f}",
            f"{row.recall:.3f}",
            f"{row.confidence:.3f}",
            f"{row.entropy:.3f}",
            f"{row.map_median:.4f}",
            f"{100 * row.switched:.1f}",
        ]
        for row in measured.rows
    ]
    f = measured.floor
    floor = [f"{value:.3f}" for value in (f.frechet, f.precision, f.recall, f.confidence, f.entropy)]
    head = ("method", "nfe", "Fréchet", "precision", "recall", "confidence", "entropy", "map error", "switched, %")
    second = [
        [
            row["guidance"],
            f"{row['frechet']:.2f}",
            f"{row['precision']:.2f}",
            f"{row['recall']:.2f}",
            f"{100 * row['right']:.1f}",
            f"{row['spread']:.2f}",
            f"{100 * row['outside']:.1f}",
        ]
        for row in guided
    ]
    return "\n\n".join(
        [
            table(head, [*rows, ["data", "", *floor, "", ""]]),
            f"{measured.count} images, {measured.seeds} noises. The fine solution is {measured.fine_error:.4f} from "
            "one of half as many steps.",
            table(
                ("guidance, scale", "Fréchet", "precision", "recall", "right class, %", "spread", "outside, %"), second
            ),
        ]
    )


def plot(path: str, measured: Measured) -> None:
    """Frechet distance and map error against evaluations, one line per method."""
    shown = ("auto", "ddim", "dpmpp-2m", "unipc2", "deis3", "flow-heun")
    with picture(path) as figure:
        for axis, (name, label) in zip(
            figure.subplots(1, 2),
            (("frechet", "Fréchet distance, 16 features"), ("map_median", "median distance from the fine solution")),
            strict=True,
        ):
            for colour, method in zip(COLOURS, shown, strict=False):
                line = [row for row in measured.rows if row.method == method]
                axis.plot([r.nfe for r in line], [getattr(r, name) for r in line], "o-", ms=3, c=colour, label=method)
            floor = measured.floor.frechet if name == "frechet" else measured.fine_error
            axis.axhline(floor, color="0.6", lw=0.8, ls="--")
            axis.set(xlabel="evaluations per image", ylabel=label, xscale="log", yscale="log")
            axis.set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
            axis.set_xticks([], minor=True)
            if name == "frechet":
                axis.set_yscale("linear")
                axis.set_ylim(0, 4 * floor)
        axis.legend(frameon=False, fontsize=7)


def main() -> None:
    options = parser(__doc__, count=512, seeds=1, guided=400, guided_evaluations=48)
    options.add_argument("--plot", help="write the plot here")
    options.add_argument("--pictures", help="write the pictures of guidance into this folder")
    o = options.parse_args()
    torch.set_num_threads(1)
    pipe, data = teacher(), read("digits")
    judge = classifier(data)
    with warnings.catch_warnings():  # orders that 4 steps do not carry
        warnings.simplefilter("ignore")
        measured = measure(pipe, data, judge, METHODS, EVALUATIONS, count=o.count, seeds=o.seeds)
    guided = guidance_rows(pipe, data, judge, o.guided, o.guided_evaluations, o.pictures)
    if o.plot:
        plot(o.plot, measured)
    emit(o, measured.summary() | {"guided": guided}, markdown(measured, guided))


if __name__ == "__main__":
    main()
