"""Just enough SVG: elements whose attributes and texts are escaped, a linear scale, round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

Value = str | int | float | None


def tag(name: str, *children: str | Markup, **attributes: Value) -> Markup:
    """One element. ``_`` in an attribute's name is ``-``; a trailing one is dropped; None leaves it out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inside}</{name}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def path(points: Iterable[tuple[float, float]], close: bool = False) -> str:
    """The ``d`` of a path through ``points``."""
    text = "L".join(f"{_short(x)} {_short(y)}" for x, y in points)
    return f"M{text}{'Z' if close else ''}" if text else ""


def _short(value: str | int | float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Scale:
    """Data ``lo..hi`` to pixels ``start..end``."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.lo) / (self.hi - self.lo) if self.hi > self.lo else 0.5
        return self.start + share * (self.end - self.start)


def ticks(lo: float, hi: float, about: int = 5) -> list[float]:
    """Round values (steps of 1, 2 or 5 times a power of ten) inside ``lo..hi``, about ``about`` of them."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / max(1, about)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]
