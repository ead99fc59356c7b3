"""Solvers, guidance, training, pipelines and applications on another device, with generators of either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, VPLinear, guidance, metrics
from consilience.diffusion.ays import ays_grid
from consilience.diffusion.denoisers import Denoiser, precondition
from consilience.diffusion.grids import karras_grid
from consilience.diffusion.losses import cfg_aligned_loss, denoising_loss, lognormal_times, uniform_times
from consilience.diffusion.processes import PFGMPP
from consilience.diffusion.solve import METHODS, solve
from consilience.diffusion.solvers.likelihood import log_likelihood
from consilience.diffusion.solvers.sde import SDEDPM, Ancestral, Churn
from consilience.diffusion.teleport import teleport
from consilience.diffusion.time_shift import time_shifted
from consilience.diffusion.training.immiscible import assigned
from consilience.testing.few_steps import gaussian

from .elsewhere import THERE, elsewhere, numbers

torch.set_num_threads(1)
CPU = torch.device("cpu")
generators = pytest.mark.parametrize("drawn", ["cpu", "there"], ids=["generator-on-the-cpu", "generator-there"])
Case = Callable[[torch.device, torch.Generator], Any]


def assert_agrees(case: Case, drawn: str, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """What a case gives elsewhere is what it gives on the CPU."""
    here = numbers(case(CPU, torch.Generator().manual_seed(3)))
    with elsewhere() as there:
        found = numbers(case(there, torch.Generator(there if drawn == "there" else CPU).manual_seed(3)))
    torch.testing.assert_close(found, here, rtol=rtol, atol=atol)


def mixture(device: torch.device, process: Process | None = None) -> GaussianMixture:
    """A Gaussian whose tensors are on the device."""
    model = gaussian(process or EDM())
    return GaussianMixture(model.weights.to(device), model.means.to(device), model.covariances.to(device), process)


def start(process: Process, device: torch.device, generator: torch.Generator) -> Tensor:
    return process.prior((6, 2), generator, dtype=torch.float64, device=device)


class Raw(nn.Module):
    """F(x, c_noise) in two dimensions, float64, with an optional class."""

    def __init__(self, seed: int = 0, outputs: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, outputs))
        self.double()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        found: Tensor = self.layers(torch.cat([x, t.expand(len(x))[:, None]], 1))
        return found if label is None else found + label[:, None]


# ----------------------------------------------------------------------------------------------------------- solvers


@generators
@pytest.mark.parametrize("process", [RectifiedFlow(), EDM(), VPLinear()], ids=lambda p: type(p).__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method(process: Process, drawn: str) -> None:
    def case(device: torch.device, generator: torch.Generator) -> list[Tensor]:
        model = mixture(device, process)
        x = start(process, device, generator)
        sde: list[Any] = [] if isinstance(process, RectifiedFlow) else [Ancestral(), SDEDPM(2), Churn()]
        found = [solve(model, x, 3, method, generator=generator).x for method in ("auto", *METHODS, *sde)]
        assert all(part.device == device for part in found)
        return found

    assert_agrees(case, drawn)


@generators
def test_a_stock_schedulers_process(drawn: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    from consilience.diffusion.huggingface import as_scheduler, from_diffusers

    def case(device: torch.device, generator: torch.Generator) -> list[Tensor]:
        net = Raw().to(device)
        stock = diffusers.DDPMScheduler()
        model = from_diffusers(net, stock, call=lambda net, x, t: net(x, t.to(x) / 1000))
        x = model.process.prior((4, 2), generator, dtype=torch.float64, device=device)
        ours, state = as_scheduler(stock, "ddim"), x
        ours.set_timesteps(4, device=device)
        for t in ours.timesteps:
            state = ours.step(net(state, (t / 1000).to(state)), t, state, generator, return_dict=False)[0]
        return [solve(model, x, 4, generator=generator).x, state]

    assert_agrees(case, drawn)


def likelihoods(device: torch.device, generator: torch.Generator) -> Any:
    model = mixture(device)
    x = model.sample(3, generator)
    parts = [
        log_likelihood(model, x, rtol=1e-2, atol=1e-2),
        log_likelihood(model, x, probes=2, generator=generator, rtol=1e-2, atol=1e-2),
    ]
    return [(part.log_density, part.latent) for part in parts]


def mixtures(device: torch.device, generator: torch.Generator) -> Any:
    model = mixture(device)
    x = model.sample(5, generator)
    return x, model.log_density(x, 1.0), model.responsibilities(x, 1.0), model.ode_map(x, 1.0, 5.0, 1e-5, 1e-5)


def grids_and_times(device: torch.device, generator: torch.Generator) -> Any:
    model = mixture(device)
    data = model.sample(8, generator)
    x = start(model.process, device, generator)
    grid = karras_grid(3, 0.01, 80.0)
    moved = teleport(x, model.process, 80.0, 5.0, model.mean, model.covariance)
    return ays_grid(model, data, 3, 0.01, 80.0, generator, 6), solve(time_shifted(model, 0.2, 0.1), x, grid).x, moved


def noises(device: torch.device, generator: torch.Generator) -> Any:
    process = PFGMPP(dim=2, extra_dim=8)
    t = torch.full((4,), 2.0, dtype=torch.float64, device=device)
    return process.noise((4, 2), t, generator), assigned(EDM())(torch.ones(4, 2, device=device), t, generator)


def distances(device: torch.device, generator: torch.Generator) -> Any:
    x, y = (mixture(device).sample(12, generator) for _ in range(2))
    shares = torch.softmax(x, 1)
    return [
        metrics.energy_distance(x, y),
        metrics.mmd(x, y),
        metrics.frechet_distance(x, y),
        *metrics.precision_recall(x, y),
        metrics.confidence(shares),
        metrics.class_entropy(shares),
        metrics.sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(0)),
        metrics.map_error(x, y, lambda s: s.argmax(1)).median,
    ]


def losses(device: torch.device, generator: torch.Generator) -> Any:
    data = mixture(device).sample(8, generator)
    model = precondition(Raw().to(device), EDM())
    labelled = {"x": data, "label": torch.ones(8, dtype=torch.float64, device=device)}
    null = {"label": torch.zeros(8, dtype=torch.float64, device=device)}
    return (
        denoising_loss(model, data, generator, times=lognormal_times()),
        denoising_loss(model, data, generator, times=uniform_times, noise=assigned(EDM())),
        cfg_aligned_loss(model, labelled, generator, null=null),
    )


@generators
@pytest.mark.parametrize("case", [likelihoods, mixtures, grids_and_times, noises, distances, losses])
def test_what_surrounds_the_solvers(case: Case, drawn: str) -> None:
    assert_agrees(case, drawn)


# ---------------------------------------------------------------------------------------------------------- guidance


def guided(name: str, model: Denoiser, weak: Denoiser, device: torch.device, generator: torch.Generator) -> Denoiser:
    classifier = Raw(2).to(device)
    match name:
        case "apg":
            return guidance.apg(model, 2.0, weak, norm_limit=1.0)
        case "autoguidance":
            return guidance.autoguidance(model, weak, 2.0)
        case "classifier_free":
            return guidance.classifier_free(model, 2.0, weak)
        case "interval":
            return guidance.interval(guidance.classifier_free(model, 2.0, weak), model, 0.1, 5.0)
        case "density":
            return guidance.density_guidance(model, lambda x, t: -t.expand(len(x)))
        case "quantile":
            return guidance.quantile_guidance(model, 0.6)
        case "potential":
            return guidance.potential_guidance(model, lambda x0, t: -x0.square().sum(1), 0.1)
        case "classifier":
            return guidance.classifier_guidance(model, lambda x, t: classifier(x, t).log_softmax(1)[:, 0])
        case "minority":
            return guidance.minority_guidance(model, classifier, 1)
        case "rehearsal":
            clean = torch.zeros((), dtype=torch.float64, device=device)
            return guidance.rehearsal_guidance(model, lambda x: classifier(x, clean), [0, 1], 0.5)
    return guidance.self_minority(model, 0.3, 1.0, generator)


NAMES = ("apg", "autoguidance", "classifier_free", "interval", "density", "quantile", "potential", "classifier")


@generators
@pytest.mark.parametrize("name", [*NAMES, "minority", "rehearsal", "self_minority"])
def test_guided_solutions(name: str, drawn: str) -> None:
    def case(device: torch.device, generator: torch.Generator) -> Tensor:
        model, weak = mixture(device), precondition(Raw(1).to(device), EDM())
        x = start(model.process, device, generator)
        return solve(guided(name, model, weak, device, generator), x, 4, "ddim").x

    assert_agrees(case, drawn)


@generators
def test_guidance_that_draws_and_trains(drawn: str) -> None:
    def case(device: torch.device, generator: torch.Generator) -> Any:
        model, network = mixture(device), Raw(1).to(device)
        x = start(model.process, device, generator)
        grid = karras_grid(3, 0.1, 80.0)[:-1]
        data = model.sample(8, generator)
        moved = guidance.stochastic_density_guidance(
            model, x, grid, lambda y, t: torch.zeros(len(y), dtype=y.dtype, device=y.device), lambda t: 0.5, generator
        )
        scores = guidance.minority_score(model, data, 1.0, generator)
        bins = guidance.ordinal_bins(scores, 2)
        fitted = guidance.fit_minority_classifier(network, model, data, bins, steps=2, batch=4, generator=generator)
        labelled = Denoiser(lambda y, t, labels: 0.5 * y + labels[:, None], model.process)
        drawn_again = guidance.rehearsal(labelled, [1, 2], 2, (2,), 3, generator)
        return moved, scores, bins, fitted, *drawn_again, *guidance.score_alignment(model, x, grid)

    assert_agrees(case, drawn)


# ---------------------------------------------------------------------------------------------- training and pictures


@pytest.fixture
def plain_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that plays a GPU has no autocast; it is off in these runs anyway."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def unet(seed: int = 0) -> Any:
    from consilience.diffusion.digits import network

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return network(8, 1, 3, 8)


def scheduler() -> Any:
    from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler

    return EDMEulerScheduler()


def trained(device: torch.device, net: nn.Module, loss: Any, rows: Any) -> Any:
    """The log's last row and the averaged weights after two steps."""
    from consilience.diffusion.training import train

    done = train(
        net,
        loss,
        rows,
        steps=2,
        batch_size=4,
        lr=0.1,
        ema=0.9,
        optimizer=torch.optim.SGD,
        clip=1.0,
        progress=False,
        device=device,
    )
    assert next(done.model.parameters()).device == device
    row = {name: value for name, value in done.log[-1].items() if name != "steps_per_second"}
    return row, [part.detach() for part in done.best.parameters()]


@pytest.mark.usefixtures("plain_autocast")
@pytest.mark.parametrize("name", ["denoising", "ect", "lsd"])
def test_the_trainers_steps_are_those_of_the_cpu(name: str) -> None:
    pytest.importorskip("accelerate")
    from consilience.diffusion.consistency.maps import consistency_map
    from consilience.diffusion.consistency.setups import SETUPS

    def loss(net: nn.Module, batch: Tensor, generator: torch.Generator) -> Any:
        if name == "denoising":
            return denoising_loss(precondition(net, EDM()), batch, generator)
        return SETUPS[name].loss(consistency_map(net, EDM()), None, batch, generator, step=0, steps=2)

    data = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_agrees(lambda device, _: trained(device, Raw(), loss, data), "there")


@pytest.mark.slow
@pytest.mark.usefixtures("plain_autocast")
@pytest.mark.parametrize("objective", ["ect", "lsd", "pcm"])
def test_students_of_pictures_are_trained_as_on_the_cpu(objective: str) -> None:
    pytest.importorskip("diffusers")
    from consilience.diffusion.few_steps import FewStepLoss, setup_of, student_of
    from consilience.diffusion.huggingface import from_diffusers

    data = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    rows = {"x": data, "class_labels": torch.arange(8) % 3}
    setup = setup_of(objective, taught=True)

    def case(device: torch.device, _generator: torch.Generator) -> Any:
        net, stock = unet().double(), scheduler()
        teacher = from_diffusers(unet(2).double().requires_grad_(False).to(device), stock)
        loss = FewStepLoss(setup, stock, teacher, 0.5, 3, 0.2, setup.average(2) is not None)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            student = student_of(net, setup, objective).double()
        return trained(device, student, loss, rows)

    assert_agrees(case, "there", rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_pictures_are_drawn_and_levels_searched_for_elsewhere() -> None:
    pytest.importorskip("diffusers")
    from consilience.diffusion.few_steps import scheduler_for, searched, setup_of
    from consilience.diffusion.huggingface import as_scheduler
    from consilience.diffusion.pictures import Images
    from consilience.diffusion.pipeline import ImagePipeline
    from consilience.diffusion.sampling import Guidance, draw, noise_of, usual_difference

    data = Images(torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 3, "noise")

    def case(device: torch.device, _generator: torch.Generator) -> Any:
        pipe = ImagePipeline.of(unet(), as_scheduler(scheduler()))
        few = ImagePipeline.of(unet(), scheduler_for(scheduler(), setup_of("ect", taught=True), 1.0))
        for one in (pipe, few):
            one.network.to(device)
        noise = noise_of(pipe, 4, 0)
        found = [
            draw(pipe, noise, 4, labels=data.labels[:4], keep=2),
            draw(pipe, noise, 4, "heun", data.labels[:4], Guidance(2.0, True)),
            draw(few, noise, 2, labels=data.labels[:4]),
            draw(few, noise, 1),
        ]
        levels = searched(few, data, 4, 1)
        return [(one.x, one.states) for one in found], levels, usual_difference(pipe, data.labels[:2], 4)

    assert_agrees(case, "cpu", rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ applications


@pytest.fixture
def plain_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that plays a GPU has no fused optimizer."""
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, rate, fused: adam(parameters, rate))


@generators
@pytest.mark.usefixtures("plain_adam")
@pytest.mark.parametrize("name", ["consistency", "consistency-ct", "meanflow", "solved", "flow", "gaussian"])
def test_policies(name: str, drawn: str) -> None:
    from consilience.diffusion.applications.policies import actors, learning
    from consilience.diffusion.applications.policies.networks import ActionNetwork, Critics, perceptron

    def policy() -> Any:
        match name:
            case "consistency" | "consistency-ct":
                return actors.ConsistencyPolicy(ActionNetwork(3, 2, 8), 2, training="ct" if "ct" in name else "ect")
            case "meanflow":
                return actors.MeanFlowPolicy(ActionNetwork(3, 2, 8, two_times=True), 2)
            case "solved":
                return actors.SolvedPolicy(ActionNetwork(3, 2, 8), 2, EDM(), 3)
            case "flow":
                return actors.SolvedPolicy(ActionNetwork(3, 2, 8), 2, RectifiedFlow(), 2)
        return actors.GaussianPolicy(perceptron(3, 4, 8), 2)

    def case(device: torch.device, generator: torch.Generator) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            law, critics = policy().to(device), Critics(3, 2, 8).to(device)
        own = torch.Generator().manual_seed(1)
        parts = [torch.rand(12, *shape, generator=own).to(device) for shape in ((3,), (2,), (), (3,), ())]
        learner = learning.Learner(law, critics, learning.Settings(batch=6), generator)
        logs = [learner.update(learning.Transitions(*parts), done) for done in (0.0, 0.5)]
        return logs, law.sample(parts[0], generator), [part.detach() for part in learner.average.parameters()]

    assert_agrees(case, drawn, rtol=1e-4, atol=1e-5)


@generators
def test_speech(drawn: str) -> None:
    from consilience.diffusion.applications.speech import training
    from consilience.diffusion.applications.speech.model import Voice, speech_denoiser
    from consilience.diffusion.applications.speech.tones import MEL
    from consilience.diffusion.training import Context

    score = torch.tensor([[48, 60], [0, 1], [0, 0], [0, 0]]).repeat_interleave(3, 1)[None].repeat(2, 1, 1)

    def case(device: torch.device, generator: torch.Generator) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            voice = Voice(16).to(device)
        x = torch.rand(2, MEL.bands, 6, generator=torch.Generator().manual_seed(1)).to(device)
        batch = {"x": x, "score": score.to(device)}
        mean = voice.encoder(batch["score"]).detach()
        student = training.student_loss(speech_denoiser(voice.decoder), 4)
        taught = student(voice.decoder, {"x": x, "mean": mean}, generator, Context(0, 2, None))
        noise = torch.ones_like(mean)
        spoken = training.spoken(voice.decoder, mean, noise, 2, generator)
        heard = training.taught(voice.decoder, mean, noise, 2)
        regression = training.regression_loss(voice, batch, generator)
        return training.teacher_loss(voice, batch, generator), taught, spoken, heard, regression

    assert_agrees(case, drawn, rtol=1e-4, atol=1e-5)


@generators
def test_boxes(drawn: str) -> None:
    from consilience.diffusion.applications.boxes import model, sampling, training
    from consilience.diffusion.applications.boxes.scenes import scenes

    made = scenes(2, np.random.default_rng(0))

    def case(device: torch.device, generator: torch.Generator) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            detector = model.Detector(8, 16, 1, 2).to(device)
        batch = {name: getattr(made, name).to(device) for name in ("boxes", "labels", "counts")}
        batch["x"] = made.images.to(device)
        losses = [make(detector, batch, generator) for make in (training.consistency_loss, training.diffusion_loss)]
        kinds = (model.CONSISTENCY, model.DIFFUSION)
        found = [sampling.detect(detector, batch["x"], kind, 2, generator) for kind in kinds]
        return losses, [[(one.boxes, one.scores) for one in scenes] for scenes in found]

    assert_agrees(case, drawn, rtol=1e-3, atol=1e-4)


def test_episodes_are_played_by_a_policy_elsewhere() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    from consilience.diffusion.applications.policies import actors, control
    from consilience.diffusion.applications.policies.networks import perceptron

    def case(device: torch.device, generator: torch.Generator) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            law = actors.GaussianPolicy(perceptron(3, 2, 8), 1).to(device)
        envs = [control.Chunks(gymnasium.make("Pendulum-v1", max_episode_steps=4), 1) for _ in range(2)]
        return control.returns(envs, law, (1, 2), generator).tolist()

    assert_agrees(case, "there", rtol=1e-4)


def test_the_device_is_the_one_that_plays_a_gpu() -> None:
    with elsewhere() as there:
        assert torch.zeros(2, device=there).device == THERE
