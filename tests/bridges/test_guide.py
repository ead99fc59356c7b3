"""The guide's examples run as they stand, on an endpoint of the test's own."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from consilience.testing import ScriptedServer

from .conftest import needed

DOCS = Path(__file__).parents[2] / "docs"
GUIDE = (DOCS / "guide" / "bridges.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
URL = "http://127.0.0.1:8000/v1"
FORM = "[[ ## reasoning ## ]]\nI multiply.\n\n[[ ## answer ## ]]\n{answer}\n\n[[ ## completed ## ]]"
TOLD = r"0\.857\d* \{'391': 5(\.0)?\}"


@pytest.mark.parametrize(
    ("number", "package", "shown"),
    [
        (0, "langchain_openai", rf"Let me think\. The answer is 391\.\n{TOLD} 5\n"),
        (1, "litellm", rf"Let me think\. The answer is 391\.\n{TOLD}\n"),
        (2, "inspect_ai", rf"391 {TOLD} 5\n"),
        (3, "dspy", rf"391\n{TOLD} 5\n"),
    ],
)
def test_an_example_prints_what_it_says(
    serve: Any, capsys: Any, monkeypatch: Any, tmp_path: Path, number: int, package: str, shown: str
) -> None:
    needed(package)
    example = EXAMPLES[number]
    with ScriptedServer(answers={"391": 1.0}, **({"reply": FORM} if package == "dspy" else {})) as upstream:
        served = package in ("langchain_openai", "litellm")
        url = serve(upstream, "--policy", "one") if served else upstream.url
        monkeypatch.setenv("LOCAL_BASE_URL", url)
        monkeypatch.setenv("LOCAL_API_KEY", "x")
        monkeypatch.setenv("INSPECT_DISPLAY", "none")
        monkeypatch.chdir(tmp_path)
        assert (URL in example) == (package != "inspect_ai")
        exec(compile(example.replace(URL, url), "guide", "exec"), {})
        assert upstream.counts["draws"] == 5
    assert re.search(shown, capsys.readouterr().out)


def test_there_is_no_example_beside_these() -> None:
    assert len(EXAMPLES) == 4


def test_the_results_page_names_the_versions_that_run_here() -> None:
    needed("lm_eval")
    page = (DOCS / "results" / "clients.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE))
    assert set(told) == {"openai", "langchain-openai", "litellm", "lm_eval", "inspect_ai", "dspy"}
    assert told == {package: version(package) for package in told}
