"""The ledger on both databases: what is stored comes back, nothing good is overwritten, exports round-trip."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from consilience import record
from consilience.draws import Draw
from consilience.errors import ConsilienceError, InputError
from consilience.ledger import Ledger, default_url
from consilience.text.sources.base import Request


def request(question: str = "q", **changes) -> Request:
    given = {
        "endpoint": "e",
        "model": "m",
        "messages": ({"role": "user", "content": question},),
        "params": {"temperature": 1},
    }
    return Request(**(given | {"question": question} | changes))


def put(ledger: Ledger, asked: Request, draws: dict[int, Draw]) -> None:
    async def work() -> None:
        await asyncio.gather(*(ledger.put(asked, index, draw) for index, draw in draws.items()))

    asyncio.run(work())


def test_draws_come_back_from_another_process_whole(ledger_url: str) -> None:
    draw = Draw(text='snow ❄ "x"\n', logprob=-1.25, completion_tokens=3, tool_calls=[{"name": "f"}])
    with Ledger(ledger_url) as ledger:
        put(ledger, request(), {0: draw, 2: Draw(text="")})
    with Ledger(ledger_url) as ledger:
        held = ledger.stored([request().hash, request("other").hash])
    assert held == {request().hash: {0: draw, 2: Draw(text="")}, request("other").hash: {}}


def test_a_good_draw_replaces_a_failed_one_and_is_never_replaced(ledger_url: str) -> None:
    key = request().hash
    with Ledger(ledger_url) as ledger:
        put(ledger, request(), {0: Draw(text="", error="timeout")})
        assert ledger.stored([key])[key] == {}
        put(ledger, request(), {0: Draw(text="good")})
        put(ledger, request(), {0: Draw(text="late")})
        put(ledger, request(), {0: Draw(text="", error="late failure")})
        assert ledger.stored([key])[key] == {0: Draw(text="good")}


@pytest.mark.parametrize(
    "changed",
    [
        {"params": {"temperature": 0.9}},
        {"params": {"temperature": 1, "top_p": 0.5}},
        {"seed": 1},
        {"model": "n"},
        {"endpoint": "f"},
        {"tools": ({"type": "function"},)},
        {"response_format": {"type": "json_object"}},
        {"messages": ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})},
    ],
)
def test_whatever_changes_the_distribution_changes_the_key(changed: dict) -> None:
    assert request(**changed).hash != request().hash


def test_what_does_not_change_the_distribution_does_not_change_the_key() -> None:
    same = request(required=frozenset({"temperature"}), problem_id="7")
    assert same.hash == request().hash
    assert same.call_seed(3) == request().call_seed(3) != request().call_seed(4)
    assert 0 <= same.call_seed(3) < 2**31


def test_many_draws_and_many_requests(ledger_url: str) -> None:
    asked = [request(f"question {number}") for number in range(700)]
    with Ledger(ledger_url) as ledger:

        async def work() -> None:
            puts = [ledger.put(one, index, Draw(text=f"{index}")) for one in asked for index in range(4)]
            await asyncio.gather(*puts)

        asyncio.run(work())
        held = ledger.stored(one.hash for one in asked)
        assert sum(len(draws) for draws in held.values()) == 2800
        assert ledger.summary() == [
            {
                "endpoint": "e",
                "model": "m",
                "requests": 700,
                "draws": 2800,
                "failed": 0,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "cost": 0,
            }
        ]


def test_export_is_a_record_and_import_brings_it_back(ledger_url: str, tmp_path: Path) -> None:
    with Ledger(ledger_url) as ledger:
        put(ledger, request("a"), {0: Draw(text="x"), 1: Draw(text="", error="no"), 2: Draw(text="y", reward=0.5)})
        put(ledger, request("b", seed=3), {0: Draw(text="z")})
        assert ledger.export(tmp_path / "all.jsonl.gz") == 2
    problems = {problem.question: problem for problem in record.read(tmp_path / "all.jsonl.gz")}
    assert [draw.text for draw in problems["a"].draws] == ["x", "y"]
    with Ledger(str(tmp_path / "second.db")) as copy:
        assert copy.load(tmp_path / "all.jsonl.gz") == (3, 0)
        assert copy.load(tmp_path / "all.jsonl.gz") == (0, 3)
        key = request("a").hash
        assert copy.stored([key])[key] == {0: Draw(text="x"), 2: Draw(text="y", reward=0.5)}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": "a", "draws": []}, "'request' is missing"),
        ({"question": "a", "request": {"endpoint": "e", "model": "m", "messages": []}, "draws": []}, "draw_indices"),
        (
            {
                "question": "a",
                "request": {"endpoint": "e", "model": "m", "messages": []},
                "draw_indices": [0, 0],
                "draws": [{"text": "x"}, {"text": "y"}],
            },
            "draw_indices",
        ),
    ],
)
def test_import_refuses_what_it_did_not_write(tmp_path: Path, line: dict, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(line))
    with Ledger(str(tmp_path / "l.db")) as ledger, pytest.raises(InputError, match=says):
        ledger.load(path)


def test_opening_errors_are_clear_and_hide_passwords(tmp_path: Path) -> None:
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"not a database, but long enough to look like a file" * 50)
    for url, says in [
        (str(broken), "cannot be opened"),
        ("sqlite://", "in-memory"),
        ("mysql+nothing://x", "no driver"),
        ("postgresql://joe:secret@127.0.0.1:1/x", "cannot be opened"),
        ("/proc/nowhere/l.db", "cannot be opened"),
    ]:
        with pytest.raises(InputError) as error:
            Ledger(url)
        assert says in str(error.value)
        assert "secret" not in str(error.value)


def test_a_write_that_fails_reaches_every_waiting_draw(tmp_path: Path) -> None:
    url = str(tmp_path / "l.db")
    with Ledger(url) as ledger:
        with sqlite3.connect(url) as connection:
            connection.execute("DROP TABLE draws")

        async def work() -> None:
            outcomes = await asyncio.gather(
                *(ledger.put(request(), index, Draw(text="x")) for index in range(3)), return_exceptions=True
            )
            assert all(isinstance(o, ConsilienceError) and "cannot be written" in str(o) for o in outcomes)

        asyncio.run(work())


def test_default_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSILIENCE_LEDGER", raising=False)
    assert default_url() == str(Path(".consilience") / "ledger.db")
    monkeypatch.setenv("CONSILIENCE_LEDGER", "other.db")
    assert default_url() == "other.db"


def test_kill_minus_nine_keeps_every_draw_that_was_announced(ledger_url: str, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import asyncio, sys
        from consilience.draws import Draw
        from consilience.ledger import Ledger
        from consilience.text.sources.base import Request
        async def work():
            ledger = Ledger(sys.argv[1])
            asked = Request("e", "m", ({"role": "user", "content": "q"},), {"temperature": 1}, question="q")
            for index in range(100000):
                await ledger.put(asked, index, Draw(text=str(index)))
                print(index, flush=True)
        asyncio.run(work())
    """)
    process = subprocess.Popen([sys.executable, "-c", script, ledger_url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    announced = [int(process.stdout.readline()) for _ in range(50)]
    os.kill(process.pid, signal.SIGKILL)
    announced += [int(line) for line in process.stdout if line.endswith("\n")]
    process.wait()
    with Ledger(ledger_url) as ledger:
        held = ledger.stored([request().hash])[request().hash]
    assert set(announced) <= set(held)
    assert len(held) <= len(announced) + 1


def test_two_processes_share_one_ledger(ledger_url: str) -> None:
    with Ledger(ledger_url) as one, Ledger(ledger_url) as two:

        async def work() -> None:
            puts = [(one if index % 2 else two).put(request(), index, Draw(text=str(index))) for index in range(300)]
            await asyncio.gather(*puts)

        asyncio.run(work())
        assert one.stored([request().hash]) == two.stored([request().hash])
        assert len(one.stored([request().hash])[request().hash]) == 300


def test_a_dropped_connection_loses_nothing(postgres_url: str) -> None:
    import psycopg

    with Ledger(postgres_url) as ledger:

        async def work() -> None:
            for index in range(60):
                await ledger.put(request(), index, Draw(text=str(index)))
                if index % 20 == 10:
                    with psycopg.connect(postgres_url, autocommit=True) as other:
                        mine = "state IS NOT NULL AND pid <> pg_backend_pid() AND query LIKE '%INTO draws%'"
                        other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {mine}")

        asyncio.run(work())
        assert len(ledger.stored([request().hash])[request().hash]) == 60


def test_two_writers_with_the_same_keys_in_other_orders(postgres_url: str) -> None:
    asked = [request(f"question {number}") for number in range(20)]
    with Ledger(postgres_url) as one, Ledger(postgres_url) as two:

        async def work() -> None:
            puts = []
            for index in range(10):
                for first, second in zip(asked, reversed(asked), strict=True):
                    puts += [one.put(first, index, Draw(text="1")), two.put(second, index, Draw(text="2"))]
                await asyncio.sleep(0)
            await asyncio.gather(*set(puts))

        asyncio.run(work())
        held = one.stored(each.hash for each in asked)
        assert all(len(draws) == 10 for draws in held.values())


async def test_a_long_run_does_not_remember_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import consilience.ledger.store as module

    monkeypatch.setattr(module, "KNOWN", 3)
    with Ledger(str(tmp_path / "l.db")) as store:
        asked = [Request("e", "m", ({"role": "user", "content": str(n % 5)},), {"temperature": 1}) for n in range(20)]
        for index, request in enumerate(asked):
            await store.put(request, index // 5, Draw(text=str(index)))
            assert len(store._known) <= 3
        found = store.stored({request.hash for request in asked})
    assert {len(draws) for draws in found.values()} == {4}
