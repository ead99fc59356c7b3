"""The little of HTTP that the endpoints share: bodies with a limit, JSON out, and a client that goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from consilience.serve.errors import ApiError


class ClientGone(Exception):
    """The client closed its connection before it had the reply."""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body; raises ApiError (413) for one above ``most`` bytes, ClientGone for one that does not end."""
    refusal = ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    refusal.headers["connection"] = "close"  # what is left of it is not read
    stated = Headers(scope=scope).get("content-length", "")
    if stated.isdigit() and int(stated) > most:
        raise refusal
    parts, size = [], 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGone
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise refusal
        if not event.get("more_body", False):
            return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; cancel it, wait for its end and raise ClientGone when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        gone.cancel()
        await cancelled(task)


async def cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task that is not done, and wait until it is."""
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
    elif not task.cancelled():
        task.exception()  # nobody is left to hear of it, and asyncio would log that


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    """A whole reply of JSON."""
    await send_bytes(send, status, json.dumps(content, ensure_ascii=False).encode(), headers)


async def send_bytes(send: Send, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A whole reply of bytes that are JSON."""
    fields = {"content-type": "application/json", "content-length": str(len(body))} | (headers or {})
    await send({"type": "http.response.start", "status": status, "headers": encoded(fields)})
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError) -> None:
    """An error in OpenAI's shape."""
    await send_bytes(send, error.status, error.body, error.headers)


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
