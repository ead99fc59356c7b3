"""A crew of tasks, one per connection, that works through the calls of many waves.

A task for every call that only waits would cost more than the waiting: a dozen coroutines and futures each, which the
garbage collector walks again and again. A call that is not yet its turn is two words in a queue here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

Do = Callable[[Any], Awaitable[Iterable[Any]]]
"""Makes one call, given by its item, and returns the items of the further calls that it turned out to need."""


class _Wave:
    """The calls of one `Crew.run`: how many have not ended, which tasks are at them, what went wrong."""

    __slots__ = ("abandoned", "do", "ended", "errors", "left", "tasks")

    def __init__(self, do: Do) -> None:
        self.do = do
        self.left = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.errors: list[BaseException] = []
        self.abandoned = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self, calls: int) -> None:
        """So many calls have ended, or will not be made."""
        self.left -= calls
        if not self.left and not self.ended.done():
            self.ended.set_result(None)


class Crew:
    """At most ``size`` calls under way, first come first served, not counting those that `rest`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._waiting: deque[tuple[_Wave, Any]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._resting = 0

    async def run(self, do: Do, items: Iterable[Any]) -> list[BaseException]:
        """Make a call per item, and those they turn out to need, all to their end; returns what they raised.

        When it is cancelled, calls under way are cancelled too and have ended before it raises CancelledError.
        """
        wave = _Wave(do)
        self._add(wave, items)
        cancelled: asyncio.CancelledError | None = None
        while wave.left:
            try:
                await asyncio.wait([wave.ended])
            except asyncio.CancelledError as error:
                cancelled = error
                self._abandon(wave)
        if cancelled is not None:
            raise cancelled
        return wave.errors

    async def rest(self, seconds: float) -> None:
        """Sleep between two attempts of a call; meanwhile another call may start."""
        counted = asyncio.current_task() in self._tasks
        self._resting += counted
        self._man()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting -= counted

    def _add(self, wave: _Wave, items: Iterable[Any]) -> None:
        before = len(self._waiting)
        self._waiting.extend((wave, item) for item in items)
        wave.left += len(self._waiting) - before
        self._man()

    def _abandon(self, wave: _Wave) -> None:
        wave.abandoned = True
        before = len(self._waiting)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not wave)
        for task in wave.tasks:
            task.cancel()
        wave.end(before - len(self._waiting))

    def _surplus(self) -> int:
        return len(self._tasks) - self._resting - self.size

    def _man(self) -> None:
        """Start tasks for what waits."""
        for _ in range(min(len(self._waiting), -self._surplus())):
            task = asyncio.get_running_loop().create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._man()  # it may have been cancelled, with its wave, while others wait

    async def _work(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while self._waiting and self._surplus() <= 0:
            wave, item = self._waiting.popleft()
            wave.tasks.add(task)
            try:
                further = await wave.do(item)
                if further and not wave.abandoned:
                    self._add(wave, further)
            except BaseException as error:
                wave.errors.append(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                wave.tasks.discard(task)
                wave.end(1)
