"""A diffusers scheduler that carries out our solvers' plans step by step.

The plan is the one that `solve` would run; a pipeline calls the network and hands over its output, so that nothing of
the pipeline has to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from consilience.diffusion.denoisers import convert
from consilience.diffusion.huggingface import Trained, grid_of, start_scale, trained_on
from consilience.diffusion.processes import RectifiedFlow
from consilience.diffusion.solve import METHODS, steps_of
from consilience.diffusion.solvers.plan import Plan, Solver, State, factors_of, view


@dataclass
class ConsilienceSchedulerOutput(BaseOutput):
    """``prev_sample`` is the state for the next evaluation, ``pred_original_sample`` the expected data."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class ConsilienceScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any method of `solve` behind diffusers' interface; made by `as_scheduler`, loaded by ``from_pretrained``.

    A pipeline's folder names this module; diffusers loads it where the module, or `pipeline`, was imported before.
    ``trained_with`` names the stock scheduler class whose configuration the other parameters are. With n inference
    steps the network is evaluated n times.

    Of a few-step model ``levels`` are the values of sigma / alpha at which ``method`` evaluates it after the first, by
    number of evaluations, and ``guidance`` the scale of classifier-free guidance that is in its weights. With
    ``two_times`` the network is one of `two_times`: its timesteps are [2, 1], where it stands and where to land.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        method: str = "auto",
        trained_with: str = "DDIMScheduler",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        shift: float | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        two_times: bool = False,
        levels: dict[str, list[float]] | None = None,
        guidance: float | None = None,
    ) -> None:
        if method != "auto" and method not in METHODS:
            raise ValueError(f"no method {method!r}; there are: auto, {', '.join(METHODS)}")
        self._trained = trained_on(dict(self.config), trained_with)
        self._solver: Solver | None = None
        self._grid: Tensor | None = None
        self._plan: Plan | None = None
        self._state: State | None = None
        self._factors: list[tuple[float, float]] = []
        self._next = 0
        self._begin_index: int | None = None
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.init_noise_sigma = start_scale(self._trained.process, self._trained.process.t_max)

    @classmethod
    def of(cls, config: dict[str, Any], name: str, method: str) -> ConsilienceScheduler:
        """One for the process of a stock scheduler's configuration."""
        if name == cls.__name__:
            name = config["trained_with"]
        takes = set(cls.__init__.__wrapped__.__code__.co_varnames) - {"self", "method", "trained_with"}
        kept = {key: value for key, value in config.items() if key in takes and value is not None}
        if config.get("use_flow_sigmas") or "flow_shift" in config:
            kept.setdefault("shift", config.get("flow_shift"))
        if kept.get("trained_betas") is not None:
            kept["trained_betas"] = [float(beta) for beta in kept["trained_betas"]]
        if config.get("use_flow_sigmas"):
            kept["prediction_type"] = "flow_prediction"
        return cls(method=method, trained_with=name, **kept)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def step_index(self) -> int | None:
        """How many evaluations of the plan were handed over."""
        return None if self._state is None else self._next

    @property
    def begin_index(self) -> int | None:
        """Where an image-to-image pipeline enters the grid."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Enter the timesteps at this index."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Plan n evaluations; ``sigmas`` (without the final 0) or ``timesteps`` fix the grid instead."""
        process = self._process(mu)
        self._trained = Trained(process, self._trained.prediction, self._trained.steps, self._trained.sigma_data)
        steps: int | Tensor
        if sigmas is not None or timesteps is not None:
            steps = self._given(sigmas, timesteps)
        elif num_inference_steps is None:
            raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
        else:
            steps = grid_of(self.config, process, self.config["method"], num_inference_steps)
        _, self._solver, self._grid, _ = steps_of(self.config["method"], process, steps)
        self._plan = self._solver.plan(self._grid, process)
        self.timesteps = self._timesteps(self._plan).float().to(device)
        self.num_inference_steps = len(self.timesteps)
        self.init_noise_sigma = start_scale(process, float(self._grid[0]))
        self._state, self._next, self._begin_index = None, 0, None

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The network's input for a state."""
        if self._trained.sigma_data is None or timestep is None:
            return sample
        return self._trained.scaled(sample, self._time(timestep, sample))

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ConsilienceSchedulerOutput | tuple[Tensor, ...]:
        """The state for the next evaluation from the network's output at ``timestep`` and ``sample`` [batch, ...]."""
        if self._plan is None:
            raise ValueError("call set_timesteps before step")
        wide = sample.float() if sample.dtype in (torch.float16, torch.bfloat16) else sample
        plan, state = (self._plan, self._state) if self._state is not None else self._enter(timestep, wide)
        stages = plan.stages
        if self._next >= len(stages):
            raise ValueError("the plan is finished: call set_timesteps for another sample")
        t = as_own(stages[self._next].t, wide)
        found = self._trained.output(model_output.to(wide.dtype), wide, t)
        process, have = self._trained.process, self._trained.prediction
        state.stands_at(wide)
        state.saw(view(found, wide, *self._factors[self._next]))
        while True:
            stage = stages[self._next]
            z = randn_tensor(wide.shape, generator, wide.device, wide.dtype) if stage.noise else None
            x = state.update(stage, z)
            self._next += 1
            if self._next == len(stages) or stages[self._next].t is not None:
                break
        if not return_dict:
            return (x.to(sample.dtype),)
        x0 = convert(found, wide, t, process, have, "x0").to(sample.dtype)
        return ConsilienceSchedulerOutput(prev_sample=x.to(sample.dtype), pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The states at ``timesteps`` of data and noise."""
        t = self._time(timesteps, original_samples)
        return self._trained.process.add_noise(original_samples, noise, t).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` as flow pipelines call it."""
        return self.add_noise(sample, noise, timestep)

    def _enter(self, timestep: Tensor | float, x: Tensor) -> tuple[Plan, State]:
        """Begin at the first timestep, or where the pipeline enters the grid."""
        assert self._plan is not None
        assert self._grid is not None
        assert self._solver is not None
        index = self._begin_index
        if index is None:
            value = float(torch.as_tensor(timestep).flatten()[0])
            index = int((self.timesteps.cpu().double().reshape(len(self.timesteps), -1)[:, 0] - value).abs().argmin())
        if index:
            times = [stage.t for stage in self._plan.stages if stage.t is not None]
            later = self._grid[self._grid <= times[index] + 1e-9]
            self._plan = self._solver.plan(later, self._trained.process)
        self._state, self._next = State(x, self._plan), 0
        self._factors = factors_of(self._plan, self._trained.process, self._trained.prediction)
        return self._plan, self._state

    def _timesteps(self, plan: Plan) -> Tensor:
        """The network's time inputs: [n], or [n, 2, 1] for a network of two times."""
        asked = [stage for stage in plan.stages if stage.t is not None]
        t = torch.tensor([stage.t for stage in asked], dtype=torch.float64)
        if not self.config["two_times"]:
            return self._trained.timestep(t)
        s = torch.tensor([stage.end for stage in asked], dtype=torch.float64) if plan.jumps else t
        return self._trained.timesteps(t, s, len(t)).T[:, :, None]

    def _process(self, mu: float | None) -> Any:
        if mu is None or not isinstance(self._trained.process, RectifiedFlow):
            return self._trained.process
        return RectifiedFlow(float(np.exp(mu)) if self.config["time_shift_type"] == "exponential" else float(mu))

    def _given(self, sigmas: list[float] | np.ndarray | None, timesteps: list[float] | None) -> Tensor:
        process = self._trained.process
        if sigmas is not None:
            given = torch.as_tensor(np.asarray(sigmas), dtype=torch.float64)
            # of a flow: its t, before the shift; otherwise sigma / alpha
            times = given if isinstance(process, RectifiedFlow) else process.time(given)
        else:
            times = self._trained.time(torch.as_tensor(np.asarray(timesteps), dtype=torch.float64))
        end = process.time(torch.zeros(1, dtype=torch.float64))
        return times if float(times[-1]) <= float(end) else torch.cat([times, end])

    def _time(self, timestep: Tensor | float, x: Tensor) -> Tensor:
        timestep = as_own(timestep, x)
        return self._trained.time(timestep[0] if timestep.ndim == 2 else timestep)  # of two times the first


def as_own(t: Tensor | float | None, x: Tensor) -> Tensor:
    """A time on the device of x, in float32 at least."""
    return torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
