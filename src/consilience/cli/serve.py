"""``consilience serve``."""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import Any

from consilience.errors import InputError

IDLE = 5
"""Seconds that connections have to close once no request is in flight."""


def run(given: dict[str, Any], *, host: str, port: int, grace: float) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight then have ``grace`` seconds, what they drew is kept."""
    try:
        import uvicorn

        from consilience.serve.app import create_app
        from consilience.serve.core import Settings
    except ModuleNotFoundError as error:
        raise InputError(f"`serve` needs {error.name}: pip install 'consilience[serve]'") from error

    listener = _listen(host, port)
    app = create_app(Settings(**given))
    core, gate = app.state.core, app.state.gate
    address = f"http://{_shown(host)}:{listener.getsockname()[1]}/v1"
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=IDLE
    )

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            _say(f"serving {address}, policy {core.policy}, upstream {core.source.endpoint}")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # until they are done the port stays open: new requests are told 503, and /readyz says it too
            await gate.drain(grace, hurry=lambda: self.force_exit)
            await super().shutdown(sockets)

    if not len(core.keyring) and not _loopback(host):
        _say("warning: no keys are configured, so whoever reaches this address can spend: see [serve.keys.NAME]")
    Announced(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
