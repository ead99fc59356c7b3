"""A hook of mkdocs: the method pages from the register, and the list of results.

Nothing is written into ``docs/``: the pages exist in the build alone. A method's parameters come from the signature of
its target, its text from the docstring, its results from the pages under ``results/`` whose front matter names it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from consilience.methods import Method, register

sys.dont_write_bytecode = True

FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)", re.DOTALL)
REFERENCE = re.compile(r"`{1,2}([^`]+)`{1,2}")


@dataclass(frozen=True)
class Result:
    """One page under ``results/``: what it is called, the methods it concerns, the command that made its numbers."""

    name: str
    title: str
    methods: tuple[str, ...]
    command: str


def read_result(path: Path) -> Result:
    """The result page at ``path``; raises PluginError where its front matter is not as it has to be."""
    found = FRONT_MATTER.match(path.read_text(encoding="utf-8"))
    head = yaml.safe_load(found[1]) if found else None
    if not isinstance(head, dict) or not isinstance(head.get("methods"), list) or not head.get("command"):
        raise PluginError(f"{path}: must open with front matter holding `methods: [...]` and `command: ...`")
    if unknown := [name for name in head["methods"] if name not in register()]:
        raise PluginError(f"{path}: method {unknown[0]!r} is not in the register")
    heading = re.search(r"^# (.+)$", found[2], re.MULTILINE) if found else None
    title = heading[1] if heading else path.stem
    return Result(path.name, title, tuple(head["methods"]), str(head["command"]).strip())


def results(folder: Path) -> list[Result]:
    """All result pages, by name."""
    return [read_result(path) for path in sorted(folder.glob("*.md")) if path.name != "index.md"]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put every method and every result into the navigation."""
    found = results(Path(config.docs_dir) / "results")
    families: dict[str, list[Any]] = defaultdict(list)
    for method in register().values():
        families[method.family].append({method.id: f"methods/{method.id}.md"})
    pages = {
        "Methods": [{"All methods": "methods/index.md"}, *({name: pages} for name, pages in families.items())],
        "Results": [{"All results": "results/index.md"}, *({one.title: f"results/{one.name}"} for one in found)],
    }
    config.nav = [{name: pages.get(name, item[name]) for name in item} for item in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    found = results(Path(config.docs_dir) / "results")
    pages = {f"methods/{method.id}.md": method_page(method, found) for method in register().values()}
    pages |= {"methods/index.md": methods_index(), "results/index.md": results_index(found)}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def methods_index() -> str:
    """The register as a table."""
    lines = [
        "# Methods",
        "",
        "Every registered method. `consilience methods` prints the same list.",
        "",
        "| id | role | what it does | source |",
        "|---|---|---|---|",
    ]
    for method in register().values():
        lines.append(f"| [`{method.id}`]({method.id}.md) | {method.role} | {method.summary} | {_source(method)} |")
    return "\n".join(lines) + "\n"


def method_page(method: Method, found: list[Result]) -> str:
    """One method: what it is, where it comes from, its parameters, how to call it, its results."""
    target = method.load()
    parameters = list(inspect.signature(target).parameters.values())
    lines = [f"# `{method.id}`", "", method.summary, "", f"- Role: {method.role}", f"- Family: {method.family}"]
    lines += [f"- Paper: {_source(method)}"] if method.paper else []
    lines += [f"- Needs: {', '.join(method.needs)}"] if method.needs else []
    lines += [f"- In the code: `{method.target}`", "", inspect.cleandoc(target.__doc__ or ""), "", "## Parameters", ""]
    if parameters:
        lines += ["| name | type | default |", "|---|---|---|"]
        lines += [f"| `{p.name}` | {_kind(p)} | {_default(p)} |" for p in parameters]
    else:
        lines.append("None.")
    lines += ["", "## Use", "", *_use(method, parameters), "", "## Results", ""]
    concerned = [one for one in found if method.id in one.methods]
    lines += [f"- [{one.title}](../results/{one.name})" for one in concerned] or ["None recorded yet."]
    return REFERENCE.sub(r"`\1`", "\n".join(lines)) + "\n"


def results_index(found: list[Result]) -> str:
    """The list of results with their commands."""
    lines = ["# Results", "", "Every page names the command that made its numbers.", ""]
    if not found:
        return "\n".join([*lines, "None recorded yet."]) + "\n"
    for one in found:
        named = ", ".join(f"[`{name}`](../methods/{name}.md)" for name in one.methods)
        lines += [f"## [{one.title}]({one.name})", "", f"Methods: {named}" if named else "", "", "```sh", one.command]
        lines += ["```", ""]
    return "\n".join(lines)


def _source(method: Method) -> str:
    if not method.paper:
        return ""
    link = f" ([arXiv:{method.arxiv}](https://arxiv.org/abs/{method.arxiv}))" if method.arxiv else ""
    return method.paper + link


def _kind(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    if kind is inspect.Parameter.empty:
        return ""
    return f"`{kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}`"


def _default(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is inspect.Parameter.empty else f"`{parameter.default}`"


def _use(method: Method, parameters: list[inspect.Parameter]) -> list[str]:
    given = ",".join(f"{p.name}={_written(p.default)}" for p in parameters if p.default is not inspect.Parameter.empty)
    spec = f"{method.id}:{given}" if given else method.id
    if method.role in ("vote", "procedure"):
        spec = f"sc+{spec}"
    if method.role not in ("stop", "vote", "procedure"):
        module, _, name = method.target.partition(":")
        return ["```python", f"from {module} import {name}", "```"]
    models, asked = _models(method)
    return [
        "```sh",
        f"consilience solve questions.jsonl --policy '{spec}'{models} --out record.jsonl",
        f"consilience replay record.jsonl --policy '{spec}'{asked}",
        "```",
        "",
        "```python",
        "import consilience",
        "",
        "run = consilience.solve(" + ", ".join(['"questions.jsonl"', f"policy='{spec}'", *_settings(models)]) + ")",
        "```",
    ]


def _models(method: Method) -> tuple[str, str]:
    """The flags that name models: as many as a stopping rule draws from, and one that a procedure asks."""
    built = method.load()()
    if method.role == "procedure" and built.asks:
        return " --model openai:MODEL@URL", " --model openai:MODEL@URL"
    if getattr(built, "arms", 1) > 1 and getattr(built, "settings", None) is None:
        return "".join(f" --model openai:MODEL{n}@URL" for n in range(1, built.arms + 1)), ""
    return "", ""


def _settings(models: str) -> list[str]:
    names = [f'"{name}"' for name in models.split(" --model ")[1:]]
    several = f"[{', '.join(names)}]" if len(names) > 1 else "".join(names)
    return [f"model={several}"] if names else []


def _written(value: Any) -> str:
    """A default as the policy grammar has it."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{text}"' if re.search(r"[,+@]", text) else text
