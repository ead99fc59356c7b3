"""The page in a real browser: it works by keyboard, fits every width, and nothing a model wrote runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from consilience.report import Page, PolicyRow, QuestionRow, ReplyRow, write
from consilience.report.page import render

from .demo import demo

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the demo run, written once."""
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write(demo(), path)
    return path


def _rows(page: Any) -> int:
    return page.locator("#table tr.row").count()


def test_asks_nobody_and_says_nothing(report: Path, watch: Any) -> None:
    watched = watch()
    page = watched.open(report)
    page.locator("button.fold").nth(3).click()
    page.locator(".chart .step").nth(2).hover()
    page.wait_for_load_state("networkidle")
    assert watched.requests == [report.as_uri()]
    assert watched.troubles == []
    assert "'none'" in page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")


def test_a_question_unfolds_by_keyboard(report: Path, watch: Any) -> None:
    page = watch().open(report)
    page.locator("#find").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "fold":
            break
    button = page.locator("button.fold").first
    assert button.evaluate("node => node === document.activeElement")
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    detail = page.locator(f"#{button.get_attribute('aria-controls')}")
    assert "Votes" in detail.inner_text()
    page.keyboard.press("Tab")  # to "unfold all texts"
    page.keyboard.press("Tab")  # to the first draw
    page.keyboard.press("Enter")
    assert "shelves holds" in detail.locator("details[open] pre").first.inner_text()
    button.focus()
    page.keyboard.press("Space")
    assert detail.count() == 0


def test_failed_draws_say_why(report: Path, watch: Any) -> None:
    page = watch().open(report)
    place = next(
        place
        for place, row in enumerate(demo().questions[:100])
        if any(one.error for one in row.replies) and not all(one.judged for one in row.replies)
    )
    page.locator("button.fold").nth(place).click()
    failed = page.locator(".drawn details", has=page.locator(".flag.failed")).first
    failed.locator("summary").click()
    assert "HTTP 502" in failed.locator(".reason").inner_text()
    assert page.locator(".drawn .flag", has_text="not judged").count() > 0


def test_filters_and_their_counts(report: Path, watch: Any) -> None:
    page = watch().open(report)
    questions = demo().questions
    counts = {
        "right": sum(row.right is True for row in questions),
        "wrong": sum(row.right is False for row in questions),
        "undecided": sum(not row.decided for row in questions),
    }
    for name, count in counts.items():
        button = page.locator(f"[data-show={name}]")
        button.focus()
        page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("#count").inner_text().startswith(f"{count} of 240")
        assert _rows(page) == min(100, count)
    assert page.locator("[data-show=all]").get_attribute("aria-pressed") == "false"
    page.locator("[data-show=all]").click()
    page.locator("#find").fill("ARITH-0007")
    assert _rows(page) == 1
    page.locator("#find").fill("no such thing")
    assert (_rows(page), page.get_by_text("No question matches.").count()) == (0, 1)


def test_more_rows_on_demand(report: Path, watch: Any) -> None:
    page = watch().open(report)
    assert _rows(page) == 100
    page.locator("#more").focus()
    page.keyboard.press("Enter")
    assert _rows(page) == 200
    assert page.evaluate("document.activeElement.className") == "fold"
    page.locator("#more").click()
    assert (_rows(page), page.locator("#more").is_visible()) == (240, False)


def test_columns_sort_both_ways_and_back(report: Path, watch: Any) -> None:
    page = watch().open(report)
    head, cells = page.locator("th.col-draws"), page.locator("td.spent")
    used = [row.draws for row in demo().questions]
    orders = (("descending", sorted(used, reverse=True)), ("ascending", sorted(used)), (None, used))
    for direction, expected in orders:
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == direction
        assert [int(text) for text in cells.all_inner_texts()] == expected[:100]


def test_unfolded_rows_stay_unfolded_through_a_sort(report: Path, watch: Any) -> None:
    page = watch().open(report)
    page.locator("button.fold").nth(5).click()
    name = page.locator("tr.unfolded").get_attribute("id")
    page.locator("th.col-draws button").click()
    page.locator("#more").click()
    page.locator("#more").click()
    assert page.locator(f"#{name}").count() == 1


def test_fits_every_screen(report: Path, watch: Any) -> None:
    page = watch().open(report)
    page.locator("button.fold").first.click()
    page.get_by_role("button", name="Unfold all texts").click()
    shown = "all => all.filter(one => getComputedStyle(one).display !== 'none').length"
    for width in (320, 380, 620, 760, 930, 1200):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("svg.wide, svg.middle, svg.narrow").evaluate_all(shown) == 1


def _contrast(page: Any, selector: str) -> float:
    """WCAG contrast of the text of ``selector`` against the nearest background behind it."""
    return page.locator(selector).first.evaluate(
        """node => {
          const parse = text => text.match(/[\\d.]+/g).map(Number);
          const light = rgb => { const [r, g, b] = rgb.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          let behind = node, back = null;
          while (behind && !back) { const c = parse(getComputedStyle(behind).backgroundColor);
            if (c.length < 4 || c[3] > 0) back = c; behind = behind.parentElement; }
          const a = light(parse(getComputedStyle(node).color)), b = light(back);
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_readable(report: Path, watch: Any, scheme: str) -> None:
    page = watch(scheme=scheme).open(report)
    page.locator("button.fold").first.click()
    shade = [int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))]
    assert (sum(shade) < 3 * 80) == (scheme == "dark")
    for selector in ("h1", ".note", ".aside", "thead th", ".mark.right", ".mark.wrong", ".preview", ".notes li", "pre"):
        if page.locator(selector).count():
            assert _contrast(page, selector) >= 4.5, selector


def test_points_speak_to_the_keyboard(report: Path, watch: Any) -> None:
    page = watch().open(report)
    point = page.locator("svg.wide .point").nth(2)
    point.focus()
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "asc:threshold=0.95" in tip.inner_text()
    assert "live" in point.get_attribute("aria-label")
    page.keyboard.press("Escape")
    assert not tip.is_visible()


HOSTILE = [
    "</script><script>window.hit = 1; alert(1)</script>",
    "<!--<script>",
    "<img src=http://example.invalid/x.png onerror=window.hit=1>",
    "\"><svg onload='window.hit=1'>",
    "' onmouseover='window.hit=1",
    "{{ 7 * 7 }}{% raw %}",
    "</title></style></textarea></noscript><iframe src=javascript:alert(1)>",
    "line\u2028separator\u2029 \u202eright to left \x00 nul \ud800 half",
    "]]>--> &lt;b&gt; &amp; \\u003c $\\frac{$ ${1}",
]


def hostile(text: str) -> Page:
    """A page with ``text`` wherever a model, a file or a user could put it."""
    replies = [ReplyRow(text, text), ReplyRow("", None, text), ReplyRow(text, None, None, judged=False)]
    question = QuestionRow(text, text, text, text, False, 0.5, 3, {text: 2.0, text + "!": 1.0}, text, replies, False)
    rows = [
        PolicyRow(text, origin, 0.5, (0.2, 0.8), 3.0, draws_used=[3.0], confidence=[0.5], right=[0.0])
        for origin in ("live", "replay")
    ]
    return Page(
        title=text,
        model=text,
        command=text,
        created=text,
        policies=rows,  # type: ignore[arg-type]
        questions=[question],
        totals={text: 3, "draws": 3},
        notes=[text],
        ledger=text,
        verdicts_of=text,
    )


@pytest.mark.parametrize("guarded", [True, False], ids=["as written", "without its policy"])
def test_hostile_texts_are_shown_and_never_run(tmp_path: Path, watch: Any, guarded: bool) -> None:
    """Escaping must hold by itself: the second run takes the content security policy away."""
    watched = watch()
    for place, text in enumerate(["\n".join(HOSTILE)] if guarded else HOSTILE):
        path = tmp_path / f"page-{place}.html"
        html = render(hostile(text))
        if not guarded:
            html, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
            assert count == 1
        path.write_bytes(html.encode("utf-8", "replace"))
        page = watched.open(path)
        page.locator("button.fold").click()
        page.get_by_role("button", name="Unfold all texts").click()
        page.locator(".point:visible").first.hover()
        assert page.locator("script").count() == 2, text
        assert page.locator("img, iframe, object, embed, base, link, form").count() == 0, text
        assert page.evaluate(
            "window.hit === undefined && ![...document.querySelectorAll('*')].some("
            "node => [...node.attributes].some(one => one.name.startsWith('on')))"
        ), text
        shown = page.locator(".drawn pre").first.evaluate("node => node.textContent")
        assert shown == text.encode("utf-8", "replace").decode()
    assert watched.troubles == []
    assert all(url.startswith("file:") for url in watched.requests)


def test_one_question_without_gold(tmp_path: Path, watch: Any) -> None:
    watched = watch(width=400)
    path = tmp_path / "one.html"
    row = QuestionRow("1", "What?", None, "yes", None, 0.75, 2, {"yes": 2.0}, "limit", [ReplyRow("yes", "yes")] * 2)
    write(dataclasses.replace(demo(3), questions=[row], policies=[], curve=None, totals={}), path)
    page = watched.open(path)
    assert page.locator("#count").inner_text() == "1 of 1 question"
    assert page.locator(".mark.unknown").count() == 1
    assert page.get_by_text("No question has a gold answer").count() == 2
    assert watched.troubles == []
