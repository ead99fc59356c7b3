"""A bare reverse proxy: aiohttp on both sides, one process, nothing but bytes; prints its port.

It reads the request, sends it on over kept connections and streams the reply back. It knows no keys, limits, counts or
errors: what a Python proxy costs that does nothing else.
"""

from __future__ import annotations

import argparse

import aiohttp
from aiohttp import web

HOP = {"connection", "keep-alive", "transfer-encoding", "host", "server", "date", "content-length"}


def app_of(upstream: str) -> web.Application:
    """The application that sends everything to ``upstream``."""

    async def relay(request: web.Request) -> web.StreamResponse:
        session: aiohttp.ClientSession = request.app[SESSION]
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        body = await request.read()
        async with session.request(request.method, upstream + request.path_qs, data=body, headers=headers) as got:
            kept = {name: value for name, value in got.headers.items() if name.lower() not in HOP}
            reply = web.StreamResponse(status=got.status, headers=kept)
            reply.content_length = got.content_length
            await reply.prepare(request)
            async for piece in got.content.iter_any():
                await reply.write(piece)
            await reply.write_eof()
            return reply

    async def session(app: web.Application):
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False) as opened:
            app[SESSION] = opened
            yield

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", relay)
    return app


SESSION = web.AppKey("session", aiohttp.ClientSession)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--upstream", required=True, help="http://HOST:PORT")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    web.run_app(app_of(options.upstream), host="127.0.0.1", port=options.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
