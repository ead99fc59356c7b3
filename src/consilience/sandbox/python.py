"""Run a Python program, or call one of its functions on many inputs, in a confined process."""

from __future__ import annotations

import marshal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _process
from .limits import Limits


@dataclass(frozen=True, slots=True)
class CallResult:
    """What one call did.

    ``status``: ``returned``, ``raised`` (``shape`` is the exception's type), ``timeout`` (its CPU time), ``oversized``
    (a value too large or too deep to report), ``exited`` (sys.exit). ``shape`` is the canonical form of the value, its
    types and contents with F for each float, C for each complex number; ``floats`` are those numbers in order.
    """

    status: str
    shape: str = ""
    floats: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    ``status``: ``finished``; ``raised`` (loading the program failed, ``error`` says why); ``exited`` (sys.exit while
    loading, or os._exit anywhere); ``timeout`` (loading took longer than a call may); ``crashed`` (a signal, such as a
    segmentation fault); ``cpu``, ``wall``, ``results``: the limit at which it was killed. ``calls`` holds the calls
    that were over by then, in order. ``stdout`` and ``stderr`` are cut at the limit; ``layers`` names what confined
    the run (always ``seccomp``).
    """

    status: str
    calls: tuple[CallResult, ...]
    stdout: str
    stderr: str
    error: str
    layers: tuple[str, ...]


def run_python(
    source: str, *, entry_point: str | None = None, inputs: Sequence[Sequence[Any]] = (), limits: Limits | None = None
) -> Outcome:
    """Run ``source``; with an ``entry_point``, call that function on each of ``inputs`` (lists of arguments) in turn.

    Arguments are fresh for every call. The program sees the standard library, an empty folder, standard input at its
    end, a fixed hash seed, and nothing else: it cannot write files, start processes or threads, or use the network.
    Without an entry point it is run as ``__main__``, with one under another name.

    The results travel on a pipe of their own under a random token, so nothing that the program prints is taken for
    one, and an early exit loses only the calls that were not over. What no such design can promise: the program shares
    its process with the few lines that report its values, so code written for that purpose can misreport what its own
    functions return. It cannot reach the caller, another run, or the machine.

    Raises ValueError for arguments that are no plain values (numbers, strings, bytes, lists, tuples, sets,
    dictionaries, None) and SandboxUnavailable where the process cannot be confined.
    """
    try:
        packed = [marshal.dumps(list(args)) for args in inputs]
    except ValueError as error:
        raise ValueError(f"the inputs of a sandboxed call must be plain values: {error}") from error
    text = source.encode("utf-8", "replace").decode("utf-8")
    task = {"what": "program", "source": text, "entry_point": entry_point, "inputs": packed}
    report = _process.run(task, limits or Limits())
    calls = tuple(_call(line[2:]) for line in report.lines if line[0] == "call" and len(line) == 5)
    failed = next((line for line in report.lines if line[0] in ("raised", "exited", "timeout")), None)
    ended = report.ended
    if ended == "finished" and failed is None and entry_point is not None and len(calls) < len(inputs):
        ended = "exited"  # only a program that speaks for its reporter says that it is done before it is
    return Outcome(
        status=failed[0] if failed else ended,
        calls=calls[: len(inputs)],
        stdout=report.stdout.decode("utf-8", "replace"),
        stderr=report.stderr.decode("utf-8", "replace"),
        error=": ".join(filter(None, failed[1:])) if failed else "",
        layers=report.layers,
    )


def _call(fields: list[str]) -> CallResult:
    status, shape, floats = fields
    try:
        return CallResult(status, shape, tuple(map(float.fromhex, floats.split(","))) if floats else ())
    except (ValueError, OverflowError):  # only a program that speaks for its reporter gives what are no floats
        return CallResult("raised", "MalformedReport")
