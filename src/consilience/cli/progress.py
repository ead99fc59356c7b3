"""The live line of a run on standard error: answered, draws, tokens, money, saved so far."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from consilience.driver import Progress
from consilience.text.session import Session

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

    def update(self, progress: Progress, session: Session) -> None:
        """Take in how far the run is."""
        self.line = describe(progress, session, self.most)
        now = time.monotonic()
        if self._tty:
            self._live.update(Text(self.line))
        elif now - self._last >= PLAIN_EVERY:
            self._last = now
            print(self.line, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def describe(progress: Progress, session: Session, most: int) -> str:
    """The line itself."""
    spent = session.account.spent
    parts = [
        f"answered {progress.answered}/{progress.problems}",
        f"draws {progress.judged:,}",
        f"tokens {spent.tokens:,}",
    ]
    if session.source.priced and session.price is not None:
        parts.append(f"${spent.cost:.4f}")
    if progress.finished:
        parts.append(f"saved {progress.saved / (progress.finished * most):.0%}")
    if session.failed:
        parts.append(f"failed {session.failed}")
    parts.append(f"{time.monotonic() - progress.started:.0f} s")
    return " · ".join(parts)
