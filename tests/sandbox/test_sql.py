"""Queries, the hostile ones too, on a real SQLite file that must come out of it unchanged."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from consilience.errors import InputError
from consilience.sandbox import Limits, run_sql

SHORT = Limits(cpu=1.0, wall=100.0, memory=256 << 20)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "a #?%b.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, price REAL, raw BLOB)")
        rows = [(1, "ann", 1.5, b"\x00\xff"), (2, "bob", None, None), (3, "é\t\n", 2.0, b"")]
        connection.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", rows)
        connection.execute("INSERT INTO t VALUES (4, CAST(x'ff41' AS TEXT), 9e999, NULL)")
    connection.close()
    return path


def state(database: Path) -> tuple[str, list[str]]:
    return hashlib.sha256(database.read_bytes()).hexdigest(), sorted(p.name for p in database.parent.iterdir())


def test_rows_as_sqlite_gives_them(database: Path) -> None:
    found = run_sql(database, "SELECT * FROM t ORDER BY id -- a comment")
    assert (found.status, found.error) == ("finished", "")
    with sqlite3.connect(database) as connection:
        expected = connection.execute("SELECT id, name, price, raw FROM t WHERE id < 4 ORDER BY id").fetchall()
    connection.close()
    assert found.rows[:3] == tuple(expected)
    assert found.rows[3] == (4, "\ufffdA", float("inf"), None)


def test_what_queries_may_use(database: Path) -> None:
    query = """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
        SELECT count(*), sum(i), group_concat(i) LIKE '1,2,%', strftime('%Y', '2020-05-01') FROM n
    """
    assert run_sql(database, query).rows == ((1000, 500500, 1, "2020"),)
    assert run_sql(database, "SELECT 1 WHERE 0").rows == ()
    assert run_sql(database, "SELECT a.id FROM t a JOIN t b ON a.id < b.id WHERE b.name = 'bob'").rows == ((1,),)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "nonsense",
        "SELECT nothing FROM t",
        "SELECT 1; SELECT 2",
        "INSERT INTO t (name) VALUES ('x')",
        "UPDATE t SET name = 'x'",
        "DELETE FROM t",
        "DROP TABLE t",
        "CREATE TABLE u (a)",
        "CREATE TEMP TABLE u (a)",
        "CREATE TEMP VIEW v AS SELECT 1",
        "WITH x AS (SELECT 1) INSERT INTO t (name) SELECT 'x' FROM x",
        "BEGIN",
        "VACUUM",
        "VACUUM INTO 'copy.db'",
        "REINDEX",
        "ANALYZE",
        "ATTACH 'other.db' AS other",
        "ATTACH ':memory:' AS other",
        "DETACH main",
        "PRAGMA writable_schema = 1",
        "PRAGMA database_list",
        "PRAGMA query_only = 0",
        "SELECT * FROM pragma_database_list",
        "SELECT load_extension('x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT writefile('x', 'y')",
        "SELECT fts3_tokenizer('simple')",
        "SELECT zeroblob(1000000000)",
        "SELECT length(zeroblob(1000000000))",
        "SELECT hex(randomblob(100000000))",
        "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000)))",
        "EXPLAIN DELETE FROM t",
    ],
)
def test_failing_queries_are_errors_and_change_nothing(database: Path, query: str) -> None:
    before = state(database)
    found = run_sql(database, query, SHORT)
    assert (found.status, found.rows) == ("raised", ())
    assert found.error
    assert state(database) == before


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
NINE = ", ".join(f"n n{k}" for k in range(9))


BOMBS = [
    (ENDLESS + "SELECT i FROM n", {"rows", "results"}),
    (ENDLESS + "SELECT i FROM n ORDER BY -i", {"cpu", "raised"}),
    ("SELECT hex(zeroblob(100000)) FROM t a, t b, t c", {"results"}),
]
LONG_BOMBS = [
    (ENDLESS + "SELECT count(*) FROM n", {"cpu"}),
    (ENDLESS + "SELECT group_concat(i) FROM n", {"raised", "cpu"}),
    (ENDLESS + "SELECT DISTINCT hex(randomblob(1000)) FROM n ORDER BY 1", {"cpu", "raised"}),
    ("SELECT printf('%.*c', 1000000000, 'x')", {"cpu", "raised"}),
    ("WITH n(i) AS (VALUES (1), (2), (3), (4), (5), (6), (7), (8)) "
     f"SELECT count(DISTINCT n0.i + n8.i) FROM {NINE}, n m0, n m1", {"cpu"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "ends"), BOMBS + [pytest.param(*bomb, marks=pytest.mark.slow) for bomb in LONG_BOMBS]
)
def test_bombs_end_at_a_limit(database: Path, query: str, ends: set[str]) -> None:
    before = state(database)
    found = run_sql(database, query, SHORT)
    assert found.status in ends
    assert found.rows == ()
    assert state(database) == before


def test_row_limit_is_exact(database: Path) -> None:
    assert len(run_sql(database, "SELECT 1 FROM t", Limits(rows=4)).rows) == 4
    assert run_sql(database, "SELECT 1 FROM t", Limits(rows=3)).status == "rows"


def test_files_that_are_no_database(tmp_path: Path, database: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        run_sql(tmp_path / "none.db", "SELECT 1")
    text = tmp_path / "text.db"
    text.write_text("not a database at all, only text")
    with pytest.raises(InputError, match="not an SQLite file"):
        run_sql(text, "SELECT 1")
    database.with_name(database.name + "-wal").write_bytes(b"x" * 32)
    with pytest.raises(InputError, match="not merged"):
        run_sql(database, "SELECT 1")


def test_a_damaged_database_fails_and_no_more(tmp_path: Path, database: Path) -> None:
    data = bytearray(database.read_bytes())
    data[100:] = bytes(b ^ 0x5A for b in data[100:])
    broken = tmp_path / "broken.db"
    broken.write_bytes(data)
    assert run_sql(broken, "SELECT * FROM t").status in ("raised", "crashed")
