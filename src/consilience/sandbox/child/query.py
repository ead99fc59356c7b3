"""Run one SQL query on an SQLite file that is opened for reading alone, and report its rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

ACTIONS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
FILE_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}


def permitted(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """The authorizer: reading, functions that touch no file, and recursion; no PRAGMA, ATTACH or write."""
    if action not in ACTIONS or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in FILE_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def connect(task: dict[str, Any]) -> sqlite3.Connection:
    """The database, immutable, with sorting in memory (which is bounded) and values of bounded length."""
    connection = sqlite3.connect(task["uri"], uri=True, isolation_level=None)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    connection.execute("PRAGMA query_only = 1")
    connection.execute("PRAGMA temp_store = 2")
    connection.execute("PRAGMA trusted_schema = 0")
    connection.execute("PRAGMA cell_size_check = 1")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, task["result_bytes"]),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
    ):
        connection.setlimit(limit, value)
    connection.set_authorizer(permitted)
    return connection


def run(task: dict[str, Any], report: Callable[..., None]) -> None:
    """Report ``row`` lines; ``raised`` if the query fails, ``limit`` beyond the rows or bytes allowed."""
    room = task["result_bytes"]
    try:
        cursor = connect(task).execute(task["query"])
        if cursor.description is None:
            report("raised", "OperationalError", "the statement returns no rows")
            return
        for count, row in enumerate(cursor):
            line = json.dumps([{"hex": cell.hex()} if isinstance(cell, bytes) else cell for cell in row])
            room -= len(line)
            if count >= task["max_rows"] or room < 0:
                report("limit", "rows" if count >= task["max_rows"] else "bytes")
                return
            report("row", line)
    except (sqlite3.Error, sqlite3.Warning, MemoryError, OverflowError, ValueError) as error:
        report("raised", type(error).__name__, str(error)[:500])
