"""Servers for the benchmarks of `consilience serve`, each a process of its own on loopback, and their peer optillm.

The name starts with an underscore so that `make bench` does not take it for a benchmark.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from _common import ROOT, release_of

OPTILLM = ROOT / ".venv-optillm" / "bin" / "optillm"
NO_OPTILLM = "optillm was skipped: it is not installed (`make .venv-optillm/.ready` installs it)."
SIDES = ROOT / "benchmarks" / "peers"


@dataclass(frozen=True)
class Running:
    """A server that listens on ``port`` as process ``pid``."""

    port: int
    pid: int

    @property
    def origin(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor time of the process so far, user and system, all threads (from /proc: Linux)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listening(command: Sequence[str], port: int, environment: Mapping[str, str] | None = None) -> Iterator[Running]:
    """A server in an empty folder of its own, from when it listens until it is stopped; RuntimeError if it ends."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as stream:
            started = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **(environment or {})}, stdout=stream, stderr=stream
            )
        try:
            for _ in range(1200):
                if started.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}")
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield Running(port, started.pid)
        finally:
            started.terminate()
            started.wait()


@contextmanager
def consilience(upstream: str, policy: str) -> Iterator[Running]:
    """``consilience serve`` as a user starts it; ``upstream`` ends in /v1."""
    port = free_port()
    command = [sys.executable, "-m", "consilience", "serve", "--upstream", upstream, "--policy", policy]
    with listening([*command, "--port", str(port), "--ledger", "ledger.db"], port) as running:
        yield running


@contextmanager
def optillm(upstream: str, approach: str | None = None) -> Iterator[Running]:
    """``optillm`` as a user starts it: its own command and web server; else the model's name says the approach."""
    port = free_port()
    command = [str(OPTILLM), "--base-url", upstream, "--port", str(port)]
    command += ["--approach", approach] if approach else []
    with listening(command, port, {"OPENAI_API_KEY": "any"}) as running:
        yield running


@contextmanager
def bare_proxy(upstream: str) -> Iterator[Running]:
    """``peers/bare_proxy.py``."""
    port = free_port()
    command = [sys.executable, str(SIDES / "bare_proxy.py"), "--upstream", upstream.removesuffix("/v1")]
    with listening([*command, "--port", str(port)], port) as running:
        yield running


def optillm_release() -> str | None:
    """The version of optillm, None where it is not installed."""
    return release_of(str(OPTILLM.parent / "python"), "optillm") if OPTILLM.exists() else None
