"""One self-contained HTML file after a run, with its plots as PNG beside it.

The page asks no other host for anything, and its content security policy forbids it to. What a model wrote is
shown as text only: the template escapes, the table's data is JSON that cannot end its element, and the script
builds text nodes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from consilience.errors import InputError
from consilience.report import charts, measures, plots, words
from consilience.report.embed import embed
from consilience.report.rows import Curve, Page, PolicyRow, QuestionRow, ReplyRow
from consilience.report.summary import cards, facts, policy_lines

__all__ = ["Curve", "Page", "PolicyRow", "QuestionRow", "ReplyRow", "render", "write"]

_TEMPLATES = Path(__file__).parent / "templates"
_SIZES = ((1040, 400, "wide"), (680, 360, "middle"), (350, 320, "narrow"))


def write(page: Page, path: Path) -> list[Path]:
    """Write the page to ``path`` and ``<stem>-accuracy.png``, ``-draws.png``, ``-reliability.png`` beside it.

    Folders are made; each file is written beside its place and then renamed, so that none is ever half there.
    Returns the four paths. Raises `InputError` where they cannot be written or the rows do not fit together.
    """
    path = Path(path)
    _check(page)
    images = [path.with_name(f"{path.stem}-{what}.png") for what in ("accuracy", "draws", "reliability")]
    paths = [path, *images]
    with replacing_all(paths) as drafts:
        drafts[0].write_bytes(render(page, [image.name for image in images]).encode("utf-8", "replace"))
        plots.save(page, (drafts[1], drafts[2], drafts[3]))
    return paths


@contextlib.contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Places beside ``paths``, in a folder that is made; they take their place together when the block ends well.

    Raises `InputError` where they cannot be written, or where one is a device.
    """
    for place in paths:
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise InputError(
                f"cannot write the report to {place}: it is no file; name one in a folder you may write to"
            )
    mark = f".{secrets.token_hex(4)}.part"
    drafts = [place.with_name(f".{place.name}{mark}") for place in paths]
    try:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        yield drafts
        for draft, place in zip(drafts, paths, strict=True):
            os.replace(draft, place)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise InputError(
            f"cannot write the report to {paths[0]}: {reason}; name a file in a folder you may write to"
        ) from problem
    finally:
        for draft in drafts:
            with contextlib.suppress(OSError):  # the renamed ones are gone
                draft.unlink()


def render(page: Page, images: list[str] | None = None) -> str:
    """The page as HTML; ``images`` are the names of the PNG files to link."""
    _check(page)
    return environment().get_template("page.html").render(_context(page, images or []))


def environment() -> Environment:
    """The templates, which escape, with the filters that print numbers."""
    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "percent": words.percent,
        "number": words.number,
        "money": words.money,
        "interval": words.interval,
        "redact": words.redact,
    }
    made.filters.update(filters)
    return made


def _context(page: Page, images: list[str]) -> dict[str, Any]:
    style, script = template("style.css"), template("page.js")
    most = measures.most_draws(page)
    embedded = embed(page.questions)
    lines = policy_lines(page)
    return {
        "page": page,
        "images": images,
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; style-src '{allowed(style)}'; script-src '{allowed(script)}'; "
        "base-uri 'none'; form-action 'none'",
        "data": Markup(embedded.json),
        "left_out": embedded.left_out,
        "cards": cards(page),
        "facts": facts(page),
        "lines": lines,
        "fixed": measures.fixed_draws(page),
        "accuracy": [charts.accuracy_chart(page, *size) for size in _SIZES] if measures.bounds(page) else [],
        "curve": page.curve if measures.usable(page.curve) else None,
        "draws": [
            (line, used, charts.draws_chart(used, line.index, most))
            for line in lines
            if (used := measures.spent(line.row, most)) is not None
        ],
        "reliability": [
            (line, trust, charts.reliability_chart(trust, line.index))
            for line in lines
            if (trust := measures.calibration(line.row)) is not None
        ],
        "no_gold": plots.NO_GOLD,
        "no_questions": plots.NO_QUESTIONS,
    }


def template(name: str) -> str:
    """A file among the templates, as it is."""
    return (_TEMPLATES / name).read_text("utf-8")


def allowed(text: str) -> str:
    """The source expression that allows exactly this inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _check(page: Page) -> None:
    for policy in page.policies:
        sizes = {len(policy.draws_used), len(policy.confidence), len(policy.right)}
        if len(sizes) != 1:
            raise InputError(
                f"policy {policy.name}: draws_used, confidence and right must have one value per question each, "
                f"got {len(policy.draws_used)}, {len(policy.confidence)} and {len(policy.right)}"
            )
    curve = page.curve
    if curve and len({len(curve.ks), len(curve.accuracy), len(curve.lo), len(curve.hi)}) != 1:
        raise InputError("the curve's ks, accuracy, lo and hi must have one length")
