"""Public tools for tests: a scripted OpenAI-compatible server, and the laws that a rule must satisfy.

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.testing.server import ScriptedServer

__all__ = ["ScriptedServer"]


def __getattr__(name: str) -> Any:
    if name == "ScriptedServer":
        from consilience.testing.server import ScriptedServer

        return ScriptedServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
