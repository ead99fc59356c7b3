"""Folders that are whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from consilience.errors import InputError


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to; when the block ends well, all that is in it is moved there.

    Files and folders of the same names are replaced, others stay. Raises InputError where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        yield beside
        folder.mkdir(exist_ok=True)
        for part in sorted(beside.iterdir()):
            _move(part, folder / part.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move(part: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    part.replace(place)
