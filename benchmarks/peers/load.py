"""A closed loop of HTTP clients on bare asyncio sockets, in a process of its own; prints one JSON object.

Each client sends the same chat request again as soon as it has the whole reply. A reply that is not 200, or
does not hold the answer, is an error. A server that closes the connection after its reply gets a new one; opening it
is part of the next latency. The clients start evenly spread over ``--spread`` seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any


def request_of(host: str, path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a request, with the headers of an OpenAI client."""
    sent = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {host}",
        "Accept: application/json",
        "Accept-Encoding: gzip, deflate",
        "Content-Type: application/json",
        "Authorization: Bearer any",
        "User-Agent: benchmark",
        f"Content-Length: {len(sent)}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + sent


class Client(asyncio.Protocol):
    """One connection: gives each whole reply to the future that waits for it."""

    def __init__(self) -> None:
        self.buffer = b""
        self.reply: asyncio.Future[tuple[int, bytes]] | None = None
        self.open = True

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(ConnectionError("the connection ended within a reply"))

    def data_received(self, data: bytes) -> None:
        self.buffer = self.buffer + data if self.buffer else data
        head, blank, body = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        fields = head.lower()
        if b"transfer-encoding: chunked" in fields:
            whole = body.endswith(b"0\r\n\r\n")
        else:
            place = fields.index(b"content-length:") + len(b"content-length:")
            whole = len(body) >= int(fields[place : place + 20].split(b"\r\n")[0])
        if whole and self.reply is not None:
            self.buffer = b""
            if b"connection: close" in fields or fields.startswith(b"http/1.0"):
                self.open = False
                self.transport.close()
            self.reply.set_result((int(head[9:12]), body))


async def client(port: int, request: bytes, start: float, end: float, taken: list[float], errors: list[str]) -> None:
    """Ask from ``start`` to ``end`` (loop time), and note each reply; those under way at the end are waited for."""
    loop = asyncio.get_running_loop()
    connection: Client | None = None
    await asyncio.sleep(start - loop.time())
    while (began := loop.time()) < end:
        try:
            if connection is None or not connection.open:
                _, connection = await loop.create_connection(Client, "127.0.0.1", port)
            connection.reply = loop.create_future()
            connection.transport.write(request)
            status, body = await connection.reply
        except (OSError, ConnectionError) as error:
            errors.append(f"{type(error).__name__}")
            connection = None
            await asyncio.sleep(0.01)
            continue
        if status != 200 or b"42" not in body:
            errors.append(f"HTTP {status}")
        else:
            taken.append(loop.time() - began)
    if connection is not None:
        connection.transport.close()


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """What the clients saw."""
    body = {"model": options.model, "messages": [{"role": "user", "content": "What is 6 x 7?"}], "temperature": 0.7}
    request = request_of(f"127.0.0.1:{options.port}", "/v1/chat/completions", body)
    taken: list[float] = []
    errors: list[str] = []
    start = asyncio.get_running_loop().time() + 0.05
    end = start + options.spread + options.seconds
    step = options.spread / options.clients
    own = time.process_time()
    await asyncio.gather(
        *(client(options.port, request, start + n * step, end, taken, errors) for n in range(options.clients))
    )
    return {
        "seconds": asyncio.get_running_loop().time() - start,
        "taken": [round(seconds * 1e6) for seconds in taken],
        "errors": len(errors),
        "error": errors[0] if errors else None,
        "cpu": time.process_time() - own,
    }


def main() -> None:
    """Ask and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--spread", type=float, default=0.0)
    print(json.dumps(asyncio.run(load(parser.parse_args()))))


if __name__ == "__main__":
    main()
