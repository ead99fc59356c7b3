"""Which names a server without keys answers to, so that no page of the web can use it through a visitor's browser.

A page may let its own name point to 127.0.0.1 after it was loaded (DNS rebinding); what it then asks of that name is
asked of this machine, but the ``Host`` header still says the page's name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from consilience.serve.errors import ApiError
from consilience.serve.http import send_error


def loopback(host: str) -> bool:
    """Whether a name or an address, without a port or brackets, is this machine and reached from it alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def name_of(host: str) -> str:
    """The name in a ``Host`` header: without its port, in small letters, an IPv6 address without its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class OwnNames:
    """Passes a request on if its ``Host`` is of this machine or is what the server was told to listen on, else 403."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app: Callable[[Scope, Receive, Send], Awaitable[None]] = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; one without the header comes from no browser."""
        if scope["type"] == "http" and (stated := Headers(scope=scope).get("host")):
            name = name_of(stated)
            if name != self._host and not loopback(name):
                text = f"without keys this server answers to localhost and {self._host}, not to {name[:100]!r}"
                await send_error(send, ApiError(403, text, code="host_not_allowed"))
                return
        await self._app(scope, receive, send)
