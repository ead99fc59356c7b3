"""The page at ``/``: three files of the package, and what they ask this server for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from consilience.serve.core import Core
from consilience.serve.errors import ApiError
from consilience.serve.page.recent import Recent

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
"""Nothing on the page comes from another host, and nothing that is written in a text can run."""
PRIVATE = HEADERS | {"cache-control": "no-store"}
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3.5" fill="#1f5fa8"/>'
    '<path d="M3.5 12V9M8 12V4M12.5 12V7.5" stroke="#fff" stroke-width="2.5" stroke-linecap="round"/></svg>'
)


def routes(core: Core, recent: Recent) -> list[Route]:
    """``/`` and what is under ``/page``; `recent` is to be told of every request."""

    async def server(_: Request) -> Response:
        """What the page has to know before it may ask for more; needs no key."""
        return JSONResponse({"keyed": len(core.keyring) > 0, "house": core.house}, headers=PRIVATE)

    def owner(request: Request) -> str:
        client = core.keyring.identify(request.headers.get("authorization", ""))
        return client.shown if len(core.keyring) else ""

    async def requests(request: Request) -> Response:
        """The latest requests and totals: of the key where there are keys, else of all."""
        client = core.keyring.identify(request.headers.get("authorization", ""))
        shown = recent.shown(owner(request))
        return JSONResponse(shown | {"policy": core.spec_of(None, client)}, headers=PRIVATE)

    async def one(request: Request) -> Response:
        """One of the latest requests with the texts of its draws."""
        found = recent.one(owner(request), request.path_params["id"])
        if found is None:
            raise ApiError(404, "this request is not kept, or no longer", code="not_kept")
        return JSONResponse(found, headers=PRIVATE)

    return [
        Route("/", _file("page.html", "text/html"), methods=["GET"]),
        Route("/page/page.css", _file("page.css", "text/css"), methods=["GET"]),
        Route("/page/page.js", _file("page.js", "text/javascript"), methods=["GET"]),
        Route("/page/icon.svg", _fixed(ICON.encode(), "image/svg+xml"), methods=["GET"]),
        Route("/page/server", server, methods=["GET"]),
        Route("/page/requests", _refusing(requests), methods=["GET"]),
        Route("/page/requests/{id}", _refusing(one), methods=["GET"]),
    ]


def _file(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    return _fixed(files(__name__).joinpath(name).read_bytes(), kind)


def _fixed(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def give(_: Request) -> Response:
        return Response(body, headers=HEADERS, media_type=kind)

    return give


def _refusing(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The endpoint, with its refusals in OpenAI's shape."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ApiError as error:
            headers: dict[str, Any] = PRIVATE | error.headers
            return Response(error.body, error.status, headers, "application/json")

    return guarded
