"""Budgets that several processes share: what is settled under a name, and what each process holds of the rest.

At any time settled + all holds is at most the cap. A process spends from its hold without asking; it exchanges what it
used for more. What a dead process held is counted as spent (`owners.bury`), so a hold is kept small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from consilience.errors import ConsilienceError
from consilience.ledger import tables
from consilience.ledger.owners import Owner

SPARE = 255
"""How many further needs of the same size a grant may bring."""
PART = 64
"""A grant's spare is at most this part of what is free, and none where that is less than one need."""
TRIES = 3
"""How often an exchange is tried that the database refused in passing."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Draws, tokens and money (picodollars)."""

    draws: int = 0
    tokens: int = 0
    pico: int = 0

    def each(self, do: Callable[..., int], *others: Amount) -> Amount:
        """``do`` for each of the three."""
        rows = ((one.draws, one.tokens, one.pico) for one in (self, *others))
        return Amount(*map(do, *rows))

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.draws + other.draws, self.tokens + other.tokens, self.pico + other.pico)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.draws - other.draws, self.tokens - other.tokens, self.pico - other.pico)

    def fits(self, room: Amount) -> bool:
        """Whether each of the three is within ``room``."""
        return self.draws <= room.draws and self.tokens <= room.tokens and self.pico <= room.pico


@dataclass(frozen=True, slots=True)
class Exchange:
    """What came of an exchange: ``granted`` beyond what was kept, ``settled`` by all, ``held`` by others.

    ``tight`` says that so little is free that holds should be given back at once. ``lost``: this process was taken
    for dead, what it held counts as spent, and nothing of the exchange was done.
    """

    granted: Amount
    settled: Amount
    held: Amount
    tight: bool = False
    lost: bool = False


class SharedBudget:
    """One name's row, as one owner sees it."""

    def __init__(self, engine: Engine, owner: Owner, name: str) -> None:
        self.name = name
        self._engine, self._owner = engine, owner
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        with engine.begin() as connection:
            row = {"name": name, "draws": 0, "tokens": 0, "pico": 0}
            connection.execute(self._insert(tables.budgets).values(row).on_conflict_do_nothing())

    def exchange(self, caps: Amount, used: Amount, held: Amount, keep: Amount, need: Amount) -> Exchange:
        """Settle ``used``, keep ``keep`` of the hold (believed to be ``held``), and get ``need`` more if it is free.

        Of tokens and money all that is needed is granted, or nothing; of draws, what there is. Raises
        ConsilienceError where the database does not answer.
        """
        for left in reversed(range(TRIES)):
            try:
                with self._engine.begin() as connection:
                    return self._exchange(connection, caps, used, held, keep, need)
            except SQLAlchemyError as error:
                if not (left and isinstance(error, OperationalError)):
                    reason = str(getattr(error, "orig", None) or error).splitlines()[0]
                    raise ConsilienceError(f"the shared budget cannot be kept ({reason})") from error
        raise AssertionError("the last try returns")

    def close(self) -> None:
        """Forget the name: nobody will ask for it again."""
        with self._engine.begin() as connection:
            connection.execute(delete(tables.holds).where(tables.holds.c.name == self.name))
            connection.execute(delete(tables.budgets).where(tables.budgets.c.name == self.name))

    def _exchange(
        self, connection: Connection, caps: Amount, used: Amount, held: Amount, keep: Amount, need: Amount
    ) -> Exchange:
        settled = self._settle(connection, used)  # its lock on the row keeps the holds as they are
        mine, others = self._holds(connection)
        if mine is None and held != Amount():
            settled = self._settle(connection, Amount() - used)
            return Exchange(Amount(), settled, others, lost=True)
        free = (caps - settled - others - keep).each(lambda left: max(left, 0))
        granted = _granted(free, need)
        self._hold(connection, mine, keep + granted)
        return Exchange(granted, settled, others, tight=not (need + need).fits(granted))

    def _settle(self, connection: Connection, used: Amount) -> Amount:
        spent = tables.budgets.c
        added = {
            "draws": spent.draws + used.draws,
            "tokens": spent.tokens + used.tokens,
            "pico": spent.pico + used.pico,
        }
        statement = update(tables.budgets).where(spent.name == self.name).values(added)
        return Amount(*connection.execute(statement.returning(spent.draws, spent.tokens, spent.pico)).one())

    def _holds(self, connection: Connection) -> tuple[Amount | None, Amount]:
        held = tables.holds.c
        mine, others = None, Amount()
        query = select(held.owner, held.draws, held.tokens, held.pico).where(held.name == self.name)
        for owner, *amount in connection.execute(query):
            if owner == self._owner.id:
                mine = Amount(*amount)
            else:
                others += Amount(*amount)
        return mine, others

    def _hold(self, connection: Connection, mine: Amount | None, now: Amount) -> None:
        row = {"draws": now.draws, "tokens": now.tokens, "pico": now.pico}
        if now != mine:
            key = {"name": self.name, "owner": self._owner.id}
            statement = self._insert(tables.holds).values(key | row)
            connection.execute(statement.on_conflict_do_update(index_elements=["name", "owner"], set_=row))


def _granted(free: Amount, need: Amount) -> Amount:
    """What is given of what is free: the need, and something to spare while there is much."""
    if not Amount(tokens=need.tokens, pico=need.pico).fits(free):
        return Amount()
    need = Amount(min(need.draws, free.draws), need.tokens, need.pico)

    def spare(need: int, free: int) -> int:
        most = min(SPARE * need, (free - need) // PART)
        return most if most >= need else 0

    return need + need.each(spare, free)
