"""The page in a real browser: it works by keyboard, shows the vote as it forms, and nothing that was written runs."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consilience.draws import Draw
from consilience.serve.observe import Served, Voted, stated_tokens
from consilience.serve.page.recent import ANSWER, ANSWERS, TEXT, Recent
from consilience.testing import ScriptedServer
from report.conftest import Watched, browser  # noqa: F401

HOSTILE = "<img src=x onerror=alert(1)>"
PRICES = '[prices."m"]\ninput = 0.5\noutput = 1.5\n'
KEYS = '[serve.keys.alice]\nkey_env = "ALICE_KEY"\n[serve.keys.bob]\nkey_env = "BOB_KEY"\n'


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:  # noqa: F811
    """Opens watched pages of a server; each has storage of its own and all are closed at the end."""
    contexts = []

    def start(origin: str, width: int = 1200, scheme: str = "light", **more: Any) -> Watched:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        watched = Watched(page)
        page.goto(origin)
        return watched

    yield start
    for context in contexts:
        context.close()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys that `KEYS` names."""
    monkeypatch.setenv("ALICE_KEY", "alice-secret")
    monkeypatch.setenv("BOB_KEY", "bob-secret")


def got(origin: str, path: str, key: str = "") -> tuple[int, dict[str, str], bytes]:
    """GET a path; the status, headers and body."""
    request = urllib.request.Request(origin + path, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, dict(reply.headers), reply.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def ask(page: Any, question: str) -> None:
    """Ask with the keyboard alone, from wherever the focus is put at the start; waits for the draws."""
    page.wait_for_selector("#asking:not([hidden])")
    page.locator("#question").fill(question)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#draws-box:not([hidden])")


def listed(page: Any, count: int) -> None:
    """Wait until the list of recent requests has so many."""
    page.wait_for_function("n => document.querySelectorAll('#recent > li').length === n", arg=count)


def cards(page: Any) -> dict[str, str]:
    """The totals by their labels."""
    texts = page.locator("#totals li").evaluate_all("all => all.map(one => [...one.children].map(c => c.textContent))")
    return {label: value for label, value, _ in texts}


# --------------------------------------------------------------------------------------------- in the browser


@pytest.mark.browser
def test_a_question_is_asked_and_its_draws_are_read_by_keyboard(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={"391": 0.7, "381": 0.3}, seed=1, models=["m"]) as upstream:
        origin = serve(upstream, policy="sc:n=9", config=PRICES).origin
        watched = watch(origin)
        page = watched.page
        page.wait_for_selector("#asking:not([hidden])")
        page.wait_for_function("document.activeElement.id === 'question'")
        page.keyboard.type("What is 17 * 23?")
        page.keyboard.press("Enter")  # a line of the question: asks nothing
        order = []
        for _ in range(4):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
        assert order == ["marked", "policy", "model", "ask"]
        page.keyboard.press("Enter")
        page.wait_for_selector("#draws-box:not([hidden])")
        listed(page, 1)
        body = upstream.requests[0]["body"]
        shown = json.loads(got(origin, "/page/requests")[2])["requests"][0]
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.tagName") != "SUMMARY":
            page.keyboard.press("Tab")
        assert page.locator("#draws details[open]").count() == 0
        page.keyboard.press("Enter")
        assert page.locator("#draws details[open] pre").inner_text().startswith("Let me think. The answer is ")
        page.keyboard.press("Escape")
        assert page.locator("#draws details[open]").count() == 0
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][1]["content"] == "What is 17 * 23?"
    verdict = page.locator(".verdict").inner_text()
    assert page.locator(".verdict .big").inner_text() == shown["answer"]
    assert f"{100 * shown['confidence']:.0f}\u202f%" in verdict
    assert re.search(r"Cost\s+\$0\.0\d+", verdict)
    assert "Stopped because" in verdict
    assert page.locator("#draws li").count() == shown["draws"] == 9
    same = page.locator("#draws .took.same").count()
    assert same == shown["votes"][shown["answer"]] == int(page.locator("#bars .lead .count").inner_text())
    assert f"The answer is {shown['answer']}" in page.locator("#spoken").text_content()
    assert watched.troubles == []
    assert {url.split("/", 3)[2] for url in watched.requests} == {origin.removeprefix("http://")}


@pytest.mark.browser
def test_the_votes_are_seen_to_arrive(serve: Any, watch: Any) -> None:
    turns = itertools.cycle(("391", "391", "381"))  # no window of four agrees
    with ScriptedServer(
        answers=lambda question, rng: f"The answer is {next(turns)}.", latency=0.1, latency_shape="fixed"
    ) as upstream:
        page = watch(serve(upstream, policy="esc:window=4,max=24").origin).page
        page.wait_for_selector("#asking:not([hidden])")
        page.evaluate(
            """() => {
              window.seen = [];
              new MutationObserver(() => {
                const bars = [...document.querySelectorAll('#bars .count')].map(one => Number(one.textContent));
                window.seen.push([document.querySelector('#result').hidden, bars.reduce((a, b) => a + b, 0)]);
              }).observe(document.querySelector('#run'), { childList: true, subtree: true });
            }"""
        )
        page.locator("#model").fill("m")
        ask(page, "6 x 7?")
        draws = page.locator("#draws li").count()
        seen = page.evaluate("window.seen")
        waves = page.locator("#waves b").all_inner_texts()
    before = sorted({votes for hidden, votes in seen if hidden and votes})
    assert draws == 24
    assert before == list(range(4, 25, 4))  # every wave was on the page before the answer was
    assert waves == [str(votes) for votes in before]


@pytest.mark.browser
def test_recent_requests_and_totals_follow(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={"first": {"1": 1.0}, "": {"2": 1.0}}, models=["m"]) as upstream:
        served = serve(upstream, policy="esc:window=5,max=40")
        page = watch(served.origin).page
        ask(page, "the first question")
        listed(page, 1)
        assert cards(page) | {"Tokens": ""} == {
            "Requests": "1",
            "Draws": "5",
            "Draws saved": "35",
            "Tokens": "",
            "Cost": "–",
        }
        page.locator("#recent .row").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(".detail .drawn")
        assert page.locator(".detail .drawn li").count() == 5
        served.ask("from another client")
        ask(page, "the last question")
        listed(page, 3)
        rows = page.locator("#recent .row").all_inner_texts()
        asked = [row.splitlines()[0] for row in rows]
        assert asked == ["the last question", "from another client", "the first question"]
        assert page.locator("#recent > li").nth(2).locator(".detail").count() == 1  # what was open stays so
        assert (cards(page)["Requests"], cards(page)["Draws"], cards(page)["Draws saved"]) == ("3", "15", "105")
        page.locator("#recent > li").nth(2).locator("summary").first.focus()
        page.keyboard.press("Escape")
        assert page.locator(".detail").count() == 0
        assert page.evaluate("document.activeElement.className") == "row"


@pytest.mark.browser
def test_what_is_written_stays_text(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={HOSTILE: 1.0}, models=["m"]) as upstream:
        watched = watch(serve(upstream, policy="sc:n=3").origin)
        page = watched.page
        ask(page, f"{HOSTILE}<script>alert(2)</script>")
        page.locator("#recent .row").first.click()
        page.wait_for_selector(".detail .drawn")
        for place in range(3):
            page.locator("#draws summary").nth(place).click()
        assert page.locator(".verdict .big").inner_text() == HOSTILE
        assert HOSTILE in page.locator("#draws pre").first.inner_text()
        assert page.locator("#asked").inner_text().startswith(HOSTILE)
        assert page.locator("img, body script").count() == 0
        page.wait_for_load_state("networkidle")
    assert watched.troubles == []


@pytest.mark.browser
def test_an_inline_script_would_not_run(serve: Any, watch: Any) -> None:
    page = watch(serve().origin).page
    page.wait_for_selector("#asking:not([hidden])")
    ran = page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.ran = true';
          document.body.append(script);
          return window.ran === true;
        }"""
    )
    assert ran is False


@pytest.mark.browser
def test_errors_are_said(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={"1": 1.0}, models=["m"]) as upstream:
        page = watch(serve(upstream, policy="sc:n=3").origin).page
        page.wait_for_selector("#asking:not([hidden])")
        page.locator("#policy").select_option("other")
        assert page.evaluate("document.activeElement.id") == "other"
        page.keyboard.type("esc:window=frog")
        page.locator("#question").fill("6 x 7?")
        page.locator("#other").press("Enter")
        page.wait_for_selector("#ask-error:not([hidden])")
        assert "frog" in page.locator("#ask-error").inner_text()
        assert upstream.counts["calls"] == 0
        page.locator("#other").fill("sc:n=2")
        ask(page, "6 x 7?")
        assert page.locator("#draws li").count() == 2
        assert page.locator("#ask-error").is_hidden()


@pytest.mark.browser
def test_the_policy_none_shows_one_reply_and_no_vote(serve: Any, watch: Any) -> None:
    from .helpers import running
    from .upstream import Upstream

    upstream = Upstream()
    with running(upstream.app) as origin:
        page = watch(serve(origin).origin).page
        page.wait_for_selector("#asking:not([hidden])")
        page.locator("#policy").select_option("none")
        page.locator("#question").fill("6 x 7?")
        page.keyboard.press("Tab")
        page.locator("#question").press("Control+Enter")
        page.wait_for_selector("#reply-box:not([hidden])")
        assert page.locator("#reply").inner_text() == "The answer is 4."
        assert "no vote" in page.locator("#standing").inner_text()
        assert page.locator("#result").is_hidden()


@pytest.mark.browser
def test_cancelling_ends_the_calls(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={"1": 1.0}, models=["m"], latency=30, latency_shape="fixed") as upstream:
        page = watch(serve(upstream, policy="sc:n=3").origin).page
        page.wait_for_selector("#asking:not([hidden])")
        page.locator("#question").fill("6 x 7?")
        page.keyboard.press("Control+Enter")
        page.locator("#cancel").click()
        page.wait_for_function("document.getElementById('standing').textContent === 'Cancelled.'")
        listed(page, 1)
        assert page.locator("#recent .what").inner_text() == "left"
        assert page.evaluate("document.activeElement.id") == "question"


@pytest.mark.browser
def test_a_key_is_asked_for_and_shows_its_own_requests_alone(serve: Any, watch: Any, keys: None) -> None:
    with ScriptedServer(answers={"7": 1.0}, models=["m"]) as upstream:
        served = serve(upstream, policy="sc:n=2", config=KEYS)
        served.ask("what bob asks", key="bob-secret")
        served.ask("what alice asks", key="alice-secret")
        watched = watch(served.origin)
        page = watched.page
        page.wait_for_selector("#locked:not([hidden])")
        assert page.locator("#asking").is_hidden()
        page.wait_for_function("document.activeElement.id === 'key'")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-error:not([hidden])")
        page.keyboard.type("alice-secret")
        page.keyboard.press("Enter")
        ask(page, "alice on the page")
        listed(page, 2)
        text = page.locator("body").inner_text()
        assert "what alice asks" in text
        assert "bob" not in text
        assert (cards(page)["Requests"], cards(page)["Draws"]) == ("2", "4")
        page.reload()  # the tab keeps the key
        page.wait_for_selector("#asking:not([hidden])")
        page.locator("#forget").click()
        page.wait_for_selector("#locked:not([hidden])")
        assert "alice" not in page.locator("body").inner_text()
        assert page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])") == "[{},{}]"
    assert not any("secret" in url for url in watched.requests)


@pytest.mark.browser
def test_it_fits_narrow_screens_and_both_schemes(serve: Any, watch: Any) -> None:
    long = "supercalifragilistic" * 12
    with ScriptedServer(answers={long: 0.6, "2": 0.4}, models=["m"]) as upstream:
        origin = serve(upstream, policy="sc:n=6").origin
        colours = {}
        for scheme in ("light", "dark"):
            page = watch(origin, width=360, scheme=scheme).page
            ask(page, long)
            page.locator("#recent .row").first.click()
            page.wait_for_selector(".detail .drawn")
            page.locator("#draws summary").first.click()
            for width in (320, 360, 700, 1000):
                page.set_viewport_size({"width": width, "height": 800})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
            colours[scheme] = page.evaluate("['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k])")
    assert colours["light"][0] != colours["dark"][0]
    assert colours["light"][1] != colours["dark"][1]


@pytest.mark.browser
def test_nothing_moves_where_motion_is_unwanted(serve: Any, watch: Any) -> None:
    moving = "document.getAnimations().length"
    with ScriptedServer(answers={"1": 1.0}, models=["m"], latency=30, latency_shape="fixed") as upstream:
        origin = serve(upstream, policy="sc:n=2").origin
        counts = []
        for motion in ("no-preference", "reduce"):
            page = watch(origin, reduced_motion=motion).page
            page.wait_for_selector("#asking:not([hidden])")
            page.locator("#question").fill("6 x 7?")
            page.keyboard.press("Control+Enter")
            page.wait_for_selector("#standing.working")
            counts.append(page.evaluate(moving))
            page.locator("#cancel").click()
    assert counts[0] > 0 == counts[1]


@pytest.mark.browser
def test_the_picture_in_the_guide(serve: Any, watch: Any) -> None:
    """Made anew where SERVE_PICTURE names a file; it has to stay small."""
    product = "17 * 23 = 17 * 20 + 17 * 3.\n17 * 20 = 340 and 17 * 3 = 51.\nThe answer is {answer}."
    answers = {"17": {"391": 0.62, "381": 0.22, "401": 0.1, "371": 0.06}, "": {"yes": 0.9, "no": 0.1}}
    with ScriptedServer(answers=answers, reply=product, models=["my-model"], seed=2, latency=0.05) as upstream:
        served = serve(upstream, policy="asc:max=40", config=PRICES.replace('"m"', '"my-model"'))
        for question in ("Is 97 a prime number?", "Is 2027 a prime number?"):
            served.ask(question, model="my-model")
        page = watch(served.origin).page
        ask(page, "What is 17 * 23?")
        listed(page, 3)
        page.locator("#draws summary").nth(1).click()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(); document.querySelector('.drawn').style.maxHeight = '200px'")
        png = page.screenshot(full_page=True, animations="disabled")
    path = Path(os.environ.get("SERVE_PICTURE") or Path(__file__).parents[2] / "docs" / "images" / "serve.png")
    if os.environ.get("SERVE_PICTURE"):
        Image = pytest.importorskip("PIL.Image")
        Image.open(io.BytesIO(png)).convert("P", palette=1, colors=128).save(path, optimize=True)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size < 150_000


# ------------------------------------------------------------------------------------------ without a browser


def test_the_page_forbids_everything_from_elsewhere(serve: Any) -> None:
    served = serve()
    html = got(served.origin, "/")[2].decode()
    for path in ("/", *re.findall(r'(?:src|href)="(/[^"]+)"', html)):
        status, headers, body = got(served.origin, path)
        assert (status, bool(body)) == (200, True)
        assert headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|https?://", html)


def test_the_texts_are_for_the_key_that_asked(serve: Any, keys: None) -> None:
    with ScriptedServer(answers={"7": 1.0}) as upstream:
        served = serve(upstream, policy="sc:n=2", config=KEYS)
        name = served.ask("mine", key="alice-secret").id
        assert json.loads(got(served.origin, "/page/server")[2]) == {"keyed": True, "house": False}
        for path in ("/page/requests", f"/page/requests/{name}"):
            status, headers, body = got(served.origin, path)
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
            status, headers, body = got(served.origin, path, "alice-secret")
            assert (status, headers["cache-control"], b"mine" in body) == (200, "no-store", True)
        drawn = json.loads(got(served.origin, f"/page/requests/{name}", "alice-secret")[2])["drawn"]
        assert [draw["answer"] for draw in drawn] == ["7", "7"]
        others = got(served.origin, "/page/requests", "bob-secret")
        assert json.loads(others[2])["requests"] == []
        assert got(served.origin, f"/page/requests/{name}", "bob-secret")[0] == 404


# ------------------------------------------------------------------------------------------- what is kept


def one(number: int, client: str = "key:a", **more: Any) -> Served:
    fields = {"id": f"r{number}", "at": float(number), "path": "/v1/chat/completions", "client": client}
    return Served(**(fields | {"model": "m", "policy": "sc:n=2", "status": 200, "seconds": 0.5} | more))


def test_the_latest_are_kept_and_all_are_counted() -> None:
    recent = Recent(apart=False, most=3)
    for number in range(7):
        recent.note(one(number, f"any:{number}", draws=2, saved=1, prompt_tokens=3, completion_tokens=4, cost=0.5))
    recent.note(one(7, path="/v1/models"))
    recent.note(one(8, status=502))
    shown = recent.shown("")
    assert [row["id"] for row in shown["requests"]] == ["r8", "r6", "r5"]
    assert shown["totals"] == {
        "requests": 8, "errors": 1, "draws": 14, "saved": 7, "tokens": 49, "cost": 3.5, "unpriced": 0,
    }  # fmt: skip
    assert recent.one("", "r0") is None


def test_clients_are_kept_apart() -> None:
    recent = Recent(apart=True, most=2)
    recent.note(one(0, "key:a"))
    for number in range(1, 6):
        recent.note(one(number, "key:b"))
    assert [row["id"] for row in recent.shown("key:a")["requests"]] == ["r0"]  # not pushed out by another
    assert [row["id"] for row in recent.shown("key:b")["requests"]] == ["r5", "r4"]
    assert recent.one("key:b", "r0") is None
    assert recent.shown("")["requests"] == []


def test_texts_are_bounded_and_the_oldest_go_first() -> None:
    recent = Recent(apart=False, texts=1000)
    for number in range(5):
        recent.note(one(number, drawn=(Draw(text="x" * 150), Draw(text="y" * 150))))
    lengths = [sum(len(draw["text"]) for draw in recent.one("", f"r{n}")["drawn"]) for n in range(5)]
    assert lengths == [0, 0, 300, 300, 300]
    recent = Recent(apart=False)
    recent.note(one(0, drawn=(Draw(text="x" * 10 * TEXT, more="dropped"),)))
    assert len(recent.one("", "r0")["drawn"][0]["text"]) == TEXT + 2


def test_answers_are_bounded_and_still_match_their_draws() -> None:
    recent = Recent(apart=False)
    long = "9" * 5 * ANSWER
    votes = {long: 7.0} | {str(number): 1.0 for number in range(2 * ANSWERS)}
    recent.note(one(0, answer=long, votes=votes, error=long, drawn=(Draw(text="t", answer=long), Draw(text="u"))))
    kept = recent.one("", "r0")
    assert len(kept["answer"]) == len(kept["error"]) == ANSWER + 2
    assert len(kept["votes"]) == ANSWERS
    assert kept["votes"][kept["answer"]] == 7.0
    assert [draw["answer"] for draw in kept["drawn"]] == [kept["answer"], None]


@pytest.mark.browser
def test_texts_can_be_read_in_both_schemes(serve: Any, watch: Any) -> None:
    """WCAG's contrast of 4.5 to 1 for each text that is shown, against what is painted behind it."""
    contrast = """() => {
      const rgb = text => text.match(/[\\d.]+/g).map(Number);
      const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
      const behind = node => {
        for (; node; node = node.parentElement) {
          const colour = rgb(getComputedStyle(node).backgroundColor);
          if (colour.length === 3 || colour[3] === 1) return colour;
        }
        throw new Error('nothing is painted');
      };
      const poor = [];
      for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
        if (!own || !node.checkVisibility() || node.closest('.hidden, .skip, noscript, datalist, option')) continue;
        const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([node.tagName, node.className, node.textContent]);
      }
      return poor;
    }"""
    with ScriptedServer(answers={"1": 0.5, "2": 0.5}, models=["m"]) as upstream:
        origin = serve(upstream, policy="sc:n=6").origin
        for scheme in ("light", "dark"):
            page = watch(origin, scheme=scheme).page
            ask(page, "6 x 7?")
            page.locator("#recent .row").first.click()
            page.wait_for_selector(".detail .drawn")
            page.mouse.move(0, 0)
            assert page.evaluate(contrast) == []


# ------------------------------------------------------------------- several choices, and requests passed through


def posted(origin: str, **more: Any) -> dict[str, Any]:
    body = {"model": "m", "messages": [{"role": "user", "content": "6 x 7?"}]} | more
    request = urllib.request.Request(f"{origin}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.loads(reply.read())


@pytest.mark.browser
def test_all_choices_of_a_request_are_shown(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={HOSTILE: 0.5, "42": 0.5}, seed=4, models=["m"]) as upstream:
        origin = serve(upstream, policy="sc:n=4", kind="text").origin
        told = posted(origin, n=3)["consilience"]["choices"]
        watched = watch(origin)
        page = watched.page
        listed(page, 1)
        assert page.locator("#recent .what").inner_text() == f"{told[0]['answer']} and 2 more choices"
        page.locator("#recent .row").click()
        page.wait_for_function("document.querySelectorAll('.choice').length === 3")
        for place, choice in enumerate(told):
            shown = page.locator(".choice").nth(place)
            assert shown.locator("h4").inner_text().startswith(f"Choice {place + 1} of 3: {choice['answer']}, ")
            assert shown.locator(".drawn > li").count() == choice["draws"] == 4
            counts = [int(text) for text in shown.locator(".bars .count").all_inner_texts()]
            assert counts == sorted(choice["votes"].values(), reverse=True)
        assert watched.troubles == []


@pytest.mark.browser
def test_a_request_passed_through_shows_the_tokens_that_its_reply_states(serve: Any, watch: Any) -> None:
    with ScriptedServer(answers={"42": 1.0}, models=["m"]) as upstream:
        origin = serve(upstream, policy="none").origin
        used = posted(origin)["usage"]["total_tokens"]
        page = watch(origin).page
        listed(page, 1)
        assert f"{used} tokens" in page.locator("#recent .row").inner_text()
        page.locator("#recent .row").click()
        assert page.locator(".detail .facts div", has_text="Tokens").locator("dd").inner_text() == str(used) != "0"
        assert cards(page)["Tokens"] == str(used)


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (b'{"choices": [], "usage" : {"prompt_tokens": 7, "completion_tokens": 3}}', (7, 3)),
        (b'data: {"usage":null}\n\ndata: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n', (7, 3)),
        (b'{"usage": {"prompt_tokens": 7}, "choices": [{"text": "\\"usage\\": {\\"prompt_tokens\\": 1}"}]}', (7, 0)),
        (b'{"choices": [], "usage": {"prompt_tokens": -1}}', None),
        (b'{"choices": [], "usage": {"prompt_tokens": 7, "compl', None),
        (b'{"choices": [], "usage": [[[', None),
        (b'"usage":' + b"[" * 60_000, None),
        (b"\x1f\x8b\x00packed", None),
        (b"", None),
    ],
)
def test_tokens_are_read_from_the_end_of_a_reply(tail: bytes, expected: tuple[int, int] | None) -> None:
    wanted = {} if expected is None else dict(zip(("prompt_tokens", "completion_tokens"), expected, strict=True))
    assert stated_tokens(tail) == wanted


def test_several_choices_keep_no_more_than_one() -> None:
    recent = Recent(apart=False)
    votes = {f"{n} " + "x" * 5000: 1.0 for n in range(200)}
    drawn = tuple(Draw(text="t" * 50_000) for _ in range(3))
    other = Voted("a" * 5000, 0.5, votes, "max", 3, drawn)
    recent.note(
        Served(
            "r", 0.0, "/v1/chat/completions", "", "m", "sc", 200, 1.0, votes=votes, drawn=drawn, others=(other,) * 127
        )
    )
    kept = recent.one("", "r")
    assert len(kept["others"]) == 127
    assert sum(len(one["votes"]) for one in (kept, *kept["others"])) <= 2 * ANSWERS
    assert max(len(one["answer"]) for one in kept["others"]) == ANSWER + 2
    assert recent._of[""].texts == sum(len(draw["text"]) for one in (kept, *kept["others"]) for draw in one["drawn"])
    recent = Recent(apart=False, texts=1000)
    recent.note(Served("r", 0.0, "/v1/completions", "", "m", "sc", 200, 1.0, drawn=drawn, others=(other,)))
    assert [one["drawn"] for one in recent.one("", "r")["others"]] == [[]]
