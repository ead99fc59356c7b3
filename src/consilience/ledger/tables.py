"""The tables of the ledger, of claims and of shared budgets, and how a database for them is opened."""

from __future__ import annotations

import time
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from consilience.errors import InputError

metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("identity", Text, nullable=False),
    Column("question", Text, nullable=False),
)

draws = Table(
    "draws",
    metadata,
    Column("request_hash", String(64), ForeignKey("requests.hash"), primary_key=True),
    Column("draw_index", Integer, primary_key=True),
    Column("failed", Integer, nullable=False),
    Column("created", Float, nullable=False),
    Column("payload", Text, nullable=False),
)

owners = (
    Table(  # the processes that claim requests or hold a part of a budget; `beat` is seconds of the database's clock
        "owners",
        metadata,
        Column("id", String(64), primary_key=True),
        Column("place", Text, nullable=False),
        Column("pid", BigInteger, nullable=False),
        Column("beat", Float, nullable=False),
    )
)

claims = Table(  # whose draws of a request are on their way
    "claims",
    metadata,
    Column("request_hash", String(64), primary_key=True),
    Column("owner", String(64), nullable=False, index=True),
)

budgets = Table(  # what was spent under a name, settled
    "budgets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("draws", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("pico", BigInteger, nullable=False),
)

holds = Table(  # what each process may still spend of it, or has spent without having said so
    "holds",
    metadata,
    Column("name", Text, primary_key=True),
    Column("owner", String(64), primary_key=True),
    Column("draws", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("pico", BigInteger, nullable=False),
)


def open_engine(url: str) -> Engine:
    """An engine for a path, ``sqlite:///PATH`` or ``postgresql://...`` with the tables in place.

    Raises InputError saying what failed; a password in the URL is never shown.
    """
    text = url if "://" in url else f"sqlite:///{url}"
    try:
        address = make_url(text)
        if address.drivername in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        shown = address.render_as_string(hide_password=True)
    except ArgumentError as error:
        raise InputError("ledger: not a path or a database URL") from error
    try:
        if address.get_backend_name() == "sqlite":
            if address.database in (None, "", ":memory:"):
                raise InputError("ledger: an in-memory database would keep nothing; give a path")
            Path(str(address.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(address, pool_pre_ping=address.get_backend_name() != "sqlite")
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _sqlite_settings)
        _create(engine)
        return engine
    except (NoSuchModuleError, ImportError) as error:
        raise InputError(
            f"ledger {shown}: no driver for it; for PostgreSQL: pip install 'consilience[postgres]'"
        ) from error
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise InputError(f"ledger {shown}: cannot be opened ({reason})") from error


def _create(engine: Engine) -> None:
    """Make what is missing; other processes may be making it in the same moment, one table or the other first."""
    for _ in metadata.tables:
        try:
            metadata.create_all(engine)
            return
        except DBAPIError:
            time.sleep(0.05)
    metadata.create_all(engine)


def _sqlite_settings(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # WAL with NORMAL: a commit survives kill -9 of this process; readers never wait for the writer.
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
