"""The same plots as PNG, by matplotlib, for papers and slides."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilience.report.measures import Calibration, bounds, calibration, most_draws, spent, usable
from consilience.report.rows import Page, PolicyRow
from consilience.report.words import known, letter, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07A00", "#5D6B7A")
"""Distinct under the common colour-vision deficiencies (after Okabe and Ito 2008; Tol 2021)."""

_INK, _SOFT, _LINE = "#1c2430", "#5b6675", "#e3e6ea"
NO_GOLD = "No question has a gold answer, so accuracy is not known."
NO_QUESTIONS = "No question was asked."


def save(page: Page, paths: tuple[Path, Path, Path]) -> None:
    """Write accuracy, draws and reliability as PNG to the three paths."""
    for path, plot in zip(paths, (_accuracy, _draws, _reliability), strict=True):
        save_figure(path, partial(plot, page))


def save_figure(path: Path, plot: Callable[[Figure], None]) -> None:
    """What ``plot`` draws on a figure, as PNG, in the style that all plots share."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "text.parse_math": False,
        "font.size": 10,
        "axes.edgecolor": _SOFT,
        "axes.labelcolor": _INK,
        "xtick.color": _SOFT,
        "ytick.color": _SOFT,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        plot(figure)
        figure.savefig(path, format="png")


def _name(index: int, policy: PolicyRow) -> str:
    """A label that matplotlib takes as it is: no formulas, one line."""
    plain = " ".join(policy.name.split())[:60]
    printable = "".join(sign if sign.isprintable() else "?" for sign in plain)
    return f"{letter(index)}  {printable} ({policy.origin})"


def _accuracy(page: Page, figure: Figure) -> None:
    span = bounds(page)
    if span is None:
        _sentence(figure, NO_GOLD)
        return
    axes = figure.add_subplot()
    if page.curve and usable(page.curve):
        curve = page.curve
        band = [[100 * value for value in side] for side in (curve.lo, curve.hi, curve.accuracy)]
        axes.fill_between(curve.ks, band[0], band[1], color=_LINE, linewidth=0)
        axes.plot(curve.ks, band[2], color=_SOFT, linewidth=2, label="plurality vote of k draws")
    for index, policy in enumerate(page.policies):
        if policy.accuracy is None or not known(policy.accuracy):
            continue
        colour, live = COLOURS[index % len(COLOURS)], policy.origin == "live"
        lo, hi = policy.accuracy_ci or (policy.accuracy, policy.accuracy)
        sides = [[100 * max(0.0, policy.accuracy - lo)], [100 * max(0.0, hi - policy.accuracy)]]
        axes.errorbar(
            [policy.mean_draws],
            [100 * policy.accuracy],
            yerr=sides,
            fmt="o" if live else "D",
            color=colour,
            markerfacecolor=colour if live else "white",
            markersize=7,
            capsize=3,
            label=_name(index, policy),
        )
    axes.set_xlim(0, most_draws(page) * 1.03)
    axes.set_ylim(100 * span[0], 100 * span[1])
    axes.set_xlabel("draws per question")
    axes.set_ylabel("right, %")
    axes.grid(axis="y", color=_LINE)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draws(page: Page, figure: Figure) -> None:
    most = most_draws(page)
    shown = [
        (index, policy, data) for index, policy in enumerate(page.policies) if (data := spent(policy, most)) is not None
    ]
    if not shown:
        _sentence(figure, NO_QUESTIONS)
        return
    for axes, (index, policy, data) in zip(_grid(figure, len(shown), 3.0), shown, strict=True):
        places = [(place + 0.5) * data.step + 0.5 * (data.step == 1) for place in range(len(data.counts))]
        shares = [100 * count / data.total for count in data.counts]
        axes.bar(places, shares, width=0.85 * data.step, color=COLOURS[index % len(COLOURS)])
        axes.axvline(data.mean, color=_INK, linewidth=1, linestyle="--")
        axes.set_title(f"{_name(index, policy)}\nmean {number(data.mean)}", fontsize=8, loc="left")
        axes.set_xlabel("draws used")
        axes.set_ylabel("questions, %")


def _reliability(page: Page, figure: Figure) -> None:
    shown: list[tuple[int, PolicyRow, Calibration]] = [
        (index, policy, data) for index, policy in enumerate(page.policies) if (data := calibration(policy)) is not None
    ]
    if not shown:
        _sentence(figure, NO_GOLD if any(policy.draws_used for policy in page.policies) else NO_QUESTIONS)
        return
    for axes, (index, policy, data) in zip(_grid(figure, len(shown), 3.6), shown, strict=True):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([0, 100], [0, 100], color=_SOFT, linewidth=1, linestyle="--")
        for row in data.bins:
            axes.plot([100 * row.confidence] * 2, [100 * row.lo, 100 * row.hi], color=colour, linewidth=1.5)
            axes.annotate(
                f"{row.count:,}", (100 * row.confidence, -8), fontsize=6, ha="center", va="bottom", color=_SOFT
            )
        axes.plot(
            [100 * row.confidence for row in data.bins], [100 * row.right for row in data.bins], "o", color=colour
        )
        axes.set(xlim=(0, 102), ylim=(-9, 102), xlabel="confidence, %, and questions", ylabel="right, %")
        calibrated = f"ECE {100 * data.ece:.1f} %, Brier {data.brier:.3f}, n = {data.count:,}"
        axes.set_title(f"{_name(index, policy)}\n{calibrated}", fontsize=8, loc="left")


def _grid(figure: Figure, count: int, height: float) -> list[Axes]:
    """``count`` axes in up to three columns, each ``height`` inches high."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure.set_size_inches(4.0 * max(columns, 1.5), height * rows)
    return [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _sentence(figure: Figure, text: str) -> None:
    figure.set_size_inches(8, 2)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=_SOFT)
