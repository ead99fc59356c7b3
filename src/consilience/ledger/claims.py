"""Claims: a process that is about to buy draws of a request says so, and no other buys any of it until it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.engine import Connection

from consilience.draws import Draw
from consilience.ledger import owners, tables
from consilience.ledger.owners import Owner

CHUNK = 400
"""Keys in one query: far below what SQLite takes."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """What came of a claim: whether it is ``mine``, and the draws from the index asked for on that are there by now."""

    mine: bool
    found: dict[int, Draw]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim on its way to the database."""

    request_hash: str
    start: int
    answer: asyncio.Future[Claimed]


def drop(connection: Connection, hashes: Iterable[str], me: Owner) -> None:
    """Let claims go."""
    rows = [(key, me.id) for key in sorted(hashes)]
    _run_many(connection, "DELETE FROM claims WHERE request_hash = {} AND owner = {}", rows)


def take(connection: Connection, claims: Sequence[Claim], me: Owner) -> list[Claimed]:
    """Claim what nobody has, or only a dead process; then look what is there: in this order nothing is overlooked."""
    hashes = {claim.request_hash for claim in claims}
    mine = _insert(connection, hashes, me)
    if mine < hashes and (names := owners.dead(connection, me)):
        owners.bury(connection, names)
        mine |= _insert(connection, hashes - mine, me)
    found = _found(connection, {claim.request_hash for claim in claims}, min(claim.start for claim in claims))
    return [Claimed(claim.request_hash in mine, found.get(claim.request_hash, {})) for claim in claims]


def _insert(connection: Connection, hashes: set[str], me: Owner) -> set[str]:
    rows = [(key, me.id) for key in sorted(hashes)]
    statement = "INSERT INTO claims (request_hash, owner) VALUES ({}, {}) ON CONFLICT DO NOTHING"
    if _run_many(connection, statement, rows) == len(rows):
        return hashes
    held = tables.claims.c
    mine: set[str] = set()
    for keys in _chunks(sorted(hashes)):
        query = select(held.request_hash).where(held.request_hash.in_(keys), held.owner == me.id)
        mine.update(connection.execute(query).scalars())
    return mine


def _found(connection: Connection, hashes: set[str], start: int) -> dict[str, dict[int, Draw]]:
    found: dict[str, dict[int, Draw]] = {}
    mark = _mark(connection)
    for keys in _chunks(sorted(hashes)):  # in plain SQL: this is done for every problem of a run
        marks = ", ".join([mark] * len(keys))
        query = f"SELECT request_hash, draw_index, payload FROM draws WHERE request_hash IN ({marks})"
        rows = connection.exec_driver_sql(f"{query} AND draw_index >= {mark} AND failed = 0", (*keys, start))
        for key, index, payload in rows:
            found.setdefault(key, {})[index] = Draw.model_validate_json(payload)
    return found


def _chunks(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), CHUNK):
        yield keys[start : start + CHUNK]


def _run_many(connection: Connection, statement: str, rows: list[tuple[str, str]]) -> int:
    """Run a statement of two parameters for all rows at once; returns how many rows it changed."""
    if not rows:
        return 0
    mark = _mark(connection)
    return connection.exec_driver_sql(statement.format(mark, mark), rows).rowcount


def _mark(connection: Connection) -> str:
    return "?" if connection.dialect.name == "sqlite" else "%s"
