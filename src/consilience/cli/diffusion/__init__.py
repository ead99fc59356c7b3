"""``consilience diffusion``: the commands and their flags; each body is imported when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

app = typer.Typer(help="Train, distil, sample and measure diffusion and flow models of images.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]
Model = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it
    typer.Option("--model", help="A folder that diffusers saved; default the digits models of the package."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the noise.")]
Config = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads it
    typer.Argument(help="Settings in TOML or JSON; flags win."),
]
Batch = Annotated[int | None, typer.Option("--batch", help="Images per step; default 64.")]
Ema = Annotated[float | None, typer.Option("--ema", help="Rate of the average that is kept; 0: none.")]
Accumulate = Annotated[int | None, typer.Option("--accumulate", help="Parts a batch is cut into.")]
Precision = Annotated[str | None, typer.Option("--precision", help="float32 or bf16.")]
Phases = Annotated[
    int | None,
    typer.Option("--phases", help="Parts that the way is cut into, for the objectives that have them, such as pcm."),
]
RunSeed = Annotated[int | None, typer.Option("--seed", help="Seed of everything.")]
SampleEvery = Annotated[
    int | None, typer.Option("--sample-every", help="Steps between pictures of samples; default 500.")
]


@app.command()
def sample(
    model: Model = None,
    steps: Annotated[int, typer.Option("--steps", help="Evaluations of the network per image.")] = 16,
    count: Annotated[int, typer.Option("--count", min=1, help="Images.")] = 64,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option("--out", help="A .png file, or a folder that gets tensors and trajectories too.")
    ] = Path("samples.png"),
    method: Annotated[str | None, typer.Option("--method", help="A solver; default what the folder says.")] = None,
    label: Annotated[
        str | None, typer.Option("--label", help="A class, several (0,3,7) or none; default each in turn.")
    ] = None,
    guidance: Annotated[
        float, typer.Option("--guidance", help="Scale of classifier-free guidance; 1 is none and half the price.")
    ] = 1.0,
    apg: Annotated[bool, typer.Option("--apg", help="Adaptive projected guidance, for high scales.")] = False,
    json: Json = False,
) -> None:
    """Draw images: a picture, or a folder with the picture, tensors and trajectories."""
    from consilience.cli.diffusion.sample import run

    run(
        model,
        steps=steps,
        count=count,
        seed=seed,
        out=out,
        method=method,
        label=label,
        guidance=guidance,
        apg=apg,
        as_json=json,
    )


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a command's arguments that were given; paths as text."""
    settings = {name: value for name, value in flags.items() if value is not None and name not in ("config", "json")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


@app.command()
def train(
    config: Config = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="digits, a folder of PNG or JPEG (sub-folders are classes), an .npz or .pt file."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of run and model; default diffusion-run.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="unet or dit.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Channels of the first level; default 32.")] = None,
    process: Annotated[str | None, typer.Option("--process", help="flow, vp or edm.")] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="denoising (the default), or one for few steps that needs no teacher: ect."),
    ] = None,
    phases: Phases = None,
    loss: Annotated[str | None, typer.Option("--loss", help="plain or min-snr.")] = None,
    immiscible: Annotated[
        bool | None, typer.Option("--immiscible/--no-immiscible", help="Give each image a nearby noise of its batch.")
    ] = None,
    unconditional: Annotated[
        bool | None, typer.Option("--unconditional/--conditional", help="Leave the labels of the data out.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps; default 4000.")] = None,
    batch: Batch = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate; default 0.001.")] = None,
    ema: Ema = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    seed: RunSeed = None,
    sample_every: SampleEvery = None,
    json: Json = False,
) -> None:
    """Train an image model; the same command again goes on where it stopped."""
    flags = _given(locals())
    from consilience.cli.diffusion.train import run

    run(config, flags, as_json=json)


@app.command()
def distill(
    config: Config = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="A folder that diffusers saved; default the digits model: digits.")
    ] = None,
    objective: Annotated[str | None, typer.Option("--objective", help="How it is taught; default ect.")] = None,
    phases: Phases = None,
    data: Annotated[
        str | None, typer.Option("--data", help="What the teacher was trained on, as train takes it; default digits.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of run and model; default diffusion-student.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Scale at which the teacher is asked; stays in the weights.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps; default 2000.")] = None,
    batch: Batch = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate; default 0.0003.")] = None,
    ema: Ema = None,
    accumulate: Accumulate = None,
    precision: Precision = None,
    seed: RunSeed = None,
    sample_every: SampleEvery = None,
    json: Json = False,
) -> None:
    """Make a model for one to four steps of one that needs many; the same command again goes on where it stopped."""
    flags = _given(locals())
    from consilience.cli.diffusion.distill import run

    run(config, flags, as_json=json)


@app.command()
def measure(
    model: Model = None,
    steps: Annotated[str, typer.Option("--steps", help="Numbers of evaluations.")] = "4,8,16,32",
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Solvers; by default several, or what a few-step student was made for."),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=4, help="Images per method, number of evaluations and seed.")
    ] = 512,
    reference: Annotated[
        str, typer.Option("--reference", help="The data: digits, a folder with sub-folders, an .npz or .pt file.")
    ] = "digits",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Noises to average over, from seed 0 on.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="The folder for plot, table and classifier.")] = Path(
        "diffusion-quality"
    ),
    json: Json = False,
) -> None:
    """Quality against evaluations: distance from data, and from the model's own exact map."""
    from consilience.cli.diffusion.measure import run

    run(
        model,
        steps=steps,
        methods=methods,
        count=count,
        reference=reference,
        seeds=seeds,
        out=out,
        as_json=json,
    )
