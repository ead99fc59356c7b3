"""``consilience ledger show | export | import``."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from consilience.errors import InputError
from consilience.ledger import Ledger, default_url

COLUMNS = ("endpoint", "model", "requests", "draws", "failed", "prompt_tokens", "completion_tokens", "cost")


def _existing(url: str | None) -> Ledger:
    given = url or default_url()
    if "://" not in given and not Path(given).exists():
        raise InputError(f"ledger {given}: there is none yet; `solve` makes it")
    return Ledger(given)


def show(url: str | None, *, as_json: bool) -> None:
    """Print what the ledger holds per endpoint and model."""
    with _existing(url) as ledger:
        rows = ledger.summary()
        if as_json:
            print(json.dumps({"ledger": ledger.name, "models": rows}, indent=1))
            return
        table = Table(*COLUMNS, title=ledger.name)
        for row in rows:
            table.add_row(*(f"{row.get(name, 0):.6f}" if name == "cost" else str(row.get(name, 0)) for name in COLUMNS))
        Console().print(table)


def export(path: Path, url: str | None) -> None:
    """Write the ledger's good draws to ``path``."""
    with _existing(url) as ledger:
        print(f"{ledger.export(path)} requests written to {path}")


def load(path: Path, url: str | None) -> None:
    """Take an export into the ledger."""
    with Ledger(url) as ledger:
        added, known = ledger.load(path)
        print(f"{added} draws added, {known} were already here")
