"""The guide's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from consilience.cli.app import app as commands
from consilience.testing import ScriptedServer

GUIDE = (Path(__file__).parents[2] / "docs" / "guide" / "serve.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, r"The answer is 391\.\n0\.\d+ \{'391': 5(\.0)?\} \d+\n"),
        (1, r"\{'draws': 5, 'votes': \{'0': \{'391': 5\}\}\}\nLet me think\. The answer is 391\."),
        (2, r"5 5\n5 0\n"),
    ],
)
def test_an_example_prints_what_it_says(serve, capsys, number, shown) -> None:
    with ScriptedServer(answers={"391": 1.0}) as upstream:
        url = serve(upstream, policy="esc:window=5,max=40").url
        assert "http://127.0.0.1:8000/v1" in EXAMPLES[number]
        exec(compile(EXAMPLES[number].replace("http://127.0.0.1:8000/v1", url), "guide", "exec"), {})
    assert re.search(shown, capsys.readouterr().out)


def test_there_is_no_example_beside_these() -> None:
    assert len(EXAMPLES) == 3


def test_the_flags_in_the_guide_are_the_commands_own() -> None:
    import typer

    group = typer.main.get_command(commands)
    flags = {flag for option in group.commands["serve"].params for flag in option.opts if flag != "--help"}
    told = set(re.findall(r"^\| (`--.*?) \|", GUIDE, re.MULTILINE))
    assert {flag for line in told for flag in re.findall(r"--[a-z-]+", line)} == flags
