"""The two tables of the ledger, and how a database for them is opened."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, create_engine, event
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
        try:
            metadata.create_all(engine)
        except DBAPIError:  # another process may have made the tables in the same moment
            metadata.create_all(engine)
        return engine
    except (NoSuchModuleError, ImportError) as error:
        raise InputError(
            f"ledger {shown}: no driver for it; for PostgreSQL: pip install 'consilience[postgres]'"
        ) from error
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise InputError(f"ledger {shown}: cannot be opened ({reason})") from error


def _sqlite_settings(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # WAL with NORMAL: a commit survives kill -9 of this process; readers never wait for the writer.
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
