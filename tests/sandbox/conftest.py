"""After every test of the sandbox: no process of ours is left, and no folder."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def children() -> set[int]:
    """The processes that have this one as their parent, alive or not yet waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("consilience-sandbox-*"))


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The temporary folder is this test's own, so that runs of other tests at the same time do not count."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the sandbox needs Linux")
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    before = children()
    yield
    assert children() <= before
    assert folders() == set()
