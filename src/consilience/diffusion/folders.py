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

    Files and folders of the same names are replaced, others stay. Files get the permissions that the umask leaves,
    also where a library made them private. Raises InputError where it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        made = beside / "made"
        made.mkdir()
        yield made
        usual = made.stat().st_mode & 0o666
        for file in filter(Path.is_file, made.rglob("*")):
            file.chmod(usual)
        folder.mkdir(exist_ok=True)
        for part in sorted(made.iterdir()):
            _move(part, folder / part.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _move(part: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    part.replace(place)
