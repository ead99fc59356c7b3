"""``consilience serve``."""

from __future__ import annotations

import socket
from typing import Any

from consilience.errors import InputError


def run(given: dict[str, Any], *, host: str, port: int, grace: float, workers: int) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight then have ``grace`` seconds, what they drew is kept."""
    try:
        from consilience.serve.core import Core, Settings
        from consilience.serve.hosts import loopback
        from consilience.serve.workers import Supervisor, say, serve_on
    except ModuleNotFoundError as error:
        raise InputError(f"`serve` needs {error.name}: pip install 'consilience[serve]'") from error

    listener = _listen(host, port)
    address = f"http://{_shown(host)}:{listener.getsockname()[1]}/v1"

    def announce(core: Core) -> None:
        if not len(core.keyring) and not loopback(host):
            say("warning: no keys are configured, so whoever reaches this address can spend: see [serve.keys.NAME]")
        if given.get("budget_name") is not None and not core.shared:
            say("warning: --budget-name without a cap shares nothing: give --budget, or keys a budget")
        several = f", {workers} workers" if workers > 1 else ""
        say(f"serving {address}, policy {core.policy}, upstream {core.source.endpoint}{several}")

    if workers > 1:
        Supervisor(listener, Settings(**given), workers, host, grace, announce).run()
    else:
        serve_on(listener, Settings(**given), host=host, grace=grace, on_ready=announce)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # every connection inherits it; asyncio sets it only on sockets that name their protocol, which this does not
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise InputError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
