"""Image models for few steps, of any objective in `SETUPS`: their network, their loss, and how they are sampled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.diffusion import metrics
from consilience.diffusion.consistency.maps import FlowMap
from consilience.diffusion.consistency.samplers import golden
from consilience.diffusion.consistency.setups import GRID, SETUPS, Setup
from consilience.diffusion.consistency.shared import Result
from consilience.diffusion.denoisers import Denoiser
from consilience.diffusion.digits import keeping_labels
from consilience.diffusion.huggingface import as_scheduler, from_diffusers, grid_at, trained_on
from consilience.diffusion.pictures import Images
from consilience.diffusion.pipeline import ImagePipeline
from consilience.diffusion.sampling import noise_of
from consilience.diffusion.solve import solve, steps_of
from consilience.diffusion.training import Context
from consilience.diffusion.training.ema import Profile
from consilience.diffusion.two_times import TwoTimeDiTTransformer2DModel, TwoTimeUNet2DModel, two_times_of
from consilience.errors import InputError

METHODS = {"multistep": "consistency", "chain": "chain", "phased": "chain", "tcd": "tcd"}
"""The method of `solve` for each kind of sampler that a setup names."""
SEARCHED = 4
"""Evaluations up to which the levels are searched for."""
REACH = math.log(8)
"""How far from 1 the logarithm of the factor is searched."""


def setup_of(objective: str, taught: bool, phases: int | None = None) -> Setup:
    """The setup of this name for training with or without a teacher, in so many phases, by default its own.

    Raises InputError where it cannot be had, or not in phases.
    """
    if objective not in SETUPS:
        raise InputError(f"no objective {objective!r}; there are: {', '.join(offered(taught))}")
    setup = SETUPS[objective]
    if setup.needs:
        part, what = next(iter(setup.needs.items()))
        raise InputError(
            f"objective {objective}: needs {part} ({what}), which cannot be made from settings: train it from Python. "
            f"There are: {', '.join(offered(taught))}"
        )
    if setup.teacher == "needed" and not taught:
        raise InputError(
            f"objective {objective}: distils a teacher: use `consilience diffusion distill`, or one of: "
            f"{', '.join(offered(taught))}"
        )
    return setup if phases is None else _in_phases(setup, objective, phases, offered(taught))


def _in_phases(setup: Setup, objective: str, phases: int, names: list[str]) -> Setup:
    if setup.edges is None:
        phased = ", ".join(name for name in names if SETUPS[name].edges is not None)
        raise InputError(f"objective {objective}: is not trained in phases: leave phases out, or take one of: {phased}")
    if not 1 <= phases <= GRID:
        raise InputError(f"phases {phases}: must be from 1 to {GRID}")
    return dataclasses.replace(setup, phases=phases)


def offered(taught: bool) -> list[str]:
    """The objectives that can be trained from settings alone, with or without a teacher."""
    return [name for name, setup in SETUPS.items() if not setup.needs and (taught or setup.teacher != "needed")]


def map_of(network: Any, scheduler: Any) -> FlowMap:
    """A diffusers network as a flow map on the process of its scheduler; one of one time lands by a DDIM step."""
    model = from_diffusers(network, scheduler)
    if isinstance(network, TwoTimeUNet2DModel | TwoTimeDiTTransformer2DModel):
        return FlowMap(lambda x, t, s, **cond: model.function(x, t, s=s, **cond), model.process, model.prediction)
    return FlowMap(lambda x, t, s, **cond: model.function(x, t, **cond), model.process, model.prediction)


def student_of(network: Any, setup: Setup, objective: str) -> Any:
    """The network that the objective trains, starting as ``network``; raises InputError where it cannot be told s."""
    try:
        told = two_times_of(network) if setup.two_times else network
        return forward_differentiable(keeping_labels(told))
    except ValueError as error:
        raise InputError(f"objective {objective}: {error}") from error


def forward_differentiable(network: Any) -> Any:
    """The network, its group norms made fit for forward-mode differentiation behind attention, whatever its layout.

    torch's own formula takes no tangent that is not contiguous. Weights and values stay what they are.
    """
    for part in network.modules():
        if type(part) is nn.GroupNorm:
            part.__class__ = _GroupNorm
    return network


class _GroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.reshape(-1).reshape(input.shape))


@dataclass(frozen=True, slots=True)
class FewStepLoss:
    """The trainer's loss of a setup.

    ``teacher`` takes the conditions of the batch; a share ``drop`` of the samples is not shown its class but the number
    ``none``, where that is not None.
    """

    setup: Setup
    stock: Any
    teacher: Denoiser | None
    sigma_data: float
    none: int | None
    drop: float
    averaged: bool

    def __call__(self, net: Any, batch: dict[str, Tensor], generator: torch.Generator, context: Context) -> Result:
        """The loss and its log at the context's step."""
        shown = dict(batch)
        if self.none is not None:
            kept = torch.rand(len(batch["x"]), generator=generator, device=generator.device) >= self.drop
            shown["class_labels"] = torch.where(kept, batch["class_labels"], self.none)
        return self.setup.loss(
            self._map(net),
            self.teacher,
            shown,
            generator,
            step=context.step,
            steps=context.steps,
            target=self._map(context.ema) if self.averaged else None,
        )

    def _map(self, net: Any) -> FlowMap:
        made = map_of(net, self.stock)
        process = self.setup.process(made.process, self.sigma_data)
        return made if process is made.process else made.on(process)


def averages(setup: Setup, steps: int, rate: float, taught: bool = False) -> list[Profile | float]:
    """What the trainer keeps: the average that is the objective's target, if any, and then that of the rate, if any."""
    target = setup.average(steps, taught)
    return [*([] if target is None else [target]), *([rate] if rate else [])]


def scheduler_for(stock: Any, setup: Setup, guidance: float, levels: dict[str, list[float]] | None = None) -> Any:
    """Our scheduler for a student of the setup on the process of ``stock``."""
    made: Any = as_scheduler(stock, METHODS[setup.sampler])
    process = trained_on(dict(made.config), "").process
    edges = None
    if setup.edges is not None:
        counts = [setup.phases * n for n in ((1, 2, 3) if setup.within else (1,))]
        edges = {str(n): process.ratio(setup.grid(process, n))[1:-1].tolist() for n in counts}
    made.register_to_config(two_times=setup.two_times, guidance=guidance, levels=levels or edges)
    return made


@torch.no_grad()
def searched(
    pipe: ImagePipeline, data: Images, count: int = 256, iterations: int = 4, told: Callable[[int], None] | None = None
) -> dict[str, list[float]]:
    """The levels for 2 to `SEARCHED` evaluations: values of sigma / alpha, by number of evaluations.

    They are the usual ones times a factor, which golden-section search finds for each number: where the energy distance
    between ``count`` samples of fixed noise and as many data, in pixels, is least. (Levels searched for one after the
    other, as in arXiv:2303.01469, section 3, come to stand at the end, where they do nothing.) ``told`` is called with
    the number of sets that were drawn.
    """
    score = _Score(pipe, data, min(count, len(data.x)), told)
    process, method = score.model.process, pipe.scheduler.config["method"]
    found: dict[str, list[float]] = {}
    for n in range(2, SEARCHED + 1):
        usual = process.ratio(steps_of(method, process, n).grid)[1:-1]

        def of(log: float, usual: Tensor = usual) -> list[float]:
            return (usual * math.exp(log)).tolist()

        best, _ = golden(lambda log, of=of: score(of(log)), -REACH, REACH, iterations)  # type: ignore[misc]
        found[str(n)] = [round(ratio, 4) for ratio in of(best)]
    return found


class _Score:
    """The energy distance between data and what a pipeline makes of fixed noise at some levels."""

    def __init__(self, pipe: ImagePipeline, data: Images, count: int, told: Callable[[int], None] | None) -> None:
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))[:count]
        labels = data.labels[order] if pipe.classes and data.labels is not None else None
        self.real, self.model = data.x[order], pipe.denoiser(labels)
        self.noise = noise_of(pipe, count, 1).to(pipe.network.device)
        self.method, self.told, self.asked = pipe.scheduler.config["method"], told, 0

    def __call__(self, levels: list[float]) -> float:
        """Of these values of sigma / alpha between pure noise and data."""
        generator = torch.Generator().manual_seed(2)
        grid = grid_at(self.model.process, levels)
        made = solve(
            self.model,
            self.noise,
            grid,
            self.method,
            noise=lambda x, _t, _s: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device),
        )
        self.asked += 1
        if self.told is not None:
            self.told(self.asked)
        return metrics.energy_distance(made.x, self.real)
