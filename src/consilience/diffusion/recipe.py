"""Training an image model from settings alone: data, network, process and loss, in a folder that diffusers loads.

`follow` trains a model from nothing, `distil` makes a few-step student of one that there is.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.diffusion.consistency.setups import SETUPS, Setup
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.digits import HERE, network, transformer
from consilience.diffusion.few_steps import FewStepLoss, averages, scheduler_for, searched, setup_of, student_of
from consilience.diffusion.folders import filling
from consilience.diffusion.guidance import classifier_free
from consilience.diffusion.huggingface import as_scheduler, from_diffusers, trained_on
from consilience.diffusion.losses import (
    Times,
    denoising_loss,
    edm_weight,
    lognormal_times,
    min_snr_weight,
    uniform_times,
)
from consilience.diffusion.pictures import Images, grid, save
from consilience.diffusion.pipeline import ImagePipeline, load
from consilience.diffusion.processes import Process
from consilience.diffusion.sampling import check_memory, draw, noise_of
from consilience.diffusion.settings import DENOISING, Distillation, Recipe, claimed
from consilience.diffusion.training import Decay, Trained, assigned, cosine, train
from consilience.diffusion.training.ema import Profile
from consilience.diffusion.training.processes import Processes
from consilience.errors import InputError

DROP = 0.15
"""The share of samples whose class is not shown, so that the model can also be asked without a class."""


@dataclass(frozen=True, slots=True)
class Made:
    """A finished run: the pipeline around the averaged weights, steps done, and the last mean loss."""

    pipe: ImagePipeline
    steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class _Job:
    """What is trained: a network, its loss, what the trainer averages, and the scheduler of samples on the way.

    ``few`` is the setup of a few-step model, None for one that solvers sample; ``guidance`` what is in its weights.
    """

    net: Any
    loss: Callable[..., Any]
    averages: Sequence[Profile | float]
    scheduler: Any
    none: bool
    few: Setup | None = None
    guidance: float = 1.0


def follow(recipe: Recipe, data: Images, out: Path, progress: bool = True) -> Made:
    """Train on ``data`` in the folder ``out``, or go on where a run of the same recipe stopped.

    ``out`` is in the end what diffusers saves (network and scheduler); ``out/run`` has checkpoint, log and recipe,
    ``out/samples`` pictures of samples every ``recipe.sample_every`` steps. Raises InputError for a folder of another
    recipe or images that the network cannot take, KeyboardInterrupt once a run that was interrupted is saved.
    """
    classes = None if recipe.unconditional else data.classes
    _check_width(recipe, data, classes)
    torch.manual_seed(recipe.seed)
    net = _network(recipe, data, classes)
    stock = _stock(recipe, data)
    if recipe.objective == DENOISING:
        rates = [recipe.ema] if recipe.ema else []
        job = _Job(net, _loss(recipe, stock, classes), rates, as_scheduler(stock), True)
    else:
        job = _few(recipe, net, stock, None, data, classes, True)
    return _carry_out(recipe, job, data, classes, out, progress, dataclasses.asdict(recipe))


def distil(recipe: Distillation, data: Images, out: Path, progress: bool = True) -> Made:
    """Make the few-step student of the recipe in the folder ``out``, or go on where a run of the same recipe stopped.

    The student starts with the teacher's weights; ``out`` gets what `follow` leaves, with the levels of noise that
    suited the student best in its scheduler's configuration. Raises InputError for a teacher that cannot be loaded or
    is a few-step model itself, for data that do not fit it, and as `follow` does.
    """
    folder = HERE / "teacher" if recipe.teacher == "digits" else Path(recipe.teacher)
    pipe = load(folder)
    classes = _fitting(pipe, data, recipe, folder)
    facts = dataclasses.asdict(recipe) | {"weights": _mark(pipe.network)}
    torch.manual_seed(recipe.seed)
    net = copy.deepcopy(pipe.network)
    net.register_to_config(_name_or_path="")  # where the teacher lies is nobody's business
    taught = SETUPS[recipe.objective].teacher != "none"
    pipe.network.requires_grad_(False).to(Processes().device)
    model = from_diffusers(pipe.network, pipe.scheduler)
    if recipe.guidance != 1:
        model = classifier_free(model, recipe.guidance, {"class_labels": pipe.classes})
    job = _few(
        recipe, net, pipe.scheduler, model if taught else None, data, classes, bool(pipe.config["unconditional"])
    )
    return _carry_out(recipe, job, data, classes, out, progress, facts)


def _fitting(pipe: ImagePipeline, data: Images, recipe: Distillation, folder: Path) -> int | None:
    """How many classes the teacher has, None for none, where it and the data fit the recipe."""
    if pipe.scheduler.config.get("guidance") is not None:
        raise InputError(f"{folder}: samples in few steps already: name the model that it was made of")
    if tuple(data.x.shape[1:]) != pipe.shape(1)[1:]:
        raise InputError(f"{data.source}: images {tuple(data.x.shape[1:])}, the teacher makes {pipe.shape(1)[1:]}")
    if pipe.classes and (data.classes or 0) != pipe.classes:
        raise InputError(f"{data.source}: has {data.classes or 'no'} classes, the teacher {pipe.classes}")
    if recipe.guidance != 1 and not (pipe.classes and pipe.config["unconditional"]):
        raise InputError(f"guidance {recipe.guidance:g}: needs a teacher with classes, and one that stands for none")
    return pipe.classes or None


def _few(
    recipe: Recipe | Distillation,
    net: Any,
    stock: Any,
    teacher: Denoiser | None,
    data: Images,
    classes: int | None,
    none: bool,
) -> _Job:
    """The job of a few-step objective; with ``none`` the class after the last stands for none."""
    setup = setup_of(recipe.objective, isinstance(recipe, Distillation), recipe.phases)
    taught = teacher is not None
    loss = FewStepLoss(
        setup,
        stock,
        teacher,
        sigma_data=round(float(data.x.std()), 4),
        none=classes if none else None,
        drop=DROP,
        averaged=setup.average(recipe.steps, taught) is not None,
    )
    kept = averages(setup, recipe.steps, recipe.ema, taught)
    guidance = recipe.guidance if isinstance(recipe, Distillation) else 1.0
    student = student_of(net, setup, recipe.objective)
    return _Job(student, loss, kept, scheduler_for(stock, setup, guidance), none, setup, guidance)


def _carry_out(
    recipe: Recipe | Distillation,
    job: _Job,
    data: Images,
    classes: int | None,
    out: Path,
    progress: bool,
    facts: dict[str, Any],
) -> Made:
    """Train, draw samples on the way, and save what makes images."""
    part = recipe.batch // recipe.accumulate
    check_memory(
        f"batch {part}: so many images", 4 * part * data.x[0].numel(), "take fewer, or more parts (accumulate)"
    )
    with claimed(facts, out):
        trained = _trained(recipe, job, data, classes, out, progress)
    best = trained.averages[-1] if recipe.ema else trained.model
    pipe = ImagePipeline.of(best, job.scheduler, job.none)
    _check_images(pipe, job, trained.step)
    if job.few is not None and job.few.edges is None:
        pipe = _with_levels(pipe, job, data, progress)
    _save(pipe, out)
    return Made(pipe, trained.step, trained.log[-1]["loss"])


def _trained(
    recipe: Recipe | Distillation, job: _Job, data: Images, classes: int | None, out: Path, progress: bool
) -> Trained:
    """The job's network after the recipe's training in ``out``."""
    batch = {"x": data.x}
    if classes is not None:
        batch["class_labels"] = cast(Tensor, data.labels)
    elif "num_embeds_ada_norm" in job.net.config:  # a DiT always names a class
        batch["class_labels"] = torch.zeros(len(data.x), dtype=torch.long)
    return train(
        job.net,
        job.loss,
        batch,
        steps=recipe.steps,
        batch_size=recipe.batch,
        lr=cosine(recipe.lr, recipe.steps, recipe.steps // 40),
        ema=[Decay(one) if isinstance(one, float) else one for one in job.averages] or None,
        clip=1.0,
        accumulate=recipe.accumulate,
        precision=recipe.precision,  # type: ignore[arg-type]
        seed=recipe.seed,
        out=out / "run",
        sample_every=min(recipe.sample_every, recipe.steps),
        on_sample=_shows(job, recipe.seed, out / "samples") if data.x.shape[1] in (1, 3) else None,
        progress=progress,
    )


def _check_images(pipe: ImagePipeline, job: _Job, step: int) -> None:
    """Raise FloatingPointError where the finished model makes no finite images, before it takes another one's place."""
    labels = torch.zeros(4, dtype=torch.long) if pipe.classes else None
    made = draw(pipe, noise_of(pipe, 4, 0), _evaluations(job)[-1], labels=labels).x
    if not bool(torch.isfinite(made).all()):
        raise FloatingPointError(
            f"the images of the model after step {step} are not finite: its weights have grown too large. "
            "No model was written; begin again in another folder at a lower rate"
        )


def _save(pipe: ImagePipeline, out: Path) -> None:
    """Write the model's folder, by the first process alone."""
    processes = Processes()
    if processes.main:
        with filling(out) as folder:
            _saved(pipe).save_pretrained(folder)
    processes.wait()


def _with_levels(pipe: ImagePipeline, job: _Job, data: Images, progress: bool) -> ImagePipeline:
    """The pipeline whose scheduler has the levels that suit its model best."""
    assert job.few is not None
    if progress:
        print("looking for the best levels of noise for 2 to 4 evaluations", file=sys.stderr)
    levels = searched(pipe, data)
    return ImagePipeline.of(pipe.network, scheduler_for(pipe.scheduler, job.few, job.guidance, levels), job.none)


def _evaluations(job: _Job) -> tuple[int, ...]:
    """The numbers of evaluations that show how a model fares."""
    if job.few is None:
        return (16,)
    return (1, 2) if job.few.edges is None else (job.few.phases,)


def _shows(job: _Job, seed: int, folder: Path) -> Callable[[int, Any], None]:
    """Draws pictures of samples: by a solver, or of a few-step model after 1 and 2 evaluations, or all its phases."""
    counts = _evaluations(job)

    def show(step: int, model: Any) -> None:
        pipe = ImagePipeline.of(model, job.scheduler, job.none)
        columns = min(pipe.classes or 6, 12)
        labels = torch.arange(6 * columns) % columns if pipe.classes else None
        noise = noise_of(pipe, 6 * columns, seed)
        for evaluations in counts:
            drawn = draw(pipe, noise, evaluations, labels=labels)
            name = f"{step:06d}.png" if job.few is None else f"{step:06d}-{evaluations}.png"
            save(grid(drawn.x, columns), folder / name)

    return show


def _mark(network: Any) -> str:
    """Which weights these are."""
    digest = hashlib.sha256()
    for name, part in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def flow_times(count: int, process: Process, generator: torch.Generator | None) -> Tensor:
    """Logit-normal times (arXiv:2403.03206, section 3.1), half of them even, so that both ends are seen."""
    device = None if generator is None else generator.device
    z = torch.randn(count, generator=generator, dtype=torch.float64, device=device).sigmoid()
    u = torch.rand(2, count, generator=generator, dtype=torch.float64, device=device)
    return torch.where(u[0] < 0.5, z, u[1]).clamp(process.t_min, process.t_max)


def _loss(recipe: Recipe, stock: Any, classes: int | None) -> Callable[..., Tensor]:
    times: dict[str, Times] = {"flow": flow_times, "vp": uniform_times, "edm": lognormal_times()}
    plain = edm_weight(stock.config["sigma_data"]) if recipe.process == "edm" else None
    weight = min_snr_weight() if recipe.loss == "min-snr" else plain

    def loss(net: Any, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        shown = dict(batch)
        if classes is not None:
            kept = torch.rand(len(batch["x"]), generator=generator, device=generator.device) >= DROP
            shown["class_labels"] = torch.where(kept, batch["class_labels"], classes)
        model = from_diffusers(net, stock)
        noise = assigned(model.process) if recipe.immiscible else None
        return denoising_loss(model, shown, generator, times=times[recipe.process], weight=weight, noise=noise)

    return loss


def _check_width(recipe: Recipe, data: Images, classes: int | None) -> None:
    """Raise InputError where training holds more than this machine's memory in weights alone.

    These are the weights, their gradients, the optimizer's two sums and an average.
    """
    try:
        with torch.device("meta"):
            count = sum(part.numel() for part in _network(recipe, data, classes).parameters())
    except RuntimeError as error:  # more than can be counted
        raise InputError(f"width {recipe.width}: larger than any memory; take a smaller one") from error
    check_memory(f"width {recipe.width}: training {count:,} weights", 5 * count, "take a smaller one")


def _network(recipe: Recipe, data: Images, classes: int | None) -> Any:
    channels, height, width = data.x.shape[1:]
    try:
        if recipe.model == "dit":
            if height != width:
                raise ValueError(f"model dit takes square images, these are {width} x {height}")
            return transformer(height, channels, classes, recipe.width)
        return network(height if height == width else (height, width), channels, classes, recipe.width)
    except ValueError as error:
        raise InputError(f"{data.source}: {error}") from error


def _stock(recipe: Recipe, data: Images) -> Any:
    """The diffusers scheduler that says what the network is trained on."""
    import diffusers

    stock: Any = diffusers
    if recipe.process == "flow":
        return stock.FlowMatchEulerDiscreteScheduler()
    if recipe.process == "edm":
        return stock.EDMEulerScheduler(sigma_data=round(float(data.x.std()), 4))
    return stock.DDPMScheduler(prediction_type="v_prediction")


def _saved(pipe: ImagePipeline) -> Any:
    """A stock pipeline where one does what ours does: it names no class, and does not scale the network's input."""
    from diffusers import DDPMPipeline

    scales = trained_on(dict(pipe.scheduler.config), "").sigma_data is not None
    if pipe.classes or pipe.unet is None or scales:
        return pipe
    return cast(Any, DDPMPipeline)(pipe.unet, pipe.scheduler)
