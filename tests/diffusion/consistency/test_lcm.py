"""Latent consistency models: guidance drawn per sample, the skipped steps, fine-tuning, the embedding."""

import pytest
import torch
from torch import Tensor

from consilience.diffusion import Denoiser, GaussianMixture
from consilience.diffusion.consistency import FlowMap, exact_map
from consilience.diffusion.consistency.objectives.lcm import guidance_embedding, lcm
from consilience.diffusion.consistency.shared import squared
from consilience.diffusion.guidance import classifier_free

from .exact import COVARIANCE, check_gradient, gaussian, generator
from .jumps import PROCESS, Notes, TwoTime, flow

DATA = gaussian().sample(60, generator())


def centred(shift: float) -> GaussianMixture:
    mean = torch.full((1, 2), shift, dtype=torch.float64)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), mean, COVARIANCE[None], PROCESS)


def conditional(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    """The exact denoiser of data around ``shift``: classes of one covariance, whose guided field is again exact."""
    at = PROCESS.alpha(t)
    moved = at.expand(len(x))[:, None] * shift[:, None]
    return centred(0.0).x0(x - moved, t) + shift[:, None]


TEACHER = Denoiser(conditional, PROCESS, "x0")
BATCH = {"x": DATA, "shift": torch.full((60,), 1.5, dtype=torch.float64)}


def guided_map() -> FlowMap:
    """The exact end of (1 + w) D_shift - w D_0: the trajectory of data around (1 + w) shift."""
    inner = exact_map(centred(0.0))

    def predict(x: Tensor, t: Tensor, s: Tensor, shift: Tensor, w: Tensor) -> Tensor:
        centre = ((1 + w) * shift)[:, None]
        found = inner(x - PROCESS.alpha(t)[:, None] * centre, t, s) + PROCESS.alpha(s)[:, None] * centre
        keep = (PROCESS.alpha(s) + PROCESS.sigma(s)) / (PROCESS.alpha(t) + PROCESS.sigma(t))
        gain = (PROCESS.alpha(t) * PROCESS.sigma(s) - PROCESS.sigma(t) * PROCESS.alpha(s)) / (
            PROCESS.alpha(t) + PROCESS.sigma(t)
        )
        return (found - keep[:, None] * x) / gain[:, None]

    return FlowMap(predict, PROCESS, "flow")


def test_near_zero_at_the_exact_guided_map_and_only_there() -> None:
    """What is left of the teacher's DDIM steps falls as their squared error: by 4 or more for twice the steps."""
    coarse, fine = (
        float(
            lcm(
                guided_map(), TEACHER, BATCH, generator(1), null={"shift": 0.0}, skip=1, distance=squared,
                grid=torch.linspace(0.6, 0.0, n + 1, dtype=torch.float64),
            )[0]
        )
        for n in (200, 400)
    )  # fmt: skip
    assert fine < coarse / 4
    assert fine < 1e-3
    wrong = FlowMap(lambda x, t, s, shift, w: guided_map().function(x, t, s, shift=shift, w=w + 1), PROCESS, "flow")
    grid = torch.linspace(0.6, 0.0, 401, dtype=torch.float64)
    off = lcm(wrong, TEACHER, BATCH, generator(1), null={"shift": 0.0}, skip=1, distance=squared, grid=grid)[0]
    assert float(off) > 3 * fine


@pytest.mark.parametrize("taught", [True, False])
def test_gradients_are_those_of_differences_with_the_target_held(taught: bool) -> None:
    teacher = TEACHER if taught else None
    check_gradient(
        lambda net, held: lcm(
            flow(net), teacher, BATCH, generator(3), target=flow(held), null={"shift": 0.0}, w=(0.0, 1.0)
        )[0],
        TwoTime(),
    )


def test_student_and_target_see_one_scale_per_sample_in_the_range() -> None:
    notes = Notes()
    lcm(notes.map, TEACHER, BATCH, generator(1), null={"shift": 0.0})
    first, second = (call[3]["w"] for call in notes.calls)
    assert torch.equal(first, second)
    assert len(first.unique()) == 60
    assert 2 <= float(first.min()) < 4
    assert 12 < float(first.max()) <= 14


def test_the_target_starts_where_the_guided_teacher_steps_to() -> None:
    """At one scale: the state at u is a DDIM step of `classifier_free` with scale 1 + w."""
    notes = Notes()
    grid = torch.linspace(0.9, 0.0, 11, dtype=torch.float64)
    lcm(notes.map, TEACHER, BATCH, generator(1), null={"shift": 0.0}, w=(3.0, 3.0), skip=4, grid=grid)
    (x_t, t, _, _), (x_u, u, s, _) = notes.calls
    guided = classifier_free(TEACHER, 4.0, {"shift": 0.0})
    x0, eps = (guided.predict(kind, x_t, t, shift=BATCH["shift"]) for kind in ("x0", "eps"))
    inner = (u < t) & (u > PROCESS.t_min)  # without noise the map is not asked
    expected = PROCESS.alpha(u)[:, None] * x0 + PROCESS.sigma(u)[:, None] * eps
    torch.testing.assert_close(x_u[inner], expected[inner])
    place = {float(v): i for i, v in enumerate(grid)}
    steps = {place[float(b)] - place[float(a)] for a, b in zip(t[inner], u[inner], strict=True)}
    assert steps == {4}
    assert bool((s == 0).all())
    assert int(inner.sum()) > 10


def test_fine_tuning_shares_datum_and_noise() -> None:
    notes = Notes()
    lcm(notes.map, None, BATCH, generator(1), skip=100)
    (x_t, t, _, _), (x_u, u, _, _) = notes.calls
    inner = (u < t) & (u > PROCESS.t_min)  # without noise the map is not asked
    noise = [
        (x[inner] - PROCESS.alpha(v)[inner, None] * DATA[inner]) / PROCESS.sigma(v)[inner, None]
        for x, v in ((x_t, t), (x_u, u))
    ]
    torch.testing.assert_close(*noise)


def test_the_embedding_is_sines_and_cosines_at_geometric_rates() -> None:
    w = torch.tensor([0.0, 0.002, 7.5], dtype=torch.float64)
    found = guidance_embedding(w, 8)
    assert found.shape == (3, 8)
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    rates = torch.tensor([1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4], dtype=torch.float64)
    torch.testing.assert_close(found[1], torch.cat([torch.sin(2 * rates), torch.cos(2 * rates)]))
    torch.testing.assert_close(found.square().sum(1), torch.full((3,), 4.0, dtype=torch.float64))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="needs null"):
        lcm(guided_map(), TEACHER, BATCH, generator())
    with pytest.raises(ValueError, match="low to high"):
        lcm(guided_map(), None, BATCH, generator(), w=(3.0, 2.0))
    with pytest.raises(ValueError, match="dim must"):
        guidance_embedding(torch.ones(1), 5)
