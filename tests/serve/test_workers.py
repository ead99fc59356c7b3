"""Several worker processes behind one address: real processes, a real PostgreSQL, an upstream that counts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from consilience.ledger import Ledger
from consilience.testing import ScriptedServer

from .helpers import eventually

pytestmark = pytest.mark.slow
ANSWERS = {"answers": {"42": 0.6, "41": 0.4}, "supports_n": False}
KEYS = '[serve.keys.ann]\nkey_env = "ANN_KEY"\nbudget = "draws=40"\n[serve.keys.bob]\nkey_env = "BOB_KEY"\n'


class Served:
    """A running supervisor with its workers."""

    def __init__(self, process: subprocess.Popen, url: str) -> None:
        self.process, self.url = process, url

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def ask(self, question: str = "6 x 7?", key: str = "x", again: str | None = None, **more) -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"} | ({} if again is None else {"idempotency-key": again})
        body = {"model": "m", "messages": [{"role": "user", "content": question}]} | more
        return httpx2.post(f"{self.url}/chat/completions", json=body, headers=headers, timeout=60)

    def metrics(self) -> dict[str, float]:
        text = httpx2.get(self.url.replace("/v1", "/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.name: sum(s.value for s in samples if s.name == sample.name) for sample in samples}


@contextmanager
def serving(upstream: ScriptedServer, folder: Path, ledger: str, *flags: str, config: str = "") -> Iterator[Served]:
    (folder / "consilience.toml").write_text(config)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    clean |= {"ANN_KEY": "ann's", "BOB_KEY": "bob's"}
    command = [sys.executable, "-m", "consilience", "serve", "--upstream", upstream.url, "--port", "0"]
    command += ["--policy", "sc:n=6", "--ledger", ledger, *flags]
    process = subprocess.Popen(command, cwd=folder, env=clean, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.match(r"serving (http://127\.0\.0\.1:\d+/v1), policy \S+, upstream \S+, \d workers\n", line)
        assert found, line + process.stderr.read()
        yield Served(process, found[1])
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        process.stderr.close()


def kept(url: str) -> int:
    with Ledger(url) as ledger:
        return sum(len(draws) for _, _, draws in ledger._requests())


def test_caps_hold_over_all_workers_and_are_used_up(tmp_path: Path, postgres_url: str) -> None:
    """As the upstream counts: the server's cap, a key's cap beneath it; and the metrics add up over the workers."""
    flags = ("--workers", "4", "--budget", "draws=150", "--concurrency", "64")
    with (
        ScriptedServer(**ANSWERS, latency=0.02) as upstream,
        serving(upstream, tmp_path, postgres_url, *flags, config=KEYS) as served,
        ThreadPoolExecutor(24) as pool,
    ):
        ann = list(pool.map(lambda n: served.ask(f"{n}?", key="ann's"), range(24)))
        assert upstream.counts["draws"] == 40
        bob = list(pool.map(lambda n: served.ask(f"{n}?", key="bob's"), range(48)))
        assert upstream.counts["draws"] == 150
        answered = [reply for reply in (*ann, *bob) if reply.status_code == 200]
        assert {reply.status_code for reply in (*ann, *bob)} == {200, 429}
        assert sum(reply.json()["consilience"]["draws"] for reply in answered) == 150
        seen = served.metrics()
        assert seen["consilience_requests_total"] == 72
        assert seen["consilience_draws_bought_total"] == 150
        assert seen["consilience_upstream_calls_total"] == 150
        assert seen["consilience_requests_most"] == 256
        assert eventually(lambda: served.metrics()["consilience_requests_in_flight"] == 0)
        assert httpx2.get(served.url.replace("/v1", "/readyz")).json() == {"status": "ready"}
    assert kept(postgres_url) == 150


def test_a_cap_on_tokens_holds_over_workers_and_over_restarts(tmp_path: Path, postgres_url: str) -> None:
    flags = ("--workers", "3", "--budget", "tokens=1500", "--max-tokens", "40", "--budget-name", "prod")
    with ScriptedServer(**ANSWERS, latency=0.01) as upstream:
        for _ in range(2):
            with serving(upstream, tmp_path, postgres_url, *flags) as served, ThreadPoolExecutor(24) as pool:
                replies = list(pool.map(lambda n, s=served: s.ask(f"{n}?").status_code, range(60)))
                spent = upstream.counts["prompt_tokens"] + upstream.counts["completion_tokens"]
                assert 1500 - 120 < spent <= 1500  # a call's worst case: 40, 64 and the bytes of the prompt
                assert 429 in replies
        assert set(replies) == {429}


def test_equal_requests_at_the_same_moment_buy_once(tmp_path: Path, postgres_url: str) -> None:
    with (
        ScriptedServer(**ANSWERS, latency=0.05) as upstream,
        serving(upstream, tmp_path, postgres_url, "--workers", "4") as served,
        ThreadPoolExecutor(12) as pool,
    ):
        for again in ({"again": "order-66"}, {"seed": 7}):
            upstream.reset()
            replies = list(pool.map(lambda _, given=again: served.ask(**given).json(), range(12)))
            assert upstream.counts["draws"] == 6
            assert sum(reply["consilience"]["draws_bought"] for reply in replies) == 6
            assert len({json.dumps(reply["consilience"]["votes"]) for reply in replies}) == 1
            assert {reply["consilience"]["draws"] for reply in replies} == {6}


def test_a_killed_worker_is_replaced_and_costs_what_it_had_in_flight(tmp_path: Path, postgres_url: str) -> None:
    names = [f"order-{n}" for n in range(16)]
    with (
        ScriptedServer(**ANSWERS, latency=0.1, latency_shape="fixed") as upstream,
        serving(upstream, tmp_path, postgres_url, "--workers", "3", "--concurrency", "12") as served,
        ThreadPoolExecutor(16) as pool,
    ):
        before = set(served.workers())
        assert len(before) == 3

        def ask(name: str) -> httpx2.Response | None:
            try:
                return served.ask(again=name)
            except httpx2.TransportError:
                return None

        asked = [pool.submit(ask, name) for name in names]
        assert eventually(lambda: upstream.counts["draws"] >= 20)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        replies = [one.result() for one in asked]
        assert all(reply is None or reply.status_code == 200 for reply in replies)
        assert any(reply is not None for reply in replies)  # the other workers go on
        assert served.process.stderr.readline() == f"worker {victim} ended (SIGKILL); another takes its place\n"
        assert eventually(lambda: len(set(served.workers()) - {victim}) == 3, 60)
        held, paid = kept(postgres_url), upstream.counts["calls"]
        retried = [served.ask(again=name).json()["consilience"] for name in names]
        assert [one["draws"] for one in retried] == [6] * 16
        assert sum(one["draws_bought"] for one in retried) == 6 * 16 - held
        assert upstream.counts["calls"] - paid == 6 * 16 - held
        assert kept(postgres_url) == 6 * 16
        assert paid - held <= 12  # no more than was in flight


def test_after_kill_9_of_all_nothing_in_the_ledger_is_bought_again(tmp_path: Path, postgres_url: str) -> None:
    names = [f"order-{n}" for n in range(8)]
    flags = ("--workers", "2", "--concurrency", "4")
    with ScriptedServer(**ANSWERS, latency=0.05) as upstream, ThreadPoolExecutor(8) as pool:
        with serving(upstream, tmp_path, postgres_url, *flags) as served:
            asked = [pool.submit(served.ask, again=name) for name in names]
            assert eventually(lambda: upstream.counts["draws"] >= 12)
            for pid in (served.process.pid, *served.workers()):
                os.kill(pid, signal.SIGKILL)
            broken = [one.exception() for one in asked]  # a request may be answered before the kill, not all of them
            assert any(broken)
            assert all(error is None or isinstance(error, httpx2.TransportError) for error in broken)
            served.process.wait()
        held = kept(postgres_url)
        assert held > 0
        with serving(upstream, tmp_path, postgres_url, *flags) as served:
            retried = list(pool.map(lambda name: served.ask(again=name).json()["consilience"], names))
        assert sum(one["draws_bought"] for one in retried) == 6 * 8 - held
        assert kept(postgres_url) == 6 * 8


def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    with ScriptedServer(**ANSWERS) as upstream, serving(upstream, tmp_path, "l.db", "--workers", "2") as served:
        workers = served.workers()
        served.process.kill()
        served.process.wait()
        assert eventually(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers), 30)


def test_sigterm_lets_all_workers_finish_and_sqlite_will_do(tmp_path: Path) -> None:
    flags = ("--workers", "2", "--budget", "draws=1000")
    with (
        ScriptedServer(**ANSWERS, latency=2, latency_shape="fixed") as upstream,
        ThreadPoolExecutor(2) as pool,
        serving(upstream, tmp_path, "l.db", *flags) as served,
    ):
        asked = [pool.submit(served.ask, f"{n}?", seed=n) for n in range(2)]
        assert eventually(lambda: upstream.counts["calls"] == 12, 60)
        served.process.send_signal(signal.SIGTERM)
        assert [one.result().json()["consilience"]["draws"] for one in asked] == [6] * 2
        assert served.process.wait(60) == 0
        assert served.process.stderr.read() == ""
        with pytest.raises(httpx2.ConnectError):
            served.ask()
    assert kept(str(tmp_path / "l.db")) == 12


def test_two_solves_at_once_buy_once(tmp_path: Path, postgres_url: str) -> None:
    (tmp_path / "q.jsonl").write_text("".join(f'{{"question": "{n}?"}}\n' for n in range(20)))
    with ScriptedServer(**ANSWERS, latency=0.03) as upstream:
        command = [sys.executable, "-m", "consilience", "solve", "q.jsonl", "--model", f"openai:m@{upstream.url}"]
        command += ["--policy", "esc:window=3,max=12", "--ledger", postgres_url, "--json"]
        pair = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        found = [json.loads(one.communicate(timeout=120)[0]) for one in pair]
        bought = [one["totals"]["draws_bought"] for one in found]
        assert sum(bought) == upstream.counts["draws"] == kept(postgres_url)
        verdicts = [[(row["verdict"]["answer"], row["verdict"]["draws"]) for row in one["problems"]] for one in found]
        assert verdicts[0] == verdicts[1]
