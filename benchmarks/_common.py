"""What the benchmarks share: a scripted server of its own process, the peer as a subprocess, tables and plots.

The name starts with an underscore so that `make bench` does not take it for a benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers" / "bin" / "python"
NO_PEERS = "its_hub was skipped: it is not installed (`make .venv-peers/.ready` installs it)."
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B07A00", "#5D6B7A")
"""Distinct under the common colour-vision deficiencies (after Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Server:
    """A scripted server that runs in a process of its own."""

    url: str

    def _ask(self, method: str, path: str) -> Any:
        with urlopen(Request(self.url.replace("/v1", path), method=method), timeout=60) as reply:
            return json.load(reply)

    def counts(self) -> dict[str, int]:
        """What the server was asked since it started or was last reset."""
        return dict(self._ask("GET", "/_counts"))

    def log(self) -> list[dict[str, Any]]:
        """Its log, one entry per call."""
        return list(self._ask("GET", "/_log"))

    def reset(self) -> None:
        """Forget all calls."""
        self._ask("POST", "/_reset")


@contextmanager
def serving(**options: Any) -> Iterator[Server]:
    """A `consilience.testing.ScriptedServer` with these options, in its own process, stopped at the end."""
    command = [sys.executable, "-m", "consilience.testing.server"]
    for name, value in options.items():
        plain = value if isinstance(value, str) else json.dumps(value)
        command += [f"--{name.replace('_', '-')}", plain]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(json.loads(process.stdout.readline())["url"])
    finally:
        process.terminate()
        process.wait()


def answers(right: float, wrong: int = 10) -> dict[str, float]:
    """The right answer, 42, with probability ``right``; the rest spread evenly over ``wrong`` other answers."""
    return {"42": right, **{str(n): (1 - right) / wrong for n in range(1, wrong + 1)}}


def questions(count: int) -> list[dict[str, str]]:
    """Mock questions whose right answer is 42."""
    return [
        {"id": f"q{n}", "question": f"Question number {n}: what is the answer?", "answer": "42", "kind": "number"}
        for n in range(count)
    ]


# ---------------------------------------------------------------------------------------------------- the peer


def peers_python(given: str | None = None) -> str | None:
    """The Python that has its_hub: the one given, that of .venv-peers, or this one; None where there is none."""
    for candidate in (given, str(PEERS), sys.executable) if given is None else (given,):
        if candidate and Path(candidate).exists():
            probe = subprocess.run([candidate, "-c", "import its_hub, backoff"], capture_output=True)
            if probe.returncode == 0:
                return candidate
    return None


def release_of(python: str, package: str = "its_hub") -> str:
    """The version of a package under another Python."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def its_hub(python: str, url: str, **options: Any) -> dict[str, Any]:
    """What ``peers/its_hub_side.py`` measured in a process of its own; raises RuntimeError where it failed."""
    command = [python, str(ROOT / "benchmarks" / "peers" / "its_hub_side.py"), "--url", url]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"its_hub_side.py failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ------------------------------------------------------------------------------------------------------ output


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def environment() -> str:
    """One sentence on what the numbers were taken with; no name of the machine."""
    named = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "SQLAlchemy", "numpy"))
    return f"{os.cpu_count()} cores, shared with other work; Python {platform.python_version()}, {named}."


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Flags with integer or float defaults, and those every benchmark has."""
    shown = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    for name, value in defaults.items():
        shown.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    shown.add_argument("--json", action="store_true", help="print one JSON object instead of Markdown")
    return shown


def emit(options: argparse.Namespace, result: dict[str, Any], markdown: str) -> None:
    """Print the result in the form asked for."""
    print(json.dumps(result, indent=1) if options.json else markdown)


@contextmanager
def picture(path: str, width: float = 7.0, height: float = 3.2) -> Iterator[Any]:
    """A matplotlib figure, saved at ``path`` as a small PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png")
