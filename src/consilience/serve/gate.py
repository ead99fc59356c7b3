"""How many requests are answered at once, what their bodies may take before, and how the last end with the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from consilience.serve.errors import ApiError
from consilience.serve.http import encoded, read_body

LAST = 5.0
"""Seconds that cancelled requests have to write down what they drew."""
FIRST = 30.0
"""Seconds that a body has to come, and one more for every ``SLOWEST`` bytes of it that came."""
SLOWEST = 64 * 1024
BODIES = 8
"""How many of the largest bodies that are taken may be on their way together, in bytes."""
LINGER = 2.0
"""Seconds for which what is left of a refused body is read and dropped: else its client may miss the refusal."""
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

    def look(self) -> None:
        """Raise what a request that came now would be refused with: ApiError, 429 without room, 503 at the end."""
        if self.draining:
            raise ending()
        if self.busy >= self.room:
            text = f"the server is answering {self.room} requests, which is all it takes at once: try again"
            raise ApiError(429, text, code="queue_full", headers={"retry-after": "1"})

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """The running task is inside while the block runs; raises ApiError as `look`."""
        self.look()
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


class Uploads:
    """Reads the bodies of requests that have no place inside yet, within bounds of time and of memory.

    ``held`` is how many bytes the bodies on their way take now; a body of more than ``most`` bytes is refused.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """A whole body; raises ApiError (408, 413, 429), ClientGone where its client goes away."""
        loop = asyncio.get_running_loop()
        until, mine = loop.time() + FIRST, 0

        async def within() -> Message:
            nonlocal until, mine
            async with asyncio.timeout_at(until):
                message = await receive()
            size = len(message.get("body", b""))
            until, mine, self.held = until + size / SLOWEST, mine + size, self.held + size
            if message.get("more_body") and mine <= self.most and self.held > BODIES * self.most:
                text = "too many large bodies are on their way: try again"
                headers = {"retry-after": "1", "connection": "close"}
                raise ApiError(429, text, code="uploads_full", headers=headers)
            return message

        try:
            return await read_body(scope, within, self.most)
        except TimeoutError:
            text = f"the body did not come: it has {FIRST:g} s, and one more for every {SLOWEST // 1024} KiB"
            raise ApiError(408, text, code="body_timeout", headers={"connection": "close"}) from None
        finally:
            self.held -= mine


async def send_parting(receive: Receive, send: Send, error: ApiError) -> None:
    """An error after which the connection ends, although its client may still be sending a body."""
    fields = {"content-type": "application/json", "content-length": str(len(error.body))} | error.headers
    await send({"type": "http.response.start", "status": error.status, "headers": encoded(fields)})
    await send({"type": "http.response.body", "body": error.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body", "body": b""})
