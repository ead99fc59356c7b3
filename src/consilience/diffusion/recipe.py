"""Training an image model from settings alone: data, network, process and loss, in a folder that diffusers loads.

`follow` trains a model from nothing, `distil` makes a few-step student of one that there is.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.diffusion.consistency.setups import Setup
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
from consilience.diffusion.sampling import draw, noise_of
from consilience.diffusion.training import Decay, assigned, cosine, train
from consilience.diffusion.training.ema import Profile
from consilience.errors import InputError
from consilience.record import replacing

DENOISING = "denoising"
"""The objective of models that are sampled by solvers."""
DROP = 0.15
"""The share of samples whose class is not shown, so that the model can also be asked without a class."""

CHOICES = {
    "model": ("unet", "dit"),
    "process": ("flow", "vp", "edm"),
    "loss": ("plain", "min-snr"),
    "precision": ("float32", "bf16"),
}
MAY_CHANGE = ("steps", "lr", "precision", "sample_every")
"""Settings that may differ when a run is taken up again."""

_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings of a training run; ``unconditional`` leaves the labels of the data out.

    ``objective`` other than "denoising" is one of `SETUPS` that needs no teacher: a model for few steps. ``ema`` is the
    rate of the average of the weights that is kept; ``lr`` falls along a cosine after a rise of a fortieth of the
    steps. Raises InputError naming the setting that cannot be.
    """

    data: str = "digits"
    model: str = "unet"
    width: int = 32
    process: str = "flow"
    objective: str = DENOISING
    loss: str = "plain"
    immiscible: bool = False
    unconditional: bool = False
    steps: int = 4000
    batch: int = 64
    lr: float = 1e-3
    ema: float = 0.999
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    sample_every: int = 500

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if self.width < 1:
            raise InputError(f"width {self.width}: must be at least 1")
        _check_run(self)
        if self.objective != DENOISING:
            setup_of(self.objective, taught=False)
            if self.loss != "plain" or self.immiscible:
                raise InputError(f"objective {self.objective}: has a loss of its own: leave loss and immiscible out")

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Recipe:
        """One from a mapping; raises InputError for an unknown key or a value of the wrong type, naming both."""
        return cls(**_checked(cls, settings, where))


@dataclass(frozen=True, slots=True)
class Distillation:
    """All settings of making a few-step student of a teacher.

    ``teacher`` is a folder that diffusers saved, or "digits" for the model of the package; ``objective`` is one of
    `SETUPS`; ``guidance`` is the scale of classifier-free guidance that the teacher is asked at, which then is in the
    student's weights. ``ema`` is the rate of the average of the weights that is kept; ``lr`` falls along a cosine.
    Raises InputError naming the setting that cannot be.
    """

    teacher: str = "digits"
    objective: str = "ect"
    data: str = "digits"
    guidance: float = 1.0
    steps: int = 2000
    batch: int = 64
    lr: float = 3e-4
    ema: float = 0.995
    accumulate: int = 1
    precision: str = "float32"
    seed: int = 0
    sample_every: int = 500

    def __post_init__(self) -> None:
        if self.precision not in CHOICES["precision"]:
            raise InputError(f"precision {self.precision!r}: expected one of {', '.join(CHOICES['precision'])}")
        _check_run(self)
        setup = setup_of(self.objective, taught=True)
        if not math.isfinite(self.guidance):
            raise InputError(f"guidance {self.guidance}: must be a finite number")
        if self.guidance != 1 and setup.teacher == "none":
            raise InputError(
                f"objective {self.objective}: asks no teacher, so that none can be guided: leave guidance out"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Distillation:
        """One from a mapping; raises InputError for an unknown key or a value of the wrong type, naming both."""
        return cls(**_checked(cls, settings, where))


def _check_run(run: Recipe | Distillation) -> None:
    """What both kinds of run must have."""
    for name in ("steps", "batch", "accumulate", "sample_every"):
        if getattr(run, name) < 1:
            raise InputError(f"{name} {getattr(run, name)}: must be at least 1")
    if not 0 < run.lr < math.inf or not 0 <= run.ema < 1 or run.seed < 0:
        raise InputError(f"lr {run.lr}, ema {run.ema}, seed {run.seed}: need a finite lr > 0, 0 <= ema < 1, seed >= 0")
    if run.batch % run.accumulate:
        raise InputError(f"batch {run.batch} cannot be cut into accumulate = {run.accumulate} equal parts")


def _checked(kind: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings whose names and types are those of the fields of ``kind``."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in settings.items():
        if name not in defaults:
            raise InputError(f"{where}: no setting {name!r}; there are: {', '.join(defaults)}")
        wanted = type(defaults[name])
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise InputError(f"{where}: {name} = {value!r}: expected {_TYPES[wanted]}")
    return dict(settings)


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
    taught = setup_of(recipe.objective, taught=True).teacher != "none"
    pipe.network.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
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
    setup = setup_of(recipe.objective, taught=isinstance(recipe, Distillation))
    kept = averages(setup, recipe.steps, recipe.ema)
    loss = FewStepLoss(
        setup,
        stock,
        teacher,
        sigma_data=round(float(data.x.std()), 4),
        none=classes if none else None,
        drop=DROP,
        averaged=setup.average(recipe.steps) is not None,
    )
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
    """Train, draw samples on the way, and save."""
    _claim(facts, out / "run" / "recipe.json")
    batch = {"x": data.x}
    if classes is not None:
        batch["class_labels"] = cast(Tensor, data.labels)
    elif "num_embeds_ada_norm" in job.net.config:  # a DiT always names a class
        batch["class_labels"] = torch.zeros(len(data.x), dtype=torch.long)

    trained = train(
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
    best = trained.averages[-1] if recipe.ema else trained.model
    pipe = ImagePipeline.of(best, job.scheduler, job.none)
    if job.few is not None and job.few.edges is None:
        pipe = _with_levels(pipe, job, data, progress)
    with filling(out) as folder:
        _saved(pipe).save_pretrained(folder)
    return Made(pipe, trained.step, trained.log[-1]["loss"])


def _with_levels(pipe: ImagePipeline, job: _Job, data: Images, progress: bool) -> ImagePipeline:
    """The pipeline whose scheduler has the levels that suit its model best."""
    assert job.few is not None
    if progress:
        print("looking for the best levels of noise for 2 to 4 evaluations", file=sys.stderr)
    levels = searched(pipe, data)
    return ImagePipeline.of(pipe.network, scheduler_for(pipe.scheduler, job.few, job.guidance, levels), job.none)


def _shows(job: _Job, seed: int, folder: Path) -> Callable[[int, Any], None]:
    """Draws pictures of samples: by a solver, or of a few-step model after 1 and 2 evaluations, or all its phases."""
    counts = (16,) if job.few is None else (1, 2) if job.few.edges is None else (job.few.phases,)

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


def _claim(now: dict[str, Any], path: Path) -> None:
    """Write the recipe down, or hold it against the one that is there."""
    if path.exists():
        try:
            old = {"objective": DENOISING} | json.loads(path.read_text(encoding="utf-8"))
            if set(old) != set(now):
                raise InputError(f"{path.parent.parent}: a run of another command: choose another folder")
            changed = [name for name in now if name not in MAY_CHANGE and old[name] != now[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a recipe that can be read ({error}): choose another folder") from error
        if changed:
            name = changed[0]
            raise InputError(
                f"{path.parent.parent}: a run with {name} = {old[name]}, this one has {now[name]}: "
                "set it to that, or choose another folder"
            )
    with replacing(path) as file:
        file.write(json.dumps(now, indent=1).encode())
