"""A server as users run it: the command, in a process of its own."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from consilience.testing import ScriptedServer

CACHE = tempfile.TemporaryDirectory(prefix="dspy-")
os.environ["DSPY_CACHEDIR"] = CACHE.name
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else litellm asks another host when it is loaded


def needed(package: str) -> Any:
    """The package. Where it is not there the tests skip, but not in ``make bridges``."""
    if os.environ.get("CONSILIENCE_REQUIRE_BRIDGES"):
        return importlib.import_module(package)
    return pytest.importorskip(package, reason=f"{package} is not installed: make bridges runs this")


@contextmanager
def process(upstream: ScriptedServer, folder: Path, *flags: str) -> Iterator[str]:
    """`consilience serve` in front of an upstream; gives its URL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    clean["OPENAI_API_KEY"] = "the-servers-own"
    command = [sys.executable, "-m", "consilience", "serve", "--upstream", upstream.url, "--port", "0"]
    started = subprocess.Popen(
        [*command, "--ledger", "ledger.db", *flags], cwd=folder, env=clean, stderr=subprocess.PIPE, text=True
    )
    try:
        line = started.stderr.readline()
        found = re.match(r"serving (http://127\.0\.0\.1:\d+/v1), ", line)
        assert found, line + started.stderr.read()
        yield found[1]
    finally:
        started.terminate()
        started.wait(20)
        started.stderr.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts servers; each call gives the URL of one more, with the ledger of all of them."""
    with ExitStack() as stack:
        yield lambda upstream, *flags: stack.enter_context(process(upstream, tmp_path, *flags))
