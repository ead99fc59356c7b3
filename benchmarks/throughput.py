"""Draws per second through the whole stack, beside a bare loop of the same HTTP client and beside its_hub.

The scripted server (its own process; no latency, `n`, log-probabilities and request bodies' log off) is first
loaded by bare sockets that send prepared bytes: that is its capacity, which should be far above the rate of any side,
else the server is what is measured. Then, in every round, the same number of calls goes over the same number of
connections through

- a bare aiohttp loop: post, read, parse;
- `consilience.asolve` under `sc:n=16`: ledger on disk, budget, answers, votes, verdicts, all of it, opening and
  closing included;
- its_hub's `SelfConsistency` with budget 16, in a process of its own, bounded by its own limit of calls in flight,
  and once more with that limit off and two questions at a time.

Rounds are interleaved and ratios taken within a round, since other work may share the cores; processor time per
draw, of the client's process alone, is shown beside the rates for the same reason.

    python benchmarks/throughput.py [--calls 4000] [--connections 32] [--rounds 5] [--json] [--plot FILE.png]
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from _common import (
    COLOURS,
    NO_PEERS,
    Server,
    emit,
    environment,
    its_hub,
    parser,
    peers_python,
    picture,
    questions,
    release_of,
    serving,
    table,
)
from http_client import bare, capacity

import consilience

DRAWS = 16
CAPACITY, BARE, STACK = "server capacity (bare sockets)", "aiohttp, bare loop", "Consilience, sc:n=16, ledger on"
PEER = "its_hub {}, SelfConsistency, {}"
LIMITS = {"own": "its own limit", "questions": "2 questions at a time"}

Measured = tuple[float, float]
"""Draws per second, and microseconds of the client's own processor time per draw."""

Side = Callable[[Server, int, int], Measured]


def in_process(load: Callable[[str, int, int], Any], server: Server, calls: int, connections: int) -> Measured:
    """A load of ``http_client.py``, in this process."""
    before = time.process_time()
    rate = asyncio.run(load(server.url, calls, connections))
    return rate, (time.process_time() - before) / calls * 1e6


def stack(server: Server, calls: int, connections: int) -> Measured:
    """`consilience.asolve` on a fresh ledger; raises AssertionError if any draw is missing."""
    asked = questions(calls // DRAWS)
    with tempfile.TemporaryDirectory() as folder:
        ledger = str(Path(folder) / "ledger.db")
        wall, cpu = time.perf_counter(), time.process_time()
        work = consilience.asolve(
            asked, model=f"openai:m@{server.url}", policy=f"sc:n={DRAWS}", concurrency=connections, ledger=ledger
        )
        run = asyncio.run(work)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    draws = len(asked) * DRAWS
    assert run.totals["draws_bought"] == draws
    assert run.totals["failed"] == 0
    return draws / wall, cpu / draws * 1e6


def peer(python: str, limit: str, server: Server, calls: int, connections: int) -> Measured:
    """its_hub's `SelfConsistency`; raises AssertionError if a question got no answer."""
    asked = calls // DRAWS
    done = its_hub(python, server.url, questions=asked, budget=DRAWS, concurrency=connections, limit=limit)
    assert done["lost"] == 0, done["errors"]
    draws = asked * DRAWS
    return draws / done["seconds"], done["cpu_seconds"] / draws * 1e6


def sides(python: str | None, release: str) -> dict[str, Side]:
    """What takes part, in the order of every round."""
    found: dict[str, Side] = {CAPACITY: partial(in_process, capacity), BARE: partial(in_process, bare), STACK: stack}
    if python is not None:
        found |= {PEER.format(release, words): partial(peer, python, limit) for limit, words in LIMITS.items()}
    return found


def measure(taking_part: dict[str, Side], calls: int, connections: int, rounds: int) -> dict[str, Any]:
    """What each side did in each round, and what the server counted of it."""
    measured: dict[str, list[Measured]] = {name: [] for name in taking_part}
    counted = dict.fromkeys(taking_part, 0)
    options: dict[str, Any] = {"answers": {"42": 0.7, "41": 0.3}, "log_bodies": False}
    with serving(**options, supports_n=False, supports_logprobs=False) as server:
        for side in taking_part.values():  # imports, first connections
            side(server, DRAWS * 4, connections)
        for _ in range(rounds):
            for name, side in taking_part.items():
                server.reset()
                gc.collect()
                measured[name].append(side(server, calls, connections))
                counted[name] += server.counts()["calls"]
    return {"measured": measured, "counted": counted}


def summary(found: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken within a round first."""
    measured: dict[str, list[Measured]] = found["measured"]
    base, rows = measured[BARE], {}
    for name, taken in measured.items():
        ratios = [rate / b for (rate, _), (b, _) in zip(taken, base, strict=True)]
        rows[name] = {
            "draws_per_second": round(median(rate for rate, _ in taken)),
            "best": round(max(rate for rate, _ in taken)),
            "times_bare": round(median(ratios), 2),
            "times_bare_rounds": [round(ratio, 2) for ratio in ratios],
            "cpu_us_per_draw": round(median(cpu for _, cpu in taken)),
            "requests_per_round": found["counted"][name] / rounds,
        }
    served = rows[CAPACITY]["draws_per_second"]
    over = {name: round(served / rows[name]["draws_per_second"], 1) for name in rows if name != CAPACITY}
    return {"sides": rows, "server_over": over}


def markdown(result: dict[str, Any]) -> str:
    """The table and what to know of it."""
    head = ["side", "draws/s, median", "best", "times bare loop", "CPU us per draw", "requests per round"]
    rows = [
        [
            name,
            r["draws_per_second"],
            r["best"],
            f"{r['times_bare']:.2f}",
            r["cpu_us_per_draw"],
            f"{r['requests_per_round']:g}",
        ]
        for name, r in result["sides"].items()
    ]
    notes = [
        f"{result['calls']} calls a round, {result['connections']} connections, {result['rounds']} rounds.",
        f"Alone, the server answers {result['server_over'][BARE]} times as fast as the bare loop asks and "
        f"{result['server_over'][STACK]} times as fast as Consilience does.",
        result["environment"],
        *([] if result["its_hub"] else [NO_PEERS]),
    ]
    return table(head, rows) + "\n\n" + "\n".join(notes)


def plot(result: dict[str, Any], path: str) -> None:
    """Each round's ratio to the bare loop as a dot, the median as a bar."""
    rows = {name: row for name, row in result["sides"].items() if name not in (CAPACITY, BARE)}
    with picture(path, height=0.9 + 0.6 * len(rows)) as figure:
        axes = figure.add_subplot()
        for place, (name, row) in enumerate(rows.items()):
            axes.barh(place, row["times_bare"], height=0.5, color=COLOURS[0 if name == STACK else 1], alpha=0.75)
            axes.plot(row["times_bare_rounds"], [place] * result["rounds"], "o", color="#1c2430", markersize=3)
        axes.axvline(1.0, color="#5b6675", linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.invert_yaxis()
        axes.set_xlabel("draws/s, times the bare loop of the same round")


def main() -> None:
    """Measure and print."""
    shown = parser(__doc__, calls=4000, connections=32, rounds=5)
    shown.add_argument("--peers-python", help="the Python that has its_hub (default: that of .venv-peers)")
    shown.add_argument("--plot", metavar="FILE.png", help="also draw the ratios")
    options = shown.parse_args()
    if options.calls < options.connections or options.calls % DRAWS:
        shown.error(f"--calls must be a multiple of {DRAWS} and at least --connections")
    python = peers_python(options.peers_python)
    release = release_of(python) if python else ""
    found = measure(sides(python, release), options.calls, options.connections, options.rounds)
    result = summary(found, options.rounds) | {
        "calls": options.calls,
        "connections": options.connections,
        "rounds": options.rounds,
        "environment": environment(),
        "its_hub": release if python else None,
    }
    emit(options, result, markdown(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
