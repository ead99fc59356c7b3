"""Few-step models from settings: `distill` and `train --objective`, their networks, schedulers, folders, refusals."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra diffusion")
pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")

from diffusers import (
    DDPMPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file

from consilience.diffusion import EDM, GaussianMixture, RectifiedFlow, VPCosine, few_steps, recipe, solve
from consilience.diffusion.consistency import derivative, exact_map, samplers
from consilience.diffusion.consistency.setups import SETUPS
from consilience.diffusion.digits import digits, network, shipped, transformer
from consilience.diffusion.few_steps import forward_differentiable, map_of
from consilience.diffusion.huggingface import as_scheduler, grid_of
from consilience.diffusion.pipeline import ImagePipeline, load
from consilience.diffusion.sampling import draw, noise_of
from consilience.diffusion.solvers.jumps import Jumps
from consilience.diffusion.two_times import TwoTimeUNet2DModel, two_times_of

torch.set_num_threads(1)

TINY = ("--batch", "8", "--steps", "4", "--sample-every", "2")
FLOW = FlowMatchEulerDiscreteScheduler()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with two small teachers: ``classes``, a pipeline of ours, and ``plain``, a stock one."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    ImagePipeline.of(network(width=8), as_scheduler(FLOW)).save_pretrained(folder / "classes")
    DDPMPipeline(network(classes=None, width=8), as_scheduler(FLOW)).save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def command(monkeypatch, tmp_path, teachers, diffusion):
    """Runs `consilience diffusion ...` in a folder with the teachers: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teachers, tmp_path, dirs_exist_ok=True)
    search = few_steps.searched
    monkeypatch.setattr("consilience.diffusion.recipe.searched", lambda pipe, data: search(pipe, data, 16, 1))
    return diffusion


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def woken(net):
    """The network with an embedding of its second time that is not zero any more."""
    for name, part in net.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(part, std=0.3)
    return net


# ------------------------------------------------------------------------------------------------------- the solvers


@pytest.mark.parametrize("process", [RectifiedFlow(), EDM(), VPCosine()], ids=lambda process: type(process).__name__)
@pytest.mark.parametrize(("method", "gamma"), [("consistency", 1.0), ("tcd", 0.3), ("chain", 0.0)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_jumps_are_the_samplers_of_flow_maps(process, method, gamma, steps):
    gaussian = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.3, -0.2]], dtype=torch.float64),
        torch.tensor([[[0.5, 0.2], [0.2, 0.3]]], dtype=torch.float64),
        process,
    )
    flow_map = exact_map(gaussian)
    top = float(process.ratio(torch.tensor(process.t_max, dtype=torch.float64)))
    grid = Jumps(gamma).grid(steps, process, top)
    x = process.prior((64, 2), seeded(), dtype=torch.float64)
    wanted = samplers.tcd_sample(flow_map, x, grid, gamma, generator=seeded(1)).x
    told = few_steps.Denoiser(lambda x, t, s: flow_map.function(x, t, s), process, flow_map.prediction, two_times=True)
    found = solve(told, x, steps, method, generator=seeded(1))
    torch.testing.assert_close(found.x, wanted, rtol=1e-8, atol=1e-8)
    assert found.nfe == steps
    if gamma == 1:
        torch.testing.assert_close(samplers.multistep(flow_map, x, grid, generator=seeded(1)).x, wanted)


def test_a_chain_of_the_exact_map_is_exact_and_an_ode_method_asks_it_at_one_time():
    gaussian = GaussianMixture(
        torch.ones(1, dtype=torch.float64),
        torch.zeros(1, 2, dtype=torch.float64),
        0.4 * torch.eye(2, dtype=torch.float64)[None],
        VPCosine(),
    )
    flow_map, x = exact_map(gaussian), torch.randn(8, 2, generator=seeded(), dtype=torch.float64)
    seen = []

    def function(x, t, s):
        seen.append((float(t), float(s)))
        return flow_map.function(x, t, s)

    model = few_steps.Denoiser(function, VPCosine(), flow_map.prediction, two_times=True)
    whole = flow_map(x, VPCosine().t_max, float(VPCosine().time(torch.zeros(()))))
    torch.testing.assert_close(solve(model, x, 3, "chain").x, whole)
    assert all(t > s for t, s in seen)
    assert [t for t, _ in seen[1:]] == [s for _, s in seen[:-1]]
    seen.clear()
    torch.testing.assert_close(solve(model, x, 64, "auto").x, whole, rtol=1e-3, atol=1e-3)
    assert all(t == s for t, s in seen)


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="gamma must be between 0 and 1"):
        Jumps(1.5)


# ------------------------------------------------------------------------------------------------------- the network


def small(kind, **settings):
    """A plain network of diffusers, of this kind; a DiT's last layer is not zero, as it would start."""
    torch.manual_seed(0)
    if kind == "unet":
        return network(width=8, **settings)
    made = transformer(width=8, **settings)
    for part in made.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=0.2)
    return made


kinds = pytest.mark.parametrize("kind", ["unet", "dit"])


@kinds
def test_a_network_of_two_times_starts_as_the_plain_one_and_without_s_asks_for_the_data(kind):
    plain = small(kind)
    made = two_times_of(plain).eval()
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([900.0, 400.0, 3.0]), torch.tensor([1, 2, 10])
    both = torch.stack([t, torch.tensor([20.0, 5.0, 0.0])])
    with torch.no_grad():
        wanted = plain(x, t, class_labels=y).sample
        assert torch.equal(made(x, both, class_labels=y).sample, wanted)
        woken(made)
        told = made(x, both, class_labels=y).sample
        assert not torch.allclose(told, wanted, atol=1e-3)
        data = made(x, torch.stack([t, torch.zeros(3)]), class_labels=y).sample
        assert torch.equal(made(x, t, class_labels=y).sample, data)
        assert torch.equal(told[2], data[2])


@kinds
def test_it_is_saved_and_loaded_by_its_configuration_alone(tmp_path, kind):
    net = woken(two_times_of(small(kind)))
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    name = "TwoTimeUNet2DModel" if kind == "unet" else "TwoTimeDiTTransformer2DModel"
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == name


def test_a_time_embedding_that_is_not_sinusoidal_is_refused():
    with pytest.raises(ValueError, match="sinusoidal"):
        TwoTimeUNet2DModel(
            block_out_channels=(8, 8),
            norm_num_groups=8,
            time_embedding_type="fourier",
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        )


@kinds
@pytest.mark.parametrize("stock", [FLOW, EDMEulerScheduler()], ids=lambda stock: type(stock).__name__)
def test_the_map_of_a_network_is_the_identity_where_it_stands(stock, kind):
    net = woken(two_times_of(small(kind))).double().eval()
    flow_map = map_of(net, stock)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for t in (0.3, 0.9):
            torch.testing.assert_close(flow_map(x, t, t, class_labels=torch.arange(4)), x)


@kinds
def test_forward_mode_goes_through_its_attention(kind):
    """The exact derivative by forward mode against backward mode, contracted with one direction."""
    plain = two_times_of(small(kind)).eval()
    x, t, s = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([0.2, 0.1])
    labels = torch.tensor([3, 4])
    flow_map = map_of(woken(forward_differentiable(plain)), FLOW)
    along = (torch.randn(2, 1, 8, 8), torch.ones(2), -torch.ones(2))

    def function(*at):
        return flow_map.function(*at, class_labels=labels)

    value, slope = derivative(function, (x, t, s), along)
    at = [part.clone().requires_grad_() for part in (x, t, s)]
    direction = torch.randn(value.shape)
    back = torch.autograd.grad((function(*at) * direction).sum(), at)
    wanted = sum(float((one * other).sum()) for one, other in zip(back, along, strict=True))
    assert float((slope * direction).sum().detach()) == pytest.approx(wanted, rel=1e-3)


# ----------------------------------------------------------------------------------------- the scheduler and the folder


def test_our_scheduler_steps_a_dit_of_two_times_as_the_sampler_goes():
    """diffusers' way by hand: the scheduler's timesteps to the network, its outputs to the scheduler."""
    net = woken(two_times_of(small("dit"))).eval()
    scheduler = as_scheduler(FLOW, "chain")
    scheduler.register_to_config(two_times=True, levels={"3": [1.7, 0.4]}, guidance=1.0)
    x, labels = torch.randn(3, 1, 8, 8, generator=seeded()), torch.tensor([1, 2, 3])
    grid = torch.tensor([1.0, 1.7 / 2.7, 0.4 / 1.4, 0.0], dtype=torch.float64)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        wanted = samplers.phased(map_of(net, FLOW), x, grid, class_labels=labels).x
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t, class_labels=labels).sample, t, x).prev_sample
    torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("two_times", [False, True])
@pytest.mark.parametrize("method", ["consistency", "tcd", "chain"])
def test_our_scheduler_in_a_stock_pipeline_is_the_sampler_with_the_same_noise(two_times, method):
    torch.manual_seed(0)
    net = network(classes=None, width=8)
    net = (woken(TwoTimeUNet2DModel.of(net)) if two_times else net).eval()
    scheduler = as_scheduler(FLOW, method)
    scheduler.register_to_config(two_times=two_times, levels={"3": [1.7, 0.4]}, guidance=1.0)
    images = DDPMPipeline(net, scheduler)(3, seeded(5), 3, output_type="pt").images
    flow_map, generator = map_of(net, FLOW), seeded(5)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    grid = torch.tensor([1.0, 1.7 / 2.7, 0.4 / 1.4, 0.0], dtype=torch.float64)
    gamma = {"consistency": 1.0, "tcd": 0.3, "chain": 0.0}[method]
    with torch.no_grad():
        found = samplers.tcd_sample(flow_map, x, grid, gamma, generator=generator).x
    torch.testing.assert_close(images, (found / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_levels_are_taken_for_the_method_and_count_that_they_are_of():
    config = {"method": "consistency", "levels": {"2": [0.5]}}
    grid = grid_of(config, RectifiedFlow(), "consistency", 2)
    torch.testing.assert_close(grid, torch.tensor([1.0, 1 / 3, 0.0], dtype=torch.float64))
    assert grid_of(config, RectifiedFlow(), "consistency", 3) == 3
    assert grid_of(config, RectifiedFlow(), "auto", 2) == 2
    assert grid_of({"method": "auto"}, RectifiedFlow(), "auto", 2) == 2
    phased = {"method": "chain", "levels": {"2": [0.5]}}
    with pytest.warns(UserWarning, match="in 2 evaluations, not in 3"):
        assert grid_of(phased, RectifiedFlow(), "chain", 3) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(grid_of(phased, RectifiedFlow(), "chain", 2)) == 3
        assert grid_of(phased, RectifiedFlow(), "auto", 3) == 3
        assert grid_of(phased | {"two_times": True}, RectifiedFlow(), "chain", 3) == 3


def test_the_search_finds_the_factor_of_a_planted_score_for_each_number_of_evaluations(monkeypatch):
    images, labels = digits()
    pipe = ImagePipeline.of(network(width=8), as_scheduler(FLOW, "consistency"))
    wanted = {1: 0.4, 2: 2.0, 3: 1.0}
    planted = lambda self, levels: abs(np.log(levels[0] * (1 / len(levels)) / wanted[len(levels)]))  # noqa: E731
    monkeypatch.setattr(few_steps._Score, "__call__", planted)
    found = few_steps.searched(pipe, few_steps.Images(images[:64], labels[:64], "digits"), iterations=12)
    assert list(found) == ["2", "3", "4"]
    for levels in found.values():
        n = len(levels)
        usual = [(n + 1 - k) / k for k in range(1, n + 1)]
        np.testing.assert_allclose(levels, np.array(usual) * wanted[n], rtol=0.03)


def test_the_search_likes_levels_that_make_data(tmp_path):
    """The score of what was drawn is its energy distance from the data, of the same noise at every call."""
    images, labels = digits()
    torch.manual_seed(0)
    pipe = ImagePipeline.of(network(width=8), as_scheduler(FLOW, "consistency"))
    score = few_steps._Score(pipe, few_steps.Images(images[:32], labels[:32], "digits"), 32, None)
    grid = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    order = torch.randperm(32, generator=seeded())
    assert torch.equal(score.real, images[:32][order])
    made = solve(pipe.denoiser(labels[:32][order]), noise_of(pipe, 32, 1), grid, "consistency", generator=seeded(2)).x
    with torch.no_grad():
        assert score([1.0]) == pytest.approx(few_steps.metrics.energy_distance(made, score.real), rel=1e-5)
        assert score([1.0]) == score([1.0])


def test_distill_leaves_a_folder_that_sample_and_stock_diffusers_load(command, tmp_path):
    code, out, err = command("distill", "--teacher", "plain", *TINY, "--out", "student")
    assert code == 0, err
    assert out == "model: student\n"
    assert "levels of its own for 2, 3, 4 evaluations" in err
    shots = {f"{step:06d}-{n}.png" for step in (2, 4) for n in (1, 2)}
    assert set(os.listdir(tmp_path / "student" / "samples")) == shots
    assert str(tmp_path) not in (tmp_path / "student" / "unet" / "config.json").read_text()
    pipe = DDPMPipeline.from_pretrained(tmp_path / "student")
    assert type(pipe.unet) is UNet2DModel
    assert pipe.scheduler.config["method"] == "consistency"
    assert command("sample", "--model", "student", "--steps", 1, "--count", 3, "--out", "drawn")[0] == 0
    held = load_file(tmp_path / "drawn" / "samples.safetensors")
    images = pipe(3, seeded(), 1, output_type="pt").images
    torch.testing.assert_close(held["noise"], torch.randn(3, 1, 8, 8, generator=seeded()))
    torch.testing.assert_close(images, (held["images"] / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_one_step_of_an_untrained_student_is_one_jump_of_its_teacher(command, tmp_path):
    assert command("distill", "--teacher", "classes", *TINY, "--lr", 1e-12, "--ema", 0, "--out", "student")[0] == 0
    labels = torch.arange(6)
    teacher, student = load(tmp_path / "classes"), load(tmp_path / "student")
    noise = noise_of(teacher, 6, 0)
    jump = draw(teacher, noise, 1, "ddim", labels).x
    torch.testing.assert_close(draw(student, noise, 1, labels=labels).x, jump, atol=1e-4, rtol=1e-4)
    assert student.classes == teacher.classes == 10
    assert bool(torch.isfinite(draw(student, noise, 2).x).all())  # without a class


@pytest.mark.parametrize("objective", [pytest.param("lsd", marks=pytest.mark.slow), "tcd", "pcm"])
def test_maps_of_two_times_and_of_phases_are_kept_with_how_they_are_sampled(command, tmp_path, objective):
    flags = ("distill", "--teacher", "plain", "--objective", objective, *TINY, "--out", "student")
    code, _, err = command(*flags)
    assert code == 0, err
    setup = SETUPS[objective]
    pipe = DDPMPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipe.unet, TwoTimeUNet2DModel) == setup.two_times
    assert pipe.scheduler.config["method"] == few_steps.METHODS[setup.sampler]
    assert set(pipe.scheduler.config["levels"]) == ({"4"} if objective == "pcm" else {"2", "3", "4"})
    images = pipe(4, seeded(), 4, output_type="pt").images
    assert command("sample", "--model", "student", "--steps", 4, "--count", 4, "--out", "drawn")[0] == 0
    held = load_file(tmp_path / "drawn" / "samples.safetensors")["images"]
    if objective != "tcd":  # whose noise comes from another generator
        torch.testing.assert_close(images, (held / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
    shots = {f"{step:06d}-{n}.png" for step in (2, 4) for n in ((4,) if objective == "pcm" else (1, 2))}
    assert set(os.listdir(tmp_path / "student" / "samples")) == shots
    _, _, err = command("sample", "--model", "student", "--steps", 3, "--count", 4)
    assert ("warning: this model was trained in phases and is sampled in 4 evaluations, not in 3" in err) == (
        objective == "pcm"
    )
    if objective == "pcm":
        edges = setup.edges(RectifiedFlow(), 4)
        kept = torch.tensor(pipe.scheduler.config["levels"]["4"], dtype=torch.float64)
        torch.testing.assert_close(RectifiedFlow().time(kept), edges[1:-1])


LOADED = """
import sys
import consilience.diffusion.pipeline as ours
from diffusers import DDPMPipeline
stock, own = DDPMPipeline.from_pretrained(sys.argv[1]), ours.ImagePipeline.from_pretrained(sys.argv[2])
print(type(stock.unet).__name__, stock.scheduler.config["method"], own.classes, len(own(2, 2).images))
dit = ours.ImagePipeline.from_pretrained(sys.argv[3])
print(type(dit.transformer).__name__, dit.classes, len(dit(2, 2, class_labels=[3, 4]).images))
"""


def test_a_process_that_has_imported_the_pipeline_alone_loads_what_was_saved(tmp_path):
    scheduler = as_scheduler(FLOW, "chain")
    scheduler.register_to_config(two_times=True)
    two = TwoTimeUNet2DModel.of(network(classes=None, width=8))
    DDPMPipeline(two, scheduler).save_pretrained(tmp_path / "stock")
    ImagePipeline.of(network(width=8), as_scheduler(FLOW, "consistency")).save_pretrained(tmp_path / "own")
    ImagePipeline.of(two_times_of(transformer(width=8)), scheduler).save_pretrained(tmp_path / "dit")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, tmp_path / "stock", tmp_path / "own", tmp_path / "dit"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout == "TwoTimeUNet2DModel chain 10 2\nTwoTimeDiTTransformer2DModel 10 2\n", done.stderr


@pytest.mark.slow
def test_guidance_goes_into_the_weights_and_is_then_refused(command, tmp_path):
    code, _, err = command(
        "distill", "--teacher", "classes", "--objective", "cm", "--guidance", 3, *TINY, "--out", "student"
    )
    assert code == 0, err
    code, _, err = command("sample", "--model", "student", "--steps", 4, "--guidance", 2)
    assert code == 2
    assert "made at a guidance scale of 3" in err
    assert command("sample", "--model", "student", "--steps", 4, "--guidance", 2, "--apg")[0] == 2
    assert command("sample", "--model", "student", "--steps", 4)[0] == 0


def test_an_interrupted_distillation_goes_on_to_the_same_bits(command, tmp_path, monkeypatch):
    flags = ("distill", "--teacher", "classes", "--objective", "cm", "--batch", 8, "--steps", 6)
    assert command(*flags, "--out", "whole")[0] == 0
    loss, seen = few_steps.FewStepLoss.__call__, []

    def interrupting(self, net, batch, generator, context):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, net, batch, generator, context)

    monkeypatch.setattr(few_steps.FewStepLoss, "__call__", interrupting)
    code, _, err = command(*flags, "--out", "parts")
    assert code == 130
    assert "saved in parts" in err
    assert not (tmp_path / "parts" / "unet").exists()
    monkeypatch.setattr(few_steps.FewStepLoss, "__call__", loss)
    assert command(*flags, "--out", "parts")[0] == 0
    whole, parts = (load(tmp_path / name) for name in ("whole", "parts"))
    assert whole.scheduler.config["levels"] == parts.scheduler.config["levels"]
    state, other = whole.network.state_dict(), parts.network.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_training_that_diverges_is_said_and_goes_on_at_a_lower_rate(command):
    flags = ("distill", "--teacher", "plain", *TINY, "--out", "student")
    code, _, err = command(*flags, "--lr", 1e30)
    assert code == 2
    assert "the loss is nan" in err
    assert "nothing was saved before" in err
    assert "Traceback" not in err
    code, _, err = command(*flags)
    assert code == 0, err


def contents(folder):
    """Every file's bytes, but the log's, whose rows after the checkpoint are dropped when the run goes on."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "log.jsonl"}


def test_a_run_taken_up_at_a_rate_that_overflows_loses_nothing(command, tmp_path):
    flags = ("distill", "--teacher", "plain", *TINY, "--out", "student")
    assert command(*flags, "--lr", 1e38)[0] == 2  # at once: there is nothing to lose
    assert command(*flags)[0] == 0
    before = contents(tmp_path / "student")
    code, out, err = command(*flags, "--steps", 8, "--lr", 1e39)
    assert (code, out) == (2, "")
    assert "the optimizer's update at step 5 overflows" in err
    assert "at a rate of 5e+38; the checkpoint of step 4 is still good" in err
    assert "Traceback" not in err
    assert contents(tmp_path / "student") == before
    code, _, err = command(*flags, "--steps", 6)
    assert code == 0, err
    assert "4 steps done before, 2 to go" in err


def test_a_model_that_makes_no_numbers_takes_no_other_models_place(command, tmp_path):
    flags = ("distill", "--teacher", "plain", "--batch", 8, "--out", "student")
    assert command(*flags, "--steps", 1)[0] == 0
    before = contents(tmp_path / "student" / "unet")
    code, _, err = command(*flags, "--steps", 2, "--lr", 1e30)
    assert code == 2
    assert "the images of the model after step 2 are not finite" in err
    assert contents(tmp_path / "student" / "unet") == before


def test_fewer_steps_than_are_done_are_refused_and_change_nothing(command, tmp_path):
    flags = ("distill", "--teacher", "plain", *TINY, "--out", "student")
    assert command(*flags)[0] == 0
    before = contents(tmp_path / "student")
    code, out, err = command(*flags, "--steps", 3)
    assert (code, out) == (2, "")
    assert "student: 4 steps are done already, more than steps = 3: ask for 4 or more" in err
    assert contents(tmp_path / "student") == before
    assert json.loads((tmp_path / "student" / "run" / "recipe.json").read_text())["steps"] == 4
    assert command(*flags)[0] == 0


def test_the_phases_are_in_the_recipe_and_in_how_the_folder_is_sampled(command, tmp_path):
    flags = ("distill", "--teacher", "plain", "--objective", "pcm", *TINY, "--out", "student")
    code, _, err = command(*flags, "--phases", 3)
    assert code == 0, err
    assert "levels of its own for 3 evaluations" in err
    assert json.loads((tmp_path / "student" / "run" / "recipe.json").read_text())["phases"] == 3
    assert {path.name for path in (tmp_path / "student" / "samples").iterdir()} == {"000002-3.png", "000004-3.png"}
    pipe = load(tmp_path / "student")
    grid = grid_of(pipe.scheduler.config, RectifiedFlow(), "chain", 3)
    torch.testing.assert_close(grid, SETUPS["pcm"].edges(RectifiedFlow(), 3))
    assert "trained in phases" not in command("sample", "--model", "student", "--steps", 3, "--count", 2)[2]
    code, _, err = command(*flags)
    assert code == 2
    assert "student: a run with phases = 3, this one has 4" in err


def test_a_recipe_from_before_there_were_phases_has_its_objectives_own(command, tmp_path):
    flags = ("distill", "--teacher", "plain", "--objective", "pcm", *TINY, "--out", "student")
    assert command(*flags)[0] == 0
    place = tmp_path / "student" / "run" / "recipe.json"
    kept = json.loads(place.read_text())
    assert kept.pop("phases") == 4
    place.write_text(json.dumps(kept))
    assert command(*flags)[0] == 0
    place.write_text(json.dumps(kept))
    assert "a run with phases = 4, this one has 2" in command(*flags, "--phases", 2)[2]


COMMAND = "import sys; from consilience.cli import main; sys.argv[0] = 'consilience'; main()"


def test_the_teacher_sits_where_its_process_computes(monkeypatch, tmp_path, teachers):
    """Not on the first device of the machine, where every process's teacher would come to lie."""

    class Elsewhere:
        device = torch.device("meta")

    def asked(network, *_):
        raise InterruptedError(network.device)

    monkeypatch.setattr(recipe, "Processes", Elsewhere)
    monkeypatch.setattr(recipe, "from_diffusers", asked)
    images, labels = digits()
    settings = recipe.Distillation(teacher=str(teachers / "plain"))
    with pytest.raises(InterruptedError, match="meta"):
        recipe.distil(settings, few_steps.Images(images, labels, "digits"), tmp_path / "out")


@pytest.mark.slow
def test_two_processes_make_one_student_in_one_folder(command, two_processes, tmp_path):
    """gloo on loopback: what two parts of one process make, taken up by both; one of them writes."""
    flags = ["diffusion", "distill", "--teacher", "plain", "--objective", "cm", *TINY, "--out", "both"]
    for steps in ("4", "6"):
        two_processes(lambda _rank, steps=steps: ["-c", COMMAND, *flags, "--steps", steps], timeout=300)
        alone = ("distill", "--teacher", "plain", "--objective", "cm", *TINY, "--accumulate", 2, "--out", "one")
        assert command(*alone, "--steps", steps)[0] == 0
        state, other = (load(tmp_path / name).network.state_dict() for name in ("one", "both"))
        for name in state:
            torch.testing.assert_close(other[name], state[name], rtol=1e-3, atol=1e-5)
    assert sorted(os.listdir(tmp_path / "both")) == sorted(os.listdir(tmp_path / "one"))


def test_averages_are_named_alike_in_every_process():
    """The trainer holds them against those of a checkpoint; an address would refuse every run taken up again."""
    for name, setup in SETUPS.items():
        assert " at 0x" not in repr(setup.average(10)), name


@pytest.mark.slow
def test_train_takes_an_objective_without_a_teacher(command, tmp_path):
    flags = ("train", "--width", 8, "--objective", "ect", "--batch", 8, "--steps", 4)
    code, _, err = command(*flags, "--unconditional", "--out", "run")
    assert code == 0, err
    assert DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config["method"] == "consistency"
    code, _, err = command(*flags, "--process", "edm", "--objective", "lsd", "--out", "run2")
    assert code == 0, err
    assert command("sample", "--model", "run2", "--steps", 1, "--count", 4, "--out", "drawn")[0] == 0
    assert bool(torch.isfinite(load_file(tmp_path / "drawn" / "samples.safetensors")["images"]).all())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("distill", "--objective", "foo"), "no objective 'foo'; there are: cm, ict, ect"),
        (("distill", "--objective", "vct"), "objective vct: needs encoder"),
        (("train", "--objective", "foo"), "no objective 'foo'; there are: cm, ict, ect"),
        (("train", "--objective", "ayf"), "objective ayf: distils a teacher: use `consilience diffusion distill`"),
        (("train", "--objective", "ect", "--loss", "min-snr"), "leave loss and immiscible out"),
        (("distill", "--teacher", "nowhere"), "nowhere: no unet/config.json"),
        (("distill", "--teacher", "latent"), "latent: a latent model"),
        (("distill", "--teacher", "student"), "student: samples in few steps already"),
        (("distill", "--teacher", "plain", "--guidance", 2), "guidance 2: needs a teacher with classes"),
        (("distill", "--objective", "sct", "--guidance", 2), "objective sct: asks no teacher"),
        (("distill", "--teacher", "classes", "--data", "large.npz"), "images (1, 4, 4), the teacher makes (1, 8, 8)"),
        (("distill", "--teacher", "classes", "--data", "plain.npz"), "has no classes, the teacher 10"),
        (("distill", "--steps", 0), "steps 0: must be at least 1"),
        (("distill", "--lr", "inf"), "lr inf, ema 0.995, seed 0: need a finite lr > 0"),
        (("distill", "--precision", "half"), "precision 'half': expected one of"),
        (("distill", "--phases", 2), "objective ect: is not trained in phases: leave phases out, or take one of: pcm"),
        (("distill", "--objective", "tdd", "--phases", 2), "objective tdd: is not trained in phases"),
        (("train", "--phases", 2), "objective denoising: is not trained in phases"),
        (("distill", "--objective", "pcm", "--phases", 0), "phases 0: must be from 1 to 50"),
        (("train", "--objective", "pcm", "--phases", 51), "phases 51: must be from 1 to 50"),
        (("distill", "--lr", "nan"), "lr nan, "),
        (("distill", "--ema", "nan"), "ema nan, "),
        (("distill", "--seed", 10**30), f"seed {10**30}: need a finite lr"),
        (("distill", "--batch", 10**12), f"batch {10**12}: so many images take"),
        (("distill", "--batch", 10**30), f"batch {10**30}: must be at least 1 and at most 1e+15"),
        (("distill", "--steps", 10**400), "000: must be at least 1 and at most 1e+15"),
        (("train", "--width", 10**6 * 8), f"width {8 * 10**6}: training"),
        (("train", "--width", 10**12 * 8), f"width {8 * 10**12}: larger than any memory"),
    ],
)
def test_what_cannot_be_trained_is_said(command, tmp_path, flags, said):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "plain.npz", images=rng.random((20, 8, 8)))
    np.savez(tmp_path / "large.npz", images=rng.random((20, 4, 4)), labels=np.arange(20) % 10)
    shutil.copytree(tmp_path / "plain", tmp_path / "latent")
    (tmp_path / "latent" / "vae").mkdir()
    scheduler = as_scheduler(FLOW, "consistency")
    scheduler.register_to_config(guidance=1.0)
    ImagePipeline.of(network(width=8), scheduler).save_pretrained(tmp_path / "student")
    before = sorted(os.listdir(tmp_path))
    code, _, err = command(*flags, "--out", "run")
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_of_another_run_is_refused(command, tmp_path):
    assert command("distill", "--teacher", "classes", *TINY, "--out", "run")[0] == 0
    code, _, err = command("distill", "--teacher", "classes", *TINY, "--out", "run", "--objective", "cm")
    assert code == 2
    assert "run: a run with objective = ect, this one has cm" in err
    code, _, err = command("train", "--width", 8, *TINY, "--out", "run")
    assert code == 2
    assert "run: a run of another command" in err
    torch.manual_seed(5)
    ImagePipeline.of(network(width=8), as_scheduler(FLOW)).save_pretrained(tmp_path / "classes")
    code, _, err = command("distill", "--teacher", "classes", *TINY, "--out", "run")
    assert code == 2
    assert "run: a run with weights = " in err


@pytest.mark.slow
def test_a_dit_is_distilled_by_objectives_of_one_time_and_of_two(command, tmp_path):
    assert command("train", "--model", "dit", "--width", 8, *TINY, "--out", "dit")[0] == 0
    for objective, kind in (("ect", "DiTTransformer2DModel"), ("lsd", "TwoTimeDiTTransformer2DModel")):
        code, _, err = command("distill", "--teacher", "dit", "--objective", objective, *TINY, "--out", objective)
        assert code == 0, err
        assert type(load(tmp_path / objective).transformer).__name__ == kind
        assert command("sample", "--model", objective, "--steps", 2, "--count", 4, "--out", f"{objective}-2")[0] == 0


def test_a_student_that_is_a_dit_drops_no_labels_by_itself(tmp_path):
    """A DiT that was loaded from a folder would, in each of its blocks, at random."""
    torch.manual_seed(0)
    transformer(width=8).save_pretrained(tmp_path)
    net = DiTTransformer2DModel.from_pretrained(tmp_path)
    x, t, y = torch.randn(64, 1, 8, 8), torch.full((64,), 300.0), torch.arange(64) % 10
    for objective in ("ect", "lsd"):
        student = few_steps.student_of(copy.deepcopy(net), SETUPS[objective], objective)
        with torch.no_grad():
            shown, wanted = (student.train(mode)(x, t, class_labels=y).sample for mode in (True, False))
        assert torch.equal(shown, wanted)


def test_another_network_is_refused_by_its_name():
    with pytest.raises(few_steps.InputError, match=r"objective lsd: a Linear cannot be told two times here"):
        few_steps.student_of(torch.nn.Linear(2, 2), SETUPS["lsd"], "lsd")


def test_a_run_from_before_there_were_objectives_goes_on(command, tmp_path):
    assert command("train", "--width", 8, *TINY, "--out", "run")[0] == 0
    place = tmp_path / "run" / "run" / "recipe.json"
    kept = json.loads(place.read_text())
    del kept["objective"]
    place.write_text(json.dumps(kept))
    assert command("train", "--width", 8, *TINY, "--out", "run")[0] == 0


# ------------------------------------------------------------------------------------------------ the shipped student


def test_the_shipped_student_is_small_knows_its_classes_and_is_taken_for_few_steps(command, tmp_path):
    folder = shipped(2)
    assert folder.name == "student"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 4 * 2**20
    code, _, err = command("sample", "--steps", 1, "--count", 10, "--out", "drawn")
    assert code == 0, err
    assert "the digits student" in err
    assert "nfe 1" in err
    assert load(folder).classes == load(shipped(16)).classes


def test_measure_takes_a_student_as_it_was_made_for(command, tmp_path):
    assert command("distill", "--teacher", "classes", *TINY, "--out", "student")[0] == 0
    code, out, err = command("measure", "--model", "student", "--steps", 2, "--count", 16, "--json")
    assert code == 0, err
    assert [row["method"] for row in json.loads(out)["rows"]] == ["consistency"]
    assert "few-step student" in err
