"""Running the server: what it counts, whether it is ready, how much it takes at once, how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from consilience.cli.app import app
from consilience.ledger import Ledger
from consilience.serve.gate import LAST
from consilience.serve.observe import Served as Told
from consilience.testing import ScriptedServer

from .helpers import eventually, post
from .test_life import ask, leave, process

CHAT = "/v1/chat/completions"
FAIR = {"answers": {"42": 0.6, "41": 0.4}}
PRICED = '[prices."m"]\ninput = 1.0\noutput = 10.0\n'


def body(content: str = "6 x 7?", **more) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]} | more).encode()


def watched(served) -> list[Told]:
    told: list[Told] = []
    served.core.observers.append(told.append)
    return told


def scraped(origin: str) -> dict[tuple, float]:
    """Every sample of ``/metrics`` by its name and labels."""
    reply = httpx2.get(f"{origin}/metrics")
    assert reply.status_code == 200
    families = text_string_to_metric_families(reply.text)
    return {(s.name, *sorted(s.labels.items())): s.value for f in families for s in f.samples}


def kept(ledger: Ledger) -> int:
    return sum(len(draws) for _, _, draws in ledger._requests())


# ------------------------------------------------------------------------------------------------ observers


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_an_answered_request_is_told_as_its_reply_says(serve, more) -> None:
    with ScriptedServer(**FAIR) as upstream:
        served = serve(upstream, policy="esc:window=3,max=12", config=PRICED)
        told = watched(served)
        plain = served.ask("seven?", seed=1)
        if more:
            list(served.ask("seven?", seed=1, **more))
        assert eventually(lambda: len(told) == 1 + bool(more))
        one, last, said = told[0], told[-1], plain.consilience
        assert (one.id, one.status, one.path, one.model, one.question) == (plain.id, 200, CHAT, "m", "seven?")
        assert (one.answer, one.confidence, one.votes) == (said["answer"], said["confidence"], said["votes"])
        assert (one.draws, one.draws_bought, one.cost) == (said["draws"], said["draws_bought"], said["cost"])
        assert (one.policy, one.stopped_because) == (said["policy"], said["stopped_because"])
        assert one.saved == (12 - one.draws if one.stopped_because == "rule" else 0)
        assert (one.prompt_tokens, one.completion_tokens) == (plain.usage.prompt_tokens, plain.usage.completion_tokens)
        assert one.error is None
        assert one.seconds > 0
        assert (last.answer, last.votes, last.draws, last.status) == (one.answer, one.votes, one.draws, 200)
        assert last.draws_bought == (0 if more else one.draws)


def test_every_other_end_is_told_once_too(serve) -> None:
    config = '[serve]\nmax_body_bytes = 2000\n[serve.keys.ann]\nkey_env = "ANN_KEY"\n'
    with ScriptedServer(**FAIR, models=["m"]) as upstream, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANN_KEY", "secret-of-ann")
        served = serve(upstream, config=config, policy="sc:n=3")
        told = watched(served)
        asked = [
            (CHAT, body(), "wrong"),
            (CHAT, b"{", "secret-of-ann"),
            (CHAT, body("x" * 3000), "secret-of-ann"),
            (CHAT, body(model="unknown"), "secret-of-ann"),
            (CHAT, body(model="m@none"), "secret-of-ann"),
            (CHAT, body(model="unknown@none"), "secret-of-ann"),
            ("/v1/completions", body(), "secret-of-ann"),
        ]
        ends = [post(served.origin, path, sent, Authorization=f"Bearer {key}")[0] for path, sent, key in asked]
        assert ends == [401, 400, 413, 404, 200, 404, 400]
        assert eventually(lambda: len(told) == len(asked))
        assert [one.status for one in told] == ends
        assert [one.path for one in told] == [path for path, _, _ in asked]
        assert [one.client for one in told] == [""] + ["key:ann"] * 6
        assert [one.policy for one in told[3:]] == ["sc:n=3", "none", "none", "sc:n=3"]
        assert all((one.error is None) == (one.policy == "none") for one in told)
        assert len({one.id for one in told}) == len(told)
        assert "secret" not in repr(told)


@pytest.mark.parametrize("more", [{}, {"stream": True}])
def test_a_client_that_left_is_told_with_what_it_had_bought(serve, more) -> None:
    with ScriptedServer(**FAIR, latency=0.05, latency_shape="fixed", supports_n=False) as upstream:
        served = serve(upstream, policy="sc:n=100", concurrency=2)
        told = watched(served)
        leave(served, lambda: upstream.counts["draws"] >= 4, **more)
        assert eventually(lambda: bool(told))
        assert (told[0].status, told[0].answer) == (499, None)
        assert told[0].draws_bought == kept(served.core.ledger) >= 2


# -------------------------------------------------------------------------------------------------- metrics


def test_metrics_add_up_to_what_replies_and_the_upstream_say(serve) -> None:
    with ScriptedServer(**FAIR) as upstream:
        served = serve(upstream, policy="esc:window=3,max=12", config=PRICED)
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda n: served.client().chat.completions.create(
                model="m", messages=[{"role": "user", "content": f"question {n}"}]), range(24)))  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            served.ask(model="m@esc:window=0")
        served.ask(model="m@none")
        name = ("consilience_requests_total", ("model", "m"), ("path", CHAT))
        assert eventually(lambda: scraped(served.origin).get((*name, ("policy", "none"), ("status", "200"))) == 1)
        found = scraped(served.origin)
        said = [reply.consilience for reply in replies]
        assert found[(*name, ("policy", "esc"), ("status", "200"))] == 24
        assert found[("consilience_requests_total", ("model", "m"), ("path", CHAT), ("policy", "esc"),
                      ("status", "400"))] == 1  # fmt: skip
        assert found["consilience_draws_total",] == sum(one["draws"] for one in said)
        assert found["consilience_draws_bought_total",] == sum(one["draws_bought"] for one in said)
        assert found["consilience_draws_bought_total",] == upstream.counts["draws"] - 1  # one passed through
        saved = sum(12 - one["draws"] for one in said if one["stopped_because"] == "rule")
        assert found["consilience_draws_saved_total",] == saved > 0
        used = [sum(getattr(reply.usage, f"{kind}_tokens") for reply in replies) for kind in ("prompt", "completion")]
        assert [found["consilience_tokens_total", ("type", kind)] for kind in ("prompt", "completion")] == used
        assert found["consilience_spent_usd_total",] == pytest.approx((used[0] + 10 * used[1]) / 1e6)
        confident = [one["confidence"] for one in said]
        assert found["consilience_confidence_count",] == len(confident)
        assert found["consilience_confidence_sum",] == pytest.approx(sum(confident))
        assert found["consilience_request_seconds_count", ("path", CHAT), ("policy", "esc")] == 25
        assert found["consilience_requests_in_flight",] == found["consilience_draws_in_flight",] == 0


def test_upstream_errors_and_what_is_in_flight_show(serve) -> None:
    with ScriptedServer(**FAIR, latency=30, latency_shape="fixed") as upstream:
        served = serve(upstream, policy="sc:n=7")
        in_flight = ("consilience_requests_in_flight",), ("consilience_draws_in_flight",)

        def seen() -> tuple[float, ...]:
            return tuple(scraped(served.origin)[name] for name in in_flight)

        waited = threading.Event()
        asking = threading.Thread(target=lambda: leave(served, waited.is_set))
        asking.start()
        assert eventually(lambda: seen() == (1, 7))
        waited.set()
        asking.join()
        assert eventually(lambda: seen() == (0, 0))
        upstream.latency, upstream.api_key = 0, "not what the server has"
        with pytest.raises(openai.InternalServerError):
            served.ask()
        assert eventually(
            lambda: scraped(served.origin).get(("consilience_upstream_errors_total", ("status", "502"))) == 1
        )


def test_labels_stay_few_whatever_clients_send(serve) -> None:
    with ScriptedServer(**FAIR) as upstream:
        served = serve(upstream, policy="sc:n=1", config=PRICED)
        counted = len(scraped(served.origin))
        for n in range(30):
            post(served.origin, CHAT, body(model=f"model-{n}"))
            post(served.origin, CHAT, body(model=f"m@odd{n}:x=1"))
            post(served.origin, CHAT, body(model=f"m@sc:n={n + 1}"))
        labels = [name for name in scraped(served.origin) if name[0] == "consilience_requests_total"]
        assert {dict(name[1:])["model"] for name in labels} == {"m", "other"}
        assert {dict(name[1:])["policy"] for name in labels} == {"sc", "other"}
        assert len(labels) == 3
        assert len(scraped(served.origin)) < counted + 60


def test_metrics_ask_other_hosts_for_a_key(serve, monkeypatch) -> None:
    monkeypatch.setenv("ANN_KEY", "secret-of-ann")
    keys = '[serve.keys.ann]\nkey_env = "ANN_KEY"\n'
    elsewhere = {"X-Forwarded-For": "203.0.113.9"}  # as a proxy on this machine says it; uvicorn believes it
    known = {"Authorization": "Bearer secret-of-ann"}
    for config, expected in ((keys, (200, 401, 200)), (keys + "[serve]\nopen_metrics = true\n", (200, 200, 200))):
        served = serve(config=config, policy="sc:n=1")
        headers = ({}, elsewhere, elsewhere | known)
        assert tuple(httpx2.get(f"{served.origin}/metrics", headers=one).status_code for one in headers) == expected


# ------------------------------------------------------------------------------------------------ readiness


def test_ready_while_the_upstream_answers(serve) -> None:
    with ScriptedServer(**FAIR) as upstream:
        served = serve(upstream)
        ready = httpx2.get(f"{served.origin}/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert httpx2.get(f"{served.origin}/readyz").status_code == 200  # it answered within the last minute


def test_not_ready_without_an_upstream_and_ready_once_it_is_there(serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    served = serve(f"http://127.0.0.1:{port}/v1")
    assert httpx2.get(f"{served.origin}/healthz").status_code == 200
    ready = httpx2.get(f"{served.origin}/readyz")
    assert (ready.status_code, ready.json()["reason"][:8]) == (503, "upstream")
    with ScriptedServer(**FAIR, port=port):
        assert httpx2.get(f"{served.origin}/readyz").status_code == 200


def test_an_upstream_that_only_accepts_connections_is_not_ready(serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        served = serve(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        ready = httpx2.get(f"{served.origin}/readyz", timeout=20)
        assert (ready.status_code, ready.json()["reason"]) == (503, "upstream: no answer within 2 s")


def test_a_call_that_was_answered_is_enough(serve) -> None:
    with ScriptedServer(**FAIR) as upstream:
        served = serve(upstream, policy="sc:n=2")
        served.ask()
    assert httpx2.get(f"{served.origin}/readyz").status_code == 200


def test_not_ready_where_the_ledger_cannot_be_written(serve) -> None:
    served = serve()
    assert httpx2.get(f"{served.origin}/readyz").status_code == 200
    with served.core.ledger._engine.begin() as connection:
        assert connection.execute(text("select count(*) from requests")).scalar() == 0  # looking leaves nothing
        connection.execute(text("alter table requests rename to lost"))
    ready = httpx2.get(f"{served.origin}/readyz")
    assert (ready.status_code, ready.json()["reason"]) == (503, "ledger: cannot be written")


# --------------------------------------------------------------------------------------------- backpressure


def test_beyond_the_queue_a_request_is_refused_and_all_others_are_answered(serve) -> None:
    with ScriptedServer(answers=lambda question, _: f"The answer is {question.split()[-1]}.", latency=0.6,
                        latency_shape="fixed") as upstream:  # fmt: skip
        served = serve(upstream, policy="sc:n=3", queue=5, concurrency=64)
        told = watched(served)
        with ThreadPoolExecutor(30) as pool:
            ends = list(pool.map(lambda n: (n, *post(served.origin, CHAT, body(f"of {n}"))), range(30)))
        assert upstream.counts["max_in_flight"] <= 5
        refused = [(headers, reply) for _, status, headers, reply in ends if status == 429]
        answered = [(n, reply) for n, status, _, reply in ends if status == 200]
        assert len(refused) + len(answered) == 30
        assert len(answered) >= 5
        assert refused
        for headers, reply in refused:
            assert int(headers["retry-after"]) >= 1
            assert (reply["error"]["code"], reply["error"]["type"]) == ("queue_full", "rate_limit_error")
        assert all(reply["consilience"]["answer"] == str(n) for n, reply in answered)
        assert eventually(lambda: len(told) == 30)
        assert Counter(one.status for one in told) == {200: len(answered), 429: len(refused)}
        assert served.ask("of 99").consilience["answer"] == "99"  # every place is free again


# ------------------------------------------------------------------------------------------------- shutdown


def asked(url: str, n: int) -> tuple[int, str | None]:
    """The status of a request, and the code of its error."""
    with httpx2.Client(timeout=60) as client:
        reply = client.post(f"{url}/chat/completions", content=body(f"question {n}"))
    return reply.status_code, reply.json().get("error", {}).get("code")


def test_sigterm_under_load_finishes_all_and_takes_no_more(tmp_path: Path) -> None:
    with (
        ScriptedServer(**FAIR, latency=0.6, latency_shape="fixed") as upstream,
        process(upstream, tmp_path, "--grace", "60") as (server, url),
        ThreadPoolExecutor(12) as pool,
    ):
        origin = url.removesuffix("/v1")
        assert httpx2.get(f"{origin}/readyz").status_code == 200
        load = [pool.submit(asked, url, n) for n in range(12)]
        assert eventually(lambda: upstream.counts["calls"] == 12)
        upstream.latency = 0
        server.send_signal(signal.SIGTERM)
        assert eventually(lambda: httpx2.get(f"{origin}/readyz").status_code == 503)
        assert httpx2.get(f"{origin}/readyz").json()["reason"] == "shutting down"
        assert asked(url, 99) == (503, "shutting_down")
        assert [one.result() for one in load] == [(200, None)] * 12
        assert server.wait(20) in (0, -signal.SIGTERM)
        assert upstream.counts["calls"] == 12
    with Ledger(str(tmp_path / "l.db")) as ledger:
        assert kept(ledger) == upstream.counts["draws"] == 72


def test_what_cannot_be_finished_is_cut_short_with_its_draws_kept(tmp_path: Path) -> None:
    """Each request has some of its draws when the upstream stalls for good; then time is up."""
    with (
        ScriptedServer(**FAIR, latency=0.02, latency_shape="fixed", supports_n=False) as upstream,
        process(upstream, tmp_path, "--grace", "0.5", "--concurrency", "3") as (server, url),
        ThreadPoolExecutor(6) as pool,
    ):
        load = [pool.submit(asked, url, n) for n in range(6)]
        assert eventually(lambda: upstream.counts["draws"] >= 8)
        upstream.latency = 3600  # those that are on their way come home well within the grace
        server.send_signal(signal.SIGTERM)
        ends = Counter(one.result() for one in load)
        assert server.wait(20) in (0, -signal.SIGTERM)
        draws = upstream.counts["draws"]
    assert ends[503, "shutting_down"] >= 1
    assert ends[503, "shutting_down"] + ends[200, None] == 6
    with Ledger(str(tmp_path / "l.db")) as ledger:
        assert 8 <= kept(ledger) == draws < 36


def test_a_stream_that_had_begun_is_cut_with_its_draws_kept(tmp_path: Path) -> None:
    with (
        ScriptedServer(**FAIR, latency=0.02, latency_shape="fixed", supports_n=False) as upstream,
        process(upstream, tmp_path, "--grace", "0.5", "--concurrency", "1") as (server, url),
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
    ):
        sent = {"model": "m@esc:window=2,max=40", "messages": [{"role": "user", "content": "6 x 7?"}], "stream": True}
        upstream.answers = lambda question, rng: f"The answer is {rng.random()}."  # no window ever agrees
        with client.chat.completions.create(**sent, extra_body={"consilience": {"progress": True}}) as stream:
            assert next(iter(stream)).consilience["progress"]["draws"] == 2
            upstream.latency = 3600
            server.send_signal(signal.SIGTERM)
            with pytest.raises((openai.APIError, httpx2.RemoteProtocolError)):
                list(stream)
        server.wait(20)
        draws = upstream.counts["draws"]
    with Ledger(str(tmp_path / "l.db")) as ledger:
        assert 2 <= kept(ledger) == draws < 40


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with (
        ScriptedServer(**FAIR, latency=3600, latency_shape="fixed") as upstream,
        process(upstream, tmp_path, "--grace", "3600") as (server, url),
        ThreadPoolExecutor(1) as pool,
    ):
        load = pool.submit(asked, url, 1)
        assert eventually(lambda: upstream.counts["in_flight"] == 1)
        server.send_signal(signal.SIGINT)
        assert eventually(lambda: httpx2.get(f"{url.removesuffix('/v1')}/readyz").status_code == 503)
        server.send_signal(signal.SIGINT)
        assert load.result() == (503, "shutting_down")
        server.wait(20)


def test_a_server_that_ended_in_time_sells_the_rest_on_a_retry(tmp_path: Path) -> None:
    with ScriptedServer(**FAIR, supports_n=False, latency=0.02, latency_shape="fixed") as upstream:
        with (
            process(upstream, tmp_path, "--concurrency", "1", "--grace", "0.5") as (server, url),
            ThreadPoolExecutor(1) as pool,
        ):
            load = pool.submit(
                lambda: post(url.removesuffix("/v1"), CHAT, body("6 x 7?", seed=3), Authorization="Bearer x")
            )
            assert eventually(lambda: upstream.counts["draws"] >= 2)
            upstream.latency = 3600
            server.send_signal(signal.SIGTERM)
            status, headers, _ = load.result()
            assert (status, headers["retry-after"]) == (503, "1")
            server.wait(20)
        upstream.latency, before = 0, upstream.counts["draws"]
        with process(upstream, tmp_path) as (_, url):
            assert ask(url, seed=3).consilience["draws_bought"] == 6 - before


# ------------------------------------------------------------------------------------------------- deploy/

DEPLOY = Path(__file__).parents[2] / "deploy"


def options() -> set[str]:
    serve = typer.main.get_command(app).commands["serve"]
    return {name for parameter in serve.params for name in parameter.opts}


def test_the_unit_starts_the_server_with_flags_it_has_and_waits_for_its_grace() -> None:
    lines = (DEPLOY / "consilience.service").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    command = settings["ExecStart"].split()
    assert command[1] == "serve"
    assert {word for word in command if word.startswith("--")} <= options()
    assert float(settings["TimeoutStopSec"]) > float(command[command.index("--grace") + 1]) + LAST


def test_the_container_starts_the_server_with_flags_it_has() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    command = [
        word for line in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE) for word in json.loads(line)
    ]
    assert command[:2] == ["consilience", "serve"]
    assert {word for word in command if word.startswith("--")} <= options()
    ports = set(re.findall(r"\b8\d{3}\b", text))
    assert ports == {command[command.index("--port") + 1]}
    for source in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / name).exists() for name in source.split())


def test_the_guide_names_every_metric_and_no_other(serve) -> None:
    table = (DEPLOY.parent / "docs" / "guide" / "operate.md").read_text()
    named = set(re.findall(r"^\| `(consilience_\w+)`", table, re.MULTILINE))
    served = serve(policy="sc:n=1")
    families = text_string_to_metric_families(httpx2.get(f"{served.origin}/metrics").text)
    counted = {f.name + "_total" * (f.type == "counter") for f in families if not f.name.endswith("_created")}
    assert named == counted
