"""Every draw ever made, durable: SQLite by default, PostgreSQL by URL."""

from consilience.ledger.store import Ledger, default_url

__all__ = ["Ledger", "default_url"]
