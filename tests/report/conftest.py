"""A real browser for the page, one per module; without one its tests are skipped with a reason."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium with a new, empty profile."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CONSILIENCE_REQUIRE_BROWSER"):
            pytest.fail("no Chromium on PATH, but browser tests are required")
        pytest.skip("no Chromium on PATH")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield running
        running.close()


class Watched:
    """A page in the browser with everything that it did which a report must not do."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.troubles: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", self._dialog)
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("console", lambda message: self.troubles.append(f"console: {message.text}"))
        page.on("popup", lambda _: self.troubles.append("a window was opened"))

    def _dialog(self, dialog: Any) -> None:
        self.troubles.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open(self, path: Path) -> Any:
        """Load the file and return the playwright page."""
        self.page.goto(path.as_uri())
        return self.page


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:
    """Opens watched pages: ``watch(width=..., scheme=...)``; all are closed at the end."""
    opened = []

    def start(width: int = 1200, scheme: str = "light") -> Watched:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(10_000)
        opened.append(page)
        return Watched(page)

    yield start
    for page in opened:
        page.close()
