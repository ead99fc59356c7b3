"""What the votes looked like after every draw: for stopping rules that judge whole sequences of draws at once.

Everything here is [draws, rows]: draw t of all rows lies together, so that a step over the rows is one vector
operation. Two passes of `running_counts` give the largest counts after every draw, and `first_stop` judges draws in
blocks of growing width, so that a row costs about as much as the draws it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilience.rules import Float, Int, View

Bool = NDArray[np.bool_]
Counts = NDArray[Any]
"""Small integers: int8 for narrow blocks, int32 for wide ones."""
Rows = slice | NDArray[np.intp]
Stops = Callable[[Rows, int], Bool]

NARROW = 64
"""Draws up to which all pairs of them are compared; wider blocks are sorted."""

CELLS = 400_000
"""Bytes that are worked on together: suits the cache."""


def by_draw(view: View, rows: Rows, width: int) -> Counts:
    """The first ``width`` answers of some rows of a view of one arm, in the smallest type; int [width, rows]."""
    part = view.answers[rows, 0, :width]
    kind = np.int8 if part.max(initial=0) < 127 else np.int32
    return np.ascontiguousarray(part.T, dtype=kind)


def field_by_draw(view: View, name: str, rows: Rows, width: int) -> Float:
    """The first ``width`` values of a field, float64 [width, rows]."""
    return np.ascontiguousarray(view.fields[name][rows, 0, :width].T)


def running_counts(labels: Counts) -> Counts:
    """How often the label of each draw has come by then, itself included, 0 where it is negative; like ``labels``."""
    if len(labels) <= NARROW:
        return np.where(labels >= 0, _earlier(labels).view(np.int8).sum(0, dtype=np.int8), np.int8(0))
    order, start = _runs(labels)
    place = np.arange(len(labels), dtype=np.int32)[:, None]
    counts = np.empty(labels.shape, np.int32)
    np.put_along_axis(counts, order, place - start + 1, axis=0)
    return np.where(labels >= 0, counts, np.int32(0))


def running_sums(labels: Counts, weights: Float) -> Float:
    """The weight of the label of each draw by then, itself included, 0 where it is negative; float64 like both."""
    usable = np.where(labels >= 0, weights, 0.0)
    if len(labels) <= NARROW:
        sums: Float = np.where(_earlier(labels), usable[:, None], 0.0).sum(0)
        return np.where(labels >= 0, sums, 0.0)
    order, start = _runs(labels)
    ordered = np.take_along_axis(usable, order, axis=0)
    total = ordered.cumsum(0)
    before = np.take_along_axis(total - ordered, start, axis=0)
    sums = np.empty(labels.shape)
    np.put_along_axis(sums, order, total - before, axis=0)
    return np.where(labels >= 0, sums, 0.0)


def renumbered(labels: Counts) -> Counts:
    """The labels of each row by order of appearance, 0, 1, ...; -1 stays; like ``labels`` [draws, rows].

    A block of more than `NARROW` draws is returned as it is.
    """
    if len(labels) > NARROW:
        return labels
    new = _earlier(labels)
    begins = new.view(np.int8).sum(0, dtype=np.int8) == 1
    number = (begins & (labels >= 0)).cumsum(0, dtype=np.int8) - np.int8(1)
    found = np.where(new & begins[:, None], number[:, None], np.int8(0)).sum(0, dtype=np.int8)
    return np.where(labels >= 0, found, np.int8(-1))


def _earlier(labels: Counts) -> Bool:
    """Whether draw s is no later than draw t and has its label; bool [draws s, draws t, rows]."""
    same = labels[:, None] == labels
    same &= np.tri(len(labels), dtype=bool).T[:, :, None]
    return same


def _runs(labels: Counts) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The order that puts equal labels together, and where the run of each place begins; int [draws, rows] each."""
    order = labels.argsort(0, kind="stable")
    ordered = np.take_along_axis(labels, order, axis=0)
    begins = np.zeros(labels.shape, np.intp)
    begins[1:] = np.where(ordered[1:] != ordered[:-1], np.arange(1, len(labels))[:, None], 0)
    return order, np.maximum.accumulate(begins, axis=0)


def running_max(values: NDArray[Any]) -> NDArray[Any]:
    """The largest value so far, along the draws; like ``values``."""
    highest = values.copy()
    shift = 1
    while shift < len(highest):
        highest[shift:] = np.maximum(highest[shift:], highest[:-shift])
        shift *= 2
    return highest


def top_counts(labels: Counts, places: int) -> list[Counts]:
    """The ``places`` largest vote counts after every draw, largest first; int [draws, rows] each.

    The i-th largest count is the highest level that i answers have reached. A draw that brings its answer to a level
    that i - 1 others have reached before is the one that lifts it there: so a second running count, of the levels,
    gives the places.
    """
    own = running_counts(labels)
    reached = running_counts(own - own.dtype.type(1))
    return [running_max(np.where(reached > place, own, own.dtype.type(0))) for place in range(places)]


def first_stop(view: View, most: int, stops: Stops, width: int = 8, cells: int = 1) -> tuple[Int, Bool]:
    """The first draw at which a rule stops, int32 [problems], and whether it did before the draws ended, bool.

    view: one arm, ``drawn`` = the draws there are. ``stops(rows, width)``, bool [width, rows], says of some rows
    whether the rule stops with each of their first ``width`` draws; it stops at ``most`` draws in any case. ``width``
    is the first block, ``cells`` the bytes that ``stops`` holds per row and pair of draws. Raises ValueError for a view
    of several arms.
    """
    if view.answers.shape[1] != 1:
        raise ValueError(f"stopping_index judges one arm, got a view of {view.answers.shape[1]}")
    available = view.drawn[:, 0].clip(max=most)
    index, stopped = available.copy(), available >= most
    longest = int(available.max(initial=0))
    rows = np.flatnonzero(available > 0)
    width = min(width, longest)
    while rows.size:
        step = max(1, CELLS // (cells * width * min(width, NARROW)))
        parts = [_part(rows, start, start + step, len(index)) for start in range(0, len(rows), step)]
        first = np.concatenate([_first(stops(part, width)) for part in parts])
        found = first <= available[rows]
        index[rows[found]] = first[found]
        stopped[rows[found]] = True
        rows = rows[~found & (available[rows] > width)]
        width = 2 * width if longest > 3 * width else longest
    return index, stopped


def _part(rows: NDArray[np.intp], start: int, stop: int, problems: int) -> Rows:
    """Some of the rows; as a slice, which needs no copy, where these are all rows there are."""
    return slice(start, stop) if len(rows) == problems else rows[start:stop]


def _first(stops: Bool) -> NDArray[np.int16]:
    """The number of draws at the first stop, int16 [rows], the largest int16 where there is none."""
    number = np.arange(1, len(stops) + 1, dtype=np.int16)[:, None]
    return np.where(stops, number, np.int16(2**15 - 1)).min(0)
