"""`consilience diffusion`: the real commands on real folders, in this process; what they write, cost and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")
pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")

from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from consilience.diffusion import pictures, recipe, solve
from consilience.diffusion.digits import digits, network, shipped
from consilience.diffusion.pipeline import ImagePipeline, load
from consilience.diffusion.quality import classifier

torch.set_num_threads(1)

TINY = ("--width", "8", "--batch", "8", "--steps", "6")


@pytest.fixture
def command(monkeypatch, tmp_path, diffusion):
    """Runs `consilience diffusion ...` in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return diffusion


@pytest.fixture(scope="module")
def judge():
    return classifier(pictures.read("digits"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """A folder that a stock pipeline saved."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stock")
    DDPMPipeline(network(classes=None, width=8), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry per evaluation of a UNet: the images in it."""
    seen: list[int] = []
    forward = UNet2DModel.forward

    def counted(self, sample, *args, **kwargs):
        seen.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", counted)
    return seen


# ------------------------------------------------------------------------------------------------------------- sample


def test_sample_without_a_word_shows_digits_of_each_class(command, tmp_path, judge):
    code, out, err = command("sample")
    assert code == 0
    assert out == "64 images: samples.png\n"
    assert "the digits teacher" in err
    assert "nfe 16" in err
    picture = np.asarray(Image.open(tmp_path / "samples.png")).astype(float) / 127.5 - 1
    assert picture.shape == (7 * 68 + 4, 10 * 68 + 4)
    cells = [picture[4 + 68 * (i // 10) :, 4 + 68 * (i % 10) :][4:64:8, 4:64:8] for i in range(64)]
    seen = judge.probabilities(torch.tensor(np.stack(cells))).argmax(1)
    assert (seen == torch.arange(64) % 10).double().mean() > 0.9
    assert os.listdir(tmp_path) == ["samples.png"]


def test_a_folder_gets_tensors_and_the_trajectory_and_they_are_those_of_solve(command, tmp_path):
    code, out, _ = command(
        "sample", "--steps", 5, "--count", 12, "--label", "3,7", "--seed", 4, "--out", "found", "--json"
    )
    assert code == 0
    facts = json.loads(out)
    assert (facts["nfe"], facts["count"], facts["seed"]) == (5, 12, 4)
    assert json.loads((tmp_path / "found" / "samples.json").read_text()) == facts
    held, path = (load_file(tmp_path / "found" / f"{name}.safetensors") for name in ("samples", "trajectory"))
    assert held["labels"].tolist() == [3, 7] * 6
    noise = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(held["noise"], noise)
    with torch.no_grad():
        expected = solve(load(shipped(5)).denoiser(held["labels"]), noise, 5)
    torch.testing.assert_close(held["images"], expected.x, rtol=1e-4, atol=1e-4)
    assert path["states"].shape == (6, 8, 1, 8, 8)
    torch.testing.assert_close(path["states"][0], noise[:8])
    torch.testing.assert_close(path["states"][-1], held["images"][:8])
    torch.testing.assert_close(path["times"], expected.grid)
    assert Image.open(tmp_path / "found" / "trajectory.png").size == (6 * 68 + 4, 8 * 68 + 4)


@pytest.mark.parametrize(
    ("flags", "nfe"),
    [
        (("--steps", 1), 1),
        (("--steps", 3, "--method", "unipc2"), 3),
        (("--steps", 8, "--method", "flow-heun"), 7),  # two per step, the last one
        (("--steps", 9, "--guidance", 3), 8),  # two per step
        (("--steps", 6, "--guidance", 3, "--apg", "--label", 2), 6),
        (("--steps", 6, "--label", "none"), 6),
    ],
)
def test_steps_are_evaluations_of_the_network_and_no_more_are_made(command, calls, flags, nfe):
    code, out, err = command("sample", "--count", 3, "--json", *flags)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["nfe"] == nfe
    measured = 16 + 2 if "--apg" in flags else 0  # a plain run, to see how large the difference usually is
    assert len(calls) == nfe + measured


def test_an_order_that_the_steps_cannot_carry_is_said(command):
    code, _, err = command("sample", "--steps", 2, "--count", 2, "--method", "ab4")
    assert code == 0
    assert "warning: ab4: 2 steps cannot carry order 4, order 2 was used" in err


def test_guidance_makes_the_class_surer(command, judge, tmp_path):
    found = {}
    for scale in (1, 4):
        assert command("sample", "--steps", 16, "--count", 60, "--guidance", scale, "--out", f"scale{scale}")[0] == 0
        held = load_file(tmp_path / f"scale{scale}" / "samples.safetensors")
        found[scale] = judge.probabilities(held["images"]).gather(1, held["labels"][:, None]).mean()
    assert found[4] > found[1] > 0.9


def test_images_do_not_depend_on_how_many_go_through_together(command, tmp_path, monkeypatch):
    from consilience.diffusion import sampling

    assert command("sample", "--steps", 3, "--count", 20, "--out", "whole")[0] == 0
    monkeypatch.setattr(sampling, "BATCH", 9)
    assert command("sample", "--steps", 3, "--count", 20, "--out", "parts")[0] == 0
    whole, parts = (load_file(tmp_path / name / "samples.safetensors")["images"] for name in ("whole", "parts"))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_any_folder_of_a_stock_pipeline_is_sampled_as_it_would_itself(command, stock, tmp_path):
    code, _, err = command("sample", "--model", stock, "--steps", 4, "--count", 4, "--method", "ddim", "--out", "a")
    assert code == 0, err
    held = load_file(tmp_path / "a" / "samples.safetensors")
    assert "labels" not in held
    from consilience.diffusion.huggingface import as_scheduler

    pipe = DDPMPipeline.from_pretrained(stock)
    pipe = DDPMPipeline(pipe.unet, as_scheduler(pipe.scheduler, "ddim"))
    images = pipe(4, torch.Generator().manual_seed(0), 4, output_type="np").images
    shown = (held["images"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(images, shown, atol=1e-3)  # its noise is scaled to sigma(t_max), 2e-4 less than 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", 0), "steps 0: must be at least 1"),
        (("--method", "nonsense"), "no method 'nonsense'; there are: auto, euler, ddim"),
        (("--model", "nowhere"), "nowhere: no unet/config.json; expected a folder that diffusers saved"),
        (("--label", 10), "label 10: expected classes from 0 to 9"),
        (("--label", "cat"), "label cat: expected classes from 0 to 9"),
        (("--label", "none", "--guidance", 2), "guidance needs a model with classes"),
        (("--steps", 1, "--guidance", 2), "one step under guidance takes 2 evaluations, got 1"),
        (("--steps", 1, "--method", "flow-rk4"), "one step of this method takes"),
        (("--apg",), "--apg changes how --guidance acts"),
        (("--out", "picture.jpg"), "picture.jpg: expected the name of a .png file, or of a folder"),
        (("--steps", 10**8), f"steps {10**8}: must be at least 1 and at most 10000"),
        (("--steps", 10**30), f"steps {10**30}: must be at least 1 and at most 10000"),
        (("--guidance", "nan"), "guidance nan: must be a finite number"),
        (("--guidance", 1e38, "--steps", 4), "the digits teacher: 2 of 2 images are not finite; guidance 1e+38 may be"),
        (("--guidance", -1e308, "--steps", 4, "--apg", "--out", "folder"), "of 2 images are not finite; guidance"),
        (("--label", 10**30), f"label {10**30}: expected classes from 0 to 9"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing(command, tmp_path, flags, said):
    code, out, err = command("sample", "--count", 2, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_a_seed_that_no_generator_takes_is_refused(command, tmp_path):
    assert command("sample", "--count", 2, "--steps", 1, "--seed", 2**63 - 1)[0] == 0
    os.remove(tmp_path / "samples.png")
    for seed in (2**63, 10**30):
        code, _, err = command("sample", "--count", 2, "--steps", 1, "--seed", seed)
        assert code == 2
        assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_memory_that_runs_out_is_said(command, tmp_path, monkeypatch):
    from consilience.diffusion import sampling

    kinds = (
        MemoryError("no"),
        torch.OutOfMemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    )
    for error in kinds:

        def full(*_args, error=error, **_kwargs):
            raise error

        monkeypatch.setattr(sampling, "solve", full)
        code, out, err = command("sample", "--count", 2)
        assert (code, out) == (2, "")
        assert "there was no memory for this: make --batch, --width, --count" in err
    assert os.listdir(tmp_path) == []

    def other(*_args, **_kwargs):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(sampling, "solve", other)
    with pytest.raises(RuntimeError, match="a mistake"):
        command("sample", "--count", 2)


def test_a_count_that_no_memory_holds_is_refused_before_anything_is_made(command, tmp_path):
    for count in (10**12, 10**17):
        code, out, err = command("sample", "--count", count)
        assert (code, out) == (2, "")
        assert f"error: count {count}: so many images take " in err
        assert "draw fewer at a time" in err
        assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_evaluations_that_carry_no_step_of_heun_are_said(command):
    code, out, err = command("sample", "--steps", 2, "--count", 2, "--method", "flow-heun", "--json")
    assert (code, json.loads(out)["nfe"]) == (0, 1)
    assert "warning: flow-heun: no step here takes its 2 evaluations" in err


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_has_the_permissions_that_the_umask_leaves(command, tmp_path, quick, umask):
    before = os.umask(umask)
    try:
        assert command("sample", "--steps", 2, "--count", 4, "--out", "drawn")[0] == 0
        assert command("train", *TINY, "--out", "run")[0] == 0
        assert command("measure", "--steps", 1, "--methods", "auto", "--count", 8, "--out", "found")[0] == 0
    finally:
        os.umask(before)
    written = ("drawn", "run/unet", "run/scheduler", "found")
    for file in (file for place in written for file in (tmp_path / place).iterdir()):
        if file.name != "classifier.npz":  # written by consilience.record
            assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
    assert {(tmp_path / place).stat().st_mode & 0o777 for place in written} == {0o777 & ~umask}


def test_a_folder_that_is_no_image_model_is_named(command, stock, tmp_path):
    import shutil

    shutil.copytree(stock, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(stock, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "scheduler")
    shutil.copytree(stock, tmp_path / "odd")
    (tmp_path / "odd" / "scheduler" / "scheduler_config.json").write_text("{")
    shutil.copytree(stock, tmp_path / "latent")
    (tmp_path / "latent" / "vae").mkdir()
    tiny = UNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
    )
    tiny.save_pretrained(tmp_path / "text" / "unet")
    DDPMScheduler().save_pretrained(tmp_path / "text" / "scheduler")
    for name, said in (
        ("cut", "cut: not a model that can be loaded"),
        ("bare", "bare: no scheduler/scheduler_config.json"),
        ("odd", "odd: not a model that can be loaded"),
        ("latent", "latent: a latent model"),
        ("text", "unet/ holds a UNet2DConditionModel, expected a UNet2DModel"),
    ):
        code, _, err = command("sample", "--model", tmp_path / name, "--count", 1)
        assert code == 2, name
        assert said in err
        assert "Traceback" not in err


def test_without_the_extra_its_name_is_said(command, monkeypatch):
    from consilience.cli.diffusion import extra

    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "diffusers" else object())
    for name in ("sample", "train", "measure"):
        code, _, err = command(name)
        assert code == 2
        assert "needs diffusers: pip install 'consilience[diffusion]'" in err


def test_an_interrupt_while_the_folder_is_written_leaves_nothing(command, tmp_path, monkeypatch):
    def interrupted(*_):
        assert any(tmp_path.iterdir())  # the tensors are on disk by now
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "strip", interrupted)
    assert command("sample", "--steps", 1, "--count", 2, "--out", "found")[0] == 130
    assert os.listdir(tmp_path) == []


def test_few_evaluations_go_to_the_student_where_there_is_one(tmp_path, monkeypatch):
    from consilience.diffusion import digits as models

    monkeypatch.setattr(models, "HERE", tmp_path)
    assert models.shipped(4).name == "teacher"
    (tmp_path / "student").mkdir()
    assert [models.shipped(n).name for n in (1, 4, 5)] == ["student", "student", "teacher"]


def test_help_loads_no_torch():
    code = "import sys; sys.argv=['consilience', 'diffusion', 'sample', '--help']\n"
    code += "from consilience.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "sys.exit(','.join({'torch', 'diffusers', 'numpy', 'sklearn'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--guidance" in done.stdout


# -------------------------------------------------------------------------------------------------------------- train


def test_train_leaves_a_folder_that_sample_and_diffusers_load(command, tmp_path):
    code, out, err = command("train", *TINY, "--unconditional", "--out", "run")
    assert code == 0, err
    assert out == "model: run\n"
    assert "scikit-learn's digits: 1797 images of 1 x 8 x 8, no classes" in err
    assert "6 steps" in err
    assert (tmp_path / "run" / "samples" / "000006.png").exists()
    pipe = DDPMPipeline.from_pretrained(tmp_path / "run")
    images = pipe(3, torch.Generator().manual_seed(0), 5, output_type="np").images
    assert command("sample", "--model", "run", "--steps", 5, "--count", 3, "--out", "drawn")[0] == 0
    held = load_file(tmp_path / "drawn" / "samples.safetensors")["images"]
    np.testing.assert_allclose(images, (held / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--process", "flow", "--immiscible"),
        ("--process", "vp", "--loss", "min-snr"),
        ("--process", "edm", "--unconditional"),
        ("--model", "dit", "--accumulate", "2"),
        ("--model", "dit", "--process", "edm", "--loss", "min-snr", "--unconditional"),
    ],
)
def test_each_kind_of_model_is_trained_saved_and_sampled(command, tmp_path, flags):
    assert command("train", *TINY, *flags, "--out", "run")[0] == 0
    pipe = ImagePipeline.from_pretrained(tmp_path / "run")
    assert pipe.classes == (0 if "--unconditional" in flags else 10)
    code, _, err = command("sample", "--model", "run", "--steps", 4, "--count", 4, "--out", "drawn")
    assert code == 0, err
    images = load_file(tmp_path / "drawn" / "samples.safetensors")["images"]
    assert images.shape == (4, 1, 8, 8)
    assert bool(torch.isfinite(images).all())
    part = "transformer" if "dit" in flags else "unet"
    again = type(pipe.network).from_pretrained(tmp_path / "run", subfolder=part)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pipe.network.parameters(), strict=True))


def test_an_interrupted_run_goes_on_to_the_same_bits(command, tmp_path, monkeypatch):
    assert command("train", *TINY, "--out", "whole")[0] == 0
    loss, seen = recipe.denoising_loss, []

    def interrupting(*args, **kwargs):
        seen.append(1)
        if len(seen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args, **kwargs)

    monkeypatch.setattr(recipe, "denoising_loss", interrupting)
    code, _, err = command("train", *TINY, "--out", "parts")
    assert code == 130
    assert "stopped after step 5: saved in parts" in err
    assert not (tmp_path / "parts" / "unet").exists()
    monkeypatch.setattr(recipe, "denoising_loss", loss)
    assert command("train", *TINY, "--out", "parts")[0] == 0
    whole, parts = (load(tmp_path / name).network.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_that_goes_on_or_is_done_says_so(command):
    assert "done before" not in command("train", *TINY, "--out", "run")[2]
    code, _, err = command("train", *TINY, "--out", "run")
    assert code == 0
    assert "run/run: 6 steps done before, nothing left to do; ask for more steps to go on" in err
    code, _, err = command("train", *TINY, "--out", "run", "--steps", 9)
    assert code == 0
    assert "run/run: 6 steps done before, 3 to go" in err


def test_settings_come_from_a_file_and_flags_win(command, tmp_path):
    (tmp_path / "a.toml").write_text('width = 8\nbatch = 8\nsteps = 3\nprocess = "vp"\nout = "run"\nlr = 1\n')
    assert command("train", "a.toml", "--steps", 2, "--lr", 0.01)[0] == 0
    kept = json.loads((tmp_path / "run" / "run" / "recipe.json").read_text())
    assert (kept["steps"], kept["lr"], kept["process"], kept["width"], kept["seed"]) == (2, 0.01, "vp", 8, 0)
    (tmp_path / "b.json").write_text(json.dumps(kept | {"out": "again"}))
    assert command("train", "b.json")[0] == 0
    a, b = (load(tmp_path / name).network.state_dict() for name in ("run", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "no setting 'stepz'; there are: data, model"),
        ('steps = "3"', "steps = '3': expected a whole number"),
        ("immiscible = 1", "immiscible = 1: expected true or false"),
        ("steps = true", "steps = True: expected a whole number"),
        ('process = "ve"', "process 've': expected one of flow, vp, edm"),
        ("batch = 0", "batch 0: must be at least 1"),
        ("batch = 9\naccumulate = 2", "batch 9 cannot be cut"),
        ("lr = 0", "lr 0"),
        ("lr = nan", "lr nan"),
        ("lr = -1e38", "lr -1e+38"),
        ("ema = 1", "ema 1"),
        (f"seed = {10**30}", f"seed {10**30}"),
        (f"steps = -{10**30}", f"steps -{10**30}: must be at least 1"),
        (f"batch = {10**30}", f"batch {10**30}: must be at least 1 and at most 1e+15"),
        (f"batch = {10**12}", f"batch {10**12}: so many images take"),
        (f"width = {8 * 10**12}", f"width {8 * 10**12}: larger than any memory"),
        ("phases = 2", "objective denoising: is not trained in phases"),
        ('phases = "2"', "phases = '2': expected a whole number"),
        ("out = 3", "out = 3: expected text"),
        ("width = 12", "a width of 8 k"),
        ('data = "nowhere"', "nowhere: not found"),
        ("steps = ", "cannot be read"),
    ],
)
def test_a_bad_setting_is_named(command, tmp_path, text, said):
    (tmp_path / "a.toml").write_text(text)
    code, _, err = command("train", "a.toml")
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["a.toml"]


def test_a_folder_of_another_recipe_or_a_damaged_run_is_refused(command, tmp_path):
    assert command("train", *TINY, "--out", "run")[0] == 0
    before = (tmp_path / "run" / "model_index.json").read_bytes()
    code, _, err = command("train", *TINY, "--out", "run", "--process", "vp")
    assert code == 2
    assert "run: a run with process = flow, this one has vp" in err
    checkpoint = tmp_path / "run" / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    code, _, err = command("train", *TINY, "--out", "run")
    assert code == 2
    assert "not a whole checkpoint" in err
    assert (tmp_path / "run" / "model_index.json").read_bytes() == before


def test_training_learns(command, tmp_path):
    flags = ("--batch", "32", "--width", "8", "--steps", "150", "--lr", "0.003", "--ema", "0", "--out", "run")
    assert command("train", *flags)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]


# ------------------------------------------------------------------------------------------------------------ measure


@pytest.fixture
def quick(monkeypatch):
    from consilience.diffusion import quality

    monkeypatch.setattr(quality, "FINE", 32)
    monkeypatch.setattr(quality, "MAPPED", 16)


def test_measure_writes_table_and_plot_and_keeps_its_classifier(command, tmp_path, quick):
    flags = ("measure", "--steps", "8,1,3", "--methods", "auto,ddim", "--count", 40, "--out", "found", "--json")
    code, out, err = command(*flags)
    assert code == 0, err
    facts = json.loads(out)
    assert [(row["method"], row["evaluations"]) for row in facts["rows"]] == [
        *(("auto", n) for n in (1, 3, 8)),
        *(("ddim", n) for n in (1, 3, 8)),
    ]
    auto = facts["rows"][:3]
    assert auto[0]["map_median"] > auto[1]["map_median"] > auto[2]["map_median"] > 0
    assert auto[0]["frechet"] > auto[2]["frechet"] > 0
    assert all(0 <= row[name] <= 1 for row in facts["rows"] for name in ("precision", "recall", "switched"))
    assert json.loads((tmp_path / "found" / "quality.json").read_text()) == facts
    assert Image.open(tmp_path / "found" / "quality.png").size[0] > 500
    made = (tmp_path / "found" / "classifier.npz").stat().st_mtime_ns
    assert json.loads(command(*flags)[1]) == facts
    assert (tmp_path / "found" / "classifier.npz").stat().st_mtime_ns == made
    code, out, _ = command(*flags[:-1])
    assert code == 0
    assert "auto" in out
    assert "data" in out


def test_a_count_that_is_cut_or_small_is_said(command, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("consilience.cli.diffusion.measure.FEW", 20)
    x, labels = digits()
    np.savez(tmp_path / "some.npz", images=x.numpy()[:60], labels=labels.numpy()[:60])
    flags = ("measure", "--steps", 2, "--methods", "auto", "--reference", "some.npz", "--json", "--count")
    for count, used, cut, few in ((500, 30, True, False), (30, 30, False, False), (19, 19, False, True)):
        code, out, err = command(*flags, count)
        assert (code, json.loads(out)["count"]) == (0, used)
        assert ("warning: some.npz: half of the data are 30 images, so 30 are drawn, not 500" in err) == cut
        assert ("below about 20 the distances are mostly chance" in err) == few


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--methods", "nonsense"), "no method 'nonsense'"),
        (("--methods", ","), "methods: name one at least"),
        (("--steps", "4,x"), "steps 4,x: expected whole numbers"),
        (("--steps", "0,4"), "steps 0: must be at least 1 and at most 10000"),
        (("--steps", f"4,{10**12}"), f"steps {10**12}: must be at least 1 and at most 10000"),
        (("--reference", "nowhere"), "nowhere: not found"),
        (("--reference", "plain.npz"), "plain.npz: has no labels"),
        (("--reference", "large.npz"), "images (1, 4, 4), the model makes (1, 8, 8)"),
    ],
)
def test_what_cannot_be_measured_is_said(command, tmp_path, quick, flags, said):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "plain.npz", images=rng.random((20, 8, 8)))
    np.savez(tmp_path / "large.npz", images=rng.random((20, 4, 4)), labels=np.arange(20) % 2)
    code, _, err = command("measure", "--count", 8, "--steps", "2", *flags)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_the_shipped_folder_is_small_and_whole():
    folder = shipped(16)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 4 * 2**20
    images, labels = digits()
    assert load(folder).shape(1)[1:] == tuple(images.shape[1:])
    assert load(folder).classes == int(labels.max()) + 1
