"""Sample from generative models with consistency as the signal.

Draw several times, see where the draws agree, spend no more draws than the decision needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consilience.draws import Budget, Draw, Problem, Usage, Verdict
    from consilience.errors import BudgetSpent, ConsilienceError, EndpointError, InputError
    from consilience.run import Run, asolve, solve

__version__ = "0.1.0"

_HOME = {
    "consilience.draws": ("Budget", "Draw", "Problem", "Usage", "Verdict"),
    "consilience.errors": ("BudgetSpent", "ConsilienceError", "EndpointError", "InputError"),
    "consilience.run": ("Run", "asolve", "solve"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Budget",
    "BudgetSpent",
    "ConsilienceError",
    "Draw",
    "EndpointError",
    "InputError",
    "Problem",
    "Run",
    "Usage",
    "Verdict",
    "__version__",
    "asolve",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
