"""``consilience methods``."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from consilience.methods import register


def run(*, as_json: bool) -> None:
    """Print the register."""
    if as_json:
        fields = ("id", "role", "family", "paper", "arxiv", "summary", "needs")
        listed = [{name: getattr(method, name) for name in fields} for method in register().values()]
        print(json.dumps({"methods": listed}, indent=1))
        return
    table = Table(title="Registered methods")
    table.add_column("id", no_wrap=True)
    for name in ("role", "what it does", "paper", "needs"):
        table.add_column(name)
    for method in register().values():
        source = f"{method.paper} (arXiv {method.arxiv})" if method.arxiv else method.paper
        table.add_row(method.id, method.role, method.summary, source, ", ".join(method.needs))
    Console().print(table)
