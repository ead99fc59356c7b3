"""The record: draws on disk, JSON lines, one problem a line, gzip by suffix.

Reading and writing stream; fields the library does not know are kept. A file is written beside its place and
renamed when it is complete, so a reader never sees half a record.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from consilience.draws import Problem
from consilience.errors import InputError


def read(path: str | Path) -> Iterator[Problem]:
    """The problems of a record or question file, one at a time; a missing ``id`` becomes the line number.

    Raises InputError naming file, line and field.
    """
    path = Path(path)
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _problem(path, number, line)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read ({reason})") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _problem(path: Path, number: int, line: bytes) -> Problem:
    try:
        problem = Problem.model_validate_json(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        field = f"field {place!r}: " if place else ""
        raise InputError(f"{path}, line {number}: {field}{first['msg']}") from error
    if not problem.question.strip():
        raise InputError(f"{path}, line {number}: field 'question': must not be empty")
    if not problem.id:
        problem.id = str(number)
    return problem


def write(path: str | Path, problems: Iterable[Problem]) -> int:
    """Write a record, whole or not at all; returns the number of problems. Raises InputError if it cannot."""
    count = 0
    with replacing(Path(path)) as stream:
        for problem in problems:
            stream.write(problem.model_dump_json(exclude_unset=True).encode() + b"\n")
            count += 1
    return count


def check_place(path: Path) -> None:
    """Raises InputError where `replacing` could not write; leaves nothing behind but the folder."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary stream beside ``path`` (gzip by its suffix) that takes its place when the block ends well.

    A device or pipe is written directly. Raises InputError where the place cannot be written.
    """
    if path.exists() and not path.is_file():
        if path.is_dir():
            raise InputError(f"{path}: is a folder, expected a file")
        with path.open("wb") as direct:
            yield direct
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with os.fdopen(descriptor, "wb") as raw:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield packed  # type: ignore[misc]
            else:
                yield raw
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
