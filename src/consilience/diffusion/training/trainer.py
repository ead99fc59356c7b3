"""`train`: a small trainer that knows nothing but a loss function.

A step is a function of the seed and its number: which rows it sees, and the generator that its loss gets, need no
memory. What has one (weights, optimizer, averages, the global random generators, a loss or data set with a
``state_dict``) is in the checkpoint, so that a run taken up again goes on bit for bit as if it had not stopped.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from consilience.diffusion.training.batches import Batches, shard_seed
from consilience.diffusion.training.checkpoints import (
    CHECKPOINT,
    LOG,
    SNAPSHOTS,
    Interrupts,
    Log,
    random_state,
    random_state_kept,
    read,
    set_random_state,
    write,
)
from consilience.diffusion.training.ema import EMA, Decay, Power, Profile
from consilience.diffusion.training.processes import Processes
from consilience.diffusion.training.progress import Line
from consilience.errors import InputError

Loss = Callable[..., "Tensor | tuple[Tensor, Mapping[str, Any]]"]
Hook = Callable[[int, nn.Module], None]
Rate = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Context:
    """What a loss that takes ``context`` may know: steps done, steps in all, and the first average as a module.

    ``ema`` is in evaluation mode and takes no gradients: the teacher of consistency training. None without averages.
    """

    step: int
    steps: int
    ema: nn.Module | None


@dataclass(frozen=True, slots=True)
class Trained:
    """What training left: the model, its averages (modules, in the order asked for), steps done and the log's rows."""

    model: nn.Module
    averages: tuple[nn.Module, ...]
    step: int
    log: list[dict[str, Any]]

    @property
    def best(self) -> nn.Module:
        """The first average, or the model itself where none was kept."""
        return self.averages[0] if self.averages else self.model


def train(
    model: nn.Module,
    loss_fn: Loss,
    data: Any,
    *,
    steps: int,
    batch_size: int,
    lr: float | Rate,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    ema: float | Profile | Sequence[Profile] | None = 0.999,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["float32", "bf16"] = "float32",
    log_every: int = 100,
    save_every: int = 1000,
    snapshot_every: int | None = None,
    sample_every: int | None = None,
    on_sample: Hook | None = None,
    on_step: Hook | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> Trained:
    """Train ``model`` in place for ``steps`` optimizer steps of ``batch_size`` samples, all processes together.

    ``loss_fn(model, batch, generator)`` returns a mean over the batch, or that and a dict of numbers for the log. It
    is called with ``context=`` (a `Context`) where it has such a parameter. ``data``: tensors, a map-style Dataset or a
    function (count, generator); see `Batches`. ``lr`` is a number or a function of the steps done, such as `cosine`.

    Each step's batch is cut into ``accumulate`` parts per process, each with a generator of its own, so that two
    processes do what two parts of one process do. ``bf16`` runs the loss under autocast, the weights stay as they are.

    With ``out`` the folder gets a checkpoint every ``save_every`` steps and at the end, the log as JSON lines, and
    weights and averages every ``snapshot_every`` steps (for `reconstruct` and `lcsc`). A folder that has a checkpoint
    is taken up where it stopped. Ctrl-C finishes the step, saves and raises KeyboardInterrupt.

    ``on_step(step, model)`` is part of the training, in every process; ``on_sample`` looks on: it is called in the
    first process every ``sample_every`` steps and leaves the random generators as they were. Both get the first
    average, or the model where none is kept. Raises ValueError for settings that cannot be, InputError for a folder of
    another run or with a damaged checkpoint, FloatingPointError where the loss or the weights are no longer finite, or
    the optimizer cannot take a step of this rate.
    """
    processes = Processes(device)
    settings = _Settings(steps, batch_size, seed, accumulate, processes.count, clip, precision)
    folder = None if out is None else Path(out)
    after = _After(folder, log_every, save_every, snapshot_every, sample_every, on_sample, on_step)
    with random_state_kept():
        run = _Run(model, loss_fn, Batches(data, seed), settings, _profiles(ema), optimizer, lr, processes)
        _seed(seed + processes.index)
        if folder is not None and (folder / CHECKPOINT).exists():
            run.load(folder / CHECKPOINT)
            _say_resumed(run, folder)
        log = Log(folder / LOG if folder is not None and processes.main else None, run.step)
        with Interrupts() as interrupts, Line(run.step, steps, progress and processes.main) as line:
            while run.step < steps:
                stop = run.take_step(interrupts.asked)
                after.step(run, log, line, stop)
                if stop and run.step < steps:
                    _say_stopped(run, folder)
                    raise KeyboardInterrupt
        model.eval()
        return Trained(model, tuple(average.module for average in run.averages), run.step, log.rows)


def cosine(lr: float, steps: int, warmup: int = 0) -> Rate:
    """The rate that rises linearly to ``lr`` in ``warmup`` steps, then falls along a cosine to 0 at ``steps``."""
    if not 0 <= warmup < steps:
        raise ValueError(f"need 0 <= warmup < steps, got {warmup} and {steps}")

    def rate(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        return lr * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup)))) / 2

    return rate


@dataclass(frozen=True, slots=True)
class _After:
    """What is done after a step, and how often."""

    folder: Path | None
    log_every: int
    save_every: int
    snapshot_every: int | None
    sample_every: int | None
    on_sample: Hook | None
    on_step: Hook | None

    def __post_init__(self) -> None:
        intervals = (self.log_every, self.save_every, self.snapshot_every, self.sample_every)
        if any(every is not None and every < 1 for every in intervals):
            raise ValueError(f"log, save, snapshot and sample intervals must be at least 1, got {intervals}")

    def step(self, run: _Run, log: Log, line: Line, stop: bool) -> None:
        """All that is due now."""
        line.at(run.step)
        last = run.step == run.settings.steps
        if self.on_step is not None:
            with run.shown() as shown:
                self.on_step(run.step, shown)
        if run.step % self.log_every == 0 or last:
            row = run.measure()
            log.add(row)
            line.measured(run.step, row["loss"])
        if self.on_sample is not None and run.processes.main and self._due(self.sample_every, run.step):
            with random_state_kept(), torch.no_grad(), run.shown() as shown:
                self.on_sample(run.step, shown)
        if self.folder is not None and self._due(self.snapshot_every, run.step):
            run.snapshot(self.folder / SNAPSHOTS)
        if self.folder is not None and (stop or last or self._due(self.save_every, run.step)):
            run.save(self.folder / CHECKPOINT)

    @staticmethod
    def _due(every: int | None, step: int) -> bool:
        return every is not None and step % every == 0


@dataclass(frozen=True, slots=True)
class _Settings:
    steps: int
    batch_size: int
    seed: int
    accumulate: int
    processes: int
    clip: float | None
    precision: str

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise ValueError("steps, batch_size and accumulate must be at least 1")
        if self.batch_size % self.shards:
            raise ValueError(
                f"a batch of {self.batch_size} cannot be cut into {self.shards} equal parts "
                f"({self.accumulate} per process, {self.processes} processes)"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"precision must be float32 or bf16, got {self.precision!r}")

    @property
    def shards(self) -> int:
        return self.accumulate * self.processes


class _Run:
    """The state of a run and what is done with it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        batches: Batches,
        settings: _Settings,
        profiles: Sequence[Profile],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float | Rate,
        processes: Processes,
    ) -> None:
        self.model = model.to(processes.device).train()
        processes.same(model)
        self.parameters = [part for part in model.parameters() if part.requires_grad]
        if not self.parameters:
            raise ValueError("the model has no parameter that takes gradients")
        self.rate: Rate = lr if callable(lr) else lambda _step: lr
        self.optimizer = optimizer(self.parameters, lr=self.rate(0))
        self.averages = [EMA(model, profile) for profile in profiles]
        self.loss_fn, self.batches, self.settings, self.processes = loss_fn, batches, settings, processes
        self.step = 0
        self._wants_context = "context" in _parameters(loss_fn)
        self._sums: dict[str, tuple[Any, float]] = {}
        self._broken: dict[str, Tensor] = {}
        self._saved = 0
        self._since, self._since_step = time.monotonic(), 0

    # ---------------------------------------------------------------------------------------------------- a step

    def take_step(self, asked: bool) -> bool:
        """One optimizer step; returns whether any process was asked to stop."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(self.settings.accumulate):
            loss = self._loss(part * self.processes.count + self.processes.index)
            torch.autograd.backward(loss / self.settings.accumulate)
        stop = self.processes.average_gradients(self.parameters, asked)
        self._clip()
        self._update()
        self.step += 1
        for average in self.averages:
            average.update(self.model, self.step)
        return stop

    def _clip(self) -> None:
        grads = [part.grad for part in self.parameters if part.grad is not None]
        norms = torch._foreach_norm(grads)
        norm = torch.stack([part.to(norms[0]) for part in norms]).norm()
        self._count("gradient_norm", norm, 1)
        self._watch("gradient", norm)
        if self.settings.clip is not None:
            torch._foreach_mul_(grads, (self.settings.clip / (norm + 1e-6)).clamp(max=1.0))

    def _update(self) -> None:
        try:
            self.optimizer.step()
        except (RuntimeError, OverflowError) as error:
            if "overflow" not in str(error):
                raise
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(
                f"the optimizer's update at step {self.step + 1} overflows: the weights cannot take a step at a rate "
                f"of {rate:g}; {self._left()}. Lower the rate."
            ) from error

    def _loss(self, shard: int) -> Tensor:
        settings, device = self.settings, self.processes.device
        generator = torch.Generator(device).manual_seed(shard_seed(settings.seed, self.step, shard))
        size = settings.batch_size // settings.shards
        batch = self.batches.get(self.step * settings.batch_size + shard * size, size, generator, device)
        first = self.averages[0].module if self.averages else None
        extra = {"context": Context(self.step, settings.steps, first)} if self._wants_context else {}
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            result = self.loss_fn(self.model, batch, generator, **extra)
        loss, numbers = (result, {}) if isinstance(result, Tensor) else result
        if loss.ndim != 0:
            raise ValueError(f"the loss must be one number, the mean over the batch; got shape {tuple(loss.shape)}")
        for name, value in {"loss": loss, **numbers}.items():
            self._count(name, value, settings.accumulate)
        self._watch("loss", loss.detach())
        return loss

    def _count(self, name: str, value: Any, parts: int) -> None:
        """Add to the sums that the next row of the log is made of: on the device, without waiting for it."""
        total, count = self._sums.get(name, (0.0, 0.0))
        value = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value, device=self.processes.device)
        self._sums[name] = (total + value.double() / parts, count + 1 / parts)

    def _watch(self, name: str, value: Tensor) -> None:
        """Remember the first step at which a number was not finite: on the device, without waiting for it."""
        step = torch.where(torch.isfinite(value), math.inf, float(self.step + 1))
        self._broken[name] = torch.minimum(self._broken[name], step) if name in self._broken else step

    def measure(self) -> dict[str, Any]:
        """The means since the last row; raises FloatingPointError where the loss or the weights are not finite."""
        own = torch.stack([total / count for total, count in self._sums.values()])
        means = dict(zip(self._sums, self.processes.mean(own).tolist(), strict=True))
        self._sums = {}
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(self._diverged(means["loss"]))
        self._check_weights()
        now = time.monotonic()
        speed = (self.step - self._since_step) / max(now - self._since, 1e-9)
        self._since, self._since_step = now, self.step
        rate = self.optimizer.param_groups[0]["lr"]
        return {"step": self.step, **means, "lr": rate, "steps_per_second": round(speed, 3)}

    def _check_weights(self) -> None:
        largest = torch._foreach_norm([part.detach() for part in self.parameters if part.numel()], math.inf)
        if not bool(torch.isfinite(torch.stack([size.to(largest[0]) for size in largest])).all()):
            raise FloatingPointError(
                f"the weights are no longer finite after step {self.step}; {self._left()}. "
                "Lower the rate, or look at the loss's weights."
            )

    def _diverged(self, loss: float) -> str:
        """What was first not finite, at which step, and what to do about it."""
        everybody = self.processes.gather({name: float(step) for name, step in self._broken.items()})
        name, step = min(((name, step) for own in everybody for name, step in own.items()), key=lambda one: one[1])
        advice = "Lower the rate, clip the gradients, or look at the loss's weights."
        if name == "loss" and step == 1:
            advice = (
                "The weights were still those it began with: look at the data, at the teacher and its guidance, "
                "and at the loss's weights."
            )
        return f"the loss is {loss}: the {name} was first not finite at step {step:.0f}; {self._left()}. {advice}"

    def _left(self) -> str:
        """What a run that breaks off leaves."""
        if not self._saved:
            return "nothing was saved before"
        return f"the checkpoint of step {self._saved} is still good, and the same run goes on from it"

    @contextmanager
    def shown(self) -> Iterator[nn.Module]:
        """The first average, or the model in evaluation mode."""
        with ExitStack() as after:
            if self.averages:
                yield self.averages[0].module
            else:
                after.callback(self.model.train)
                yield self.model.eval()

    # ------------------------------------------------------------------------------------------------- the state

    def save(self, path: Path) -> None:
        """Write the checkpoint; every process takes part, the first one writes."""
        if "loss" in self._sums and not bool(torch.isfinite(self.processes.mean(self._sums["loss"][0]))):
            self.measure()  # says so
        self._check_weights()
        random = self.processes.gather(random_state())
        sums = self.processes.gather(self._sums)
        if self.processes.main:
            content = {
                "step": self.step,
                "settings": self._fixed(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "averages": [average.module.state_dict() for average in self.averages],
                "random": random,
                "sums": sums,
                "states": {name: owner.state_dict() for name, owner in self._owners().items()},
            }
            write(path, content)
        self._saved = self.step
        self.processes.wait()

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        content = read(path)
        try:
            self._check(content["settings"], path)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            for average, state in zip(self.averages, content["averages"], strict=True):
                average.module.load_state_dict(state)
            for name, owner in self._owners().items():
                owner.load_state_dict(content["states"][name])
            self.step = self._since_step = self._saved = content["step"]
            device = self.processes.device
            sums = content["sums"][self.processes.index]
            self._sums = {name: (total.to(device), count) for name, (total, count) in sums.items()}
            set_random_state(content["random"][self.processes.index])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(f"{path} is of another model or loss ({reason}): choose another folder") from error

    def snapshot(self, folder: Path) -> None:
        """Save weights and averages alone."""
        if self.processes.main:
            lengths = [a.profile.sigma_rel if isinstance(a.profile, Power) else None for a in self.averages]
            content = {
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": [average.module.state_dict() for average in self.averages],
                "sigma_rel": lengths,
            }
            write(folder / f"{self.step:09d}.pt", content)

    def _fixed(self) -> dict[str, Any]:
        """The settings that must not change within a run."""
        settings = self.settings
        return {
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "accumulate": settings.accumulate,
            "processes": settings.processes,
            "rows of data": self.batches.length,
            "ema": [repr(average.profile) for average in self.averages],
        }

    def _check(self, old: Mapping[str, Any], path: Path) -> None:
        for name, value in self._fixed().items():
            if old[name] != value:
                cure = "choose another folder" if name == "ema" else "set it to that, or choose another folder"
                raise InputError(f"{path} is of a run with {name} = {old[name]}, this one has {value}: {cure}")

    def _owners(self) -> dict[str, Any]:
        """The loss and the data, where they have a state."""
        held = {"loss": self.loss_fn, "data": self.batches.data}
        return {
            name: owner
            for name, owner in held.items()
            if callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None))
        }


def _profiles(ema: float | Profile | Sequence[Profile] | None) -> list[Profile]:
    if ema is None:
        return []
    if isinstance(ema, int | float):
        return [Decay(float(ema))]
    return list(ema) if isinstance(ema, Sequence) else [ema]


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in
        return frozenset()


def _seed(seed: int) -> None:
    from accelerate.utils import set_seed  # type: ignore[import-untyped]

    set_seed(seed % 2**32)


def _say_resumed(run: _Run, folder: Path) -> None:
    if run.processes.main:
        left = max(0, run.settings.steps - run.step)
        goes_on = f"{left} to go" if left else "nothing left to do; ask for more steps to go on"
        print(f"{folder}: {run.step} steps done before, {goes_on}", file=sys.stderr)


def _say_stopped(run: _Run, folder: Path | None) -> None:
    if run.processes.main:
        kept = (
            "nothing was kept: no folder was given" if folder is None else f"saved in {folder}; run it again to go on"
        )
        print(f"stopped after step {run.step}: {kept}", file=sys.stderr)
