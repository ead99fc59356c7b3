"""Stable consistency tuning: between plain tuning and distillation from the exact score."""

import pytest
import torch

from consilience.diffusion import EDM, GaussianMixture, Process, RectifiedFlow, VPLinear
from consilience.diffusion.consistency import exact_map
from consilience.diffusion.consistency.objectives.ect import ect, jump
from consilience.diffusion.consistency.objectives.sct import posterior_mean, sct

from .exact import Net, check_gradient, gaussian, generator, student

PROCESSES: list[Process] = [EDM(), VPLinear(), RectifiedFlow()]
named = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


@named
def test_alone_it_is_easy_consistency_tuning(process: Process) -> None:
    """With one sample and no reference there is nothing to average; far-away reference data change nothing."""
    net = Net()
    for seed in range(5):
        data = gaussian().sample(1, generator(seed))
        plain, _ = ect(student(net, process), None, data, generator(9), decay=0.05)
        alone, _ = sct(student(net, process), None, data, generator(9), decay=0.05)
        far, _ = sct(student(net, process), None, data, generator(9), decay=0.05, reference=data + 1e6)
        torch.testing.assert_close(alone, plain, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(far, plain, rtol=1e-9, atol=1e-11)


@named
def test_the_mean_over_a_batch_is_that_of_a_mixture_of_its_points(process: Process) -> None:
    data = gaussian().sample(40, generator())
    p = jump(process, data, generator(1), 0.1, -1.1, 2.0)
    points = GaussianMixture(torch.full((40,), 1 / 40).double(), data, torch.zeros(40, 2, 2).double(), process)
    torch.testing.assert_close(posterior_mean(process, p), points.x0(p.x_t, p.t), rtol=1e-6, atol=1e-8)


def test_a_references_mean_counts_each_samples_own_datum_once_more() -> None:
    """Against loops over samples and references."""
    data, others = gaussian().sample(5, generator()), gaussian().sample(7, generator(1))
    p = jump(EDM(), data, generator(2), 0.1, 0.0, 1.0)
    found = posterior_mean(EDM(), p, others)
    for i in range(5):
        candidates = [data[i], *others]
        chances = torch.stack([torch.exp(-((p.x_t[i] - x) ** 2).sum() / (2 * p.t[i] ** 2)) for x in candidates])
        mean = sum(c * x for c, x in zip(chances / chances.sum(), candidates, strict=True))
        torch.testing.assert_close(found[i], mean, rtol=1e-9, atol=1e-10)


def test_more_reference_data_lower_the_floor_to_that_of_distillation() -> None:
    """At the exact map: E ||ends' difference||^2 falls from tuning's towards that of an Euler step of the exact ODE."""
    teacher = gaussian()
    flow, data = exact_map(teacher), teacher.sample(300, generator())
    floors = []
    for count in (1, 30, 3000):
        _, log = sct(flow, None, data, generator(1), decay=2**-5, reference=teacher.sample(count, generator(2)))
        floors.append(log["difference"])
    _, plain = ect(flow, None, data, generator(1), decay=2**-5)
    assert floors[2] < 0.25 * floors[1] < 0.25 * floors[0] < 0.26 * plain["difference"]


def test_only_data_of_the_same_condition_serve() -> None:
    """Two far labels near each other in space: a mean over both (planted) is another one."""
    data, labels = gaussian().sample(40, generator()), torch.arange(40) % 2
    p = jump(EDM(), {"x": data, "label": labels}, generator(1), 0.1, 0.0, 1.0)
    found = posterior_mean(EDM(), p)
    for label in (0, 1):
        mine = labels == label
        part = p._replace(x0=p.x0[mine], x_t=p.x_t[mine], t=p.t[mine], cond={})
        torch.testing.assert_close(found[mine], posterior_mean(EDM(), part), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, posterior_mean(EDM(), p._replace(cond={})), atol=1e-3)
    with pytest.raises(ValueError, match="lack the condition 'label'"):
        posterior_mean(EDM(), p, data)


def test_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher"):
        sct(exact_map(gaussian()), gaussian(), gaussian().sample(4, generator()), generator())


def test_gradients_are_those_of_differences_with_the_target_held() -> None:
    data = gaussian().sample(12, generator())
    check_gradient(
        lambda net, held: sct(student(net), None, data, generator(3), target=student(held), decay=0.05)[0], Net()
    )
