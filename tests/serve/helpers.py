"""A server in front of a scripted upstream, both real: uvicorn and sockets on loopback."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn
from starlette.applications import Starlette

from consilience.serve.core import Core


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """Serve an application from a thread; gives its origin."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


class Served:
    """A running server: where it is, its core, and clients for it."""

    def __init__(self, origin: str, core: Core) -> None:
        self.origin = origin
        self.url = f"{origin}/v1"
        self.core = core
        self._clients: dict[str, openai.OpenAI] = {}

    def client(self, key: str = "anything", **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, **({"max_retries": 0} | more))

    def ask(self, content: Any = "6 x 7?", model: str = "m", key: str = "anything", **more: Any) -> Any:
        """A chat completion of one message of a user; its client lives as long as the test."""
        if key not in self._clients:
            self._clients[key] = self.client(key)
        messages = [{"role": "user", "content": content}]
        return self._clients[key].chat.completions.create(model=model, messages=messages, **more)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()


def raw(origin: str, request: bytes, seconds: float = 10) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; the status, headers and body of the first reply."""
    host, port = origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            piece = connection.recv(65536)
            assert piece, received
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
        while len(body) < int(headers["content-length"]):
            piece = connection.recv(65536)
            assert piece, (head, body)
            body += piece
    return int(lines[0].split()[1]), headers, body


def post(origin: str, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], Any]:
    """POST bytes as JSON; the status, headers and the JSON of the reply."""
    lines = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    status, got, content = raw(origin, head.encode() + body)
    return status, got, json.loads(content)


def eventually(holds: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether something comes true within a generous time."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()
