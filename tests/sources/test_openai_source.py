"""What `OpenAISource` sends, learns and delivers, counted at a scripted server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from consilience.draws import Draw, Usage
from consilience.errors import BudgetSpent, ConsilienceError, EndpointError, InputError
from consilience.testing import ScriptedServer
from consilience.text.sources.base import Request, Source
from consilience.text.sources.openai import (
    NO_CHOICES,
    NO_LOGPROBS,
    OpenAISource,
    apportion,
    chat_urls,
    draws_of,
    named_parameter,
    parse_openai_spec,
    read_completion,
)
from consilience.text.transport import Refused, Retry

QUICK = Retry(base=0.001, longest=0.005, patience=5)
COINS = {"heads": 0.7, "tails": 0.3}
KEY = "sk-very-secret"


class FakeMeter:
    """Records (draws reserved, outcome) of every attempt; ``most`` draws may be reserved in all."""

    seconds_left = math.inf

    def __init__(self, most: float = math.inf) -> None:
        self.most, self.reserved = most, 0
        self.outcomes: list[tuple[int, Any]] = []

    @asynccontextmanager
    async def attempt(self, draws: int) -> AsyncIterator[Any]:
        if self.reserved + draws > self.most:
            raise BudgetSpent("draws", "the cap is reached")
        self.reserved += draws
        entry = FakeAttempt()
        try:
            yield entry
        finally:
            self.outcomes.append((draws, entry.outcome))


class FakeAttempt:
    seconds_left = math.inf
    outcome: Any = "reserved"

    def settle(self, usage: Usage) -> None:
        self.outcome = usage

    def release(self) -> None:
        self.outcome = "released"


def request(question: str = "Toss.", required: tuple[str, ...] = (), **params: Any) -> Request:
    extra = {k: params.pop(k) for k in ("tools", "response_format") if k in params}
    params = {"temperature": 0.7, "max_tokens": 50} | params
    messages = ({"role": "user", "content": question},)
    return Request("e", "m", messages, params, required=frozenset(required), **extra)


@asynccontextmanager
async def source(server: ScriptedServer, **options: Any) -> AsyncIterator[OpenAISource]:
    kept = OpenAISource("m", server.url, **{"api_key": KEY, "retry": QUICK} | options)
    try:
        yield kept
    finally:
        await kept.close()


async def drawn(
    kept: OpenAISource, count: int, asked: Request | None = None, meter: Any = None, first: int = 0
) -> list[Draw]:
    """The draws of ``count`` indices; each must be delivered exactly once."""
    got: dict[int, Draw] = {}

    def deliver(index: int, draw: Draw) -> None:
        assert index not in got
        got[index] = draw

    await kept.draw(asked or request(), range(first, first + count), meter or FakeMeter(), deliver)
    assert sorted(got) == list(range(first, first + count))
    return [got[i] for i in sorted(got)]


def bodies(server: ScriptedServer) -> list[dict[str, Any]]:
    return [entry["body"] for entry in server.requests]


def message_server(message: dict[str, Any], **options: Any) -> ScriptedServer:
    return ScriptedServer(answers=lambda question, rng: {"role": "assistant", **message}, **options)


# ----------------------------------------------------------------------------------------------- addresses


def test_specification_splits_at_the_last_http() -> None:
    assert parse_openai_spec("openai:m@http://h/v1") == ("m", "http://h/v1")
    assert parse_openai_spec("openai:a@b:c@https://h") == ("a@b:c", "https://h")
    assert parse_openai_spec("openai:x@http://y@https://h") == ("x@http://y", "https://h")
    for bad in ("openai:m", "openai:@http://h", "hf:m@http://h", "m@http://h", "openai:m@ftp://h"):
        with pytest.raises(InputError, match="openai:MODEL@URL"):
            parse_openai_spec(bad)


@pytest.mark.parametrize(
    ("url", "endpoint", "address"),
    [
        ("http://h:8000", "http://h:8000/v1", "http://h:8000/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1", "http://h/v1/chat/completions"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1", "https://h/api/v1/chat/completions"),
        ("https://h/x?api-version=1", "https://h/x", "https://h/x/chat/completions?api-version=1"),
    ],
)
def test_addresses(url: str, endpoint: str, address: str) -> None:
    assert chat_urls(url) == (endpoint, address)
    kept: Source = OpenAISource("m", url, api_key=None)
    assert kept.name == f"openai:m@{endpoint}"
    assert kept.priced


def test_urls_and_keys_that_cannot_be_sent() -> None:
    for url in ("h/v1", "ftp://h", "http://", "https://me:sk-secret-word@h/v1"):
        with pytest.raises(InputError) as caught:
            OpenAISource("m", url, api_key=None)
        assert "sk-secret-word" not in str(caught.value)
    for key in ("sk secret", "sk-sécret"):
        with pytest.raises(InputError, match="MY_KEY") as caught:
            OpenAISource("m", "http://h", api_key=key, key_variable="MY_KEY")
        assert key not in str(caught.value)
    OpenAISource("m", "http://h", api_key="sk-ok\n")


# ------------------------------------------------------------------------------------------ what is sent


async def test_the_body_is_what_openai_documents() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asked = request(stop=["x"], top_p=0.9, logit_bias=None, tools=(tool,), response_format={"type": "json_object"})
    with ScriptedServer(api_key=KEY) as server:
        async with source(server, headers={"X-Team": "research"}) as kept:
            await drawn(kept, 3, asked)
            (body,) = bodies(server)
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(body)
    assert set(body) <= set(get_type_hints(CompletionCreateParamsNonStreaming))
    wanted = {"model", "messages", "temperature", "max_tokens", "stop", "top_p"}
    assert set(body) == wanted | {"tools", "response_format", "logprobs", "seed", "n"}
    assert (body["n"], body["seed"], body["logprobs"]) == (3, asked.call_seed(0), True)


async def test_a_different_seed_per_call_the_same_in_every_run() -> None:
    asked = request()

    async def run() -> list[tuple[int, str]]:
        with ScriptedServer(answers=COINS, supports_n=False) as server:
            async with source(server) as kept:
                texts = [d.text for d in await drawn(kept, 12, asked)]
                sent = sorted(b["seed"] for b in bodies(server)[1:])
                assert sent == sorted(asked.call_seed(i) for i in range(1, 12))
        return list(enumerate(texts))

    assert await run() == await run()


# ------------------------------------------------------------------------------------------------- n


async def test_n_is_one_call() -> None:
    meter = FakeMeter()
    with ScriptedServer(answers=COINS) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 8, meter=meter)
            assert server.counts["calls"] == 1
            assert kept.notes == []
            assert [n for n, _ in meter.outcomes] == [8]
            assert [d.prompt_tokens for d in draws] == [1] + [0] * 7
            assert sum(d.completion_tokens or 0 for d in draws) == server.counts["completion_tokens"]
            usage = meter.outcomes[0][1]
            assert usage.tokens == sum((d.prompt_tokens or 0) + (d.completion_tokens or 0) for d in draws)
            await drawn(kept, 130)  # OpenAI's most is 128
            assert sorted(b.get("n", 1) for b in bodies(server)[1:]) == [2, 128]


async def test_n_ignored_is_learnt_from_the_first_wave_without_an_extra_call() -> None:
    with ScriptedServer(answers=COINS, supports_n=False) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 8)
            assert [b.get("n") for b in bodies(server)] == [8] + [None] * 7
            assert all(d.prompt_tokens == 1 for d in draws)
            await drawn(kept, 5, first=8)
            assert [b.get("n") for b in bodies(server)[8:]] == [None] * 5
            assert kept.notes == [NO_CHOICES]


async def test_n_refused_is_learnt_and_calls_in_flight_handle_it_each() -> None:
    meter = FakeMeter()
    with ScriptedServer(unsupported={"n"}, latency=0.01) as server:
        async with source(server) as kept:
            await asyncio.gather(*(drawn(kept, 4, request(f"q{i}"), meter) for i in range(3)))
            assert server.counts["draws"] == 12
            assert server.counts["calls"] <= 15
            assert kept.notes == [NO_CHOICES]
    assert {o for n, o in meter.outcomes if n == 4} == {"released"}


async def test_n_call_that_fails_for_good_is_repeated_as_single_calls() -> None:
    """By this seed the first call fails, and the third of the four single calls after it."""
    with ScriptedServer(failure_rate=0.3, seed=79) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 4)
            statuses = [e["status"] for e in server.requests]
    assert statuses == [400, 200, 200, 400, 200]
    assert sum(not d.failed for d in draws) == 3


async def test_n_call_without_luck_in_all_tries_gives_its_single_calls_one_try() -> None:
    with ScriptedServer(error_rate=1.0) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 3)
            assert server.counts["calls"] == 5 + 3
    assert {d.error for d in draws} == {"HTTP 500 after 1 try: The scripted error."}


# ------------------------------------------------------------------------------- parameters refused


@pytest.mark.parametrize("name", ["seed", "logprobs", "temperature"])
async def test_an_optional_parameter_is_dropped_remembered_and_noted(name: str) -> None:
    meter = FakeMeter()
    with ScriptedServer(unsupported={name}) as server:
        async with source(server) as kept:
            assert not any(d.failed for d in await drawn(kept, 3, meter=meter))
            await drawn(kept, 3, first=3)
            assert [e["status"] for e in server.requests] == [400, 200, 200]
            assert [name in b for b in bodies(server)] == [True, False, False]
            assert len(kept.notes) == 1
            assert name in kept.notes[0] or kept.notes == [NO_LOGPROBS]
    assert meter.outcomes[0] == (3, "released")


async def test_several_refused_parameters_are_dropped_one_by_one() -> None:
    with ScriptedServer(unsupported=["seed", "logprobs", "n"], max_completion_tokens_only=True) as server:
        async with source(server) as kept:
            assert not any(d.failed for d in await drawn(kept, 2))
            assert set(bodies(server)[-1]) == {"model", "messages", "temperature", "max_completion_tokens"}
            assert len(kept.notes) == 4


@pytest.mark.parametrize("required", [(), ("max_tokens",)])
async def test_max_tokens_falls_back_and_is_remembered(required: tuple[str, ...]) -> None:
    with ScriptedServer(max_completion_tokens_only=True) as server:
        async with source(server) as kept:
            await drawn(kept, 2, request(required=required))
            await drawn(kept, 2, request("other", required=required))
            assert [e["status"] for e in server.requests] == [400, 200, 200]
            assert [b.get("max_completion_tokens") for b in bodies(server)] == [None, 50, 50]
            assert len(kept.notes) == 1


async def test_no_token_limit_at_all_is_an_error() -> None:
    with ScriptedServer(unsupported={"max_tokens", "max_completion_tokens"}) as server:
        async with source(server) as kept:
            with pytest.raises(EndpointError, match="max_completion_tokens"):
                await drawn(kept, 1)


async def test_a_parameter_of_the_user_is_an_error_before_the_second_call() -> None:
    with ScriptedServer(unsupported={"top_p"}) as server:
        async with source(server, concurrency=1) as kept:
            asked = request(required=("top_p",), top_p=0.5)
            results = await asyncio.gather(*(drawn(kept, 1, asked, first=i) for i in range(5)), return_exceptions=True)
            assert all(isinstance(r, EndpointError) and "`top_p`" in str(r) for r in results)
            assert server.counts["calls"] == 1
            assert not (await drawn(kept, 1))[0].failed  # another request may go on


async def test_tools_and_response_format_are_the_users() -> None:
    with ScriptedServer(unsupported={"response_format"}) as server:
        async with source(server) as kept:
            with pytest.raises(EndpointError, match="response_format"):
                await drawn(kept, 2, request(response_format={"type": "json_object"}))
            assert server.counts["calls"] == 1


def refused(message: str, param: str | None = None) -> Refused:
    return Refused(400, message, param, None)


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("Unrecognized request argument supplied: logprobs", "logprobs"),
        ("property 'n' is unsupported", "n"),
        ("'n' : number must be at most 1", "n"),
        ("Only n = 1 is supported", "n"),
        ("This model does not support logprobs.", "logprobs"),
        ("Unsupported parameter(s): `seed`", "seed"),
        ("seed: Extra inputs are not permitted", "seed"),
        ("logprobs is not supported", "logprobs"),
        ("'seed': Extra inputs are not permitted", "seed"),
        ("Unsupported parameter: 'max_tokens' ... Use 'max_completion_tokens' instead.", "max_tokens"),
        ("top_logprobs is not supported", None),
        ("Please stop sending spam; the seed of doubt", None),
        ("an n-gram was blocked", None),
        ("'messages' must not be empty", None),
    ],
)
def test_parameters_named_by_messages_of_many_servers(message: str, name: str | None) -> None:
    sent = ["temperature", "max_tokens", "logprobs", "stop", "seed", "n"]
    assert named_parameter(refused(message), sent) == name


def test_parameters_named_by_the_error_itself() -> None:
    assert named_parameter(refused("about 'seed'", "body.n"), ["seed", "n"]) == "n"
    assert named_parameter(refused("about 'seed'", "messages[0].content"), ["seed", "n"]) is None


# --------------------------------------------------------------------------------- failures and the run


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"api_key": "other"}, "set OPENAI_API_KEY"),
        ({"failure_rate": 1.0, "failure_status": 403}, "OPENAI_API_KEY"),
        ({"models": ["other"]}, "check the model"),
        ({"failure_rate": 1.0, "failure_status": 307}, "does not answer there"),
    ],
)
async def test_refusals_of_the_run(options: dict[str, Any], says: str) -> None:
    meter = FakeMeter()
    with ScriptedServer(**options) as server:
        async with source(server) as kept:
            with pytest.raises(EndpointError, match=says) as caught:
                await drawn(kept, 4, meter=meter)
            assert server.url.split("/v1")[0] in str(caught.value)
            assert server.counts["calls"] == 1
    assert meter.outcomes == [(4, "released")]


async def test_another_4xx_is_a_failed_draw_with_its_reason() -> None:
    with ScriptedServer(failure_rate=1.0, failure_status=451) as server:
        async with source(server) as kept:
            (draw,) = await drawn(kept, 1)
    assert (draw.text, draw.error) == ("", "HTTP 451: The scripted failure.")
    assert draw.failed
    assert draw.answer is None


async def test_a_prompt_too_long_fails_its_draw_though_it_names_max_tokens() -> None:
    failure = Refused(400, "'max_tokens' is too large: the maximum context length is 10", "max_tokens", None)
    kept = OpenAISource("m", "http://h", api_key=None)

    async def call(*_: Any) -> Any:
        raise failure

    kept._transport.call = call  # type: ignore[method-assign]
    (draw,) = await drawn(kept, 1)
    assert "context length" in (draw.error or "")


async def test_two_percent_of_failures_lose_only_their_own_draws() -> None:
    with ScriptedServer(answers=COINS, failure_rate=0.02, supports_n=False) as server:
        async with source(server, concurrency=32) as kept:
            draws = [d for q in range(20) for d in await drawn(kept, 16, request(f"q{q}"))]
            assert sum(d.failed for d in draws) <= server.counts["failures"] < 30


async def test_trouble_of_every_kind_at_once_loses_no_draw() -> None:
    meter = FakeMeter()
    trouble = {"error_rate": 0.15, "truncate_rate": 0.1, "max_concurrent": 6, "retry_after": 0.01}
    with ScriptedServer(answers=COINS, latency=0.002, supports_n=False, **trouble) as server:
        async with source(server, concurrency=16, retry=Retry(tries=12, base=0.001, longest=0.01)) as kept:
            draws = await asyncio.gather(*(drawn(kept, 10, request(f"q{q}"), meter) for q in range(10)))
            assert not any(d.failed for each in draws for d in each)
            assert server.counts["completed"] == 100
    assert sum(isinstance(outcome, Usage) for _, outcome in meter.outcomes) == 100


async def test_a_spent_budget_keeps_what_was_in_flight() -> None:
    got: dict[int, Draw] = {}
    with ScriptedServer(supports_n=False, latency=0.02) as server:
        async with source(server) as kept:
            await drawn(kept, 2)
            with pytest.raises(BudgetSpent):
                await kept.draw(request(), range(2, 10), FakeMeter(most=5), got.__setitem__)
            assert len(got) == 5
            assert server.counts["completed"] == 2 + 5


async def test_each_draw_is_delivered_as_soon_as_its_call_returns() -> None:
    order: list[int] = []
    with ScriptedServer(supports_n=False) as server:
        async with source(server, concurrency=1) as kept:
            await drawn(kept, 2)

            def deliver(index: int, draw: Draw) -> None:
                order.append(server.counts["calls"])

            server.latency = 0.005
            await kept.draw(request(), range(2, 6), FakeMeter(), deliver)
    assert order == sorted(order)
    assert order[0] < order[-1]


async def test_cancelling_a_draw_frees_its_slots() -> None:
    with ScriptedServer(supports_n=False) as server:
        async with source(server, concurrency=2) as kept:
            await drawn(kept, 2)
            server.latency = 30
            task = asyncio.create_task(drawn(kept, 6, first=2))
            async with asyncio.timeout(10):
                while server.counts["in_flight"] < 2:
                    await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.latency = 0
            assert len(await drawn(kept, 6, first=2)) == 6


async def test_the_key_is_nowhere_to_be_seen() -> None:
    """The server echoes what it was sent; errors, notes and reprs must not."""

    def echo(question: str, rng: Any) -> str:
        return "fine"

    extra = {"X-Api-Key": "another-secret"}
    seen: list[str] = []
    with ScriptedServer(answers=echo, api_key="right") as server:
        original = server._refusal

        def refusal(head: Any, body: Any, now: float) -> Any:
            status = original(head, body, now)[0]  # type: ignore[index]
            shown = f"got {head.headers['authorization']} {head.headers['x-api-key']}"
            return status, json.dumps({"error": {"message": shown}}).encode()

        server._refusal = refusal  # type: ignore[method-assign]
        async with source(server, headers=extra) as kept:
            with pytest.raises(ConsilienceError) as caught:
                await drawn(kept, 2)
            seen += [str(caught.value), repr(caught.value), repr(kept), *kept.notes, kept.name]
            seen += [repr(kept._transport), str(vars(kept))]
    assert "***" in seen[0]
    assert not any(secret in s for s in seen for secret in (KEY, "another-secret"))


# ------------------------------------------------------------------------------------- what comes back


async def test_fields_of_a_draw() -> None:
    with ScriptedServer(answers={"heads": 0.25, "tails": 0.75}) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 5)
    for draw in draws:
        assert draw.model == "m"
        assert draw.finish_reason == "stop"
        assert draw.completion_id == draws[0].completion_id  # type: ignore[attr-defined]
        assert draw.logprob == pytest.approx(math.log(0.25 if "heads" in draw.text else 0.75))
        assert sum(draw.token_logprobs) == pytest.approx(draw.logprob)  # type: ignore[attr-defined]
        assert draw.completion_tokens == len(draw.token_logprobs)  # type: ignore[attr-defined]


async def test_no_logprobs_is_noted_once() -> None:
    with ScriptedServer(supports_logprobs=False) as server:
        async with source(server) as kept:
            draws = await drawn(kept, 2) + await drawn(kept, 2, first=2)
            assert kept.notes == [NO_LOGPROBS]
    assert all(d.logprob is None for d in draws)


async def test_a_cut_reply_says_so() -> None:
    with ScriptedServer() as server:
        async with source(server) as kept:
            (draw,) = await drawn(kept, 1, request(max_tokens=3))
    assert (draw.finish_reason, draw.completion_tokens) == ("length", 3)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "text", "extra"),
    [
        ({"content": None, "tool_calls": [CALL]}, "", {"tool_calls": [CALL]}),
        ({"content": [{"type": "text", "text": "a"}, {"type": "x"}, "b"]}, "ab", {}),
        ({"content": "a", "reasoning_content": "why"}, "a", {"reasoning_content": "why"}),
        ({"content": "a", "reasoning": "why"}, "a", {"reasoning_content": "why"}),
        ({"content": None, "refusal": "no"}, "", {"refusal": "no"}),
        ({}, "", {}),
    ],
)
async def test_messages_of_every_shape(message: dict[str, Any], text: str, extra: dict[str, Any]) -> None:
    with message_server(message) as server:
        async with source(server) as kept:
            for draw in await drawn(kept, 2):
                assert draw.text == text
                assert not draw.failed
                for name, value in extra.items():
                    assert getattr(draw, name) == value


def reply(*texts: str, **fields: Any) -> bytes:
    choices = [{"message": {"content": t}, "index": i} for i, t in enumerate(texts)]
    return json.dumps({"choices": choices} | fields).encode()


@pytest.mark.parametrize(
    "body",
    [b"[]", b"1", b"{}", b'{"choices": []}', b'{"choices": [1]}', b'{"choices": [{"text": "x"}]}', b"{"],
)
def test_replies_that_are_not_whole(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"choices|choice|Expecting"):
        read_completion(body)


def test_an_error_inside_a_200_is_named() -> None:
    with pytest.raises(ValueError, match="overloaded"):
        read_completion(b'{"error": {"message": "overloaded"}}')


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 1}, {"prompt_tokens": -1, "completion_tokens": 2}])
def test_usage_not_stated_stays_unknown(usage: Any) -> None:
    data, stated = read_completion(reply("a", usage=usage))
    assert stated is None
    assert draws_of(data, stated, 1)[0].completion_tokens is None


def test_choices_are_taken_in_the_order_of_their_index_and_extras_left() -> None:
    data = json.loads(reply("a", "b", "c"))
    data["choices"][0]["index"], data["choices"][1]["index"] = 1, 0
    assert [d.text for d in draws_of(data, Usage(completion_tokens=7), 2)] == ["b", "a"]


def test_logprobs_that_are_not_numbers_are_left_out() -> None:
    for value in (None, "x", math.inf, math.nan):
        data = json.loads(reply("a"))
        data["choices"][0]["logprobs"] = {"content": [{"logprob": -1.0}, {"logprob": value}]}
        assert draws_of(data, None, 1)[0].logprob is None


@given(st.integers(0, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_shares_sum_to_the_total_and_are_off_by_less_than_one(total: int, weights: list[int]) -> None:
    shares = apportion(total, weights)
    assert sum(shares) == total
    assert all(s >= 0 for s in shares)
    if whole := sum(weights):
        assert all(abs(s - total * w / whole) < 1 for s, w in zip(shares, weights, strict=True))
        assert apportion(whole, weights) == weights


@given(
    st.lists(st.text(max_size=20), min_size=1, max_size=12),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.booleans(),
)
def test_usage_of_the_draws_sums_to_the_servers(
    texts: list[str], prompt: int, completion: int, with_logprobs: bool
) -> None:
    data = json.loads(reply(*texts))
    if with_logprobs:
        for choice, text in zip(data["choices"], texts, strict=True):
            choice["logprobs"] = {"content": [{"logprob": -0.5}] * (len(text) + 1)}
        completion = sum(len(t) + 1 for t in texts)
    draws = draws_of(data, Usage(prompt_tokens=prompt, completion_tokens=completion), len(texts))
    assert [d.prompt_tokens for d in draws] == [prompt] + [0] * (len(texts) - 1)
    assert sum(d.completion_tokens or 0 for d in draws) == completion
    if with_logprobs:
        assert [d.completion_tokens for d in draws] == [len(t) + 1 for t in texts]
