"""Run code that a model wrote, and only here: a bare process of its own that can compute, print and nothing else.

:func:`run_python` runs a program, :func:`run_sql` a query on an SQLite file. Each run is one process that ends with the
call: no network, no file written, no other process started or signalled, no secret of the caller in sight, and memory,
CPU time, wall time and output bounded. Where the system cannot promise that, :class:`SandboxUnavailable` is raised.
"""

from consilience.errors import SandboxUnavailable

from .limits import Limits
from .python import CallResult, Outcome, run_python
from .sql import Rows, run_sql

__all__ = ["CallResult", "Limits", "Outcome", "Rows", "SandboxUnavailable", "run_python", "run_sql"]
