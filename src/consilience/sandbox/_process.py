"""One confined process: start it, hand it its task, read what it says within bounds, and see it dead."""

from __future__ import annotations

import contextlib
import importlib
import marshal
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from consilience.errors import SandboxUnavailable

from .limits import Limits

_START = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import child.main; del sys.path[0]; "
_START += "child.main.main()"
_OVERHEAD = 64 << 10  # bytes of reports that are no results: tokens, call numbers, errors
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known of a run: its reports (fields of each line), what it printed, and how it ended.

    ``ended``: ``finished`` (said so itself), ``exited``, ``crashed`` (a signal), ``cpu``, ``wall`` or ``results``
    (the limit that ended it).
    """

    lines: list[list[str]]
    stdout: bytes
    stderr: bytes
    ended: str
    layers: tuple[str, ...]


def run(task: dict[str, Any], limits: Limits, readable: Sequence[str] = ()) -> Report:
    """Run one task in a confined process of its own, gone with its folder when this returns.

    Raises SandboxUnavailable where the process cannot be confined.
    """
    if not (sys.platform.startswith("linux") and hasattr(os, "pidfd_open") and sys.executable):
        raise SandboxUnavailable(
            "generated code runs only confined, and that needs Linux 5.3 or later and a Python interpreter on disk; "
            "use Linux (a container or WSL 2 will do), or record the draws' results elsewhere"
        )
    folder = tempfile.mkdtemp(prefix="consilience-sandbox-")
    token = secrets.token_hex(16)
    try:
        return _Run(task, limits, [*_python_folders(), folder, *readable], folder, token).report()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(maxsize=1)
def _python_folders() -> tuple[str, ...]:
    """The folders that the standard library and the shared libraries of its extensions are read from."""
    with contextlib.suppress(ImportError):
        importlib.import_module(".child.main", __package__)  # leaves its bytecode, which every run then starts from
    paths = sysconfig.get_paths()
    base = Path(sys.base_prefix)
    found = [paths["stdlib"], paths["platstdlib"], str(base / "lib")]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"]
    devices = ["/etc/ld.so.cache", "/dev/null", "/dev/urandom"]
    return tuple(dict.fromkeys(path for path in [*found, *system, *devices] if os.path.exists(path)))


class _Run:
    """The process and its pipes while it runs."""

    def __init__(self, task: dict[str, Any], limits: Limits, readable: list[str], folder: str, token: str) -> None:
        self.limits, self.token = limits, token
        self.deadline = time.monotonic() + limits.wall
        self.kept: dict[int, bytearray] = {}
        self.room: dict[int, int] = {}
        self.over: str | None = None
        source, sink = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-c", _START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(sink,),
                cwd=folder,
                env=_environment(),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException as error:
            os.close(source)
            if isinstance(error, OSError):
                raise SandboxUnavailable(f"the interpreter {sys.executable} does not start: {error}") from error
            raise
        finally:
            os.close(sink)
        self.results = source
        bounds = {"memory": limits.memory, "cpu": math.ceil(limits.cpu)}
        whole = {"limits": bounds, "readable": readable, "parent": os.getpid(), "pipe": sink, "token": token}
        whole |= {"call_seconds": limits.call, "result_bytes": limits.results}
        self.task = memoryview(marshal.dumps({**task, **whole}))

    def report(self) -> Report:
        """Serve the process until its end or the deadline; it is dead and waited for when this returns or raises."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        limits = self.limits
        out, err = process.stdout.fileno(), process.stderr.fileno()
        self.room = {out: limits.output, err: limits.output, self.results: limits.results + _OVERHEAD}
        self.kept = {stream: bytearray() for stream in self.room}
        try:
            self._serve(process.stdin.fileno())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in self.room:
                with contextlib.suppress(BlockingIOError):
                    while self._read(stream):
                        pass
            os.close(self.results)
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()
        return self._read_reports(bytes(self.kept[self.results]), bytes(self.kept[out]), bytes(self.kept[err]))

    def _serve(self, stdin: int) -> None:
        ended = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                for stream in self.room:
                    os.set_blocking(stream, False)
                    selector.register(stream, selectors.EVENT_READ)
                os.set_blocking(stdin, False)
                selector.register(stdin, selectors.EVENT_WRITE)
                selector.register(ended, selectors.EVENT_READ)
                self._exchange(selector, stdin, ended)
        finally:
            os.close(ended)

    def _exchange(self, selector: selectors.BaseSelector, stdin: int, ended: int) -> None:
        """Pass the task in and the output out; returns when the process has ended or went over a limit."""
        while self.over is None:
            left = self.deadline - time.monotonic()
            if left <= 0:
                self.over = "wall"
                return
            ready = {key.fd for key, _ in selector.select(left)}
            for stream in ready - {stdin, ended}:
                if not self._read(stream):
                    selector.unregister(stream)
            if stdin in ready and not self._write(stdin):
                selector.unregister(stdin)
                if self.process.stdin is not None:
                    self.process.stdin.close()
            if ended in ready:
                return

    def _read(self, stream: int) -> bool:
        """Read once and keep what there is room for; False at the end of the stream."""
        data = os.read(stream, _CHUNK)
        kept, room = self.kept[stream], self.room[stream]
        kept += data[: room - len(kept)]
        if stream == self.results and len(kept) >= room:
            self.over = self.over or "results"
        return bool(data)

    def _write(self, stdin: int) -> bool:
        """Write a part of the task; False when there is no more to write or nobody to read it."""
        try:
            self.task = self.task[os.write(stdin, self.task[:_CHUNK]) :]
        except BrokenPipeError:
            return False
        return len(self.task) > 0

    def _read_reports(self, results: bytes, stdout: bytes, stderr: bytes) -> Report:
        mark = self.token.encode()
        whole = [line.decode("ascii", "replace").split("\t") for line in results.split(b"\n")[:-1]]
        lines = [line[1:] for line in whole if line[0].encode() == mark and len(line) > 1]
        if not lines or lines[0][0] != "ready":
            words = lines[0][1] if lines and len(lines[0]) > 1 else stderr.decode("utf-8", "replace").strip()[-300:]
            if self.over is None or words:
                reason = words or "no reason given"
                raise SandboxUnavailable(f"generated code runs only confined, which this system refuses: {reason}")
        layers = tuple(lines[0][1].split(",")) if lines else ()
        return Report(lines[1:], stdout, stderr, self._ended(bool(lines) and lines[-1] == ["end"]), layers)

    def _ended(self, said_so: bool) -> str:
        if self.over is not None:
            return self.over
        if said_so:
            return "finished"
        code = self.process.returncode
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "cpu"
        return "exited" if code >= 0 else "crashed"


def _environment() -> dict[str, str]:
    """The whole environment of the process: a fixed order of sets, UTF-8, where the interpreter's own library is."""
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LANG": "C.UTF-8"}
    needed = os.environ.get("LD_LIBRARY_PATH")
    return {**fixed, "LD_LIBRARY_PATH": needed} if needed else fixed
