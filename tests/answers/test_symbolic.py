"""The worker pool, with real processes: stuck, killed, crashed, shared by threads, inside an event loop, after fork."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from consilience.text.answers import AnswerClasses, Equality
from consilience.text.answers.symbolic import SymbolicPool

SCRIPT = """
import json, os, sys, time
def read():
    head = sys.stdin.buffer.read(4)
    return json.loads(sys.stdin.buffer.read(int.from_bytes(head, "big"))) if head else None
def write(message):
    body = json.dumps(message).encode()
    sys.stdout.buffer.write(len(body).to_bytes(4, "big") + body); sys.stdout.buffer.flush()
read(); write({"ready": True})
while (message := read()) is not None:
    if "hang" in message.values():
        while True: time.sleep(1)
    if "crash" in message.values():
        os._exit(3)
    write({"outcome": "equal" if message["a"].lower() == message["b"].lower() else "different"})
"""


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[SymbolicPool]:
    (tmp_path / "worker.py").write_text(SCRIPT)
    with SymbolicPool(2, timeout=3.0, command=[sys.executable, str(tmp_path / "worker.py")]) as pool:
        yield pool


@pytest.fixture(scope="module")
def real() -> Iterator[SymbolicPool]:
    with SymbolicPool(1, timeout=20.0) as pool:
        yield pool


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_stuck_pair_is_killed_and_the_next_works(scripted: SymbolicPool) -> None:
    assert scripted.compare("a", "A") is Equality.EQUAL
    (stuck,) = scripted.worker_pids()
    assert scripted.compare("a", "hang") is Equality.UNKNOWN
    assert gone(stuck)
    assert scripted.compare("b", "B") is Equality.EQUAL
    start = time.perf_counter()
    assert scripted.compare("hang", "a") is Equality.UNKNOWN  # kept, in either order
    assert time.perf_counter() - start < 1.0


def test_a_crash_is_unknown_and_the_next_works(scripted: SymbolicPool) -> None:
    assert scripted.compare("a", "crash") is Equality.UNKNOWN
    assert scripted.compare("a", "A") is Equality.EQUAL


def test_a_worker_killed_from_outside_is_replaced(scripted: SymbolicPool) -> None:
    assert scripted.compare("a", "A") is Equality.EQUAL
    (pid,) = scripted.worker_pids()
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    outcomes = [scripted.compare("b", "B"), scripted.compare("c", "C")]
    assert outcomes == [Equality.EQUAL] * 2
    assert pid not in scripted.worker_pids()


def test_threads_share_it_and_close_leaves_no_process(scripted: SymbolicPool) -> None:
    outcomes: list[Equality] = []

    def work(number: int) -> None:
        outcomes.extend(scripted.compare(f"x{number}.{i}", f"X{number}.{i}") for i in range(20))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [Equality.EQUAL] * 120
    pids = scripted.worker_pids()
    assert 1 <= len(pids) <= 2
    scripted.close()
    assert all(map(gone, pids))
    assert scripted.compare("again", "AGAIN") is Equality.EQUAL


async def test_the_event_loop_keeps_running(scripted: SymbolicPool) -> None:
    classes = AnswerClasses("math", pool=scripted)
    await classes.add_async("x+1")
    waiting = asyncio.ensure_future(classes.add_async("hang"))
    ticks = 0
    while not waiting.done():
        await asyncio.sleep(0.05)
        ticks += 1
    assert (await waiting, ticks > 5) == (1, True)
    assert classes.unknown_pairs == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_workers_of_its_own(scripted: SymbolicPool) -> None:
    assert scripted.compare("a", "A") is Equality.EQUAL
    pids = scripted.worker_pids()
    child = os.fork()
    if child == 0:
        ok = not scripted.worker_pids() and scripted.compare("b", "B") is Equality.EQUAL
        scripted.close()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert scripted.worker_pids() == pids
    assert scripted.compare("c", "C") is Equality.EQUAL


def test_a_worker_that_cannot_start_is_a_clear_error() -> None:
    with (
        SymbolicPool(1, command=[sys.executable, "-c", "pass"]) as pool,
        pytest.raises(RuntimeError, match="math-verify"),
    ):
        pool.compare("a", "b")
    with pytest.raises(ValueError, match="size >= 1"):
        SymbolicPool(0)


def test_real_pairs(real: SymbolicPool) -> None:
    assert real.compare("x^2-1", "(x-1)(x+1)") is Equality.EQUAL
    assert real.compare("x^2", "x^3") is Equality.DIFFERENT
    assert real.compare("}{", "x+1") is Equality.UNKNOWN


def test_a_real_expression_that_hangs_is_killed() -> None:
    with SymbolicPool(1, timeout=3.0) as pool:
        hanging = "\\sum_{k=1}^{10^{9}} \\sin(k^2)^{k}", "\\int_0^1 x^{x^{x^x}} e^{\\sin x^{x}} dx"
        assert pool.compare(*hanging) is not Equality.EQUAL
        assert pool.compare("9^{9^{9^{9^{9}}}}", "9^{9^{9^{9^{8}}}}+1") is not Equality.EQUAL
        assert pool.compare("2x+x", "3x") is Equality.EQUAL
