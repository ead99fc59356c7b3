"""The processes that share a ledger: who claims a request, who holds a part of a budget, and who of them is dead.

An owner renews its row every few seconds. One that has not for `EXPIRY` seconds, or whose process is gone from this
machine, is dead: its claims are free, and what it held of budgets counts as spent.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from sqlalchemy import delete, select, text, update
from sqlalchemy.engine import Connection
from sqlalchemy.sql.elements import TextClause

from consilience.ledger import tables

BEAT = 3.0
"""Seconds between two renewals of an owner."""
EXPIRY = 15.0
"""Seconds after which an owner that was not renewed is dead."""

_NOW = {"postgresql": "extract(epoch FROM clock_timestamp())", "sqlite": "(julianday('now') - 2440587.5) * 86400.0"}


@cache
def _place() -> str:
    """Names this boot of this machine and this namespace of process numbers; empty where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Owner:
    """One ledger object of one process."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    place: str = field(default_factory=lambda: _place())
    pid: int = field(default_factory=os.getpid)


def now_of(connection: Connection) -> TextClause:
    """The database's own clock, so that the clocks of the machines that share it do not matter."""
    return text(_NOW[connection.dialect.name])


def renew(connection: Connection, owner: Owner) -> bool:
    """Say that an owner is alive; False where it was not known, or no longer."""
    known, beat = tables.owners.c, {"beat": now_of(connection)}
    if connection.execute(update(tables.owners).where(known.id == owner.id).values(beat)).rowcount:
        return True
    row = {"id": owner.id, "place": owner.place, "pid": owner.pid} | beat
    connection.execute(tables.owners.insert().values(row))
    return False


def dead(connection: Connection, me: Owner) -> list[str]:
    """The owners that are dead."""
    known = tables.owners.c
    query = select(known.id, known.place, known.pid, (now_of(connection) - known.beat) > EXPIRY)
    found = connection.execute(query.where(known.id != me.id)).all()
    return [name for name, place, pid, expired in found if expired or (place and place == me.place and not _runs(pid))]


def bury(connection: Connection, names: list[str]) -> None:
    """Free the claims of owners, and count what they held of budgets as spent."""
    held = tables.holds.c
    for budget in sorted(connection.execute(select(held.name).where(held.owner.in_(names)).distinct()).scalars()):
        _count_as_spent(connection, budget, names)
    for name in sorted(names):
        connection.execute(delete(tables.claims).where(tables.claims.c.owner == name))
        connection.execute(delete(tables.owners).where(tables.owners.c.id == name))


def _count_as_spent(connection: Connection, budget: str, names: list[str]) -> None:
    """Settle what owners hold of one budget; locks its row first, as an exchange does: one of them may be at one."""
    spent, held = tables.budgets.c, tables.holds.c
    connection.execute(select(spent.name).where(spent.name == budget).with_for_update())
    gone = delete(tables.holds).where(held.name == budget, held.owner.in_(names))
    for draws, tokens, pico in connection.execute(gone.returning(held.draws, held.tokens, held.pico)).all():
        added = {"draws": spent.draws + draws, "tokens": spent.tokens + tokens, "pico": spent.pico + pico}
        connection.execute(update(tables.budgets).where(spent.name == budget).values(added))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
