"""The line that a training run shows on standard error: loss, steps per second and the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY = 10.0
"""Seconds between lines where standard error is not a terminal."""


class Line:
    """Redrawn in a terminal; elsewhere a plain line now and then; nothing where it is not ``shown``."""

    def __init__(self, done: int, steps: int, shown: bool) -> None:
        console = Console(stderr=True)
        self._plain = shown and not console.is_terminal
        self._steps = steps
        self._begun, self._first, self._last = time.monotonic(), done, time.monotonic()
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} steps/s  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._plain,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, loss="-", speed="-")

    def __enter__(self) -> Line:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def at(self, step: int) -> None:
        """A step is done."""
        self._bar.update(self._task, completed=step)

    def measured(self, step: int, loss: float) -> None:
        """The mean loss is known anew."""
        now = time.monotonic()
        speed = (step - self._first) / max(now - self._begun, 1e-9)
        self._bar.update(self._task, completed=step, loss=f"{loss:.4g}", speed=f"{speed:.1f}")
        if self._plain and (now - self._last >= PLAIN_EVERY or step == self._steps):
            self._last = now
            left = (self._steps - step) / max(speed, 1e-9)
            text = f"step {step}/{self._steps}  loss {loss:.4g}  {speed:.1f} steps/s  {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)
