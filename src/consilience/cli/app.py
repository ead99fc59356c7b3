"""The commands and their flags; each body is imported when it runs, so that ``--help`` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from consilience import __version__
from consilience.cli.diffusion import app as diffusion_app

app = typer.Typer(
    name="consilience",
    help="Ask a model several times, see where the draws agree, and stop when that is enough.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(help="Look at, export and import the draws that were made.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(diffusion_app, name="diffusion")


def _page(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter("expected the name of an .html file")
    return path


Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Ledger = Annotated[
    Optional[str],  # noqa: UP045 - typer reads it
    typer.Option("--ledger", help="Path or URL; default $CONSILIENCE_LEDGER, else .consilience/ledger.db."),
]
Kind = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--kind", help="Answer kind of all problems: auto, number, math, choice, text, json, open, code, sql."
    ),
]
Extract = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--extract", help="Regular expression that finds the answer (group 1, or the whole match)."),
]
Report = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--report", callback=_page, help="Write a page (.html) with plots beside it."),
]


def _once(values: list[str] | None) -> list[str] | None:
    if values and len(values) > 1:
        raise typer.BadParameter("give one policy; `replay` compares several")
    return values


def _version(show: bool) -> None:
    if show:
        print(f"consilience {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ask a model several times, see where the draws agree, and stop when that is enough."""


@app.command()
def solve(
    questions: Annotated[Path, typer.Argument(help="Questions: JSON lines, only `question` is required.")],
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--model", help="house, hf:PATH, record:FILE or openai:MODEL@URL; again for more arms."),
    ] = None,
    policy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--policy", callback=_once, help="stop:key=value,...[+vote:...] or @FILE; default asc."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Caps of the run: draws=,tokens=,usd=,seconds=.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the record (.jsonl or .jsonl.gz).")] = None,
    json: Json = False,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Default 0.7.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Nucleus mass; not sent unless given.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Tokens per draw; default 1024.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    template: Annotated[
        Path | None, typer.Option("--template", help="Prompt template with {question} and {ending}.")
    ] = None,
    kind: Kind = None,
    extract: Extract = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the run: another seed, other draws.")] = 0,
    ledger: Ledger = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Calls in flight; default 8.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Default consilience.toml, if there.")] = None,
    report: Report = None,
) -> None:
    """Answer questions with as many draws as each needs; a second run of the same command buys nothing twice."""
    from consilience.cli.solve import run

    settings = {
        "model": model,
        "policy": policy[0] if policy else None,
        "budget": budget,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "system": system,
        "template": template,
        "kind": kind,
        "extract": extract,
        "seed": seed,
        "ledger": ledger,
        "concurrency": concurrency,
        "config": config,
    }
    raise typer.Exit(run(questions, settings, out=out, report=report, as_json=json))


@app.command()
def replay(
    record: Annotated[Path, typer.Argument(help="A record: what `solve --out` wrote, or any file of its form.")],
    policy: Annotated[list[str], typer.Option("--policy", help="A policy; give the flag again for more.")],
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Random orders of the draws.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the orders.")] = 0,
    json: Json = False,
    kind: Kind = None,
    extract: Extract = None,
    arm: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--arm", help="A model of the record as an arm; again for the next, in their order."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="The model that a procedure (usc, fsc, ...) asks; draws stay the recorded ones."),
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Caps of that asking.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Tokens per reply of it.")] = None,
    ledger: Ledger = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Its calls in flight; default 8.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Default consilience.toml, if there.")] = None,
    report: Report = None,
) -> None:
    """Run policies over recorded draws in many random orders, without a further draw."""
    from consilience.cli.replay import run

    asking = {
        "model": model,
        "budget": budget,
        "max_tokens": max_tokens,
        "ledger": ledger,
        "concurrency": concurrency,
        "config": config,
    }
    code = run(
        record,
        policy,
        repeats=repeats,
        seed=seed,
        kind=kind,
        extract=extract,
        arms=arm,
        asking=asking,
        report=report,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command()
def tune(
    record: Annotated[Path, typer.Argument(help="A record with many draws per problem: what `solve --out` wrote.")],
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Points of accuracy that may be lost against the vote of all draws.")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the policy file (JSON), for --policy @FILE.")] = None,
    json: Json = False,
    cost: Annotated[str, typer.Option("--cost", help="What to save: draws, tokens or usd.")] = "draws",
    policy: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--policy", help="A policy to try too; give the flag again for more."),
    ] = None,
    families: Annotated[
        str | None, typer.Option("--families", help="Try these only, such as sc,asc,certified.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Random orders of the draws.")] = 50,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the halves and of the orders.")] = 0,
    kind: Kind = None,
    extract: Extract = None,
    report: Report = None,
) -> None:
    """Find the cheapest policy that is, on a record, as good as the vote of all its draws."""
    from consilience.cli.tune import run

    code = run(
        record,
        max_drop=max_drop,
        cost=cost,
        specs=policy or [],
        families=families,
        repeats=repeats,
        seed=seed,
        kind=kind,
        extract=extract,
        out=out,
        report=report,
        as_json=json,
    )
    raise typer.Exit(code)


@app.command()
def serve(
    upstream: Annotated[
        str, typer.Option("--upstream", help="house, the URL of an OpenAI-compatible server, or an endpoint's name.")
    ] = "house",
    policy: Annotated[
        str | None, typer.Option("--policy", help="The policy where a request names none; default asc.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    kind: Annotated[str, typer.Option("--kind", help="Answer kind where a request names none.")] = "auto",
    budget: Annotated[
        str | None, typer.Option("--budget", help="Caps of all requests together: draws=,tokens=,usd=.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Tokens per draw where a request sets no limit.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", min=1, help="Tokens of a prompt with images at most: needed under a cap."),
    ] = None,
    ledger: Ledger = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Calls upstream in flight.")] = 64,
    config: Annotated[Path | None, typer.Option("--config", help="Default consilience.toml, if there.")] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests answered at once; more get 429.")] = 256,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that requests have to finish after SIGTERM.")
    ] = 30.0,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes; they share budgets and ledger.")] = 1,
    budget_name: Annotated[
        str | None,
        typer.Option("--budget-name", help="Servers of one name on one ledger share their caps, also after restarts."),
    ] = None,
) -> None:
    """Serve OpenAI's API: each reply is what several draws of the upstream agree on."""
    from consilience.cli.serve import run

    settings = {
        "upstream": upstream,
        "policy": policy,
        "kind": kind,
        "budget": budget,
        "max_tokens": max_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "ledger": ledger,
        "concurrency": concurrency,
        "config": config,
        "queue": queue,
        "budget_name": budget_name,
    }
    run(settings, host=host, port=port, grace=grace, workers=workers)


@app.command()
def methods(json: Json = False) -> None:
    """List every registered method: id, family, paper, needs."""
    from consilience.cli.methods import run

    run(as_json=json)


@ledger_app.command("show")
def ledger_show(ledger: Ledger = None, json: Json = False) -> None:
    """Count what the ledger holds, per endpoint and model."""
    from consilience.cli.ledger import show

    show(ledger, as_json=json)


@ledger_app.command("export")
def ledger_export(
    path: Annotated[Path, typer.Argument(help="The file to write (.jsonl or .jsonl.gz).")], ledger: Ledger = None
) -> None:
    """Write all good draws as a record, one request a line."""
    from consilience.cli.ledger import export

    export(path, ledger)


@ledger_app.command("import")
def ledger_import(
    path: Annotated[Path, typer.Argument(help="A file that `ledger export` wrote.")], ledger: Ledger = None
) -> None:
    """Take in an export; draws already here stay as they are."""
    from consilience.cli.ledger import load

    load(path, ledger)
