"""What long work shows on standard error: the live line of a run, and counters."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from consilience.driver import Progress
from consilience.text.session import Session

Item = TypeVar("Item")

PLAIN_EVERY = 10.0
"""Seconds between lines where standard error is not a terminal."""


class ProgressLine:
    """Shows a run while it works: redrawn in a terminal, a line now and then in a log."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.console = Console(stderr=True)
        self.line = ""
        self._live = Live(console=self.console, refresh_per_second=8, transient=True)
        self._tty = self.console.is_terminal
        self._last = time.monotonic()

    def __enter__(self) -> ProgressLine:
        if self._tty:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._tty:
            self._live.stop()

    def update(self, progress: Progress, sessions: Sequence[Session]) -> None:
        """Take in how far the run is."""
        self.line = describe(progress, sessions, self.most)
        now = time.monotonic()
        if self._tty:
            self._live.update(Text(self.line))
        elif now - self._last >= PLAIN_EVERY:
            self._last = now
            print(self.line, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def describe(progress: Progress, sessions: Sequence[Session], most: int) -> str:
    """The line itself."""
    spent = sessions[0].account.spent
    parts = [
        f"answered {progress.answered}/{progress.problems}",
        f"draws {progress.judged:,}",
        f"tokens {spent.tokens:,}",
    ]
    if any(session.source.priced and session.price is not None for session in sessions):
        parts.append(f"${spent.cost:.4f}")
    if progress.finished:
        parts.append(f"saved {progress.saved / (progress.finished * most):.0%}")
    if failed := sum(session.failed for session in sessions):
        parts.append(f"failed {failed}")
    parts.append(f"{time.monotonic() - progress.started:.0f} s")
    return " · ".join(parts)


class Counter:
    """Counts work on standard error, ``reading: 1,200 problems``; in a log a line now and then."""

    def __init__(self, text: str, unit: str, total: int | None = None) -> None:
        columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f}" + f" {unit}"))
        bar = () if total is None else (BarColumn(), TimeRemainingColumn())
        self._plain, self._unit, self._last = text, unit, time.monotonic()
        self._tty = shown = sys.stderr.isatty()
        self._progress = Bars(*columns, *bar, console=Console(stderr=True), transient=True, disable=not shown)
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Counter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int) -> None:
        """So much is done."""
        if self._tty:
            self._progress.update(self._task, completed=done)
        elif time.monotonic() - self._last >= PLAIN_EVERY:
            self._last = time.monotonic()
            print(f"{self._plain}: {done:,} {self._unit}", file=sys.stderr, flush=True)

    def count(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, counted as they pass."""
        for number, item in enumerate(items, 1):
            yield item
            self.update(number)
