"""What happens around requests: clients that leave, a server that ends, a server that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from consilience.ledger import Ledger
from consilience.testing import ScriptedServer

from .helpers import eventually

ASKED = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}


def leave(served, after, **more) -> None:
    """Send a request and close the connection once ``after`` holds."""
    body = json.dumps(ASKED | more).encode()
    host, port = served.origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert eventually(after)


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"stream": True, "consilience": {"progress": True}}])
@pytest.mark.parametrize("supports_n", [True, False])
def test_a_client_that_goes_away_cancels_its_upstream_calls(serve, more, supports_n) -> None:
    """The upstream would be asked 200 times; it is not asked again once the client has gone."""
    script = {
        "answers": lambda question, rng: f"The answer is {rng.random()}.",
        "latency": 0.03,
        "latency_shape": "fixed",
        "supports_n": supports_n,
    }
    with ScriptedServer(**script) as upstream:
        served = serve(upstream, policy="esc:window=2,max=400", concurrency=2)
        leave(served, lambda: upstream.counts["draws"] >= 5, **more)
        assert eventually(lambda: served.core.session._held == {})  # the request has ended
        calls = upstream.counts["calls"]
        time.sleep(0.2)
        assert upstream.counts["calls"] == calls < 30
        assert (served.core.account._reserved_tokens, served.core.account._reserved_pico) == (0, 0)
        draws = sum(len(draws) for _, _, draws in served.core.ledger._requests())
        assert draws >= 4  # what had come is kept


def test_others_go_on_when_one_leaves(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}, latency=0.05, supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=20", concurrency=4)
        replies: list = []
        others = [threading.Thread(target=lambda n=n: replies.append(served.ask(f"q {n}"))) for n in range(3)]
        for other in others:
            other.start()
        leave(served, lambda: upstream.counts["draws"] > 3)
        for other in others:
            other.join()
        assert [reply.consilience["draws"] for reply in replies] == [20] * 3


def test_a_client_that_leaves_and_asks_again_pays_only_for_the_rest(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}, latency=0.03, supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=30", concurrency=2)
        leave(served, lambda: upstream.counts["draws"] >= 6, seed=5)
        assert eventually(lambda: upstream.counts["in_flight"] == 0)
        time.sleep(0.05)
        kept = sum(len(draws) for _, _, draws in served.core.ledger._requests())
        body = json.dumps(ASKED | {"seed": 5}).encode()
        reply = httpx2.post(f"{served.url}/chat/completions", content=body, timeout=30).json()
        assert kept >= 4
        assert reply["consilience"]["draws_bought"] == 30 - kept
        assert reply["consilience"]["draws"] == 30


@contextmanager
def process(upstream: ScriptedServer, folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command, as a user runs it; gives the process and its URL."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONSILIENCE_")}
    arguments = ["serve", "--upstream", upstream.url, "--port", "0", "--policy", "sc:n=6", "--ledger", "l.db", *flags]
    started = subprocess.Popen(
        [sys.executable, "-m", "consilience", *arguments], cwd=folder, env=clean, stderr=subprocess.PIPE, text=True
    )
    try:
        line = started.stderr.readline()
        found = re.match(r"serving (http://127\.0\.0\.1:\d+/v1), policy sc:n=6, upstream http", line)
        assert found, line + started.stderr.read()
        yield started, found[1]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def ask(url: str, **more) -> openai.types.chat.ChatCompletion:
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        return client.chat.completions.create(**ASKED, **more)


def ask_in_vain(url: str, **more) -> None:
    with pytest.raises(openai.APIConnectionError):
        ask(url, **more)


def test_sigterm_finishes_what_is_in_flight(tmp_path: Path) -> None:
    with (
        ScriptedServer(answers={"42": 1.0}, latency=0.7, latency_shape="fixed") as upstream,
        process(upstream, tmp_path) as (server, url),
    ):
        replies: list = []
        asking = threading.Thread(target=lambda: replies.append(ask(url)))
        asking.start()
        assert eventually(lambda: upstream.counts["in_flight"] == 1)
        server.send_signal(signal.SIGTERM)
        asking.join(20)
        assert replies[0].consilience["draws"] == 6
        assert server.wait(20) in (0, -signal.SIGTERM)
        with pytest.raises(openai.APIConnectionError):
            ask(url)
    with Ledger(str(tmp_path / "l.db")) as ledger:
        assert sum(len(draws) for _, _, draws in ledger._requests()) == 6


def test_after_kill_9_a_retry_buys_nothing_that_was_paid_for(tmp_path: Path) -> None:
    header = {"extra_headers": {"Idempotency-Key": "order-66"}}
    with ScriptedServer(answers={"42": 0.5, "41": 0.5}, supports_n=False, latency=0.02) as upstream:
        with process(upstream, tmp_path, "--concurrency", "1") as (server, url):
            asking = threading.Thread(target=ask_in_vain, args=(url,), kwargs=header)
            asking.start()
            assert eventually(lambda: upstream.counts["draws"] >= 4)
            server.kill()
            asking.join(20)
        with Ledger(str(tmp_path / "l.db")) as ledger:
            kept = sum(len(draws) for _, _, draws in ledger._requests())
        assert kept >= 2
        with process(upstream, tmp_path, "--concurrency", "1") as (_, url):
            assert ask(url, **header).consilience["draws_bought"] == 6 - kept
            assert ask(url, **header).consilience["draws_bought"] == 0
