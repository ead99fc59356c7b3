"""The guide's examples run as they stand, and its tables of flags are the commands' own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / "docs" / "guide" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("diffusion", "diffusion-cli", "diffusion-few-steps")
}
EXAMPLES, FEW_STEPS = (
    re.findall(r"^```python\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)
    for name in ("diffusion", "diffusion-few-steps")
)

NUMBER = r"\d\.\de-\d\d"
SHOWN = (
    r"8 fitted-ab\d tensor\(0\.(6[6-9]|7[0-4])\d*\)\n",
    r"tensor\(\[\[ 0\.5000, -0\.5000\],\n( +\[ 0\.5000, -0\.5000\],?\n){2} +\[ 0\.5000, -0\.5000\]\]\)\n",
    "\n".join(rf"{name} +12 {NUMBER}" for name in ("auto", "ddim", "dpmpp-2m", "unipc2")) + r"\n[\s\S]*\ngrid and coef",
    r"tensor\(\[1\.0000, 0\.7500, 0\.5000, 0\.2500, 0\.0000\], dtype=torch\.float64\)\n8\n11\n",
    r"torch\.Size\(\[3, 1, 8, 8\]\) \(8, 8\)\n",
)


@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_an_example_prints_what_it_says(capsys, number):
    exec(compile(EXAMPLES[number], "guide", "exec"), {})
    assert re.match(SHOWN[number], capsys.readouterr().out)


def test_there_is_no_example_beside_these():
    assert len(EXAMPLES) == len(SHOWN)
    assert len(FEW_STEPS) == 2


@pytest.mark.slow
def test_the_few_step_example_learns_the_circle(capsys):
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(FEW_STEPS[0], "guide", "exec"), names)
    radius = names["samples"].norm(dim=1)
    assert abs(float(radius.mean()) - 1) < 0.1
    assert float(radius.std()) < 0.3
    assert capsys.readouterr().out == "[]\n"


def test_the_editing_example_keeps_what_is_known(capsys):
    exec(compile(FEW_STEPS[1], "guide", "exec"), {})
    assert float(capsys.readouterr().out.removeprefix("tensor(").removesuffix(")\n")) < 1e-5


def test_the_pipeline_and_solve_draw_the_same_images():
    names: dict = {}
    exec(compile(EXAMPLES[-1], "guide", "exec"), names)
    from PIL import Image

    shown = ((names["x"] / 2 + 0.5).clamp(0, 1) * 255).round().byte()[:, 0]
    assert all(
        (shown[i].numpy() == image).all() for i, image in enumerate(names["images"]) if isinstance(image, Image.Image)
    )


@pytest.mark.parametrize("name", ["sample", "train", "distill", "measure"])
def test_the_flags_in_the_guide_are_the_commands_own(name):
    import typer

    from consilience.cli.diffusion import app

    group = typer.main.get_command(app)
    own = {flag for option in group.commands[name].params for flag in (*option.opts, *option.secondary_opts)}
    own = {flag for flag in own if flag.startswith("--")} - {"--help"}
    part = PAGES["diffusion-cli"].split(f"\n## {name}\n")[1].split("\n## ")[0]
    told = {
        flag for cell in re.findall(r"^\| (`--.*?) \|", part, re.MULTILINE) for flag in re.findall(r"--[a-z-]+", cell)
    }
    assert told == own


def test_the_example_file_holds_the_defaults():
    import tomllib
    from dataclasses import asdict

    from consilience.diffusion.settings import Recipe

    settings = tomllib.loads((ROOT / "examples" / "diffusion.toml").read_text(encoding="utf-8"))
    assert settings.pop("out") == "diffusion-run"
    assert settings == {name: value for name, value in asdict(Recipe()).items() if value is not None}
