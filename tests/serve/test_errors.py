"""Errors: every one is OpenAI's shape, names what is wrong, and none is a 500."""

from __future__ import annotations

import json
import socket

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consilience.cli.app import app as commands
from consilience.errors import InputError
from consilience.serve.app import create_app
from consilience.serve.core import Settings
from consilience.testing import ScriptedServer

from .helpers import Served, post, raw, running

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "6 x 7?"}]


@pytest.fixture(scope="module")
def upstream():
    with ScriptedServer(answers={"42": 1.0}) as server:
        yield server


@pytest.fixture(scope="module")
def shared(upstream, tmp_path_factory):
    """One server for the tests that leave nothing behind."""
    folder = tmp_path_factory.mktemp("shared")
    app = create_app(Settings(upstream=upstream.url, policy="sc:n=1", ledger=str(folder / "l.db")))
    with running(app) as origin:
        yield Served(origin, app.state.core)


def checked(reply) -> dict:
    """The error of a reply, whose shape is checked."""
    _status, headers, content = reply
    assert headers["content-type"] == "application/json"
    assert set(content) == {"error"}
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/nowhere", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("PUT", "/healthz", 405, "method_not_allowed"),
        ("GET", "/page", 404, "unknown_url"),
    ],
)
def test_unknown_paths_and_methods(shared, method, path, status, code) -> None:
    reply = raw(shared.origin, f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    assert reply[0] == status
    assert checked((reply[0], reply[1], json.loads(reply[2])))["code"] == code


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b"[" * 100_000,
        b'{"model": ' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_json(shared, body: bytes) -> None:
    status, headers, content = post(shared.origin, CHAT, body)
    error = checked((status, headers, content))
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 7}, "model"),
        ({"model": "m@sc:n=0"}, "model"),
        ({"model": "m@nothing:n=1"}, "model"),
        ({"model": "m@sc:n=5000"}, "model"),
        ({"model": "m@modelswitch:"}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [*MESSAGES, {"content": "x"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"model": "m@none", "consilience": {"budget": "draws=5"}}, "consilience.budget"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "x"}, "top_p"),
        ({"tools": {}}, "tools"),
        ({"response_format": "json"}, "response_format"),
        ({"prompt": "x"}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"consilience": 5}, "consilience"),
        ({"consilience": {"polcy": "asc"}}, "consilience"),
        ({"consilience": {"policy": 5}}, "consilience.policy"),
        ({"consilience": {"policy": "@/etc/hostname"}}, "consilience.policy"),
        ({"consilience": {"policy": "modelswitch"}}, "consilience.policy"),
        ({"consilience": {"kind": "essay"}}, "consilience.kind"),
        ({"consilience": {"kind": "code"}}, "consilience.kind"),
        ({"consilience": {"budget": "draws=x"}}, "consilience.budget"),
        ({"consilience": {"budget": {"draws": [1]}}}, "consilience.budget"),
        ({"consilience": {"budget": {"usd": 1}}}, "model"),
    ],
)
def test_a_field_that_is_wrong_is_named_and_nothing_is_drawn(shared, upstream, change, param) -> None:
    upstream.reset()
    body = {"model": "m", "messages": MESSAGES} | change
    status, headers, content = post(shared.origin, CHAT, json.dumps(body).encode())
    error = checked((status, headers, content))
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert upstream.counts["calls"] == 0


def test_the_official_client_raises_its_own_errors(shared) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        shared.ask(temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        shared.client().embeddings.create(model="m", input="x")


@pytest.mark.parametrize("supports_n", [True, False])
def test_what_the_upstream_refuses_is_the_clients_error_by_name(serve, supports_n) -> None:
    with ScriptedServer(unsupported=("top_k", "logprobs"), models=("m",), supports_n=supports_n) as upstream:
        served = serve(upstream, policy="sc:n=4")
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(extra_body={"top_k": 3})
        assert caught.value.param == "top_k"
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(logprobs=True)
        assert caught.value.param == "logprobs"
        with pytest.raises(openai.NotFoundError) as caught:
            served.ask(model="other")
        assert caught.value.code == "model_not_found"
        assert served.ask().consilience["draws"] == 4  # others are not disturbed
        assert served.ask(model="m@sc:n=3+logprob-weighted").consilience["draws"] == 3


def test_a_refused_request_disturbs_no_other_in_flight(serve) -> None:
    """Each request's errors are its own: beside refused ones, all good ones are answered."""
    from concurrent.futures import ThreadPoolExecutor

    with ScriptedServer(answers={"42": 1.0}, latency=0.01, models=("m",), unsupported=("top_k",)) as upstream:
        served = serve(upstream, policy="esc:window=2,max=4")
        wrong = [{"model": "other"}, {"extra_body": {"top_k": 1}}]

        def one(number: int) -> str:
            try:
                return served.ask(f"question {number}", **(wrong[number % 4] if number % 4 < 2 else {})).model
            except openai.APIStatusError as error:
                return str(error.status_code)

        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(one, range(80)))
        assert outcomes == [("404", "400", "m", "m")[number % 4] for number in range(80)]


def test_upstream_failures(serve, monkeypatch) -> None:
    with ScriptedServer(failure_rate=1.0) as upstream, pytest.raises(openai.BadRequestError, match="scripted failure"):
        serve(upstream, policy="sc:n=2").ask()
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    with ScriptedServer(api_key="right-key") as upstream:
        with pytest.raises(openai.InternalServerError) as caught:
            serve(upstream, policy="sc:n=2").ask(key="right-key")
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_key_refused")
        assert "wrong-key" not in str(caught.value)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    with pytest.raises(openai.InternalServerError) as caught:
        serve(nobody, policy="none").ask()
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unavailable")


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_reply_that_cannot_be_recorded_is_not_given(serve, upstream, more, caplog) -> None:
    served = serve(upstream, policy="sc:n=2")
    with served.core.ledger._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE draws")
    with pytest.raises(openai.InternalServerError) as caught:
        served.ask(**more)
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert "draws" in caplog.text


def test_an_error_of_the_server_is_a_500_that_says_nothing_of_its_inside(serve, upstream, monkeypatch, caplog) -> None:
    served = serve(upstream)

    async def broken(*_, **__):
        raise RuntimeError("the inside")

    monkeypatch.setattr(served.core, "answer", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        served.ask()
    assert (caught.value.status_code, caught.value.type) == (500, "server_error")
    assert "inside" not in str(caught.value)
    assert "the inside" in caplog.text


def test_some_failed_draws_do_not_matter(serve) -> None:
    with ScriptedServer(answers={"42": 1.0}, failure_rate=0.5, supports_n=False, seed=1) as upstream:
        served = serve(upstream, policy="sc:n=16")
        served.ask("a first question, by which it is learnt that the upstream gives one choice per call")
        upstream.reset()
        told = served.ask().consilience
        assert told["draws"] == 16
        assert 0 < told["failed"] == upstream.counts["failures"] < 16
        assert told["votes"] == {"42": 16 - told["failed"]}


def test_bodies_have_a_limit_stated_or_not(serve, upstream) -> None:
    served = serve(upstream, config="[serve]\nmax_body_bytes = 2000\n", policy="sc:n=1")

    def body(size: int) -> bytes:
        empty = json.dumps({"model": "m", "messages": [{"role": "user", "content": ""}]}).encode()
        return empty.replace(b'""', b'"' + b"x" * (size - len(empty)) + b'"')

    assert post(served.origin, CHAT, body(2000))[0] == 200
    status, headers, content = post(served.origin, CHAT, body(2001))
    assert (status, checked((status, headers, content))["code"]) == (413, "body_too_large")
    chunk = b"5DC\r\n" + b"x" * 1500 + b"\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    status, headers, got = raw(served.origin, head + chunk + chunk)
    assert (status, checked((status, headers, json.loads(got)))["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"policy": "nothing"}, "nothing"),
        ({"policy": "modelswitch"}, "one upstream"),
        ({"kind": "essay"}, "essay"),
        ({"kind": "code"}, "code"),
        ({"upstream": "nowhere"}, "nowhere"),
        ({"upstream": "http://user:pass@host/v1"}, "login"),
        ({"budget": "seconds=5"}, "seconds"),
        ({"budget": "draws=-1"}, "draws"),
    ],
)
def test_bad_settings_are_told_at_the_start(tmp_path, change, says) -> None:
    with pytest.raises(InputError, match=says):
        create_app(Settings(**({"ledger": str(tmp_path / "l.db"), "upstream": "http://127.0.0.1:9/v1"} | change)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("model", "messages", "prompt", "n", "seed", "stream", "stream_options", "tools", "response_format", "stop")
MORE = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "logprobs", "consilience", "best_of", "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.dictionaries(st.sampled_from((*FIELDS, *MORE)), VALUES, max_size=4),
    whole=st.booleans(),
    path=st.sampled_from([CHAT, "/v1/completions"]),
)
def test_no_body_whatever_is_a_500(shared, data, whole, path) -> None:
    base = {"model": "m", "messages": MESSAGES} if path == CHAT else {"model": "m", "prompt": "x"}
    body = json.dumps((base if whole else {}) | data).encode()
    with httpx2.Client() as client:
        reply = client.post(shared.origin + path, content=body)
    assert reply.status_code in (200, 400, 404), (body, reply.text)


def test_the_command_says_what_is_wrong(tmp_path) -> None:
    from typer.testing import CliRunner

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(commands, ["serve", "--port", port, "--ledger", str(tmp_path / "l.db")])
    assert isinstance(result.exception, InputError)
    assert "cannot listen" in str(result.exception)
