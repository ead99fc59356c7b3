"""The settings of training runs: what each may be, and the recipe that a run's folder keeps of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.diffusion.consistency.setups import SETUPS, Setup
from consilience.diffusion.few_steps import setup_of
from consilience.diffusion.training.checkpoints import CHECKPOINT, steps_done
from consilience.diffusion.training.processes import Processes
from consilience.errors import InputError
from consilience.record import replacing

DENOISING = "denoising"
"""The objective of models that are sampled by solvers."""

CHOICES = {
    "model": ("unet", "dit"),
    "process": ("flow", "vp", "edm"),
    "loss": ("plain", "min-snr"),
    "precision": ("float32", "bf16"),
}
MOST = 10**15
"""Of steps, batch, parts and intervals."""
MAY_CHANGE = ("steps", "lr", "precision", "sample_every")
"""Settings that may differ when a run is taken up again."""

_TYPES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """All settings of a training run; ``unconditional`` leaves the labels of the data out.

    ``objective`` other than "denoising" is one of `SETUPS` that needs no teacher: a model for few steps. ``phases`` is
    the number of them where the objective has phases, by default its own. ``ema`` is the rate of the average of the
    weights that is kept; ``lr`` falls along a cosine after a rise of a fortieth of the steps. Raises InputError naming
    the setting that cannot be.
    """

    data: str = "digits"
    model: str = "unet"
    width: int = 32
    process: str = "flow"
    objective: str = DENOISING
    phases: int | None = None
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
        if self.objective == DENOISING and self.phases is not None:
            raise InputError(f"objective {DENOISING}: is not trained in phases: leave phases out")
        if self.objective != DENOISING:
            _settle(self, setup_of(self.objective, taught=False, phases=self.phases))
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
    student's weights. ``phases`` is the number of them where the objective has phases, by default its own. ``ema`` is
    the rate of the average of the weights that is kept; ``lr`` falls along a cosine. Raises InputError naming the
    setting that cannot be.
    """

    teacher: str = "digits"
    objective: str = "ect"
    phases: int | None = None
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
        setup = setup_of(self.objective, taught=True, phases=self.phases)
        _settle(self, setup)
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


def _settle(run: Recipe | Distillation, setup: Setup) -> None:
    """The phases are in the recipe also where they are the objective's own."""
    object.__setattr__(run, "phases", setup.phases if setup.edges is not None else None)


def _check_run(run: Recipe | Distillation) -> None:
    """What both kinds of run must have."""
    for name in ("steps", "batch", "accumulate", "sample_every"):
        if not 1 <= getattr(run, name) <= MOST:
            raise InputError(f"{name} {getattr(run, name)}: must be at least 1 and at most {MOST:.0e}")
    if not 0 < run.lr < math.inf or not 0 <= run.ema < 1 or not 0 <= run.seed < 2**63:
        raise InputError(
            f"lr {run.lr}, ema {run.ema}, seed {run.seed}: need a finite lr > 0, 0 <= ema < 1, 0 <= seed < 2^63"
        )
    if run.batch % run.accumulate:
        raise InputError(f"batch {run.batch} cannot be cut into accumulate = {run.accumulate} equal parts")


def _checked(kind: Any, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings whose names and types are those of the fields of ``kind``."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, value in settings.items():
        if name not in defaults:
            raise InputError(f"{where}: no setting {name!r}; there are: {', '.join(defaults)}")
        if value is None and defaults[name] is None:
            continue
        wanted = int if defaults[name] is None else type(defaults[name])
        fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise InputError(f"{where}: {name} = {value!r}: expected {_TYPES[wanted]}")
    return dict(settings)


@contextmanager
def claimed(now: dict[str, Any], out: Path) -> Iterator[None]:
    """Hold a recipe against the one in the folder, and write it down for the run in the block.

    The former one comes back where the run is refused or diverges before it saves. Raises InputError for a run of
    another recipe, or one that has done more steps already.
    """
    place, checkpoint, main = out / "run" / "recipe.json", out / "run" / CHECKPOINT, Processes().main
    before = place.read_bytes() if place.is_file() else None
    if before is not None:
        _check_same(now, before, place)
    done = steps_done(checkpoint)
    if done > now["steps"]:
        raise InputError(
            f"{out}: {done} steps are done already, more than steps = {now['steps']}: ask for {done} or more, or "
            "choose another folder"
        )
    if main:
        _write(place, json.dumps(now, indent=1).encode())
    try:
        yield
    except (FloatingPointError, InputError):
        if main and before is not None and steps_done(checkpoint) == done:
            _write(place, before)
        raise


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _check_same(now: dict[str, Any], kept: bytes, path: Path) -> None:
    """Raise InputError where the recipe that is kept is another one, or none."""
    try:
        old = {"objective": DENOISING} | json.loads(kept)
        own = SETUPS.get(old["objective"])
        old = {"phases": None if own is None or own.edges is None else own.phases} | old
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
