"""What one sandboxed run may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run.

    ``memory`` is the address space in bytes, ``cpu`` and ``wall`` are seconds of the whole run, ``call`` the CPU
    seconds of each call and of loading the program before them; ``output`` caps the bytes kept of standard output and
    of standard error each (the rest is read and dropped), ``results`` the bytes of returned values or rows, ``rows``
    the rows of a query. Files and processes have no limit to set: a run can make none.
    """

    memory: int = 512 << 20
    cpu: float = 4.0
    wall: float = 20.0
    call: float = 0.5
    output: int = 64 << 10
    results: int = 1 << 20
    rows: int = 100_000

    def __post_init__(self) -> None:
        """Raise ValueError for a bound that is not positive and finite, or memory too small for an interpreter."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"sandbox limit {field.name} must be positive and finite, got {value}")
        if self.memory < 64 << 20:
            raise ValueError(
                f"sandbox limit memory must be at least 64 MiB (the interpreter's), got {self.memory} bytes"
            )
