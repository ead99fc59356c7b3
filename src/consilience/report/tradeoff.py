"""The page of a search for a policy: accuracy against cost for all that was tried, on both halves of the problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from consilience.report.charts import Frame
from consilience.report.page import allowed, environment, replacing_all, template
from consilience.report.plots import COLOURS, save_figure
from consilience.report.summary import Card
from consilience.report.svg import Scale, path, tag, ticks
from consilience.report.words import interval, number, percent, redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HALVES = ("search", "held-out")


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on one half: accuracy and its loss against the full vote as shares, with 95 % intervals; cost per
    question; ``saved``: share of the full vote's cost."""

    cost: float
    accuracy: float
    accuracy_ci: tuple[float, float]
    drop: float
    drop_ci: tuple[float, float]
    drop_bound: float
    saved: float


@dataclass(frozen=True, slots=True)
class TradeoffRow:
    """A policy that was tried: its points on the search and on the held-out half."""

    name: str
    points: tuple[Point, Point]
    frontier: bool = False


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """Everything on the page. ``full`` and ``chosen`` are places in ``rows``; ``accuracy`` and ``unit`` name the axes;
    ``sizes`` are the questions of the halves, ``max_drop`` the limit as a share; ``knots`` are the calibration's
    confidences and accuracies, ``ece`` the error of the confidence before and after it."""

    title: str
    command: str
    created: str
    rows: Sequence[TradeoffRow]
    full: int
    chosen: int
    found: bool
    accuracy: str
    unit: str
    sizes: tuple[int, int]
    max_drop: float
    level: float
    knots: tuple[Sequence[float], Sequence[float]] | None = None
    ece: tuple[float, float] | None = None
    notes: Sequence[str] = ()

    @property
    def limit(self) -> str:
        """The limit in words."""
        return f"{100 * self.max_drop:g} point{'s' * (self.max_drop != 0.01)}"

    @property
    def listed(self) -> list[TradeoffRow]:
        """The rows of the table: the frontier, the chosen policy and the full vote, by rising cost."""
        shown = {id(row): row for row in (*self.frontier, self.rows[self.chosen], self.rows[self.full])}
        return sorted(shown.values(), key=lambda row: row.points[0].cost)

    @property
    def frontier(self) -> list[TradeoffRow]:
        """The rows on the frontier, by rising cost on the search half."""
        return sorted((row for row in self.rows if row.frontier), key=lambda row: row.points[0].cost)


def write_tradeoff(page: Tradeoff, target: Path) -> list[Path]:
    """Write the page to ``target`` and its plot to ``<stem>-tradeoff.png`` beside it; returns both paths.

    Raises InputError where they cannot be written; none is ever half there.
    """
    target = Path(target)
    image = target.with_name(f"{target.stem}-tradeoff.png")
    with replacing_all([target, image]) as drafts:
        drafts[0].write_bytes(render_tradeoff(page, image.name).encode("utf-8", "replace"))
        save_figure(drafts[1], lambda figure: _plot(page, figure))
    return [target, image]


def render_tradeoff(page: Tradeoff, image: str | None = None) -> str:
    """The page as HTML; ``image`` is the name of the PNG file to link."""
    style = template("style.css") + template("tradeoff.css")
    context = {
        "page": page,
        "image": image,
        "cards": _cards(page),
        "style": Markup(style),
        "style_policy": f"default-src 'none'; style-src '{allowed(style)}'; base-uri 'none'; form-action 'none'",
        "command": redact(page.command),
        "charts": [(name, page.sizes[half], _chart(page, half)) for half, name in enumerate(HALVES)],
    }
    return environment().get_template("tradeoff.html").render(context)


def _cards(page: Tradeoff) -> list[Card]:
    search, held = page.rows[page.chosen].points
    limit = f"limit {page.limit}"
    return [
        Card("Recommended", page.rows[page.chosen].name, "" if page.found else "nothing cheaper is within the limit"),
        Card("Saved, held-out half", percent(held.saved, 0), f"{number(held.cost, 2)} {page.unit}"),
        Card("Drop promised, at most", _points(search.drop_bound), f"{limit}, {100 * page.level:g} % one-sided"),
        Card("Drop found, held-out half", _points(held.drop), f"95 % interval {_between(held.drop_ci)}"),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _between(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:+.2f} to {100 * pair[1]:+.2f}"


# ------------------------------------------------------------------------------------------------- inline SVG


def _spans(page: Tradeoff, half: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges of cost and accuracy to show, with some air: of the better part, where some policies are far off."""
    points = [row.points[half] for row in page.rows]
    full, chosen = points[page.full], points[page.chosen]
    values = [*(p.accuracy for p in points), full.accuracy - page.max_drop]
    values += [full.accuracy - side for side in chosen.drop_ci if math.isfinite(side) and abs(side) < 1]
    air = max(0.004, 0.06 * (max(values) - min(values)))
    most = max(p.cost for p in points) or 1.0
    return (0.0, 1.04 * most), (max(0.0, min(values) - air), min(1.0, max(values) + air))


def _chart(page: Tradeoff, half: int) -> Markup:
    """Accuracy against cost on one half."""
    frame = Frame(520, 360, top=30, right=16)
    costs, shares = _spans(page, half)
    x, y = frame.x(*costs), frame.y(*shares)
    full = page.rows[page.full].points[half]
    parts = [_axes(page, frame, x, y)]
    for value, css in ((full.accuracy, "full"), (full.accuracy - page.max_drop, "limit")):
        at = y(value)
        parts.append(tag("line", x1=frame.left, x2=frame.width - frame.right, y1=at, y2=at, class_=css))
    line = [(x(row.points[half].cost), y(row.points[half].accuracy)) for row in page.frontier]
    parts.append(tag("path", d=path(line), class_="front"))
    parts += [_dot(page, place, half, x, y) for place in _drawing_order(page)]
    label = f"{page.accuracy} against {page.unit} of every policy, {HALVES[half]} half; the table has the frontier."
    return frame.svg(label, "tradeoff", *parts)


def _drawing_order(page: Tradeoff) -> list[int]:
    """The rows with those that matter on top."""
    return sorted(range(len(page.rows)), key=lambda place: (_state(page, place) != "tried", place == page.chosen))


def _state(page: Tradeoff, place: int) -> str:
    if place == page.chosen:
        return "chosen"
    return "fullvote" if place == page.full else "front" if page.rows[place].frontier else "tried"


def _dot(page: Tradeoff, place: int, half: int, x: Scale, y: Scale) -> Markup:
    row, state = page.rows[place], _state(page, place)
    point = row.points[half]
    px, py = x(point.cost), y(point.accuracy)
    tip = (
        f"{row.name}\n{page.accuracy} {percent(point.accuracy)} ({interval(point.accuracy_ci)})\n"
        f"{_points(-point.drop)} points against the full vote ({_between((-point.drop_ci[1], -point.drop_ci[0]))})\n"
        f"{number(point.cost, 2)} {page.unit}"
    )
    parts = [tag("title", tip)]
    if state == "chosen":
        ends = [y(min(1.0, max(0.0, point.accuracy + point.drop - side))) for side in point.drop_ci]
        parts.append(tag("line", x1=px, x2=px, y1=ends[0], y2=ends[1], class_="bar"))
    size = {"chosen": 7.0, "fullvote": 6.0, "front": 4.5}.get(state, 3.0)
    parts.append(tag("circle", cx=px, cy=py, r=size))
    return tag("g", *parts, class_=f"policy {state}")


def _axes(page: Tradeoff, frame: Frame, x: Scale, y: Scale) -> Markup:
    parts = []
    for value in ticks(y.lo, y.hi, 6):
        parts.append(tag("line", x1=frame.left, x2=frame.width - frame.right, y1=y(value), y2=y(value), class_="grid"))
        text = f"{100 * value:g}"
        parts.append(tag("text", text, x=frame.left - 7, y=y(value) + 4, class_="tick", text_anchor="end"))
    base = frame.height - frame.bottom
    parts.append(tag("line", x1=frame.left, x2=frame.width - frame.right, y1=base, y2=base, class_="axis"))
    for value in ticks(x.lo, x.hi, 7):
        parts.append(tag("text", f"{value:g}", x=x(value), y=base + 17, class_="tick", text_anchor="middle"))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(tag("text", page.unit, x=middle, y=frame.height - 5, class_="name", text_anchor="middle"))
    parts.append(tag("text", f"{page.accuracy}, %", x=0, y=frame.top - 11, class_="name"))
    return tag("g", *parts, aria_hidden="true")


# ------------------------------------------------------------------------------------------------------- PNG


def _plot(page: Tradeoff, figure: Figure) -> None:
    """Both halves side by side, as on the page."""
    figure.set_size_inches(10, 4.4)
    left, right = figure.subplots(1, 2)
    for half, axes in enumerate((left, right)):
        _panel(page, half, axes)
    left.legend(frameon=False, fontsize=7.5, loc="lower right")


def _panel(page: Tradeoff, half: int, axes: Axes) -> None:
    points = [row.points[half] for row in page.rows]
    full, chosen = points[page.full], points[page.chosen]
    costs, shares = _spans(page, half)
    axes.axhline(100 * full.accuracy, color=COLOURS[5], linewidth=1)
    limit = f"full vote less {page.limit}"
    axes.axhline(100 * (full.accuracy - page.max_drop), color=COLOURS[1], linewidth=1, linestyle="--", label=limit)
    xs, ys = [point.cost for point in points], [100 * point.accuracy for point in points]
    axes.plot(xs, ys, "o", color="#B9C1CB", markersize=3.5, label=f"{len(points)} policies")
    line = [row.points[half] for row in page.frontier]
    found = "frontier of the search half"
    costs_of, shares_of = [p.cost for p in line], [100 * p.accuracy for p in line]
    axes.plot(costs_of, shares_of, "o-", color=COLOURS[0], markersize=4.5, linewidth=1.2, label=found)
    axes.plot([full.cost], [100 * full.accuracy], "s", color=COLOURS[5], markersize=7, label="full vote")
    sides = [[100 * abs(chosen.drop_ci[1] - chosen.drop)], [100 * abs(chosen.drop - chosen.drop_ci[0])]]
    at: dict[str, Any] = {"x": [chosen.cost], "y": [100 * chosen.accuracy]}
    name = page.rows[page.chosen].name[:50]
    axes.errorbar(**at, yerr=sides, fmt="D", color=COLOURS[1], markersize=7, capsize=3, label=f"chosen: {name}")
    axes.set(xlim=costs, ylim=(100 * shares[0], 100 * shares[1]), xlabel=page.unit, ylabel=f"{page.accuracy}, %")
    axes.set_title(f"{HALVES[half]} half, {page.sizes[half]:,} questions", fontsize=9, loc="left")
    axes.grid(axis="y", color="#e3e6ea")
    axes.set_axisbelow(True)
