"""The server on a socket, in this process or in several: a supervisor that binds once and replaces who dies.

All workers accept from the one socket, so a dead worker takes no connection with it but its own. What they share is in
the ledger: draws, claims and budgets; their metrics are files of one folder.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from tempfile import TemporaryDirectory

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from sqlalchemy.exc import SQLAlchemyError

from consilience.errors import ConsilienceError
from consilience.serve.app import create_app
from consilience.serve.core import Core, Settings
from consilience.serve.gate import LAST

BACKLOG = 2048
"""Connections that may wait to be accepted."""
KEPT = 75
"""Seconds that a connection may be idle: more than clients keep theirs, as one that is closed when it is used fails."""
IDLE = 5
"""Seconds that connections have to close once no request is in flight."""
LATE = 10.0
"""Seconds beyond all of its own after which a worker that was told to end is killed."""
LOOK = 0.1
"""Seconds between two looks at signals."""
PAUSES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Seconds before a worker is replaced, after so many that never came to serve."""


def say(text: str) -> None:
    """Tell who runs the server."""
    print(text, file=sys.stderr, flush=True)


def serve_on(
    listener: socket.socket,
    settings: Settings,
    *,
    host: str,
    grace: float,
    on_ready: Callable[[Core], None],
    alone: bool = True,
) -> None:
    """Serve in this process until SIGINT or SIGTERM; requests in flight then have ``grace`` seconds.

    Exits with status 0 after SIGTERM. ``alone``: no other process accepts from the socket.
    """
    app = create_app(settings, host)
    core, gate = app.state.core, app.state.gate
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=IDLE,
        timeout_keep_alive=KEPT,
        backlog=BACKLOG if alone else 1,  # asyncio accepts so many at once; the rest is for the others
    )

    class Announced(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listener.listen(BACKLOG)
            # what the imports made stays: a full collection that looks through it holds every request up for 50 ms
            gc.collect()
            gc.freeze()
            on_ready(core)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # until they are done the port stays open: new requests are told 503, and /readyz says it too
            await gate.drain(grace, hurry=lambda: self.force_exit)
            await super().shutdown(sockets)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again when all is done
    Announced(config).run(sockets=[listener])


def _work(listener: socket.socket, settings: Settings, host: str, grace: float, line: Connection) -> None:
    """A worker process: says over ``line`` as which owner it serves, and ends once the supervisor is gone."""

    def orphaned() -> None:
        with suppress(EOFError, OSError):
            line.recv()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=orphaned, daemon=True).start()
    with suppress(KeyboardInterrupt):
        serve_on(
            listener, settings, host=host, grace=grace, on_ready=lambda core: line.send(core.ledger.owner), alone=False
        )


@dataclass
class _Worker:
    process: BaseProcess
    line: Connection
    owner: str | None = None

    @property
    def serving(self) -> bool:
        return self.owner is not None


@dataclass
class Supervisor:
    """``count`` workers on one socket; `run` returns once all have ended after SIGTERM.

    `run` raises KeyboardInterrupt after SIGINT, ConsilienceError where the workers cannot start.
    """

    listener: socket.socket
    settings: Settings
    count: int
    host: str
    grace: float
    on_ready: Callable[[Core], None]
    _workers: list[_Worker] = field(default_factory=list)
    _signals: list[int] = field(default_factory=list)
    _failures: int = 0
    _announced: bool = False

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM."""
        own = self.settings.budget_name is None
        self.settings = replace(self.settings, budget_name=self.settings.budget_name or f"run {uuid.uuid4().hex}")
        core = Core(self.settings)  # what is wrong with the settings is said before a worker starts
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda given, _: self._signals.append(given))
        try:
            with TemporaryDirectory(prefix="consilience-") as folder:
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
                self._supervise(core, folder)
        finally:
            for account in core.shared if own else []:
                account.forget()
            asyncio.run(core.close())
        if signal.SIGINT in self._signals:
            raise KeyboardInterrupt

    def _supervise(self, core: Core, folder: str) -> None:
        try:
            self._workers = [self._start(place) for place in range(self.count)]
            while not self._signals:
                self._look()
                if not self._announced and all(worker.serving for worker in self._workers):
                    self._announced = True
                    self.on_ready(core)
                for place, worker in enumerate(self._workers):
                    if not worker.process.is_alive() and not self._signals:
                        if not self._announced:
                            raise ConsilienceError("a worker ended before it served; see above")
                        self._bury(worker, core, folder)
                        self._workers[place] = self._start(place)
        finally:
            self._end()

    def _start(self, place: int) -> _Worker:
        """A new worker; it has its share of what the settings allow at once."""
        given = self.settings
        shares = {name: max((getattr(given, name) + place) // self.count, 1) for name in ("concurrency", "queue")}
        context = get_context("spawn")
        line, other = context.Pipe()
        known = (self.listener, replace(given, **shares), self.host, self.grace, other)
        process = context.Process(target=_work, args=known, name="consilience-worker")
        process.start()
        other.close()
        return _Worker(process, line)

    def _look(self) -> None:
        """Wait a moment for news: of workers that serve now, of one that ended."""
        lines = [worker.line for worker in self._workers if not worker.serving]
        wait([*lines, *(worker.process.sentinel for worker in self._workers)], timeout=LOOK)
        for worker in self._workers:
            if not worker.serving and worker.line.poll():
                with suppress(EOFError, OSError):
                    worker.owner = worker.line.recv()
                    self._failures = 0
                    if self._announced:
                        say(f"worker {worker.process.pid} serves")

    def _bury(self, worker: _Worker, core: Core, folder: str) -> None:
        process = worker.process
        process.join()
        worker.line.close()
        say(f"worker {process.pid} ended ({_how(process.exitcode)}); another takes its place")
        mark_process_dead(process.pid, folder)  # type: ignore[no-untyped-call]
        try:
            core.ledger.bury_dead(worker.owner)
        except SQLAlchemyError as error:  # the others find out by themselves
            say(f"warning: the ledger was not told ({type(error).__name__})")
        if not worker.serving:
            self._failures += 1
        time.sleep(PAUSES[min(self._failures, len(PAUSES) - 1)])

    def _end(self) -> None:
        """Let all workers finish; a second SIGINT hurries them."""
        for worker in self._workers:
            worker.process.terminate()
        until = time.monotonic() + self.grace + LAST + IDLE + LATE
        hurried = False
        while (alive := [one.process for one in self._workers if one.process.is_alive()]) and time.monotonic() < until:
            if self._signals.count(signal.SIGINT) > 1 and not hurried:
                hurried = True
                for process in alive:
                    os.kill(process.pid or 0, signal.SIGINT)
            wait([process.sentinel for process in alive], timeout=LOOK)
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
