"""Run an SQL query on an SQLite file in a confined process.

In the caller's process a query could not be bounded: SQLite's heap limit is one for the whole process (the ledger uses
SQLite too), a single long-running function ignores progress handlers, and a large sort spills to disk. In a confined
process the kernel bounds memory and time, nothing can be written whatever the query, and a crash harms nobody.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from consilience.errors import InputError

from . import _process
from .limits import Limits


@dataclass(frozen=True, slots=True)
class Rows:
    """What a query gave.

    ``status``: ``finished`` with all ``rows`` (cells are None, int, float, str or bytes); ``raised`` (``error`` says
    why: no such column, not permitted, out of memory, ...); ``rows`` or ``results`` (more than the limit allows);
    ``cpu``, ``wall`` or ``crashed``. Without ``finished`` there are no rows.
    """

    status: str
    rows: tuple[tuple[Any, ...], ...] = ()
    error: str = ""


def run_sql(database: str | Path, query: str, limits: Limits | None = None) -> Rows:
    """Run one statement that reads; the file is opened read-only and immutable, and cannot be changed.

    An authorizer permits SELECT, functions that touch no file, and recursion; PRAGMA, ATTACH and every write are
    errors of the query. Raises InputError for a file that is missing, no database, or has changes that its writer has
    not yet merged (a ``-wal`` or ``-journal`` file that is not empty); SandboxUnavailable where a process cannot be
    confined.
    """
    path = _checked(database)
    limits = limits or Limits()
    uri = f"file:{quote(str(path))}?mode=ro&immutable=1"
    text = query.encode("utf-8", "replace").decode("utf-8")
    task = {"what": "query", "uri": uri, "query": text, "max_rows": limits.rows}
    report = _process.run(task, limits, readable=[str(path)])
    failed = next((line for line in report.lines if line[0] in ("raised", "limit")), None)
    if failed is not None:
        over = {"rows": "rows", "bytes": "results"}
        return Rows(over[failed[1]] if failed[0] == "limit" else "raised", error=": ".join(failed[1:]))
    if report.ended != "finished":
        return Rows(report.ended)
    return Rows("finished", tuple(_row(line[1]) for line in report.lines if line[0] == "row"))


def _checked(database: str | Path) -> Path:
    """The file's absolute path, if it is an SQLite database that nobody is in the middle of changing."""
    path = Path(database).resolve()
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise InputError(f"database {database}: cannot be read ({error.strerror})") from error
    if head != b"SQLite format 3\x00":
        raise InputError(f"database {database}: is not an SQLite file (SQLite {sqlite3.sqlite_version})")
    for suffix in ("-wal", "-journal"):
        side = path.with_name(path.name + suffix)
        if side.exists() and side.stat().st_size:
            raise InputError(
                f"database {database}: {side.name} holds changes that are not merged; close its writer, or "
                "give a copy made with VACUUM INTO"
            )
    return path


def _row(line: str) -> tuple[Any, ...]:
    return tuple(bytes.fromhex(cell["hex"]) if isinstance(cell, dict) else cell for cell in json.loads(line))
