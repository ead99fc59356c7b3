"""What several test modules share: real parts, found or skipped with a reason."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

RECORDS = Path(os.environ.get("CONSILIENCE_RECORDS") or Path(__file__).parents[2] / "shared" / "records")


@pytest.fixture
def recorded():
    """The path of a recorded file by name; skips where the recorded model outputs are not at hand."""

    def find(name: str) -> Path:
        path = RECORDS / name
        if not path.exists():
            pytest.skip(f"recorded model outputs not at hand (set CONSILIENCE_RECORDS): {name}")
        return path

    return find


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """A fresh schema on the PostgreSQL of CONSILIENCE_TEST_POSTGRES; skips where there is none."""
    base = os.environ.get("CONSILIENCE_TEST_POSTGRES")
    if not base:
        if os.environ.get("CONSILIENCE_REQUIRE_POSTGRES"):
            pytest.fail("CONSILIENCE_TEST_POSTGRES is not set, but PostgreSQL tests are required")
        pytest.skip("no PostgreSQL server: set CONSILIENCE_TEST_POSTGRES=postgresql://... to run this")
    import psycopg

    schema = f"test_{uuid.uuid4().hex[:12]}"
    plain = base.replace("postgresql+psycopg://", "postgresql://")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'CREATE SCHEMA "{schema}"')
    joint = "&" if "?" in plain else "?"
    yield f"{plain}{joint}options=-csearch_path%3D{schema}"
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'DROP SCHEMA "{schema}" CASCADE')


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh ledger on each of the two databases."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres_url")
    return str(tmp_path / "ledger.db")
