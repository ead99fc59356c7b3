"""Tool calls and structured output: votes on what a reply does, returned as the upstream gave it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from consilience.testing import ScriptedServer
from consilience.text.answers import AnswerClasses, call_answer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a place.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number"}}},
        },
    }
]


def call(arguments: str, name: str = "weather", number: str = "c1") -> dict:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def in_turn(*messages):
    """A script that gives these messages one after the other."""
    left = list(messages)
    return lambda question, rng: left.pop(0)


def calls(*made: dict) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": list(made)}


def test_tool_calls_are_voted_on_by_name_and_canonical_arguments(serve) -> None:
    script = in_turn(
        calls(call('{"city": "Rome", "days": 2}', number="a")),
        calls(call('{"city": "Paris", "days": 2}', number="b")),
        calls(call('{"days":2.0,"city":"Paris"}', number="c")),
        calls(call('{"city": "paris", "days": 2}', number="d")),
        calls(call('{"days": 2, "city": "Paris"}', name="forecast", number="e")),
    )
    with ScriptedServer(answers=script) as upstream:
        reply = serve(upstream, policy="sc:n=5").ask("weather?", tools=TOOLS, tool_choice="auto")
        sent = upstream.requests[0]["body"]
    assert (sent["tools"], sent["tool_choice"]) == (TOOLS, "auto")
    told = reply.consilience
    assert sorted(told["votes"].values()) == [1, 1, 1, 2]
    assert told["answer"] == 'tool_calls:[{"arguments":{"city":"Paris","days":2},"name":"weather"}]'
    choice = reply.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [made] = choice.message.tool_calls
    assert (made.id, made.function.arguments) == ("b", '{"city": "Paris", "days": 2}')


def test_a_streamed_tool_call_is_put_together_by_the_official_client(serve) -> None:
    one, two = call('{"city": "Rome"}'), call('{"city": "Oslo"}', number="c2")
    with ScriptedServer(answers=lambda question, rng: calls(one, two)) as upstream:
        served = serve(upstream, policy="sc:n=3")
        with served.client() as client:
            messages = [{"role": "user", "content": "weather?"}]
            with client.chat.completions.stream(model="m", messages=messages, tools=TOOLS) as stream:
                final = stream.get_final_completion()
    got = [(c.id, c.function.name, c.function.arguments) for c in final.choices[0].message.tool_calls]
    assert got == [("c1", "weather", '{"city": "Rome"}'), ("c2", "weather", '{"city": "Oslo"}')]
    assert final.choices[0].finish_reason == "tool_calls"


def test_the_older_function_call_is_voted_on_and_returned_too(serve) -> None:
    made = [{"name": "weather", "arguments": arguments} for arguments in ('{"a":1}', '{"a": 2}', '{ "a": 2 }')]
    script = in_turn(*({"role": "assistant", "content": None, "function_call": one} for one in made))
    with ScriptedServer(answers=script) as upstream:
        reply = serve(upstream, policy="sc:n=3").ask("weather?", functions=[TOOLS[0]["function"]])
    assert reply.choices[0].message.function_call.arguments == '{"a": 2}'
    assert reply.choices[0].message.tool_calls is None
    assert sorted(reply.consilience["votes"].values()) == [1, 2]


def test_a_conversation_with_tool_results_travels_unchanged(serve) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        calls(call("{}")),
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    with ScriptedServer(answers=lambda question, rng: "The answer is sunny.") as upstream:
        served = serve(upstream, policy="sc:n=2")
        with served.client() as client:
            reply = client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
        assert upstream.requests[0]["body"]["messages"] == messages
    assert reply.consilience["answer"] == "sunny"


class Place(BaseModel):
    city: str
    people: int


def test_structured_output_is_voted_on_by_its_whole_canonical_value(serve) -> None:
    texts = ['{"city": "Rome", "people": 3}', '{"people": 5, "city": "Rome"}', '{ "city":"Rome","people":5.0 }', "Rome"]
    with ScriptedServer(answers=in_turn(*texts)) as upstream:
        served = serve(upstream, policy="sc:n=4")
        with served.client() as client:
            messages = [{"role": "user", "content": "Where?"}]
            reply = client.chat.completions.parse(model="m", messages=messages, response_format=Place)
        sent = upstream.requests[0]["body"]["response_format"]
    assert sent["type"] == "json_schema"
    assert reply.choices[0].message.parsed == Place(city="Rome", people=5)
    assert reply.choices[0].message.content == texts[1]
    assert reply.consilience["votes"] == {'{"city":"Rome","people":5}': 2, '{"city":"Rome","people":3}': 1}
    assert reply.consilience["kind"] == "json"


def test_an_answer_field_decides_only_where_the_kind_is_asked_for(serve) -> None:
    texts = [json.dumps({"answer": 4, "why": str(n)}) for n in range(3)]
    format_ = {"type": "json_object"}
    with ScriptedServer(answers=in_turn(*texts, *texts)) as upstream:
        served = serve(upstream, policy="sc:n=3")
        assert len(served.ask(response_format=format_).consilience["votes"]) == 3
        asked = served.ask(response_format=format_, extra_body={"consilience": {"kind": "json"}})
        assert asked.consilience["votes"] == {"4": 3}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(a=JSON, b=JSON, kind=st.sampled_from(["auto", "number", "choice", "text", "json", "math", "open"]))
def test_two_calls_are_the_same_class_if_and_only_if_their_arguments_are_the_same_value(a, b, kind) -> None:
    """Whatever the kind, and however the JSON is spaced or ordered."""
    first = call_answer([call(json.dumps({"x": a}, indent=2))])
    again = call_answer([call(json.dumps({"x": a}, ensure_ascii=False), number="other")])
    other = call_answer([call(json.dumps({"x": b}))])
    classes = AnswerClasses(kind)
    assert classes.add(first) == classes.add(again) == 0
    assert (classes.add(other) == 0) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))


@pytest.mark.parametrize("odd", [None, [], {}, "x", [7], [{}], [{"function": {}}], [{"function": {"name": 3}}]])
def test_what_is_no_call_is_no_answer(odd) -> None:
    assert call_answer(odd) is None


def test_parallel_calls_have_no_order_and_bad_json_is_text() -> None:
    a, b = call('{"x": 1}'), call("{broken", name="other")
    assert call_answer([a, b]) == call_answer([b, a])
    assert call_answer([b]) == call_answer([call("{broken", name="other", number="z")])
    assert call_answer([b]) != call_answer([call("{broken ", name="other")])
    assert call_answer([{"type": "custom", "custom": {"name": "f", "input": "1"}}]) is not None
