"""Server-sent events: heartbeats and progress while the votes come in, then the winner's text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from starlette.types import Send

from consilience.serve.core import Answer, OnProgress
from consilience.serve.errors import ApiError, of_mishap
from consilience.serve.http import cancelled, encoded
from consilience.serve.replies import Replies

HEARTBEAT = b": votes are coming in\n\n"
DONE = b"data: [DONE]\n\n"
WAITING = 16
"""Progress events that wait for a client that reads slowly; beyond them the oldest is left out."""

Answering = Callable[[OnProgress | None], Coroutine[Any, Any, Answer]]


class EventStream:
    """The reply to one request as events; the status line waits until there is something to say."""

    def __init__(self, send: Send, replies: Replies, heartbeat: float) -> None:
        self._send = send
        self._replies = replies
        self._heartbeat = heartbeat
        self.started = False

    async def run(self, answering: Answering) -> None:
        """Send what `answering` comes to; raises ApiError while nothing has been sent, else it becomes an event."""
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        told: OnProgress | None = None
        if self._replies.ask.progress:

            def told(votes: dict[int, dict[str, int]], judged: int) -> None:
                if events.qsize() == WAITING:
                    events.get_nowait()
                events.put_nowait(self._replies.progress(votes, judged))

        task = asyncio.ensure_future(answering(told))
        try:
            await self._wait(task, events)
            while not events.empty():
                await self._event(events.get_nowait())
            for chunk in self._replies.chunks(task.result()):
                await self._event(chunk)
        except Exception as error:
            if not self.started:
                raise
            await self._event((error if isinstance(error, ApiError) else of_mishap(error)).content)
        finally:
            await cancelled(task)
        await self._write(DONE, last=True)

    async def _wait(self, task: asyncio.Future[Answer], events: asyncio.Queue[dict[str, Any]]) -> None:
        """Pass progress on until the answer is there; a comment where nothing happened for a while."""
        while not task.done():
            event = asyncio.ensure_future(events.get())
            try:
                both: set[asyncio.Future[Any]] = {task, event}
                await asyncio.wait(both, timeout=self._heartbeat, return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    await self._event(event.result())
                elif not task.done():
                    await self._write(HEARTBEAT)
            finally:
                event.cancel()

    async def _event(self, data: dict[str, Any]) -> None:
        await self._write(b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n")

    async def _write(self, body: bytes, last: bool = False) -> None:
        if not self.started:
            self.started = True
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "x-request-id": self._replies.id,
            }
            await self._send({"type": "http.response.start", "status": 200, "headers": encoded(headers)})
        await self._send({"type": "http.response.body", "body": body, "more_body": not last})
