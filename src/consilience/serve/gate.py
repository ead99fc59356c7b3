"""How many requests are answered at once, and how the last of them end when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from consilience.serve.errors import ApiError

LAST = 5.0
"""Seconds that cancelled requests have to write down what they drew."""
LOOK = 0.05
"""Seconds between two looks at whether all are done, or somebody is in a hurry."""


def ending() -> ApiError:
    """What a request is told that the end of the server cuts short, or comes too late."""
    text = "the server is shutting down; draws that came are kept, an equal request with the same seed finds them"
    return ApiError(503, text, code="shutting_down", headers={"retry-after": "1", "connection": "close"})


class Gate:
    """Lets at most ``room`` requests in at once, and none once the server is ``draining``.

    ``ended`` says that those inside were cut short.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.draining = False
        self.ended = False
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def busy(self) -> int:
        """How many requests are inside."""
        return len(self._tasks)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """The running task is inside while the block runs; raises ApiError: 429 without room, 503 at the end."""
        if self.draining:
            raise ending()
        if self.busy >= self.room:
            text = f"the server is answering {self.room} requests, which is all it takes at once: try again"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"})
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Let no more in, wait up to ``seconds`` for those inside, or until in a ``hurry``, then cut the rest short."""
        self.draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._tasks and loop.time() < until and not hurry():
            await asyncio.wait(self._tasks, timeout=min(LOOK, max(until - loop.time(), 0)))
        await self.end()

    async def end(self) -> None:
        """Cancel the requests inside and wait until they have written down what they drew."""
        self.draining = self.ended = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LAST)
