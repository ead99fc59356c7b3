"""Which names a server without keys answers to, so that no page of the web can use it through a visitor's browser.

A page may let its own name point to 127.0.0.1 after it was loaded (DNS rebinding); what it then asks of that name is
asked of this machine, but the ``Host`` header still says the page's name. A page that asks this machine by its address
is named by the ``Origin`` header.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

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


def origin_of(origin: str) -> str:
    """The name in an ``Origin`` header; empty for one that has none, or cannot be read."""
    try:
        return (urlsplit(origin).hostname or "").lower()
    except ValueError:
        return ""


class OwnNames:
    """Passes a request on if its ``Host`` and its ``Origin`` are of this machine or of what the server listens on.

    Others get 403; a request without either header comes from no page.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app: Callable[[Scope, Receive, Send], Awaitable[None]] = app
        self._host = host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and (refused := self._refused(Headers(scope=scope))) is not None:
            await send_error(send, refused)
            return
        await self._app(scope, receive, send)

    def _refused(self, headers: Headers) -> ApiError | None:
        if (stated := headers.get("host")) and not self._own(name := name_of(stated)):
            text = f"without keys this server answers to localhost and {self._host}, not to {name[:100]!r}"
            return ApiError(403, text, code="host_not_allowed")
        if (origin := headers.get("origin")) and not self._own(origin_of(origin)):
            text = f"without keys pages of {origin[:100]!r} may not use this server"
            return ApiError(403, text, code="origin_not_allowed")
        return None

    def _own(self, name: str) -> bool:
        return name == self._host or loopback(name)
