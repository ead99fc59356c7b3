"""TLCM: global consistency on the student's own samples, and the three terms that are added to it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from consilience.diffusion import EDM, Denoiser, GaussianMixture, Process, RectifiedFlow
from consilience.diffusion.consistency import FlowMap
from consilience.diffusion.consistency.objectives import tlcm as module
from consilience.diffusion.consistency.objectives.tlcm import discriminator_loss, own_samples, preference_loss, tlcm
from consilience.diffusion.consistency.objectives.trajectory import times

from .exact import check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, exact, exact_step, flow

DATA = gaussian().sample(60, generator())
TEACHER = gaussian(PROCESS)
every = pytest.mark.parametrize("process", [RectifiedFlow(), PROCESS, EDM()], ids=lambda p: type(p).__name__)


@every
def test_zero_at_the_exact_map_of_the_teacher(process: Process) -> None:
    teacher = gaussian(process)
    loss, log = tlcm(exact(process), teacher, DATA, generator(1), step=exact_step(process), fake=teacher)
    assert float(loss) < 1e-18
    assert log["matching"] == 0.0


def test_the_teachers_steps_leave_an_error_of_first_order() -> None:
    """The loss is its square: a ninth at three times the steps, near enough."""
    losses = [float(tlcm(exact(), TEACHER, DATA, generator(1), teacher_steps=n)[0]) for n in (3, 9, 27)]
    assert losses[0] > 6 * losses[1] > 40 * losses[2] > 0


def test_gradients_are_those_of_differences_with_the_target_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples have no gradient: they are fixed here, as the differences would move them."""
    fixed = (DATA, torch.randn(60, 2, dtype=torch.float64, generator=generator(5)))
    monkeypatch.setattr(module, "own_samples", lambda *_: fixed)
    check_gradient(lambda net, held: tlcm(flow(net), TEACHER, DATA, generator(3), target=flow(held))[0], TwoTime())


def test_the_samples_have_no_gradient() -> None:
    data, noise = own_samples(flow(TwoTime()), DATA, generator(), 4, times(PROCESS, 50))
    assert not data.requires_grad
    assert not noise.requires_grad


@every
def test_samples_are_renoised_with_the_noise_they_came_from(process: Process) -> None:
    """Algorithm 2, by hand: four times even on the grid, and one noise at each of them."""
    notes, grid = Notes(process), times(process, 12)
    data, noise = own_samples(notes.map, DATA, generator(2), 4, grid)
    torch.testing.assert_close(noise, torch.randn(60, 2, dtype=torch.float64, generator=generator(2)))
    assert [float(t[0]) for _, t, _, _ in notes.calls] == pytest.approx([float(grid[i]) for i in (0, 3, 6, 9)])
    torch.testing.assert_close(notes.calls[0][0], process.sigma(grid[0]) * noise)
    end = process.time(torch.zeros(60, dtype=torch.float64))
    for (x, t, _, _), (y, u, _, _) in zip(notes.calls, notes.calls[1:], strict=False):
        clean = exact(process)(x, t, end)
        torch.testing.assert_close(y, process.add_noise(clean, noise, u))
    torch.testing.assert_close(data, exact(process)(notes.calls[-1][0], notes.calls[-1][1], end))


def test_the_two_times_are_neighbouring_edges_of_segments_and_the_data_do_not_matter() -> None:
    grid, notes = times(PROCESS, 50), Notes()
    loss, _ = tlcm(notes.map, TEACHER, DATA, generator(2), grid=grid, segments=5)
    other, _ = tlcm(notes.map, TEACHER, DATA + 3, generator(2), grid=grid, segments=5)
    assert float(loss) == float(other)
    (_, t, _, _), (_, u, _, _) = notes.calls[4:6]
    places = [int((grid - v).abs().argmin()) for v in t]
    assert set(places) == {0, 10, 20, 30, 40}
    torch.testing.assert_close(t, grid[places])
    after = grid[[i + 10 for i in places]].clamp(min=PROCESS.t_min)  # without noise the map is not asked
    torch.testing.assert_close(u, after)


def test_the_preference_is_satisfied_beyond_the_margins() -> None:
    right, wrong = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([17.0, 10.0], [-1.0, 2.0]))
    loss = preference_loss(right, wrong)
    assert float(loss.detach()) == pytest.approx((0 + 6 + 0 + 2) / 2)
    slopes = torch.autograd.grad(loss, [right, wrong])
    assert [g.tolist() for g in slopes] == [[0.0, -0.5], [0.0, 0.5]]
    assert float(preference_loss(torch.full((3,), 5.0), torch.zeros(3), margin=5.0)) == 0.0


def shifted() -> GaussianMixture:
    return GaussianMixture(TEACHER.weights, TEACHER.means + 0.5, TEACHER.covariances, PROCESS)


def extras(form: Tensor) -> dict[str, dict[str, Any]]:
    return {
        "preference": {"scores": lambda x: (x[:, 0], x[:, 1]), "margin": 3.0},
        "matching": {"fake": shifted()},
        "adversarial": {"discriminator": lambda x, t: t * torch.tanh(x @ form)},
    }


@pytest.mark.parametrize("name", ["preference", "matching", "adversarial"])
def test_each_term_is_optional_and_reaches_the_student_alone(name: str) -> None:
    net, form = TwoTime(), torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    place = ["preference", "matching", "adversarial"].index(name)

    def slopes(weight: float | None) -> tuple[float, dict[str, float], list[Tensor]]:
        weights = tuple(0.0 if i != place else weight for i in range(3))
        more = {} if weight is None else {**extras(form)[name], "weights": weights}
        loss, log = tlcm(flow(net), TEACHER, DATA, generator(1), **more)
        found = torch.autograd.grad(loss, [*net.parameters(), form], allow_unused=True)
        return float(loss.detach()), log, list(found)

    plain, bare, without = slopes(None)
    loss, log, with_ = slopes(0.7)
    assert name not in bare
    assert loss == pytest.approx(plain + log[name])
    assert log[name] != 0
    assert with_[-1] is None
    assert max(float((a - b).abs().max()) for a, b in zip(with_[:-1], without[:-1], strict=True)) > 1e-5
    _, double, twice = slopes(1.4)
    assert double[name] == pytest.approx(2 * log[name])
    _, _, none = slopes(0.0)
    for a, b, c, d in zip(without[:-1], with_[:-1], twice[:-1], none[:-1], strict=True):
        torch.testing.assert_close(c - a, 2 * (b - a), rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(d, a)


def test_the_matching_moves_data_from_what_the_fake_score_likes_to_what_the_teacher_does() -> None:
    """The student makes data about the fake's mean, 0.5 above the teacher's; a step down the gradient lowers them."""
    fake = shifted()
    offset = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    inner = FlowMap(
        lambda x, t, s, **_: exact().function(x, t, s) - offset, PROCESS, "flow"
    )  # flow is noise - data: less of it is more data
    arguments = {"fake": fake, "weights": (0.0, 1.0, 0.0), "step": exact_step()}
    plain = tlcm(inner, TEACHER, DATA, generator(1), step=exact_step())[0]
    loss = tlcm(inner, TEACHER, DATA, generator(1), **arguments)[0]
    (slope,) = torch.autograd.grad(loss - plain, offset)
    assert bool((slope > 0).all())


def test_the_discriminator_tells_the_students_one_step_from_its_many() -> None:
    net, form = TwoTime(), torch.tensor([0.5, -0.3], dtype=torch.float64, requires_grad=True)
    seen: list[tuple[Tensor, Tensor]] = []

    def discriminator(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x @ form

    loss, log = discriminator_loss(flow(net), DATA, generator(1), discriminator=discriminator)
    (made, one), (real, other) = seen
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    expected = -(torch.sigmoid(real @ form).log().mean() + torch.sigmoid(-(made @ form)).log().mean())
    torch.testing.assert_close(loss, expected)
    assert log["loss"] == pytest.approx(float(loss.detach()))
    assert not made.requires_grad
    assert not real.requires_grad
    assert float(torch.autograd.grad(loss, form)[0].abs().sum()) > 0
    blind, _ = discriminator_loss(flow(net), DATA, generator(1), discriminator=lambda x, t: 0 * x[:, 0])
    assert float(blind) == pytest.approx(2 * math.log(2))


def test_at_the_exact_map_one_step_and_many_have_one_law() -> None:
    """Means of 20 batches of 400: within 5 standard errors (false alarm below 1e-5), and off the exact map not."""
    off = FlowMap(lambda x, t, s: exact().function(x, t, s) + (t > 0.9)[:, None] * 0.8, PROCESS, "flow")
    scores = []
    for model in (exact(), off):
        means: list[float] = []

        def discriminator(x: Tensor, t: Tensor, means: list[float] = means) -> Tensor:
            means.append(float((x * (t < 0.3)[:, None]).sum() / (t < 0.3).sum()))
            return torch.zeros(len(x), dtype=torch.float64)

        for seed in range(20):
            discriminator_loss(model, torch.zeros(400, 2).double(), generator(seed), discriminator=discriminator)
        values = torch.tensor(means[::2]) - torch.tensor(means[1::2])
        scores.append(abs(float(values.mean() / (values.std() / math.sqrt(20)))))
    assert scores[0] < 5 < scores[1]


def test_the_teacher_may_be_on_another_process() -> None:
    model: Denoiser = gaussian()
    assert float(tlcm(exact(), model, DATA, generator(1), step=exact_step(), fake=model)[0]) < 1e-12


@pytest.mark.parametrize("bad", [{"teacher": None}, {"segments": 0}, {"student_steps": 0}, {"teacher_steps": 0}])
def test_what_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need a segment|distils a teacher"):
        tlcm(exact(), bad.pop("teacher", TEACHER), DATA, generator(), **bad)
