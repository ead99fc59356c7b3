"""The start of the sandboxed process: read the task, close the door, run, report.

Reports are lines of tab-separated ASCII fields on a pipe of their own; each starts with a token that the program was
not told, so that nothing it prints is taken for one.
"""

from __future__ import annotations

import marshal
import os
import sys

from .confine import Refused, confine

TYPE_CHECKING = False  # as typing has it; importing typing would cost more than the rest
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Serve one task and end the process, without the program's exit handlers."""
    task = marshal.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    pipe, token = task.pop("pipe"), task.pop("token")

    def report(*fields: object, write: Any = os.write) -> None:
        line = memoryview(("\t".join([token, *map(plain, fields)]) + "\n").encode("ascii"))
        while line:
            line = line[write(pipe, line) :]

    if task["what"] == "query":
        from .query import run
    else:
        from .program import run
    try:
        layers = confine(task["limits"], task["readable"], task["parent"])
    except (Refused, OSError, ValueError) as error:
        report("unavailable", error)
        os._exit(1)
    report("ready", ",".join(layers))
    end = os._exit  # kept: the program may replace the module's own
    run(task, report)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            continue
    report("end")
    end(0)


def plain(field: object) -> str:
    """ASCII without a tab or a line break."""
    text = str(field)
    if text.isascii() and text.isprintable():
        return text
    return text.encode("ascii", "backslashreplace").decode("ascii").replace("\t", " ").replace("\n", " ")
