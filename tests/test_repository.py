"""The repository keeps its own promises: register, results, light imports, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from consilience import policy
from consilience.methods import Method, register
from consilience.rules import Procedure, StopRule, VoteRule
from consilience.testing import laws

ROOT = Path(__file__).parents[1]
RESULTS = sorted(path for path in (ROOT / "docs" / "results").glob("*.md") if path.name != "index.md")
PROTOCOLS: dict[str, Any] = {"stop": StopRule, "vote": VoteRule, "procedure": Procedure}

# Written in pieces so that this file does not match itself.
FOLDERS = "|".join(("ho" + "me", "ro" + "ot", "Us" + "ers", "wo" + "rk"))
HOSTS = "|".join(("pypi" + r"\.org", "python" + "hosted", "pytorch" + r"\.org/whl", "file:" + "///"))
UNWANTED = re.compile(rf"(?<![\w.~*$}}-])/(?:{FOLDERS})/[\w.]|{HOSTS}")


def run_python(code: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML head of a page."""
    found = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{path.name} does not open with front matter between two lines of ---"
    return dict(yaml.safe_load(found[1]))


def test_result_pages_name_their_methods_and_command() -> None:
    for path in RESULTS:
        head = front_matter(path)
        assert isinstance(head.get("methods"), list), path.name
        assert set(head["methods"]) <= set(register()), path.name
        assert isinstance(head.get("command"), str), path.name
        assert head["command"].strip(), path.name


@pytest.mark.parametrize("method", register().values(), ids=lambda method: method.id)
def test_every_registered_method_is_what_its_role_says(method: Method) -> None:
    target = method.load()
    assert target.__doc__
    if method.role in PROTOCOLS:
        assert isinstance(target(), PROTOCOLS[method.role])


@pytest.mark.parametrize("name", [method.id for method in register().values() if method.role == "stop"])
def test_every_registered_stopping_rule_keeps_the_laws_and_replays_as_it_runs(name: str) -> None:
    rule = policy.parse(name)
    laws.check_rule(rule, trials=60)
    if not rule.needs:  # the source of the law has texts alone
        laws.check_live_equals_replay(rule, problems=12, concurrencies=(1, 8))


@pytest.mark.parametrize("method", register().values(), ids=lambda method: method.id)
def test_a_register_line_is_complete(method: Method) -> None:
    assert method.family
    assert method.summary.endswith(".")
    assert not method.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", method.arxiv)


def test_no_file_holds_a_path_of_one_machine_or_a_registry() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{number}: {line[:100]}" for number, line in enumerate(lines, 1) if UNWANTED.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("place", [f"see /{'ho' + 'me'}/ann/x", f'"/{"wo" + "rk"}/y"', f"pip from pypi{'.'}org"])
def test_the_pattern_finds_what_it_should(place: str) -> None:
    assert UNWANTED.search(place)


def test_import_is_light() -> None:
    loaded = run_python("import consilience, sys; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy", "matplotlib", "aiohttp", "pydantic"} & set(loaded)


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['consilience', '--help']\n"
        "from consilience.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('MODULES', *sys.modules)"
    )
    shown, _, loaded = run_python(code).partition("MODULES")
    assert "solve" in shown
    assert "replay" in shown
    assert not {"torch", "transformers", "matplotlib", "scipy", "sqlalchemy"} & set(loaded.split())


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_python_in_the_documents_parses(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        assert ast.parse(block).body


def test_readme_shows_the_two_commands_and_a_python_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    assert "consilience.solve(" in text


def test_the_project_states_its_version_once() -> None:
    import tomllib

    import consilience

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert consilience.__version__ == project["version"]


def test_every_dependency_is_pinned() -> None:
    import tomllib

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in ("test", "lint", "docs", "local", "postgres", "serve"):
        wanted += extras[extra]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", one)[0]).lower() for one in wanted}  # type: ignore[index]
    assert names <= pinned
