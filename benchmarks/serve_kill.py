"""kill -9 of one worker after another under load: what is bought twice, what clients see, what a retry costs.

`consilience serve --workers 4` stands in front of a scripted server (its own process, fixed latency, no ``n``), with a
PostgreSQL of its own (``initdb``), or one of a URL. Clients ask without a pause, each request with an
``Idempotency-Key`` of its own, and send a request again when its connection breaks. At random moments a worker is
killed; the next one once it is replaced. Then the scripted server's log is held against the ledger: a call carries its
question and a seed made of request and index, so each call is known by the one draw it was made for, and a draw was
bought again if a call for it began after it was in the ledger.

    python benchmarks/serve_kill.py [--kills 10] [--clients 16] [--postgres URL] [--json]
"""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import sqlalchemy
from _common import Server, emit, environment, parser, serving, table

from consilience.ledger import Ledger, tables

DRAWS = 6
WORKERS = 4


@contextmanager
def database(url: str) -> Iterator[str]:
    """A database to use up: a schema of its own at ``url``, or else a server started here."""
    if url:
        import psycopg

        name = f"kill_{os.getpid()}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        try:
            yield f"{url}{'&' if '?' in url else '?'}options=-csearch_path%3D{name}"
        finally:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f"DROP SCHEMA {name} CASCADE")
        return
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    initdb = shutil.which("initdb") or (str(found[0]) if found else "")
    if not initdb:
        raise SystemExit("no initdb found: install PostgreSQL, or give --postgres URL")
    if os.geteuid() == 0:
        raise SystemExit("PostgreSQL does not start as root: give --postgres URL")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        data = Path(folder) / "data"
        subprocess.run([initdb, "-D", data, "-A", "trust"], check=True, stdout=subprocess.DEVNULL)
        flags = ["-p", str(port), "-c", "listen_addresses=127.0.0.1", "-k", folder]
        server = subprocess.Popen([Path(initdb).with_name("postgres"), "-D", data, *flags], stderr=subprocess.DEVNULL)
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"postgresql://{getpass.getuser()}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


@contextmanager
def served(upstream: Server, ledger: str, folder: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a user starts it, and its URL."""
    command = [sys.executable, "-m", "consilience", "serve", "--upstream", upstream.url, "--port", "0"]
    command += ["--policy", f"sc:n={DRAWS}", "--ledger", ledger, "--workers", str(WORKERS), "--budget", "draws=1000000"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"serving (http://\S+/v1),", line)
        assert found, line + process.stderr.read()
        yield process, found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The process numbers of the workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@dataclass
class Seen:
    """What the clients saw: requests, broken tries, other failures, and seconds from a break to the answer."""

    answered: int = 0
    broken: list[float] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    recovery: list[float] = field(default_factory=list)
    bought: int = 0
    during: int = 0


async def client(url: str, number: int, seen: Seen, over: asyncio.Event, state: dict[str, bool]) -> None:
    """Ask one question after the other, each until it is answered."""
    connector = aiohttp.TCPConnector(force_close=number % 2 == 0)  # half of the clients keep their connections
    async with aiohttp.ClientSession(connector=connector) as session:
        count = 0
        while not over.is_set():
            count += 1
            key = {"Idempotency-Key": f"client {number}, order {count}"}
            body = {"model": "m", "messages": [{"role": "user", "content": f"{number} x {count}?"}]}
            broke = None
            while True:
                try:
                    async with session.post(f"{url}/chat/completions", json=body, headers=key) as reply:
                        said = await reply.json()
                        if reply.status != 200:
                            seen.other[f"HTTP {reply.status}"] += 1
                            continue
                        assert said["consilience"]["draws"] == DRAWS
                        seen.answered += 1
                        seen.during += state["short"]
                        seen.bought += said["consilience"]["draws_bought"]
                        if broke is not None:
                            seen.recovery.append(time.perf_counter() - broke)
                        break
                except (aiohttp.ClientError, ConnectionError):
                    seen.broken.append(time.perf_counter())
                    broke = broke or time.perf_counter()


async def load(url: str, process: subprocess.Popen[str], kills: int, clients: int, seed: int) -> tuple[Seen, int]:
    """Clients at work while workers are killed; returns what they saw, and breaks that no kill explains."""
    rng, seen, over, state = random.Random(seed), Seen(), asyncio.Event(), {"short": False}
    tasks = [asyncio.ensure_future(client(url, number, seen, over, state)) for number in range(clients)]
    moments: list[float] = []
    for _ in range(kills):
        await asyncio.sleep(0.5 + rng.random())
        victim = rng.choice(workers(process))
        moments.append(time.perf_counter())
        os.kill(victim, signal.SIGKILL)
        state["short"] = True
        assert process.stderr is not None
        line = await asyncio.to_thread(process.stderr.readline)
        assert line.startswith(f"worker {victim} ended (SIGKILL)"), line
        line = await asyncio.to_thread(process.stderr.readline)
        assert line.endswith(" serves\n"), line
        state["short"] = False
    await asyncio.sleep(1)
    over.set()
    await asyncio.gather(*tasks)
    unexplained = sum(not any(0 <= when - moment < 1 for moment in moments) for when in seen.broken)
    return seen, unexplained


def held(ledger: str) -> dict[tuple[str, int], float]:
    """When each draw was put into the ledger, by its question and the seed of its call; seconds since the epoch."""
    r, d = tables.requests.c, tables.draws.c
    query = sqlalchemy.select(r.question, d.request_hash, d.draw_index, d.created).where(d.failed == 0)
    with Ledger(ledger) as store, store._engine.connect() as connection:
        rows = connection.execute(query.join_from(tables.draws, tables.requests)).all()
    return {(question, call_seed(key, index)): created for question, key, index, created in rows}


def call_seed(request_hash: str, index: int) -> int:
    """As `Request.call_seed`."""
    return int.from_bytes(hashlib.sha256(f"{request_hash}:{index}".encode()).digest()[:4], "big") >> 1


def accounts(ledger: str, upstream: Server) -> dict[str, int]:
    """The upstream's log against the ledger."""
    stored, log = held(ledger), upstream.log()
    began = time.time() - time.monotonic()
    calls = [((e["body"]["messages"][0]["content"], e["body"]["seed"]), began + e["time"]) for e in log]
    return {
        "upstream_calls": upstream.counts()["calls"],
        "draws_in_ledger": len(stored),
        "calls_without_a_draw": sum(key not in stored for key, _ in calls),
        "calls_for_a_draw_in_flight_at_a_kill": len(calls) - len({key for key, _ in calls}),
        "calls_for_a_draw_in_the_ledger": sum(key in stored and at > stored[key] for key, at in calls),
    }


def measure(url: str, options: Any) -> dict[str, Any]:
    """One run."""
    given = {"answers": {"42": 0.6, "41": 0.4}, "latency": 0.05, "latency_shape": "fixed", "supports_n": False}
    with serving(**given) as upstream, database(url) as ledger, tempfile.TemporaryDirectory() as folder:
        with served(upstream, ledger, folder) as (process, address):
            seen, unexplained = asyncio.run(load(address, process, options.kills, options.clients, options.seed))
        recovery = sorted(seen.recovery)
        return {
            "kills": options.kills,
            "requests": seen.answered,
            "answered_while_a_worker_was_missing": seen.during,
            "tries_broken": len(seen.broken),
            "tries_broken_without_a_kill": unexplained,
            "other_failures": sum(seen.other.values()),
            "requests_broken_then_answered": len(recovery),
            "seconds_to_the_answer_median": round(recovery[len(recovery) // 2], 2) if recovery else None,
            "seconds_to_the_answer_max": round(recovery[-1], 2) if recovery else None,
            **accounts(ledger, upstream),
        }


def main() -> None:
    """Measure and print."""
    shown = parser(__doc__, kills=10, clients=16, seed=1)
    default = os.environ.get("CONSILIENCE_TEST_POSTGRES", "")
    shown.add_argument("--postgres", default=default, help="default: $CONSILIENCE_TEST_POSTGRES, else one started here")
    options = shown.parse_args()
    result = measure(options.postgres, options) | {"environment": environment()}
    rows = [(name.replace("_", " "), value) for name, value in result.items() if name != "environment"]
    emit(options, result, table(["what", "count"], rows) + "\n\n" + result["environment"])


if __name__ == "__main__":
    main()
