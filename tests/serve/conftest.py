"""Servers for a test: each a real one on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from consilience.serve.app import create_app
from consilience.serve.core import Settings

from .helpers import Served, running


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start servers; each has a ledger of its own unless it is given one."""
    with ExitStack() as stack:

        def start(upstream: Any = "house", *, config: str = "", **settings: Any) -> Served:
            name = f"{len(list(tmp_path.iterdir()))}"
            file = tmp_path / f"{name}.toml"
            file.write_text(config)
            url = upstream if isinstance(upstream, str) else upstream.url
            given = {"ledger": str(tmp_path / f"{name}.db"), "config": file} | settings
            app = create_app(Settings(upstream=url, **given))
            served = Served(stack.enter_context(running(app)), app.state.core)
            stack.callback(served.close)
            return served

        yield start
