"""Policies as the server applies them: every registered one is served or refused, and what is added changes no vote."""

from __future__ import annotations

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilience import policy
from consilience.methods import register
from consilience.rules import View
from consilience.serve.app import create_app
from consilience.serve.core import Settings
from consilience.serve.policies import served_rule, split_model
from consilience.testing import ScriptedServer

from .helpers import Served, running

SPECS = [name for name, method in register().items() if method.role == "stop"]
SPECS += [f"sc:n=3+{name}" for name, method in register().items() if method.role in ("vote", "procedure")]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server and its upstream for all policies."""
    folder = tmp_path_factory.mktemp("shared")
    with ScriptedServer(answers={"42": 0.7, "41": 0.3}) as upstream:
        app = create_app(Settings(upstream=upstream.url, ledger=str(folder / "l.db")))
        with running(app) as origin:
            yield Served(origin, app.state.core), upstream


@pytest.mark.parametrize("spec", SPECS)
def test_every_registered_policy_is_served_or_refused_by_name(shared, spec) -> None:
    served, upstream = shared
    upstream.reset()
    asked = {"max_tokens": 30, "extra_body": {"consilience": {"policy": spec}}}
    try:
        reply = served.ask(model="m", **asked)
    except openai.BadRequestError as error:
        said = error.message
    else:
        said = None
        assert reply.consilience["draws"] > 0
        assert reply.choices[0].message.content
        assert upstream.counts["draws"] == reply.consilience["draws_bought"]
    if said is not None:
        assert spec.split("+")[-1] in said


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-x", ("gpt-x", None)),
        ("gpt-x@esc", ("gpt-x", "esc")),
        ("gpt-x@none", ("gpt-x", "none")),
        ("gpt-x@esc:window=5,max=40", ("gpt-x", "esc:window=5,max=40")),
        ("gpt-x@sc:n=5+usc", ("gpt-x", "sc:n=5+usc")),
        ("gpt-x@sc+usc", ("gpt-x", "sc+usc")),
        ("org/gpt@2024-01", ("org/gpt@2024-01", None)),
        ("org/gpt@2024-01@asc", ("org/gpt@2024-01", "asc")),
        ("gpt@plurality", ("gpt@plurality", None)),
        ("@esc", ("@esc", None)),
        ("a@b:c", ("a", "b:c")),
    ],
)
def test_a_models_name_and_its_policy(name, found) -> None:
    assert split_model(name) == found


@pytest.mark.parametrize("spec", ["esc:window=3,max=20", "asc", "sc:n=7", "certified"])
@given(answers=st.lists(st.integers(-1, 3), max_size=20))
def test_what_the_server_adds_changes_nothing_once_there_is_an_answer(spec, answers) -> None:
    """With an answer among the draws the rule is asked as it is; without one, and with draws, it wants no more."""
    view = View.single(np.array([answers], dtype=np.int32).reshape(1, -1))
    bare, served = policy.parse(spec), served_rule(spec)
    assert (served.name, served.max, served.needs) == (bare.name, bare.max, bare.needs)
    if not answers or max(answers) >= 0:
        assert served.want(view).tolist() == bare.want(view).tolist()
    else:
        assert served.want(view).tolist() == [[0]]
