"""What careless and hostile clients do: the server says no in the API's own words, and serves the others."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx2
import pytest

from consilience.serve import gate
from consilience.serve.app import create_app
from consilience.serve.core import Settings
from consilience.testing import ScriptedServer

from .helpers import Served, eventually, post, raw, running
from .test_errors import CHAT, checked
from .test_life import leave

ASKED = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]}
KEYS = '[serve.keys.ann]\nkey_env = "ANN_KEY"\nbudget = "draws=40"\n'


@pytest.fixture(scope="module")
def upstream():
    with ScriptedServer(answers={"42": 1.0}) as server:
        yield server


@contextmanager
def connected(served: Served, sent: bytes) -> Iterator[socket.socket]:
    """A connection over which so much of a request was sent."""
    host, port = served.origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        yield connection


def head(length: int, **more: str) -> bytes:
    lines = {"Host": "x", "Content-Length": str(length)} | more
    return f"POST {CHAT} HTTP/1.1\r\n".encode() + "".join(f"{k}: {v}\r\n" for k, v in lines.items()).encode() + b"\r\n"


# ------------------------------------------------------------------------------------------------------ budgets


def test_leaving_before_the_reply_does_not_make_draws_free(serve, monkeypatch) -> None:
    """The upstream made draws for a client that left; a cap on draws counts them, so it is never passed."""
    monkeypatch.setenv("ANN_KEY", "secret-of-ann")
    with ScriptedServer(answers={"42": 1.0}, latency=0.05, latency_shape="fixed") as upstream:
        served = serve(upstream, config=KEYS, policy="sc:n=8")
        for n in range(12):
            calls = upstream.counts["calls"]
            body = json.dumps(ASKED).encode()
            with connected(served, head(len(body), Authorization="Bearer secret-of-ann") + body):
                eventually(lambda calls=calls: upstream.counts["calls"] > calls, 0.5 if n > 4 else 10)
            assert eventually(lambda: served.core.session._held == {})
        assert eventually(lambda: upstream.counts["in_flight"] == 0)
        assert upstream.counts["draws"] == 40  # five requests; the others are refused


# ------------------------------------------------------------------------------------------------------ uploads


def test_a_slow_upload_holds_no_place(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=1", queue=1)
    body = json.dumps(ASKED).encode()
    with connected(served, head(len(body)) + body[:20]) as slow:
        assert post(served.origin, CHAT, body)[0] == 200  # the one place is free
        slow.sendall(body[20:])
        assert slow.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_body_that_does_not_come_is_given_up(serve, upstream, monkeypatch) -> None:
    monkeypatch.setattr(gate, "FIRST", 0.2)
    served = serve(upstream, policy="sc:n=1")
    for start in (
        head(100) + b"{",
        head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"1\r\n{\r\n",
    ):
        status, headers, content = raw(served.origin, start)
        assert (status, headers["connection"]) == (408, "close")
        assert checked((status, headers, json.loads(content)))["code"] == "body_timeout"


def test_bodies_on_their_way_are_bounded_together(tmp_path, upstream) -> None:
    (tmp_path / "c.toml").write_text("[serve]\nmax_body_bytes = 4000\n")
    given = {
        "upstream": upstream.url,
        "policy": "sc:n=1",
        "ledger": str(tmp_path / "l.db"),
        "config": tmp_path / "c.toml",
    }
    app = create_app(Settings(**given))
    uploads = app.state.uploads
    with running(app) as origin, ExitStack() as stack:
        served = Served(origin, app.state.core)
        for number in range(1, gate.BODIES + 1):
            stack.enter_context(connected(served, head(4000) + b"x" * 3999))
            assert eventually(lambda number=number: uploads.held == number * 3999)
        body = json.dumps(ASKED | {"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
        assert post(served.origin, CHAT, json.dumps(ASKED).encode())[0] == 200  # one that is there at once is fine
        status, headers, content = raw(served.origin, head(len(body)) + body[:-1])
        assert (status, json.loads(content)["error"]["code"], headers["retry-after"]) == (429, "uploads_full", "1")
        stack.close()
        assert eventually(lambda: uploads.held == 0)
        assert post(served.origin, CHAT, body)[0] == 200


def test_a_client_that_is_still_sending_gets_the_refusal(serve, upstream) -> None:
    """Eight megabytes beyond the limit: the whole of it is sent, and the 413 arrives."""
    served = serve(upstream, config="[serve]\nmax_body_bytes = 2000\n", policy="sc:n=1")
    body = json.dumps(ASKED | {"user": "x" * 8_000_000}).encode()
    for _ in range(5):
        reply = httpx2.post(served.origin + CHAT, content=body, timeout=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
        reply = httpx2.post(served.origin + CHAT, content=(body[i : i + 65536] for i in range(0, len(body), 65536)))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


# --------------------------------------------------------------------------------------------------- the Host header


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "127.1.2.3", 200),
        ("127.0.0.1", "[::1]:80", 200),
        ("127.0.0.1", "evil.example", 403),
        ("127.0.0.1", "evil.example:8000", 403),
        ("127.0.0.1", "localhost.evil.example", 403),
        ("127.0.0.1", "127.0.0.1.evil.example", 403),
        ("127.0.0.1", "127.0.0.1@evil.example", 403),
        ("127.0.0.1", "[evil]", 403),
        ("127.0.0.1", "10.0.0.1", 403),
        ("localhost", "evil.example", 403),
        ("::1", "[::1]", 200),
        ("0.0.0.0", "anything.example", 200),
        ("10.0.0.1", "anything.example", 200),
        (None, "anything.example", 200),
    ],
)
def test_a_keyless_server_on_loopback_answers_to_its_own_names_alone(tmp_path, bound, host, status) -> None:
    app = create_app(Settings(ledger=str(tmp_path / "l.db")), bound)
    with running(app) as origin:
        for path in ("/", "/page/requests", "/v1/models", "/healthz"):
            got, headers, content = raw(origin, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert got == status
            if status == 403:
                assert checked((got, headers, json.loads(content)))["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin_header", "status"),
    [
        ("http://127.0.0.1:8000", 200),
        ("http://localhost:3000", 200),
        ("http://[::1]:8000", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),
        ("http://[evil", 403),
    ],
)
def test_a_page_of_the_web_cannot_use_a_keyless_server_on_loopback(tmp_path, origin_header, status) -> None:
    """As `fetch(..., {mode: "no-cors"})` sends it: an honest Host, text/plain, no preflight."""
    app = create_app(Settings(ledger=str(tmp_path / "l.db"), policy="sc:n=1"), "127.0.0.1")
    asked = json.dumps({"model": "house", "messages": [{"role": "user", "content": "1 + 1?"}]}).encode()
    with running(app) as origin:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: {origin_header}\r\nContent-Type: text/plain\r\n"
        got, headers, content = raw(origin, head.encode() + b"Content-Length: %d\r\n\r\n" % len(asked) + asked)
        assert got == status
        if status == 403:
            assert checked((got, headers, json.loads(content)))["code"] == "origin_not_allowed"
            assert app.state.core.session.bought == 0


def test_with_keys_the_name_does_not_matter(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ANN_KEY", "secret-of-ann")
    (tmp_path / "c.toml").write_text(KEYS)
    app = create_app(Settings(ledger=str(tmp_path / "l.db"), config=tmp_path / "c.toml"), "127.0.0.1")
    with running(app) as origin:
        assert raw(origin, b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n")[0] == 200


# ----------------------------------------------------------------------------------------------------- observers


def test_an_observer_that_fails_stops_no_other_and_no_reply(serve, upstream, caplog) -> None:
    served = serve(upstream, policy="sc:n=1")
    told: list = []

    def broken(_: object) -> None:
        raise RuntimeError("out of order")

    served.core.observers[:0] = [broken]
    served.core.observers.append(told.append)
    assert served.ask().consilience["draws"] == 1
    assert eventually(lambda: len(told) == 1)
    assert "out of order" in caplog.text


# -------------------------------------------------------------------------------------------------- what is in a body


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b'{"model": "m", "n": 1, "n": 2, "messages": []}', "invalid_json", None),
        (b'{"model": "m@none", "max_tokens": 9, "messages": [], "max_tokens": 1}', "invalid_json", None),
        (json.dumps(ASKED).encode()[:-1] + b', "x": ' + b"[" * 101 + b"]" * 101 + b"}", "invalid_json", None),
        (json.dumps(ASKED).encode()[:-1] + b', "x": ' + b'{"a":' * 900 + b"1" + b"}" * 901, "invalid_json", None),
        (json.dumps(ASKED | {"model": "m" * 1001}).encode(), "invalid_value", "model"),
        (json.dumps(ASKED | {"model": "m@sc:n=2" + " " * 1000}).encode(), "invalid_value", "model"),
        (json.dumps(ASKED | {"consilience": {"policy": "sc:n=2" + " " * 1000}}).encode(), "invalid_value",
         "consilience.policy"),
        (json.dumps(ASKED | {"embedding": True}).encode(), "unknown_parameter", "embedding"),
        (json.dumps(ASKED | {"completion": True}).encode(), "unknown_parameter", "completion"),
    ],
)  # fmt: skip
def test_what_a_body_may_not_hold(serve, upstream, body, code, param) -> None:
    status, headers, content = post(serve(upstream, policy="sc:n=1").origin, CHAT, body)
    error = checked((status, headers, content))
    assert (status, error["code"], error["param"]) == (400, code, param)


def test_a_deep_body_that_is_just_shallow_enough_is_answered(serve, upstream) -> None:
    body = json.dumps(ASKED).encode()[:-1] + b', "x": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert post(serve(upstream, policy="sc:n=1").origin, CHAT, body)[0] == 200


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
SEEN = {
    "model": "m",
    "max_tokens": 20,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, IMAGE]}],
}


@pytest.mark.parametrize("model", ["m", "m@none"])
def test_images_under_a_cap_need_a_bound_on_their_tokens(serve, upstream, model) -> None:
    """What is reserved for each call is the bound given; so it decides how many calls fit at once."""
    sent = json.dumps(SEEN | {"model": model}).encode()
    without = serve(upstream, policy="sc:n=1", budget="tokens=5000")
    status, headers, content = post(without.origin, CHAT, sent)
    assert (status, checked((status, headers, content))["code"]) == (400, "prompt_not_bounded")
    assert post(serve(upstream, policy="sc:n=1").origin, CHAT, sent)[0] == 200  # no cap, no question
    assert post(without.origin, CHAT, json.dumps(ASKED | {"max_tokens": 20, "model": model}).encode())[0] == 200
    for most, expected in ((4980, 200), (4981, 429)):  # with 20 for the reply: just under the cap, and just above
        served = serve(upstream, policy="sc:n=1", budget="tokens=5000", max_prompt_tokens=most)
        assert post(served.origin, CHAT, sent)[0] == expected


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"n": 4.0}, CHAT),
        ({"n": "4"}, CHAT),
        ({"n": 0}, CHAT),
        ({"max_tokens": 100, "max_completion_tokens": 1, "n": 40}, CHAT),
        ({"prompt": ["a"] * 41}, "/v1/completions"),
        ({"prompt": ["a"] * 21, "n": 2}, "/v1/completions"),
    ],
)
def test_what_is_passed_through_cannot_be_read_differently_past_a_cap(serve, upstream, more, path) -> None:
    served = serve(upstream, policy="none", budget="draws=40,tokens=2000")
    before = upstream.counts["calls"]
    body = ASKED | {"max_tokens": 5} | more
    if "prompt" in more:
        del body["messages"]
    assert post(served.origin, path, json.dumps(body).encode())[0] in (400, 429)
    assert upstream.counts["calls"] == before


# ------------------------------------------------------------------------------------------ streams that end early


def test_a_stream_that_the_upstream_cuts_is_cut_in_one_line_of_the_log(serve, caplog) -> None:
    from .upstream import Upstream

    class Dying(Upstream):
        async def stream(self, body):
            yield b'data: {"choices": []}\n\n'
            raise ConnectionResetError("gone")

    dying = Dying()
    with running(dying.app) as origin:
        served = serve(f"{origin}/v1", policy="none")
        caplog.clear()
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.post(served.origin + CHAT, content=json.dumps(ASKED | {"stream": True}).encode())
        ours = [record for record in caplog.records if record.name == "consilience.serve"]
        assert eventually(lambda: any("a reply was cut" in record.getMessage() for record in caplog.records))
        assert all(record.exc_info is None for record in ours)
        assert served.ask("again").choices  # and it serves on


@pytest.mark.parametrize("policy", ["none", "sc:n=3"])
def test_a_client_that_leaves_a_stream_leaves_no_traceback_and_no_task(serve, caplog, policy) -> None:
    with ScriptedServer(answers={"42": 1.0}, latency=0.05) as upstream:
        served = serve(upstream, policy=policy)
        told: list = []
        served.core.observers.append(told.append)
        for n in range(6):
            calls = upstream.counts["calls"]
            leave(served, lambda calls=calls: upstream.counts["calls"] > calls, stream=True)
            assert eventually(lambda n=n: len(told) == n + 1)
        assert {one.status for one in told} <= {499, 200}
        assert not [record for record in caplog.records if record.exc_info]


def test_upstream_faults_that_were_got_over_are_counted(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}, error_rate=0.4, seed=3, supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=5")
        served.core.source._transport.retry = served.core.source._transport.retry.__class__(base=0.001)
        assert served.ask().consilience["draws"] == 5
        text = httpx2.get(f"{served.origin}/metrics").text
        failed = upstream.counts["failures"]
        assert failed > 0
        assert f'consilience_upstream_attempts_failed_total{{reason="HTTP 500"}} {failed}.0' in text
