"""What a request pays for passing through `consilience serve` untouched, beside optillm, a bare proxy and no proxy.

Every server is a process of its own on loopback, as a user starts it: `consilience serve --policy none`,
`optillm --approach none` (its own Flask server), `peers/bare_proxy.py` (aiohttp on both sides, nothing but bytes).
The upstream is the scripted server; the load comes from another process, a closed loop of clients on bare
sockets (`peers/load.py`). Two things are measured with 1, 16 and 64 clients:

- added latency: the upstream takes 50 ms; median and 99th percentile, minus those of direct calls of the same round;
- throughput: the upstream takes no time.

Rounds are interleaved and differences and ratios taken within a round, since other work may share the
cores. Processor time per request, of the side's process alone, says what noise cannot change much.

    python benchmarks/serve_passthrough.py [--rounds 3] [--seconds 2] [--json] [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from statistics import median
from typing import Any

from _common import COLOURS, Server, emit, environment, parser, picture, serving, table
from _servers import NO_OPTILLM, SIDES, Running, bare_proxy, consilience, optillm, optillm_release

CLIENTS = (1, 16, 64)
LATENCY = 0.05
DIRECT, OURS, BARE, PEER = "direct", "consilience serve, @none", "bare aiohttp proxy", "optillm {}, none"

Start = Callable[[str], AbstractContextManager[Running]]


def load(port: int, clients: int, seconds: float, spread: float) -> dict[str, Any]:
    """What a load from a process of its own saw; raises RuntimeError for any reply that is not right."""
    command = [sys.executable, str(SIDES / "load.py"), "--port", str(port), "--clients", str(clients)]
    command += ["--seconds", str(seconds), "--spread", str(spread)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    seen: dict[str, Any] = json.loads(done.stdout)
    if seen["errors"] or not seen["taken"]:
        raise RuntimeError(f"{seen['errors']} replies of port {port} were not right: {seen['error']}")
    return seen


def percentile(taken: list[int], share: float) -> float:
    """A percentile of microseconds, in milliseconds."""
    ordered = sorted(taken)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] / 1e3


def one(side: Running | None, port: int, clients: int, seconds: float, spread: float) -> dict[str, float]:
    """One side in one round."""
    before = side.cpu_seconds() if side else 0.0
    seen = load(port, clients, seconds, spread)
    used = side.cpu_seconds() - before if side else 0.0
    return {
        "p50": percentile(seen["taken"], 0.5),
        "p99": percentile(seen["taken"], 0.99),
        "rate": len(seen["taken"]) / seen["seconds"],
        "cpu": used / len(seen["taken"]) * 1e6,
    }


def measure(starts: dict[str, Start], latency: float, rounds: int, seconds: float) -> dict[str, Any]:
    """By number of clients and side: what each round gave."""
    options: dict[str, Any] = {"answers": {"42": 1.0}, "log_bodies": False}
    with ExitStack() as stack:
        slow = {"latency": latency, "latency_shape": "fixed"} if latency else {}
        upstream: Server = stack.enter_context(serving(**options, **slow))
        sides = {name: stack.enter_context(start(upstream.url)) for name, start in starts.items()}
        ports = {DIRECT: int(upstream.url.split(":")[2].split("/")[0])} | {n: s.port for n, s in sides.items()}
        for port in ports.values():  # first connections, late imports
            load(port, 4, 0.5, 0.0)
        found: dict[str, Any] = {}
        for clients in CLIENTS:
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
            for _ in range(rounds):
                for name, port in ports.items():
                    rows[name].append(one(sides.get(name), port, clients, seconds, latency))
                    upstream.reset()
            found[str(clients)] = rows
        return found


def added(rows: dict[str, list[dict[str, float]]], name: str) -> dict[str, Any]:
    """Milliseconds over direct calls, medians of the rounds, and every round's median."""
    pairs = list(zip(rows[name], rows[DIRECT], strict=True))
    each = [side["p50"] - base["p50"] for side, base in pairs]
    return {
        "p50": round(median(each), 2),
        "p50_rounds": [round(value, 2) for value in each],
        "p99": round(median(side["p99"] - base["p99"] for side, base in pairs), 1),
        "cpu": round(median(side["cpu"] for side, _ in pairs)),
    }


def speed(rows: dict[str, list[dict[str, float]]], name: str, peer: str) -> dict[str, Any]:
    """Requests per second, and times those of the peer of the same round."""
    shown = {"rate": round(median(r["rate"] for r in rows[name])), "cpu": round(median(r["cpu"] for r in rows[name]))}
    if peer not in rows:
        return shown | {"times": None, "times_rounds": []}
    times = [side["rate"] / base["rate"] for side, base in zip(rows[name], rows[peer], strict=True)]
    return shown | {"times": round(median(times), 1), "times_rounds": [round(value, 1) for value in times]}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as one JSON-ready object."""
    release = optillm_release()
    peer = PEER.format(release)
    starts: dict[str, Start] = {
        BARE: bare_proxy,
        OURS: lambda upstream: consilience(upstream, "none"),
        **({peer: lambda upstream: optillm(upstream, "none")} if release else {}),
    }
    slow = measure(starts, LATENCY, options.rounds, options.seconds)
    fast = measure(starts, 0.0, options.rounds, options.seconds)
    return {
        "added": {n: {name: added(rows, name) for name in starts} for n, rows in slow.items()},
        "direct_p50": {n: round(median(r["p50"] for r in rows[DIRECT]), 2) for n, rows in slow.items()},
        "speed": {n: {name: speed(rows, name, peer) for name in (DIRECT, *starts)} for n, rows in fast.items()},
        "rounds": options.rounds,
        "seconds": options.seconds,
        "optillm": release,
        "environment": environment(),
    }


def markdown(result: dict[str, Any]) -> str:
    """Both tables and what to know of them."""
    late, quick = result["added"], result["speed"]
    head = ["side", *(f"{what}, {n}" for what in ("p50 ms", "p99 ms", "CPU us") for n in CLIENTS)]
    rows = [
        [name, *(late[str(n)][name][what] for what in ("p50", "p99", "cpu") for n in CLIENTS)]
        for name in late[str(CLIENTS[0])]
    ]
    rates = ["side", *(f"{what}, {n}" for what in ("requests/s", "times optillm", "CPU us") for n in CLIENTS)]
    lines = [
        [name, *(_shown(quick[str(n)][name][what]) for what in ("rate", "times", "cpu") for n in CLIENTS)]
        for name in quick[str(CLIENTS[0])]
    ]
    notes = [
        f"{result['rounds']} interleaved rounds of {result['seconds']:g} s; medians of the rounds, differences and "
        "ratios within a round. The number after a column's name is that of the clients.",
        "CPU us: processor time of the side's own process per request.",
        f"Direct calls, median: {', '.join(f'{v} ms with {n}' for n, v in result['direct_p50'].items())} clients.",
        result["environment"],
        *([] if result["optillm"] else [NO_OPTILLM]),
    ]
    return (
        f"Added to the latency of an upstream that takes {LATENCY * 1e3:g} ms, by number of clients:\n\n"
        f"{table(head, rows)}\n\nThroughput with an upstream that takes no time, by number of clients:\n\n"
        f"{table(rates, lines)}\n\n" + "\n".join(notes)
    )


def _shown(value: float | None) -> str:
    return "" if not value else f"{value:g}"


def plot(result: dict[str, Any], path: str) -> None:
    """Added median latency and throughput against the number of clients, a line per side, a dot per round."""
    with picture(path, width=8.0, height=3.4) as figure:
        left, right = figure.subplots(1, 2)
        names = list(result["added"][str(CLIENTS[0])])
        for name, colour in zip(names, (COLOURS[5], COLOURS[0], COLOURS[1]), strict=False):
            places = [n * (1.0 if name != OURS else 1.06) for n in CLIENTS]
            rounds = [result["added"][str(n)][name]["p50_rounds"] for n in CLIENTS]
            left.plot(places, [median(each) for each in rounds], "-o", color=colour, label=name, markersize=4)
            for place, each in zip(places, rounds, strict=True):
                left.plot([place] * len(each), each, ".", color=colour, alpha=0.4, markersize=4)
            rates = [result["speed"][str(n)][name]["rate"] for n in CLIENTS]
            right.plot(CLIENTS, rates, "-o", color=colour, label=name, markersize=4)
        left.axhline(3.0, color="#5b6675", linewidth=1, linestyle="--")
        left.set_ylabel("ms added at the median (50 ms upstream)")
        right.set_ylabel("requests/s (upstream takes no time)")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(CLIENTS, [str(n) for n in CLIENTS])
            axes.set_xlabel("clients")
        right.legend(frameon=False, fontsize=8)


def main() -> None:
    """Measure and print."""
    shown = parser(__doc__, rounds=3, seconds=2.0)
    shown.add_argument("--plot", metavar="FILE.png", help="also draw latency and throughput")
    options = shown.parse_args()
    result = run(options)
    emit(options, result, markdown(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
