"""The grammar of policies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience import policy
from consilience.errors import InputError
from consilience.policy import _pairs, _show


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("asc", "asc:threshold=0.95,max=40"),
        ("esc:max=10,window=2", "esc:window=2,max=10"),
        (" sc : n = 12 ", "sc:n=12"),
        ("one", "one"),
        ("esc+plurality", "esc:window=5,max=40"),
        ("asc:threshold=0.950", "asc:threshold=0.95,max=40"),
        ('sc:n="7"', "sc:n=7"),
    ],
)
def test_canonical_form(spec: str, canonical: str) -> None:
    assert policy.parse(spec).name == canonical
    assert policy.parse(canonical).name == canonical


@given(st.integers(1, 50), st.integers(0, 50))
def test_canonical_form_is_a_fixed_point(window: int, more: int) -> None:
    spec = f"esc:max={window + more},window={window}"
    once = policy.parse(spec)
    assert policy.parse(once.name) == once


@given(st.text(max_size=20))
def test_quoted_values_come_back(value: str) -> None:
    shown = _show(value)
    quoted = shown if shown.startswith('"') else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    pairs = _pairs(f"a={quoted},b=1", "spec")
    assert pairs["b"] == "1"
    assert policy._value("a", pairs["a"], str) == value


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("ascc", "did you mean 'asc'"),
        ("plurality", "unknown stop rule"),
        ("sc+esc", "unknown vote rule"),
        ("esc:windw=3", "has no parameter 'windw' (it has: window, max)"),
        ("esc:window=x", "window must be a whole number"),
        ("asc:threshold=x", "threshold must be a number"),
        ("esc:window=50", "window must lie between"),
        ("esc:window=5,", "expected key=value"),
        ("esc:window=5,window=6", "given twice"),
        ("esc:", "expected key=value"),
        ("sc:n=4+plurality+x", "expected stop:key=value"),
        ("", "expected stop:key=value"),
        ("@nowhere.json", "nowhere.json"),
    ],
)
def test_errors_say_what_and_what_to_do(spec: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        policy.parse(spec)
    assert says in str(error.value)


def test_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"policy": "esc:window=3", "measured": {"accuracy": 0.8}}))
    assert policy.parse(f"@{path}").name == "esc:window=3,max=40"
    for content, says in [("{", "not JSON"), ("[]", 'field "policy"'), ('{"policy": "@x"}', "another file")]:
        path.write_text(content)
        with pytest.raises(InputError, match=says):
            policy.parse(f"@{path}")
