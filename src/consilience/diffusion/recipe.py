"""Training an image model from settings alone: data, network, process and loss, in a folder that diffusers loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from consilience.diffusion.digits import network, transformer
from consilience.diffusion.folders import filling
from consilience.diffusion.huggingface import as_scheduler, from_diffusers
from consilience.diffusion.losses import (
    Times,
    denoising_loss,
    edm_weight,
    lognormal_times,
    min_snr_weight,
    uniform_times,
)
from consilience.diffusion.pictures import Images, grid, save
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.processes import Process
from consilience.diffusion.sampling import draw, noise_of
from consilience.diffusion.training import assigned, cosine, train
from consilience.errors import InputError
from consilience.record import replacing

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

    ``ema`` is the rate of the average of the weights that is kept; ``lr`` falls along a cosine after a rise of a
    fortieth of the steps. Raises InputError naming the setting that cannot be.
    """

    data: str = "digits"
    model: str = "unet"
    width: int = 32
    process: str = "flow"
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
        for name in ("width", "steps", "batch", "accumulate", "sample_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)}: must be at least 1")
        if not self.lr > 0 or not 0 <= self.ema < 1 or self.seed < 0:
            raise InputError(f"lr {self.lr}, ema {self.ema}, seed {self.seed}: need lr > 0, 0 <= ema < 1, seed >= 0")
        if self.batch % self.accumulate:
            raise InputError(f"batch {self.batch} cannot be cut into accumulate = {self.accumulate} equal parts")

    @classmethod
    def of(cls, settings: Mapping[str, Any], where: str) -> Recipe:
        """One from a mapping; raises InputError for an unknown key or a value of the wrong type, naming both."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in settings.items():
            if name not in defaults:
                raise InputError(f"{where}: no setting {name!r}; there are: {', '.join(defaults)}")
            wanted = type(defaults[name])
            fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
            if not fits or (isinstance(value, bool) and wanted is not bool):
                raise InputError(f"{where}: {name} = {value!r}: expected {_TYPES[wanted]}")
        return cls(**settings)


@dataclass(frozen=True, slots=True)
class Made:
    """A finished run: the pipeline around the averaged weights, steps done, and the last mean loss."""

    pipe: ImagePipeline
    steps: int
    loss: float


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
    _claim(recipe, out / "run" / "recipe.json")
    batch = {"x": data.x}
    if classes is not None:
        batch["class_labels"] = cast(Tensor, data.labels)
    elif recipe.model == "dit":
        batch["class_labels"] = torch.zeros(len(data.x), dtype=torch.long)

    def show(step: int, model: Any) -> None:
        pipe = ImagePipeline.of(model, as_scheduler(stock))
        columns = min(pipe.classes or 6, 12)
        labels = torch.arange(6 * columns) % columns if pipe.classes else None
        drawn = draw(pipe, noise_of(pipe, 6 * columns, recipe.seed), 16, labels=labels)
        save(grid(drawn.x, columns), out / "samples" / f"{step:06d}.png")

    trained = train(
        net,
        _loss(recipe, stock, classes),
        batch,
        steps=recipe.steps,
        batch_size=recipe.batch,
        lr=cosine(recipe.lr, recipe.steps, recipe.steps // 40),
        ema=recipe.ema or None,
        clip=1.0,
        accumulate=recipe.accumulate,
        precision=recipe.precision,  # type: ignore[arg-type]
        seed=recipe.seed,
        out=out / "run",
        sample_every=min(recipe.sample_every, recipe.steps),
        on_sample=show if data.x.shape[1] in (1, 3) else None,
        progress=progress,
    )
    pipe = ImagePipeline.of(trained.best, as_scheduler(stock))
    with filling(out) as folder:
        _saved(pipe, recipe).save_pretrained(folder)
    return Made(pipe, trained.step, trained.log[-1]["loss"])


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


def _saved(pipe: ImagePipeline, recipe: Recipe) -> Any:
    """A stock pipeline where one does what ours does: it names no class, and does not scale the network's input."""
    from diffusers import DDPMPipeline

    if pipe.classes or pipe.unet is None or recipe.process == "edm":
        return pipe
    return cast(Any, DDPMPipeline)(pipe.unet, pipe.scheduler)


def _claim(recipe: Recipe, path: Path) -> None:
    """Write the recipe down, or hold it against the one that is there."""
    now = dataclasses.asdict(recipe)
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
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
