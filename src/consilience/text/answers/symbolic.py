"""Symbolic equality in worker processes that can be killed.

A computer algebra system can hang or eat all memory on an answer a model made up, and signals and threads cannot stop
it safely; a process can be killed. The workers are plain ``subprocess`` children running ``_worker.py`` by path and
speaking length-prefixed JSON over pipes: unlike ``multiprocessing`` (spawn and forkserver import the user's main
module again, fork copies locked locks), this works from a notebook, a thread, an event loop or a script without a
``__main__`` guard. Nothing is started before the first symbolic comparison.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from .equality import MAX_SYMBOLIC, Equality

_WORKER = Path(__file__).with_name("_worker.py")
_START_SECONDS = 120.0  # to import the computer algebra system, on a busy machine
_CACHE_PAIRS = 65_536


class SymbolicPool:
    """Up to ``size`` worker processes, started when needed; every comparison is bounded by ``timeout`` seconds.

    A worker that is stuck is killed and replaced, one that crashed is replaced; the pair is UNKNOWN. Decided and
    timed-out pairs are kept (symmetric, least recently used out first), a crash is tried again. Safe from any thread;
    a forked child starts workers of its own.
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        timeout: float = 5.0,
        memory_bytes: int = 2 << 30,
        cache_pairs: int = _CACHE_PAIRS,
        command: Sequence[str] | None = None,
    ) -> None:
        """``size``: workers, by default the cores up to 4. ``command`` replaces the worker program (for tests).

        Raises ValueError for a size or timeout that is not positive.
        """
        size = min(4, os.cpu_count() or 1) if size is None else size
        if size < 1 or timeout <= 0:
            raise ValueError(f"a symbolic pool needs size >= 1 and timeout > 0, got size={size}, timeout={timeout}")
        self.size, self.timeout = size, timeout
        self._cache_pairs = cache_pairs
        self._command = list(command) if command else [sys.executable, "-P", str(_WORKER)]
        self._settings = {"memory_bytes": memory_bytes, "cpu_seconds": int(timeout) + 10}
        self._forget()
        _POOLS.add(self)

    def _forget(self) -> None:
        """A fresh state without workers; in a forked child the parent's workers are left alone."""
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self.size)
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._pairs: OrderedDict[tuple[str, str], Equality] = OrderedDict()

    def compare(self, a: str, b: str) -> Equality:
        """Whether two LaTeX answers are equal by math-verify, in either direction; UNKNOWN if that was not decided.

        DIFFERENT means that both were parsed and no equality was established. Raises RuntimeError if the worker
        cannot be started, because math-verify does not import.
        """
        if max(len(a), len(b)) > MAX_SYMBOLIC:
            return Equality.UNKNOWN
        pair = (a, b) if a <= b else (b, a)
        with self._lock:
            if pair in self._pairs:
                self._pairs.move_to_end(pair)
                return self._pairs[pair]
        outcome = self._ask(*pair)
        if outcome is None:
            return Equality.UNKNOWN
        with self._lock:
            self._pairs[pair] = outcome
            while len(self._pairs) > self._cache_pairs:
                self._pairs.popitem(last=False)
        return outcome

    def _ask(self, a: str, b: str) -> Equality | None:
        """One comparison by a worker of its own for the time; None if the worker crashed."""
        with self._free:
            worker = self._take()
            try:
                reply = worker.request({"a": a, "b": b}, self.timeout)
            except BaseException:
                self._discard(worker)
                raise
            if reply is None:
                self._discard(worker)
                return Equality.UNKNOWN if worker.timed_out else None
            with self._lock:
                if worker in self._all and not worker.timed_out:
                    self._idle.append(worker)
            return Equality(reply["outcome"])

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.alive():
                    return worker
                self._all.discard(worker)
                worker.kill()
            worker = _Worker(self._command)
            self._all.add(worker)
        for attempt in (1, 2):
            greeting = worker.request(self._settings, _START_SECONDS)
            if greeting is not None and greeting.get("ready"):
                return worker
            self._discard(worker)
            if greeting is not None or attempt == 2:
                break
            with self._lock:
                worker = _Worker(self._command)
                self._all.add(worker)
        reason = (greeting or {}).get("error", "it ended before it was ready")
        raise RuntimeError(f"the worker for symbolic equality did not start: {reason}; is math-verify installed?")

    def _discard(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()

    def worker_pids(self) -> list[int]:
        """The process ids of the workers that are running."""
        with self._lock:
            return sorted(worker.pid for worker in self._all)

    def close(self) -> None:
        """Kill and reap every worker; comparisons under way end as UNKNOWN. A later comparison starts workers again."""
        with self._lock:
            workers, self._all, self._idle = self._all, set(), []
        for worker in workers:
            worker.kill()

    def __enter__(self) -> SymbolicPool:
        """The pool itself; it is closed on exit."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the pool."""
        self.close()


class _Worker:
    """One child process; one request at a time."""

    def __init__(self, command: list[str]) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C in a terminal reaches the user's program, not the workers
        )
        self.pid = self._process.pid
        self.timed_out = False
        self._reaping = threading.Lock()
        self._watching = threading.Lock()
        self._asked = False

    def alive(self) -> bool:
        return self._process.poll() is None

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """The reply; None if the worker was killed at the timeout, crashed, or said something that is no message."""
        self._asked = True
        watchdog = threading.Timer(timeout, self._expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            _send(self._process.stdin, message)
            return _receive(self._process.stdout)
        except (OSError, ValueError):
            return None
        finally:
            watchdog.cancel()
            with self._watching:
                self._asked = False

    def _expire(self) -> None:
        with self._watching, contextlib.suppress(OSError):
            if self._asked:  # else the reply came at the last moment
                self.timed_out = True
                self._process.kill()

    def kill(self) -> None:
        """SIGKILL, reap, close the pipes; safe to call again and from several threads."""
        with self._reaping:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()

    def __del__(self) -> None:
        self.close_pipes()

    def close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _send(pipe: IO[bytes] | None, message: dict[str, Any]) -> None:
    assert pipe is not None
    body = json.dumps(message).encode()
    data = memoryview(len(body).to_bytes(4, "big") + body)
    while data:
        data = data[pipe.write(data) :]


def _receive(pipe: IO[bytes] | None) -> dict[str, Any] | None:
    assert pipe is not None
    head = _read_exactly(pipe, 4)
    body = _read_exactly(pipe, int.from_bytes(head, "big")) if head else None
    message = json.loads(body) if body else None
    return message if isinstance(message, dict) else None


def _read_exactly(pipe: IO[bytes], count: int) -> bytes | None:
    """``count`` bytes, or None at the end of the stream."""
    parts = b""
    while len(parts) < count:
        part = pipe.read(count - len(parts))
        if not part:
            return None
        parts += part
    return parts


_POOLS: weakref.WeakSet[SymbolicPool] = weakref.WeakSet()
_shared: SymbolicPool | None = None
_shared_lock = threading.Lock()


def shared_pool() -> SymbolicPool:
    """The pool that comparisons use by default, made at the first call."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = SymbolicPool()
        return _shared


def close_pools() -> None:
    """Close every pool of this process; runs by itself at exit."""
    for pool in list(_POOLS):
        pool.close()


def _after_fork() -> None:
    """In a forked child: forget the parent's workers (without killing them) and renew every lock."""
    global _shared_lock
    _shared_lock = threading.Lock()
    for pool in list(_POOLS):
        for worker in pool._all:
            worker._process.returncode = 0  # not our child: never to be waited for
            worker.close_pipes()
        pool._forget()


atexit.register(close_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
