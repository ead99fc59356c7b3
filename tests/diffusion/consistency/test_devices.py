"""Every objective and sampler on another device than the CPU, with generators of either: no tensor is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Process, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import FlowMap, editing, samplers
from consilience.diffusion.consistency.setups import SETUPS, few_grid

from ..elsewhere import elsewhere, numbers
from .test_setups import DATA, student_of
from .two_times import TwoTimes, flow_map

PROCESSES: list[Process] = [RectifiedFlow(), EDM(), VPLinear()]
PROCESS = {name: PROCESSES[place % 3] for place, name in enumerate(SETUPS)}
CPU = torch.device("cpu")
STEPS = 200
GENERATORS = ["cpu", "there"]
generators = pytest.mark.parametrize("drawn", GENERATORS, ids=["generator-on-the-cpu", "generator-there"])


def generator_on(device: torch.device, drawn: str) -> torch.Generator:
    """A generator of seed 3, on the device or on the CPU; both give the same numbers."""
    return torch.Generator(device if drawn == "there" else CPU).manual_seed(3)


def for_samplers(net: TwoTimes, process: Process) -> FlowMap:
    """The network's map, which samplers ask at one time for the whole batch."""
    inner = flow_map(net, process)

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        found: Tensor = inner.function(x, t.expand(len(x)), s.expand(len(x)))
        return found

    return FlowMap(function, process, inner.prediction)


def parts_of(name: str, process: Process, device: torch.device) -> dict[str, Any]:
    """What the setups that need more are given."""
    if name == "vct":
        return {"encoder": lambda x: (0.1 * x, torch.full_like(x, 0.9))}
    if name == "nct":
        return {"base": flow_map(TwoTimes(5).to(device), process), "control": lambda x: x[:, 0]}
    if name == "dcm":
        return {"boundary": 0.5 * (process.t_min + process.t_max), "expert": "semantic"}
    return {}


def loss_on(device: torch.device, name: str, taught: bool, drawn: str) -> Any:
    """Loss, log and gradients of a small network."""
    setup, own = SETUPS[name], PROCESS[name]
    process = setup.process(own, 0.6)
    net, average, source = (TwoTimes(seed).to(device) for seed in (0, 1, 7))
    loss, log = setup.loss(
        student_of(name, net, own, process),
        flow_map(source, own).denoiser if taught else None,
        DATA.to(device),
        generator_on(device, drawn),
        step=STEPS // 2,
        steps=STEPS,
        target=student_of(name, average, own, process) if setup.average(STEPS) is not None else None,
        **parts_of(name, process, device),
    )
    assert loss.device == device
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return numbers((loss, log, list(grads)))


CASES = [
    (name, taught)
    for name, setup in SETUPS.items()
    for taught in (False, True)
    if (setup.teacher, taught) not in {("needed", False), ("none", True)}
]


@generators
@pytest.mark.parametrize(("name", "taught"), CASES, ids=[f"{name}{'-taught' if t else ''}" for name, t in CASES])
def test_losses_and_gradients_are_those_of_the_cpu(name: str, taught: bool, drawn: str) -> None:
    here = loss_on(CPU, name, taught, drawn)
    with elsewhere() as there:
        found = loss_on(there, name, taught, drawn)
    torch.testing.assert_close(found, here, rtol=1e-10, atol=1e-12)


def samples(device: torch.device, name: str, drawn: str) -> Tensor:
    setup, process = SETUPS[name], PROCESS[name]
    model = for_samplers(TwoTimes().to(device), process).on(setup.process(process, 0.6))
    x = model.process.prior((16, 2), generator_on(device, drawn), dtype=torch.float64, device=device)
    steps = setup.phases if setup.edges is not None else 3
    return setup.sample(model, x, steps, generator_on(device, drawn), 0.6).x


WAYS = list({(s.sampler, s.edges is None, s.within, s.trig): name for name, s in SETUPS.items()}.values())


@generators
@pytest.mark.parametrize("name", WAYS)
def test_samples_of_every_kind_are_those_of_the_cpu(name: str, drawn: str) -> None:
    here = samples(CPU, name, drawn)
    with elsewhere() as there:
        found = samples(there, name, drawn)
        assert found.device == there
        torch.testing.assert_close(numbers(found), here, rtol=1e-10, atol=1e-12)


def sampled(device: torch.device, how: str, drawn: str) -> Tensor:
    process = EDM()
    model = for_samplers(TwoTimes().to(device), process)
    generator = generator_on(device, drawn)
    x = process.prior((8, 2), generator, dtype=torch.float64, device=device)
    grid = few_grid(process, 3)
    match how:
        case "one step":
            return samplers.one_step(model, x).x
        case "multistep":
            return samplers.multistep(model, x, grid.to(device), generator=generator).x
        case "phased":
            return samplers.phased(model, x, grid).x
        case "gamma":
            return samplers.gamma_sample(model, x, grid, 0.5, generator=generator).x
        case "tcd":
            return samplers.tcd_sample(model, x, grid, 0.3, generator=generator).x
        case "interpolation":
            weights = torch.linspace(0, 1, 5)
            return editing.interpolate(model, x[0], x[1], weights, grid, generator=generator).x
        case "inpainting":
            known = editing.inpainting(torch.tensor([True, False]))
            return editing.edit(model, x, known, grid, generator=generator).x
    metric = lambda levels: float(samplers.phased(model, x, levels).x.detach().square().mean())  # noqa: E731
    return samplers.search_levels(metric, process, 2, iterations=2).grid


@generators
@pytest.mark.parametrize(
    "how", ["one step", "multistep", "phased", "gamma", "tcd", "interpolation", "inpainting", "search"]
)
def test_samplers_and_editing_give_what_they_do_on_the_cpu(how: str, drawn: str) -> None:
    here = sampled(CPU, how, drawn)
    with elsewhere() as there:
        found = numbers(sampled(there, how, drawn))
    torch.testing.assert_close(found, here, rtol=1e-10, atol=1e-12)


def edited(device: torch.device, measurement: editing.Measurement, drawn: str) -> Tensor:
    y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    process = EDM()
    model = FlowMap(lambda x, t, s: 0.5 * x, process, "x0")
    return editing.edit(model, y, measurement, few_grid(process, 3), generator=generator_on(device, drawn)).x


@generators
@pytest.mark.parametrize("make", [editing.colourisation, lambda: editing.superresolution(2)], ids=["colour", "large"])
def test_pictures_are_edited_as_on_the_cpu(make: Any, drawn: str) -> None:
    here = edited(CPU, make(), drawn)
    with elsewhere() as there:
        found = numbers(edited(there, make(), drawn))
    torch.testing.assert_close(found, here)


def test_a_forgotten_device_is_refused() -> None:
    class Forgetful(EDM):
        def noise(self, shape: Any, t: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return torch.randn(shape, dtype=t.dtype)

    with elsewhere() as there:
        student = flow_map(TwoTimes().to(there), Forgetful())
        with pytest.raises(RuntimeError, match="one device"):
            SETUPS["ect"].loss(student, None, DATA.to(there), step=0, steps=STEPS)


def test_a_generator_that_draws_on_another_device_is_refused() -> None:
    with elsewhere() as there:
        for generator, device in ((torch.Generator(), there), (torch.Generator(there), CPU)):
            torch.randn(3, generator=generator, device=generator.device)
            with pytest.raises(RuntimeError, match="generator"):
                torch.randn(3, generator=generator, device=device)


def test_what_a_gpu_takes_is_taken_and_what_it_refuses_is_refused() -> None:
    with elsewhere() as there:
        x, y = torch.ones(3, device=there), torch.ones(3)
        for taken in (lambda: x + torch.tensor(2.0), lambda: x[torch.tensor([0, 2])], lambda: x.to(y) + y):
            taken()
        for refused in (
            lambda: x + y,
            lambda: torch.cat([x, y]),
            lambda: torch.where(y > 0, x, 0.0),
            lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
            lambda: y[torch.tensor([0, 2], device=there)],
            lambda: x.numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                refused()
