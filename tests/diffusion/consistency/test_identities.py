"""Every objective against the laws of its kind, and every known mistake, planted, against them: none goes unseen."""

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from consilience.diffusion import EDM, Process, VPLinear
from consilience.diffusion.consistency import exact_map
from consilience.testing import few_steps as laws

from .exact import Net, student

with patch.object(sys, "path", [str(Path(__file__).parents[3] / "benchmarks"), *sys.path]):
    bench: Any = importlib.import_module("few_steps_identities")

torch.set_num_threads(1)
everyone = pytest.mark.parametrize("name", list(bench.CASES))

NONE = {
    "no boundary": {"nct"},  # its boundary is learned
    "unshared noise": {"sct", "mlcm", "tlcm", "scott", "ayf", "rcm", "scflow", "dcm"},  # a step from the first state
    "ratio stuck": {"scm", "rcm", "nct"},  # one time
    "swapped s and t": {"scm", "rcm"},
    "no stop-gradient": set(),
}
WEIGHTED = {"ict", "ect", "sct", "slct", "vct", "epg", "multistepcm", "meanflow"}


@everyone
def test_all_laws_hold(name: str) -> None:
    case = bench.CASES[name]
    assert bench.broken(case) == []
    error = bench.identity(case)
    assert error is None or error < 1e-9
    for attention in (False, True):
        off = bench.jvp(case, attention)
        assert off is None or off < 1e-4


@everyone
@pytest.mark.parametrize("mistake", bench.MISTAKES)
def test_a_planted_mistake_is_seen(name: str, mistake: str) -> None:
    found = bench.noticed(bench.CASES[name], mistake)
    absent = name not in WEIGHTED if mistake == "missing weight" else name in NONE[mistake]
    assert found is None if absent else found


@pytest.mark.parametrize("mistake", ["unshared noise", "no stop-gradient", "missing weight"])
def test_what_was_planted_is_gone_afterwards(mistake: Any) -> None:
    case = bench.CASES["ict"]
    before = case.loss(case.map(Net()), None, bench.data(EDM(), 8), laws.generator(1))[0]
    with laws.planted(mistake):
        pass
    after = case.loss(case.map(Net()), None, bench.data(EDM(), 8), laws.generator(1))[0]
    assert torch.equal(before, after)
    assert not torch.zeros(1, requires_grad=True).detach().requires_grad


def test_the_expectation_of_a_distance_is_that_of_samples() -> None:
    """200,000 samples of three shapes, within 5 standard errors (false alarm below 1e-5)."""
    variances = torch.tensor([[1.0, 0.3, 0.01], [1.0, 0.05, 1e-6]], dtype=torch.float64)
    found = laws.expected(torch.sqrt, variances)
    z = torch.randn(200_000, 2, dtype=torch.float64, generator=laws.generator())
    for row, value in zip(variances.T, found, strict=True):
        sizes = (z * row.sqrt()).norm(dim=1)
        assert abs(float(sizes.mean() - value)) < 5 * float(sizes.std()) / 200_000**0.5


@pytest.mark.parametrize("process", [EDM(), VPLinear()], ids=lambda p: type(p).__name__)
def test_the_difference_of_two_ends_is_that_of_samples(process: Process) -> None:
    """The sum of the variances over 20,000 pairs of one noise, within 5 standard errors."""
    count = 20_000
    t, u, s = (process.time(torch.full((count,), r, dtype=torch.float64)) for r in (2.0, 0.7, 0.3))
    x0 = laws.gaussian().sample(count, laws.generator())
    noise = torch.randn(count, 2, dtype=torch.float64, generator=laws.generator(1))
    model = exact_map(laws.gaussian(process))
    ends = [model(process.add_noise(x0, noise, at), at, s) for at in (t, u)]
    off = (ends[0] - ends[1]).square().sum(1)
    expected = float(laws.difference(process, t[:1], u[:1], s[:1]).sum())
    assert abs(float(off.mean()) - expected) < 5 * float(off.std()) / count**0.5


def test_a_recorder_tells_what_a_map_was_asked() -> None:
    recorder = laws.Recorder(student(Net()))
    x, t = torch.ones(3, 2, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    recorder.map.x0(x, t)
    with torch.no_grad():
        recorder.map.x0(2 * x, t / 2)
    one, other = recorder.calls
    assert one.learning
    assert not other.learning
    assert torch.equal(other.x, 2 * x)
    assert torch.equal(other.t, t / 2)
