"""Who asks: keys, what each may spend, and the draws that a repeated request finds again."""

from __future__ import annotations

import hmac
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from consilience.errors import InputError
from consilience.serve import keys
from consilience.serve.app import create_app
from consilience.serve.core import Settings
from consilience.testing import ScriptedServer

from .helpers import post, raw

ANSWERS = {"42": 0.6, "41": 0.4}
KEYS = """
[serve.keys.alice]
key_env = "TEST_ALICE"
policy = "sc:n=3"
budget = "draws=20"

[serve.keys.bob]
key_env = "TEST_BOB"
"""


@pytest.fixture(autouse=True)
def secrets(monkeypatch) -> None:
    monkeypatch.setenv("TEST_ALICE", "alice-secret-1")
    monkeypatch.setenv("TEST_BOB", "bob-secret-22")
    monkeypatch.setenv("OPENAI_API_KEY", "upstream-secret-333")


@pytest.fixture
def upstream():
    with ScriptedServer(answers=ANSWERS, api_key="upstream-secret-333") as server:
        yield server


# ----------------------------------------------------------------------------------------------------- keys


def test_only_configured_keys_are_let_in_and_every_endpoint_asks(serve, upstream) -> None:
    served = serve(upstream, config=KEYS, policy="sc:n=2")
    assert served.ask(key="alice-secret-1").consilience["policy"] == "sc:n=3"
    assert served.ask(key="alice-secret-1", model="m@sc:n=1").consilience["draws"] == 1
    assert served.ask(key="bob-secret-22").consilience["policy"] == "sc:n=2"
    for key in ("alice-secret-", "alice-secret-11", "upstream-secret-333", "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            served.ask(key=key)
        assert caught.value.code == "invalid_api_key"
    for authorization in ("", "Basic alice-secret-1", "alice-secret-1", "Bearer", "Bearer ünknown"):
        head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\n\r\n"
        assert raw(served.origin, head.encode("latin-1"))[0] == 401
        status, _, content = post(served.origin, "/v1/chat/completions", b"{}", Authorization=authorization.strip("ü"))
        assert (status, content["error"]["code"]) == (401, "invalid_api_key")
    assert raw(served.origin, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
    with served.client("bob-secret-22") as client:
        assert list(client.models.list())


def test_without_keys_any_and_none_is_accepted(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=1")
    served.ask(key="whatever")
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    assert post(served.origin, "/v1/chat/completions", body)[0] == 200


def test_a_key_is_compared_with_all_in_constant_time(serve, upstream, monkeypatch) -> None:
    served = serve(upstream, config=KEYS)
    compared = []
    real = hmac.compare_digest

    def counting(a, b):
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", counting)
    for given in ("alice-secret-1", "bob-secret-22"):
        compared.clear()
        served.core.keyring.identify(f"Bearer {given}")
        assert compared == [(32, 32)] * 2  # the length says nothing, and the first match ends nothing


def test_no_key_is_logged_stored_or_shown(serve, upstream, caplog, tmp_path, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    served = serve(upstream, config=KEYS, ledger=str(tmp_path / "l.db"))
    shown = [served.ask(key="alice-secret-1", seed=4).model_dump_json()]
    for key in ("bob-secret-22", "wrong-secret-4444"):
        try:
            served.ask(key=key, temperature=9)
        except openai.APIStatusError as error:
            shown.append(str(error.body))
    upstream.api_key = "another"
    with pytest.raises(openai.InternalServerError) as caught:
        served.ask(key="bob-secret-22")
    files = b"".join(path.read_bytes() for path in Path(tmp_path).glob("l.db*"))
    seen = caplog.text + "".join(shown) + str(caught.value) + "".join(capfd.readouterr()) + repr(files)
    assert "secret" not in seen.replace("TEST_ALICE", "")
    assert len(files) > 1000


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('[serve.keys.a]\nkey_env = "TEST_NOWHERE"', "TEST_NOWHERE"),
        ('[serve.keys.a]\nkey_env = "TEST_BOB"\n[serve.keys.b]\nkey_env = "TEST_BOB"', "another client"),
        ('[serve.keys.a]\nkey_env = "TEST_BOB"\npolicy = "nothing"', "nothing"),
        ('[serve.keys.a]\nkey_env = "TEST_BOB"\nbudget = "seconds=3"', "seconds"),
        ('[serve.keys.a]\nkey_env = "TEST_BOB"\nrate = 3', "rate"),
        ('[serve.keys.a]\npolicy = "asc"', "key_env"),
    ],
)
def test_a_bad_configuration_is_told_at_the_start(tmp_path, config, says) -> None:
    file = tmp_path / "c.toml"
    file.write_text(config)
    with pytest.raises(InputError, match=says):
        create_app(Settings(config=file, ledger=str(tmp_path / "l.db")))


# --------------------------------------------------------------------------------------------------- budgets


def test_a_requests_budget_ends_its_sampling(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=10")
    for budget in ("draws=4", {"draws": 4}):
        told = served.ask(extra_body={"consilience": {"budget": budget}}).consilience
        assert (sum(told["votes"].values()), told["stopped_because"]) == (4, "budget: draws")
    upstream.reset()
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(extra_body={"consilience": {"budget": "draws=0"}})
    assert caught.value.param == "consilience.budget"
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(extra_body={"consilience": {"budget": "tokens=50"}}, max_tokens=100)
    assert caught.value.code == "budget_spent"
    assert upstream.counts["calls"] == 0


def test_a_requests_time_ends_its_sampling(serve) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.05, latency_shape="fixed", supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=400", concurrency=2)
        told = served.ask(extra_body={"consilience": {"budget": "seconds=0.5"}}).consilience
        assert told["stopped_because"] == "budget: seconds"
        assert 0 < sum(told["votes"].values()) < 100


def test_a_token_cap_holds_for_a_request_and_a_limit_is_sent_where_the_client_set_none(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=40")
    told = served.ask(max_tokens=20, extra_body={"consilience": {"budget": "tokens=200"}}).consilience
    assert told["stopped_because"] == "budget: tokens"
    assert upstream.counts["prompt_tokens"] + upstream.counts["completion_tokens"] <= 200
    served.ask(extra_body={"consilience": {"budget": "tokens=40000"}})
    assert upstream.requests[-1]["body"]["max_tokens"] == 1024
    served.ask()
    assert "max_tokens" not in upstream.requests[-1]["body"]


def test_the_caps_of_client_and_server_both_hold_under_many_requests_at_once(serve) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.002, supports_n=False, api_key="upstream-secret-333") as upstream:
        served = serve(upstream, config=KEYS, policy="sc:n=3", budget="draws=50", concurrency=16)

        refusals = set()

        def one(number: int) -> tuple[str, int]:
            key = ("alice-secret-1", "bob-secret-22")[number % 2]
            try:
                return key, served.ask(f"question {number}", key=key).consilience["draws_bought"]
            except openai.RateLimitError as error:
                refusals.add((error.code, error.type))
                return key, 0

        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(one, range(60)))
        assert refusals == {("insufficient_quota", "insufficient_quota")}
        bought = Counter()
        for key, count in outcomes:
            bought[key] += count
        assert bought == {"alice-secret-1": 20, "bob-secret-22": 30}
        assert upstream.counts["draws"] == served.core.account.draws == 50


def test_a_money_cap_of_the_server_holds_as_the_upstream_counts(serve) -> None:
    prices = '[prices."m"]\ninput = 1000.0\noutput = 2000.0\n'
    with ScriptedServer(answers=ANSWERS, latency=0.002, supports_n=False) as upstream:
        served = serve(upstream, config=prices, policy="sc:n=4", budget="usd=2", concurrency=16)

        def one(number: int) -> float:
            try:
                return served.ask(f"q {number}", max_tokens=10).consilience["cost"]
            except openai.RateLimitError:
                return 0.0

        with ThreadPoolExecutor(16) as pool:
            costs = list(pool.map(one, range(60)))
        counted = (upstream.counts["prompt_tokens"] * 1000 + upstream.counts["completion_tokens"] * 2000) / 1e6
        assert 1.0 < counted <= 2
        assert sum(costs) == pytest.approx(counted)
        assert served.core.account.spent.cost == pytest.approx(counted)
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(model="unpriced", max_tokens=10)
        assert caught.value.code == "price_unknown"


# ------------------------------------------------------------------------------------ draws that are found again


def test_every_request_draws_afresh(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=8")
    replies = [served.ask().consilience for _ in range(12)]
    assert {reply["draws_bought"] for reply in replies} == {8}
    assert upstream.counts["draws"] == 96
    assert len({json.dumps(reply["votes"]) for reply in replies}) > 1  # all equal by chance: less than 1e-5
    assert sum(len(draws) for _, _, draws in served.core.ledger._requests()) == 96


@pytest.mark.parametrize("way", ["header", "seed"])
def test_an_equal_key_or_seed_finds_its_draws_within_one_client_alone(serve, upstream, way) -> None:
    served = serve(upstream, policy="sc:n=8")

    def ask(value: int, key: str = "a", **more) -> dict:
        tied = {"extra_headers": {"Idempotency-Key": str(value)}} if way == "header" else {"seed": value}
        reply = served.ask(key=key, **tied, **more)
        return reply.consilience | {"text": reply.choices[0].message.content, "usage": reply.usage}

    first, again = ask(1), ask(1)
    assert (first.pop("draws_bought"), again.pop("draws_bought")) == (8, 0)
    assert first == again
    assert ask(2)["draws_bought"] == 8
    assert ask(1, key="b")["draws_bought"] == 8
    assert ask(1, temperature=0.5)["draws_bought"] == 8
    assert ask(1, content="another question")["draws_bought"] == 8
    assert ask(1, model="other")["draws_bought"] == 8
    more = ask(1, extra_body={"consilience": {"policy": "sc:n=11"}})
    assert (more["draws"], more["draws_bought"]) == (11, 3)
    assert all(first["votes"].get(answer, 0) <= count for answer, count in more["votes"].items())


def test_a_seed_stands_for_the_same_seeds_upstream_another_for_others(serve) -> None:
    """Each of a request's calls has a seed of its own; two servers that know nothing of each other send the same."""

    def sent(upstream: ScriptedServer, seed: int | None) -> list[int]:
        upstream.reset()
        serve(upstream, policy="sc:n=5").ask(seed=seed) if seed else serve(upstream, policy="sc:n=5").ask()
        seeds = sorted(entry["body"]["seed"] for entry in upstream.requests)
        assert len(set(seeds)) == len(seeds) == 5
        return seeds

    with ScriptedServer(answers=ANSWERS, supports_n=False) as upstream:
        assert sent(upstream, 7) == sent(upstream, 7)
        assert not set(sent(upstream, 7)) & set(sent(upstream, 8))
        assert not set(sent(upstream, None)) & set(sent(upstream, None))


def test_two_equal_requests_at_once_buy_once(serve) -> None:
    with ScriptedServer(answers=ANSWERS, latency=0.05, latency_shape="fixed") as upstream:
        served = serve(upstream, policy="sc:n=8")
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda _: served.ask(seed=1).consilience, range(6)))
        assert upstream.counts["draws"] == 8
        assert sorted(reply["draws_bought"] for reply in replies) == [0] * 5 + [8]
        assert len({json.dumps(reply["votes"]) for reply in replies}) == 1


def test_an_idempotency_key_has_a_length(serve, upstream) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        serve(upstream).ask(extra_headers={"Idempotency-Key": "k" * 256})
    assert caught.value.code == "invalid_idempotency_key"


def test_choices_of_one_request_do_not_share_draws(serve, upstream) -> None:
    served = serve(upstream, policy="sc:n=4")
    assert served.ask(n=3, seed=1).consilience["draws_bought"] == 12
    assert served.ask(n=3, seed=1).consilience["draws_bought"] == 0
