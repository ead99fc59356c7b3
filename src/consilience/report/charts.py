"""The charts of the page as inline SVG. Colours come from the style sheet, so they follow dark mode; every mark
carries its numbers in ``data-tip``."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from consilience.report.measures import Calibration, Spent, bounds, most_draws, usable
from consilience.report.rows import Curve, Page, PolicyRow
from consilience.report.svg import Scale, join, path, tag, ticks
from consilience.report.words import interval, known, letter, number, percent


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area of a chart, in pixels of its view box."""

    width: float
    height: float
    left: float = 46
    right: float = 14
    top: float = 14
    bottom: float = 40

    def x(self, lo: float, hi: float) -> Scale:
        """The horizontal scale."""
        return Scale(lo, hi, self.left, self.width - self.right)

    def y(self, lo: float, hi: float) -> Scale:
        """The vertical scale, upwards."""
        return Scale(lo, hi, self.height - self.bottom, self.top)

    def svg(self, label: str, css: str, *parts: Markup) -> Markup:
        """The chart as a whole."""
        box = f"0 0 {self.width:g} {self.height:g}"
        return tag("svg", *parts, viewBox=box, class_=f"chart {css}", role="img", aria_label=label)


def _axes(frame: Frame, x: Scale, y: Scale, names: tuple[str, str], counts: tuple[int, int]) -> Markup:
    """Grid, tick labels and axis names; the horizontal axis counts draws, the vertical one is in per cent."""
    parts = []
    for value in ticks(y.lo, y.hi, counts[1]):
        parts.append(tag("line", x1=frame.left, x2=frame.width - frame.right, y1=y(value), y2=y(value), class_="grid"))
        text = f"{100 * value:g}"
        parts.append(tag("text", text, x=frame.left - 7, y=y(value) + 4, class_="tick", text_anchor="end"))
    base = frame.height - frame.bottom
    parts.append(tag("line", x1=frame.left, x2=frame.width - frame.right, y1=base, y2=base, class_="axis"))
    for value in _draw_ticks(x, counts[0]):
        parts.append(tag("line", x1=x(value), x2=x(value), y1=base, y2=base + 4, class_="axis"))
        parts.append(tag("text", f"{value:g}", x=x(value), y=base + 17, class_="tick", text_anchor="middle"))
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(tag("text", names[0], x=middle, y=frame.height - 5, class_="name", text_anchor="middle"))
    parts.append(tag("text", names[1], x=0, y=frame.top - 11, class_="name"))
    return tag("g", *parts, aria_hidden="true")


def _draw_ticks(x: Scale, about: int) -> list[float]:
    """Round numbers of draws; 1 in place of 0, where no vote is."""
    values = [value for value in ticks(0, x.hi, about) if value.is_integer()]
    return [1.0 if value == 0 else value for value in values]


def accuracy_chart(page: Page, width: int, height: int, css: str) -> Markup | None:
    """Accuracy against draws: the curve of the vote with its band, each policy as a point with its interval."""
    span = bounds(page)
    if span is None:
        return None
    frame = Frame(width, height, top=30, right=18)
    x, y = frame.x(0.5, most_draws(page) + 0.5), frame.y(*span)
    wide = width > 500
    parts = [_axes(frame, x, y, ("draws per question", "right, %"), (8 if wide else 4, 8 if wide else 5))]
    if page.curve and usable(page.curve):
        parts.append(_curve(page.curve, frame, x, y))
    parts.append(_points(page, x, y))
    label = "Accuracy against draws per question; the same numbers are in the table of policies and below."
    return frame.svg(label, css, *parts)


def _curve(curve: Curve, frame: Frame, x: Scale, y: Scale) -> Markup:
    xs = [x(k) for k in curve.ks]
    upper = list(zip(xs, map(y, curve.hi), strict=True))
    lower = list(zip(xs, map(y, curve.lo), strict=True))
    line = list(zip(xs, map(y, curve.accuracy), strict=True))
    parts = [
        tag("path", d=path([*upper, *reversed(lower)], close=True), class_="band"),
        tag("path", d=path(line), class_="curve"),
    ]
    half = (xs[1] - xs[0]) / 2 if len(xs) > 1 else 10.0
    for index, k in enumerate(curve.ks):
        tip = (
            f"Plurality vote of {k} draw{'s' * (k != 1)}\n{percent(curve.accuracy[index])} right "
            f"({interval((curve.lo[index], curve.hi[index]))})"
        )
        hit = tag(
            "rect",
            x=xs[index] - half,
            y=frame.top,
            width=2 * half,
            height=frame.height - frame.top - frame.bottom,
            class_="hit",
        )
        dot = tag("circle", cx=xs[index], cy=line[index][1], r=4, class_="dot")
        parts.append(tag("g", hit, dot, class_="step", data_tip=tip))
    return tag("g", *parts)


def _points(page: Page, x: Scale, y: Scale) -> Markup:
    marks: list[Markup] = []
    taken: list[tuple[float, float]] = []
    for index, policy in enumerate(page.policies):
        if policy.accuracy is None or not known(policy.accuracy) or not known(policy.mean_draws):
            continue
        px, py = x(policy.mean_draws), y(policy.accuracy)
        step = 0
        while any(abs(px - ox) < 15 and abs(py - oy) < 30 for ox, oy in taken) and step < 12:
            step += 1
            px = x(policy.mean_draws) + (-15 if step % 2 else 15) * ((step + 1) // 2)
            px = min(max(px, x.start + 6), x.end)
        taken.append((px, py))
        marks.append(_point(index, policy, px, y))
    return join(marks)


def _point(index: int, policy: PolicyRow, px: float, y: Scale) -> Markup:
    assert policy.accuracy is not None
    parts = []
    if policy.accuracy_ci is not None:
        lo, hi = y(policy.accuracy_ci[0]), y(policy.accuracy_ci[1])
        parts.append(tag("line", x1=px, x2=px, y1=lo, y2=hi, class_="bar"))
        parts += [tag("line", x1=px - 4, x2=px + 4, y1=end, y2=end, class_="bar") for end in (lo, hi)]
    parts.append(mark(policy.origin, px, y(policy.accuracy)))
    parts.append(tag("text", letter(index), x=px + 9, y=y(policy.accuracy) - 7, class_="letter"))
    parts.append(tag("circle", cx=px, cy=y(policy.accuracy), r=14, class_="hit"))
    tip = (
        f"{letter(index)}  {policy.name[:80]} ({policy.origin})\n{percent(policy.accuracy)} right"
        f"{' (' + interval(policy.accuracy_ci) + ')' if policy.accuracy_ci else ''}\n"
        f"{number(policy.mean_draws)} draws per question"
    )
    return tag("g", *parts, class_=f"point p{index % 6}", data_tip=tip, tabindex=0, role="img", aria_label=tip)


def mark(origin: str, x: float, y: float) -> Markup:
    """A filled disc for a live run, a hollow diamond for a replay."""
    if origin == "live":
        return tag("circle", cx=x, cy=y, r=6, class_="live")
    corners = [(x, y - 7.5), (x + 7.5, y), (x, y + 7.5), (x - 7.5, y)]
    return tag("path", d=path(corners, close=True), class_="replay")


def key(index: int, origin: str) -> Markup:
    """The mark of a policy for legends and tables."""
    return tag(
        "svg",
        mark(origin, 9, 9),
        viewBox="0 0 18 18",
        class_=f"key p{index % 6}",
        aria_hidden="true",
        width=18,
        height=18,
    )


def draws_chart(data: Spent, index: int, most: int) -> Markup:
    """Histogram of the draws used per question."""
    frame = Frame(300, 170, left=34, right=8, top=24)
    top = max(data.counts) / data.total or 1.0
    end = max(most, len(data.counts) * data.step)
    x, y = frame.x(0, end), frame.y(0, top * 1.05)
    parts = [_histogram_axes(frame, x, y, data.step)]
    for place, count in enumerate(data.counts):
        lo, hi = place * data.step, (place + 1) * data.step
        what = f"{hi} draw{'s' * (hi != 1)}" if data.step == 1 else f"{lo + 1} to {hi} draws"
        tip = f"{what}\n{count:,} question{'s' * (count != 1)}, {percent(count / data.total)}"
        gap = min(1.0, 0.15 * (x(hi) - x(lo)))
        width, base = x(hi) - x(lo) - 2 * gap, frame.height - frame.bottom
        height = base - y(count / data.total)
        bar = tag("rect", x=x(lo) + gap, y=base - height, width=width, height=height, class_="fill")
        hit = tag("rect", x=x(lo), y=frame.top, width=x(hi) - x(lo), height=base - frame.top, class_="hit")
        parts.append(tag("g", hit, bar, class_="step", data_tip=tip))
    at = x(max(0.0, data.mean - data.step / 2 if data.step == 1 else data.mean))
    parts.append(tag("line", x1=at, x2=at, y1=frame.top - 4, y2=frame.height - frame.bottom, class_="mean"))
    label = f"Draws used per question: mean {number(data.mean)}, median {number(data.median)}"
    return frame.svg(label, f"p{index % 6}", *parts)


def _histogram_axes(frame: Frame, x: Scale, y: Scale, step: int) -> Markup:
    """As `_axes`, with whole draws in the middle of their bar where a bar is one draw wide."""
    shift = 0.5 if step == 1 else 0.0
    shifted = Scale(x.lo + shift, x.hi + shift, x.start, x.end)
    return _axes(frame, shifted, y, ("draws used", "questions, %"), (5, 3))


def reliability_chart(data: Calibration, index: int) -> Markup:
    """Share right against confidence, with the counts below and the diagonal of a perfect confidence."""
    frame = Frame(300, 290, left=34, right=10, top=24, bottom=96)
    x, y = frame.x(0, 1), frame.y(0, 1)
    strip = Scale(0, max(row.count for row in data.bins), 0, 36)
    foot = frame.height - 36
    parts = [_reliability_axes(frame, x, y, foot)]
    for row in data.bins:
        tip = (
            f"confidence {100 * row.lower:g}–{100 * row.upper:g} %: {row.count:,} question"
            f"{'s' * (row.count != 1)}\nmean confidence {percent(row.confidence)}\n"
            f"right {percent(row.right)} ({interval((row.lo, row.hi))})"
        )
        at, width = x(row.confidence), x(row.upper) - x(row.lower)
        inside = [
            tag("rect", x=x(row.lower), y=frame.top, width=width, height=foot - frame.top, class_="hit"),
            tag(
                "rect",
                x=x(row.lower) + 1,
                y=foot - strip(row.count),
                width=width - 2,
                height=strip(row.count),
                class_="fill",
            ),
            tag("line", x1=at, x2=at, y1=y(row.lo), y2=y(row.hi), class_="bar"),
            tag("circle", cx=at, cy=y(row.right), r=5, class_="live"),
        ]
        parts.append(tag("g", *inside, class_="step", data_tip=tip))
    label = f"Share right against confidence: ECE {percent(data.ece)}, Brier score {data.brier:.3f}"
    return frame.svg(label, f"p{index % 6}", *parts)


def _reliability_axes(frame: Frame, x: Scale, y: Scale, foot: float) -> Markup:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        text = f"{100 * share:g}"
        parts += [
            tag("line", x1=x.start, x2=x.end, y1=y(share), y2=y(share), class_="grid"),
            tag("text", text, x=x.start - 7, y=y(share) + 4, class_="tick", text_anchor="end"),
            tag("text", text, x=x(share), y=foot + 16, class_="tick", text_anchor="middle"),
        ]
    parts += [
        tag("line", x1=x(0), x2=x(1), y1=y(0), y2=y(1), class_="ideal"),
        tag("line", x1=x.start, x2=x.end, y1=foot, y2=foot, class_="axis"),
        tag("text", "right, %", x=0, y=frame.top - 11, class_="name"),
        tag("text", "n", x=x.start - 7, y=foot - 12, class_="tick", text_anchor="end"),
        tag(
            "text",
            "confidence, %",
            x=(x.start + x.end) / 2,
            y=frame.height - 3,
            class_="name",
            text_anchor="middle",
        ),
    ]
    return tag("g", *parts, aria_hidden="true")
