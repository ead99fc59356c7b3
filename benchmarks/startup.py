"""How long `import consilience` and `consilience --help` take, as whole processes beside an empty one.

Each round starts, in turn, an interpreter that does nothing, one that imports NumPy, one that imports consilience,
and `consilience --help`; medians over the rounds, the empty interpreter's time of the same round taken off. Ratios
are to NumPy's import in the same round, since other work may share the cores. A further process each tells whether
torch or transformers got loaded.

    python benchmarks/startup.py [--rounds 25] [--json]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from statistics import median
from typing import Any

from _common import emit, environment, parser, table

EMPTY, NUMPY, IMPORT, HELP = "python -c pass", "import numpy", "import consilience", "consilience --help"
PROCESSES = {
    EMPTY: ["-c", "pass"],
    NUMPY: ["-c", "import numpy"],
    IMPORT: ["-c", "import consilience"],
    HELP: ["-m", "consilience", "--help"],
}
HEAVY = ("torch", "transformers")
SHOW_HELP = (
    "import sys\nfrom consilience.cli import main\nsys.argv = ['consilience', '--help']\n"
    "try: main()\nexcept SystemExit: pass\n"
)


def start(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one process, from its start to its end."""
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def loaded(code: str) -> list[str]:
    """Which of the heavy packages are in a fresh interpreter after ``code``."""
    shown = f"{code}\nimport sys; print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def measure(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """What each process took, interleaved; the first start of each is thrown away."""
    for arguments in PROCESSES.values():
        start(arguments)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in PROCESSES}
    for _ in range(rounds):
        for name, arguments in PROCESSES.items():
            taken[name].append(start(arguments))
    return taken


def summary(taken: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians in seconds, whole and above the empty interpreter, and the ratio to NumPy's import."""
    rows = {}
    for name, processes in taken.items():
        above = [wall - empty for (wall, _), (empty, _) in zip(processes, taken[EMPTY], strict=True)]
        numpy = [wall - empty for (wall, _), (empty, _) in zip(taken[NUMPY], taken[EMPTY], strict=True)]
        rows[name] = {
            "seconds": median(wall for wall, _ in processes),
            "above_empty": median(above),
            "cpu_seconds": median(cpu for _, cpu in processes),
            "times_numpy": median(one / base for one, base in zip(above, numpy, strict=True)),
        }
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table and what was loaded."""
    head = ["process", "whole, s", "above the empty one, s", "CPU, s", "times import numpy"]
    rows = [
        [
            f"`{name}`",
            *(f"{r[key]:.3f}" for key in ("seconds", "above_empty", "cpu_seconds")),
            f"{r['times_numpy']:.2f}",
        ]
        for name, r in result["processes"].items()
    ]
    words = [
        f"{name} ({'installed' if find_spec(name) else 'not installed here'}): "
        + ", ".join(f"`{what}` {'yes' if name in found else 'no'}" for what, found in result["loaded"].items())
        for name in HEAVY
    ]
    notes = [f"{result['rounds']} rounds, medians.", f"Loaded: {'; '.join(words)}.", result["environment"]]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON-ready object."""
    os.environ.setdefault("TERM", "dumb")
    return {
        "processes": summary(measure(options.rounds)),
        "loaded": {IMPORT: loaded("import consilience"), HELP: loaded(SHOW_HELP)},
        "rounds": options.rounds,
        "environment": environment(),
    }


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, rounds=25).parse_args()
    result = run(options)
    emit(options, result, markdown(result))


if __name__ == "__main__":
    main()
