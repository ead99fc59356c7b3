"""Denoising of boxes: overlap, suppression, assignment, padding, renewal, the boundary, and a detector that finds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from consilience.diffusion.applications.boxes.geometry import corners, overlaps, pairwise_iou, suppress
from consilience.diffusion.applications.boxes.matching import (
    Detections,
    Predictions,
    assign,
    average_precision,
    costs,
    focal,
    mean_iou,
    set_loss,
)
from consilience.diffusion.applications.boxes.model import (
    CONSISTENCY,
    DIFFUSION,
    Detector,
    box_map,
    moved,
    pool,
)
from consilience.diffusion.applications.boxes.pretraining import SIDES_WEIGHT, Dense, dense_loss, targets
from consilience.diffusion.applications.boxes.sampling import detect, joined, renewed, step_grid
from consilience.diffusion.applications.boxes.scenes import (
    CLASSES,
    ELLIPSE,
    MOST,
    SIZE,
    Scenes,
    object_mask,
    scenes,
)
from consilience.diffusion.applications.boxes.training import consistency_loss, diffusion_loss, padded, padding
from consilience.diffusion.consistency.curriculum import karras_levels
from consilience.diffusion.training import train

torch.set_num_threads(1)

PIXEL_BOX = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 8), st.integers(1, 8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_pixels(*boxes: tuple[int, int, int, int]) -> Tensor:
    """Boxes (corner and size, in pixels of a 20 x 20 image) as parts of it."""
    rows = [((x + w / 2) / 20, (y + h / 2) / 20, w / 20, h / 20) for x, y, w, h in boxes]
    return torch.tensor(rows, dtype=torch.float64)


def batch(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    made = scenes(count, np.random.default_rng(seed))
    return {"x": made.images, "boxes": made.boxes, "labels": made.labels, "counts": made.counts}


# -------------------------------------------------------------------------------------------------------- geometry


@given(PIXEL_BOX, PIXEL_BOX)
def test_overlaps_count_pixels(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> None:
    """Intersection, union and hull counted pixel by pixel; symmetric; 1 for a box with itself."""

    def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
        x, y, w, h = box
        return set(itertools.product(range(x, x + w), range(y, y + h)))

    both, either = pixels(a) & pixels(b), pixels(a) | pixels(b)
    xs, ys = zip(*either, strict=True)
    hull = (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
    one, other = of_pixels(a), of_pixels(b)
    iou, generalised = overlaps(one, other)
    assert float(iou) == pytest.approx(len(both) / len(either), abs=1e-9)
    assert float(generalised) == pytest.approx(len(both) / len(either) - (hull - len(either)) / hull, abs=1e-9)
    assert torch.allclose(torch.stack(overlaps(one, other)), torch.stack(overlaps(other, one)))
    assert torch.allclose(torch.stack(overlaps(one, one)), torch.ones(2, 1, dtype=torch.float64))


@given(st.lists(PIXEL_BOX, min_size=2, max_size=2), st.integers(-3, 3), st.floats(0.2, 3))
def test_overlap_does_not_know_where_or_how_large(
    boxes: list[tuple[int, int, int, int]], by: int, scale: float
) -> None:
    pair = of_pixels(*boxes)
    changed = pair * scale + torch.tensor([by, by, 0, 0])
    assert torch.allclose(pairwise_iou(changed, changed), pairwise_iou(pair, pair), atol=1e-9)


def test_boxes_apart_still_pull_each_other() -> None:
    """The generalised overlap has a gradient where the plain one has none, and pulls towards the other box."""
    box = torch.tensor([0.2, 0.5, 0.1, 0.1], requires_grad=True)
    other = torch.tensor([0.8, 0.5, 0.1, 0.1])
    iou, generalised = overlaps(box, other)
    assert float(iou.detach()) == 0
    (pull,) = torch.autograd.grad(generalised, box)
    assert pull[0] > 0


@settings(max_examples=40, deadline=None)
@given(st.lists(PIXEL_BOX, min_size=1, max_size=7), st.integers(0, 1000), st.sampled_from([0.2, 0.5]))
def test_suppression_keeps_the_best_and_nothing_beside_it(
    found: list[tuple[int, int, int, int]], seed: int, threshold: float
) -> None:
    """No kept pair of a label overlaps more than the threshold; each dropped box has a better one kept that does."""
    boxes, rng = of_pixels(*found), np.random.default_rng(seed)
    scores = torch.from_numpy(rng.permutation(len(found)).astype(float))
    labels = torch.from_numpy(rng.integers(0, 2, len(found)))
    kept = suppress(boxes, scores, labels, threshold)
    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    rivals = (pairwise_iou(boxes, boxes) > threshold) & (labels[:, None] == labels)
    for one, other in itertools.combinations(kept.tolist(), 2):
        assert not rivals[one, other]
    for lost in set(range(len(found))) - set(kept.tolist()):
        assert any(rivals[lost, k] and scores[k] > scores[lost] for k in kept.tolist())


def test_pooling_a_linear_image_gives_its_values_in_the_cells_middles() -> None:
    """Bilinear interpolation is exact on a plane: features 2 x + 3 y at the middles of 2 x 2 cells."""
    middle = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    plane = (2 * middle[None, :] + 3 * middle[:, None])[None, None]
    boxes = torch.tensor([[[0.5, 0.4, 0.4, 0.2], [0.3, 0.6, 0.2, 0.4]]], dtype=torch.float64)
    found = pool(plane, boxes, 2)
    assert found.shape == (1, 2, 1, 4)
    for k, (x, y, w, h) in enumerate(boxes[0].tolist()):
        wanted = [2 * (x + i * w / 4) + 3 * (y + j * h / 4) for j in (-1, 1) for i in (-1, 1)]
        assert torch.allclose(found[0, k, 0], torch.tensor(wanted, dtype=torch.float64))


def test_a_move_of_nothing_moves_nothing() -> None:
    boxes = padding((3, 5), generator())
    assert torch.allclose(moved(boxes, torch.zeros_like(boxes)), boxes)
    there = moved(boxes, torch.tensor([1.0, -0.5, 0.0, 0.0]).expand_as(boxes))
    assert torch.allclose(there[..., 0] - boxes[..., 0], boxes[..., 2].clamp(min=1e-3), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- scenes


@given(st.integers(5, 20), st.integers(5, 20), st.integers(0, 28), st.integers(0, 28), st.sampled_from([0, ELLIPSE]))
def test_a_box_bounds_the_pixels_of_its_object(wide: int, high: int, left: int, top: int, label: int) -> None:
    """The first and last rows and columns of a mask are the box's edges; an ellipse fills about pi / 4 of it."""
    mask = object_mask(np.array([left + wide / 2, top + high / 2, wide, high]), label)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == [left, top, left + wide, top + high]
    share = mask.sum() / (wide * high)
    assert share == pytest.approx(np.pi / 4, abs=0.12) if label == ELLIPSE else share == 1


def test_an_object_stands_out_from_its_ground() -> None:
    """The pixels in the boxes differ from the median of the picture, those outside all of them hardly do."""
    made = scenes(100, np.random.default_rng(1))
    away = (made.images - made.images.flatten(2).median(2).values[:, :, None, None]).abs().amax(1)
    middle = (torch.arange(SIZE) + 0.5) / SIZE
    edges = corners(made.boxes)
    across, down = ((middle > edges[..., k, None]) & (middle < edges[..., k + 2, None]) for k in (0, 1))
    inside = (across[:, :, None, :] & down[:, :, :, None]).any(1)
    assert float(away[inside].median()) > 3 * float(away[~inside].median())


def test_scenes_are_their_seeds_and_their_padding_is_marked() -> None:
    one, same = (scenes(50, np.random.default_rng(4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    real = torch.arange(MOST) < one.counts[:, None]
    assert (one.labels[real] >= 0).all()
    assert (one.labels[~real] == -1).all()
    assert (one.boxes[~real] == 0).all()
    assert int(one.counts.min()) >= 1
    assert set(one.labels[real].tolist()) == set(range(CLASSES))
    for boxes, count in zip(one.boxes, one.counts, strict=True):
        assert float(pairwise_iou(boxes[:count], boxes[:count]).fill_diagonal_(0).max()) < 0.1


# -------------------------------------------------------------------------------------------------------- matching


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([1, 2]))
def test_the_assignment_is_the_cheapest_of_all(seed: int, objects: int, repeat: int) -> None:
    """Against every one-to-one map of the copied objects to seven predictions."""
    rng = np.random.default_rng(seed)
    n = 5 if repeat * objects > 4 else 6
    n = max(n, repeat * objects)
    cost = torch.from_numpy(rng.normal(size=(1, n, 4)))
    scene, place, column = assign(cost, torch.tensor([objects]), repeat)
    copies = [k for k in range(objects) for _ in range(repeat)]
    best = min(
        sum(float(cost[0, i, k]) for i, k in zip(places, copies, strict=True))
        for places in itertools.permutations(range(n), len(copies))
    )
    assert float(cost[scene, place, column].sum()) == pytest.approx(best)
    assert len(set(place.tolist())) == len(place)
    assert sorted(column.tolist()) == copies


def test_a_cost_is_the_loss_of_its_own_assignment() -> None:
    """The set loss of one prediction and one object is its cost plus what does not depend on the assignment."""
    found = Predictions(padding((1, 1), generator(1)), torch.randn(1, 1, CLASSES, generator=generator(2)))
    boxes, labels, counts = padding((1, 1), generator(3)), torch.tensor([[1]]), torch.tensor([1])
    rest = 2.0 * float(focal(found.logits, torch.zeros_like(found.logits)).sum()) + 2.0
    loss = float(set_loss(found, boxes, labels, counts))
    assert loss == pytest.approx(float(costs(found, boxes, labels)) + rest, rel=1e-5)


def test_focal_loss_without_focus_is_a_quarter_or_three_of_the_entropy() -> None:
    """Where the chance is 1/2 the factor is (1/2)^2; a sure and right logit costs nothing."""
    half = focal(torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert half.tolist() == pytest.approx([0.25 * 0.25 * np.log(2), 0.75 * 0.25 * np.log(2)])
    assert float(focal(torch.tensor([30.0]), torch.tensor([1.0]))) < 1e-10


def test_too_few_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be shared"):
        assign(torch.zeros(1, 3, 4), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="more than 2 boxes"):
        padded(torch.zeros(1, 4, 4), torch.tensor([3]), 2)


def truth() -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.zeros(2, 3, 4, dtype=torch.float64)
    boxes[0, :2] = of_pixels((0, 0, 6, 6), (10, 10, 5, 5))
    boxes[1, :1] = of_pixels((3, 3, 8, 4))
    return boxes, torch.tensor([[0, 0, -1], [0, -1, -1]]), torch.tensor([2, 1])


def found(rows: list[tuple[Tensor, float]]) -> Detections:
    if not rows:
        return Detections(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    boxes = torch.cat([box for box, _ in rows])
    return Detections(boxes, torch.tensor([score for _, score in rows]), torch.zeros(len(rows), dtype=torch.long))


def test_measures_of_worked_cases() -> None:
    """All right is 1; nothing is 0; a wrong one scored below the right ones does not count, above them it does."""
    boxes, labels, counts = truth()
    right = [found([(boxes[0, :1], 0.9), (boxes[0, 1:2], 0.8)]), found([(boxes[1, :1], 0.7)])]
    assert average_precision(right, boxes, labels, counts) == pytest.approx(1)
    assert mean_iou(right, boxes, counts) == pytest.approx(1)
    nothing = [found([]), found([])]
    assert average_precision(nothing, boxes, labels, counts) == 0
    assert mean_iou(nothing, boxes, counts) == 0
    wrong = of_pixels((15, 0, 4, 4))
    late = [right[0], found([(boxes[1, :1], 0.7), (wrong, 0.6)])]
    early = [right[0], found([(boxes[1, :1], 0.7), (wrong, 0.95)])]
    assert average_precision(late, boxes, labels, counts) == pytest.approx(1)
    assert average_precision(early, boxes, labels, counts) == pytest.approx(3 / 4)
    assert mean_iou(late, boxes, counts) == pytest.approx(1)
    assert mean_iou(early, boxes, counts) == pytest.approx(2 / 3)  # the best scored of the second scene is wrong
    twice = [found([(boxes[0, :1], 0.9), (boxes[0, :1], 0.85), (boxes[0, 1:2], 0.8)]), right[1]]
    assert average_precision(twice, boxes, labels, counts) == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)


# ------------------------------------------------------------------------------------------ padding, renewal, noise


def test_padding_keeps_the_truth_and_is_normal_beside_it() -> None:
    """Kolmogorov-Smirnov at a false alarm rate of 1e-4 for centres about 1/2 with a deviation of 1/6."""
    boxes, counts = torch.rand(400, MOST, 4, generator=generator(1)), torch.arange(400) % (MOST + 1)
    made = padded(boxes, counts, 16, generator(2))
    real = torch.arange(16) < counts[:, None]
    assert torch.equal(made[real], boxes[torch.arange(MOST) < counts[:, None]])
    fresh = made[~real]
    assert stats.kstest(fresh[:, :2].flatten().numpy(), stats.norm(0.5, 1 / 6).cdf).pvalue > 1e-4
    assert (fresh[:, 2:] > 0).all()


def test_only_poor_boxes_are_renewed_and_by_noised_padding() -> None:
    """At a late time new boxes are padding itself; at the first they are the process's prior (KS, rate 1e-4 each)."""
    x = torch.full((300, 8, 4), 7.0)
    logits = torch.full((300, 8, CLASSES), -3.0)
    logits[:, ::2, 1] = 2.0
    for noising in (CONSISTENCY, DIFFUSION):
        late, early = (torch.tensor(t) for t in (noising.process.t_min, noising.process.t_max))
        kept = renewed(x, logits, late, noising, generator())
        assert (kept[:, ::2] == 7).all()
        assert (kept[:, 1::2] != 7).all()
        centre = noising.boxes(kept[:, 1::2])[..., :2].flatten()
        inner = centre[(centre > 0) & (centre < 1)]
        normal = stats.norm(0.5, 1 / 6)
        bounded = stats.truncnorm(-3, 3, 0.5, 1 / 6)
        assert stats.kstest(inner.numpy(), bounded.cdf).pvalue > 1e-4
        assert normal.std() == pytest.approx(1 / 6)
        first = renewed(x, logits, early, noising, generator(1))[:, 1::2].flatten()
        spread = float(noising.process.sigma(early))
        assert stats.kstest(first.numpy(), stats.norm(0, spread).cdf).pvalue > 1e-4


@given(st.lists(st.floats(0.05, 0.95), min_size=4, max_size=4))
def test_the_signal_is_the_box_again(values: list[float]) -> None:
    box = torch.tensor(values, dtype=torch.float64)
    for noising in (CONSISTENCY, DIFFUSION):
        assert torch.allclose(noising.boxes(noising.signal(box)), box)


def test_without_noise_the_decoder_looks_where_the_box_is() -> None:
    """And from much noise at normal boxes within the image, not all at its edges."""
    box = torch.tensor([[[0.3, 0.6, 0.2, 0.4]]])
    for noising in (CONSISTENCY, DIFFUSION):
        t = torch.tensor([noising.process.t_min])
        x = noising.process.alpha(t)[:, None, None] * noising.signal(box)
        assert torch.allclose(noising.proposals(x, t), box, atol=2e-3)
        top = torch.tensor(noising.process.t_max)
        far = noising.proposals(noising.process.prior((500, 1, 4), generator()), top)[..., 0]
        inside = (far > 0) & (far < 1)
        assert inside.float().mean() > 0.9
        assert 0.2 < float(far[inside].std()) < 0.3


# ----------------------------------------------------------------------------------------------------- the detector


def test_at_the_least_noise_the_map_is_the_identity() -> None:
    """f(x, eps) = x whatever the image; above it the decoder's boxes are what counts."""
    torch.manual_seed(0)
    detector = Detector(8, 16)
    features = detector.features(batch()["x"])
    x = torch.randn(4, 5, 4, generator=generator())
    model = box_map(detector, CONSISTENCY)
    assert torch.allclose(model.x0(x, CONSISTENCY.process.t_min, features=features), x, atol=1e-6)
    seen = detector.look(features, x, torch.full((4,), 40.0), CONSISTENCY).last.boxes
    share = 0.002 / 40.0
    wanted = share * x + (1 - share) * CONSISTENCY.signal(seen)
    assert torch.allclose(model.x0(x, 40.0, features=features), wanted, atol=1e-5)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, bool]]:
    """States and times that detectors look at from now on, and whether a gradient is taken."""
    shown: list[tuple[Tensor, Tensor, bool]] = []
    look = Detector.look

    def spy(self: Detector, features: Tensor, x: Tensor, t: Tensor, noising: Any) -> Any:
        shown.append((x, t, torch.is_grad_enabled()))
        return look(self, features, x, t, noising)

    monkeypatch.setattr(Detector, "look", spy)
    return shown


def test_pairs_of_levels_are_drawn_lognormally(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square at a false alarm rate of 1e-4 against the normal law of log sigma, cut at the ends."""
    shown = spied(monkeypatch)
    torch.manual_seed(0)
    detector, data, draws = Detector(8, 16), batch(64), generator(4)
    for _ in range(10):
        consistency_loss(detector, data, draws, levels=6, mean=0.2, std=2.0)
    assert len(shown) == 10
    grid = karras_levels(CONSISTENCY.process, 6)
    times = torch.cat([t[:64] for _, t, _ in shown])
    counts = [int((times - level).abs().lt(1e-4 * level).sum()) for level in grid[1:]]
    mass = np.diff(stats.norm(0.2, 2.0).cdf(grid.log().numpy()))
    assert stats.chisquare(counts, 640 * mass / mass.sum()).pvalue > 1e-4


def test_one_noise_at_two_neighbouring_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the decoder is shown at the two levels differs by the gap times one noise; a level is shared by a scene."""
    shown = spied(monkeypatch)
    torch.manual_seed(0)
    data = batch(16)
    consistency_loss(Detector(8, 16), data, generator(), levels=12)
    ((x, times, learns),) = shown
    assert learns
    (x_t, x_s), (t, s) = x.chunk(2), times.chunk(2)
    assert t.shape == (16,)
    grid = karras_levels(CONSISTENCY.process, 12).float()
    place = (t[:, None] / grid).log().abs().argmin(1)
    assert torch.allclose(t, grid[place])
    assert torch.allclose(s, grid[place - 1])
    noise = (x_t - x_s) / (t - s)[:, None, None]
    clean = x_t - t[:, None, None] * noise
    real = torch.arange(MOST) < data["counts"][:, None]
    few = t < 5  # where float32 still tells the data from the noise
    assert torch.allclose(CONSISTENCY.boxes(clean)[few][:, :MOST][real[few]], data["boxes"][few][real[few]], atol=1e-3)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4


def test_both_levels_are_held_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the distance the loss is the mean over stages and levels of set losses computed look by look."""
    shown = spied(monkeypatch)
    torch.manual_seed(0)
    detector, data = Detector(8, 16), batch(3)
    loss, log = consistency_loss(detector, data, generator(1), weight=0.0)
    ((x, t, _),) = shown
    features, truth = detector.features(data["x"]), (data["boxes"], data["labels"], data["counts"])
    alone = []
    for part in (slice(0, 3), slice(3, 6)):
        for stage in detector.look(features, x[part], t[part], CONSISTENCY).stages:
            found = set_loss(stage, *truth, repeat=2)
            assigned = len(assign(costs(stage, *truth[:2]), truth[2], 2)[0])
            alone.append(float(found.detach()))
            assert assigned == 2 * int(truth[2].sum())  # the same at both, so that the mean of the two is the whole
    assert float(loss.detach()) == pytest.approx(float(np.mean(alone)), rel=1e-5)
    assert log["detection"] == pytest.approx(float(loss.detach()))


def test_the_distance_has_its_weight_and_pulls_the_noisier_level_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is linear in it; the gradient that it adds is 0 at the lower level's boxes, at the others their sign."""
    looks: list[Tensor] = []
    look = Detector.look

    def keep(self: Detector, *given: Any) -> Any:
        seen = look(self, *given)
        seen.last.boxes.retain_grad()
        looks.append(seen.last.boxes)
        return seen

    monkeypatch.setattr(Detector, "look", keep)
    torch.manual_seed(0)
    detector, data = Detector(8, 16), batch()
    losses = []
    for weight in (0.0, 1.0, 2.0):
        loss, log = consistency_loss(detector, data, generator(3), weight=weight)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    assert losses[1] - losses[0] == pytest.approx(log["apart"], rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(2 * log["apart"], rel=1e-4)
    plain, once = (found.grad for found in looks[:2])
    assert plain is not None
    assert once is not None
    far, near = (once - plain).chunk(2)
    assert torch.allclose(near, torch.zeros_like(near), atol=1e-7)
    noisier, lower = looks[1].detach().chunk(2)
    assert torch.allclose(far, 2 * torch.sign(noisier - lower) / far.numel(), atol=1e-7)  # boxes to signal: times 2


def test_more_looks_are_independent_and_take_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks of DiffusionDet's loss: times of their own, boxes of the same truth, and one pass of the backbone."""
    shown = spied(monkeypatch)
    passes: list[int] = []
    features = Detector.features

    def counted(self: Detector, images: Tensor) -> Tensor:
        passes.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Detector, "features", counted)
    torch.manual_seed(0)
    data = batch(40)
    diffusion_loss(Detector(8, 16), data, generator(2), looks=2)
    ((x, times, _),) = shown
    assert passes == [40]
    assert x.shape[0] == len(times) == 80
    assert stats.kstest(times.numpy(), "uniform").pvalue > 1e-4
    first, second = times.chunk(2)
    assert abs(float(stats.spearmanr(first, second).statistic)) < 0.55  # false alarm rate below 1e-3 for 40 pairs
    assert (first != second).all()


# ----------------------------------------------------------------------------------------------------- pretraining


def test_dense_targets_are_the_box_of_the_place() -> None:
    """Place by place against a search: the smallest box that covers it, its label, and sides that give it back."""
    made = scenes(20, np.random.default_rng(3))
    size = SIZE // 2
    labels, sides = targets(made.boxes, made.labels, size)
    edges = corners(made.boxes)
    for scene, row, column in np.random.default_rng(0).integers(0, [20, size, size], (300, 3)):
        x, y = (column + 0.5) / size, (row + 0.5) / size
        covering = [
            (float(made.boxes[scene, k, 2:].prod()), k)
            for k in range(int(made.counts[scene]))
            if edges[scene, k, 0] < x < edges[scene, k, 2] and edges[scene, k, 1] < y < edges[scene, k, 3]
        ]
        if not covering:
            assert labels[scene, row, column] == CLASSES
            continue
        mine = min(covering)[1]
        assert labels[scene, row, column] == made.labels[scene, mine]
        at = torch.tensor([x, y])
        found = torch.cat([at - sides[scene, row, column, :2], at + sides[scene, row, column, 2:]])
        assert torch.allclose(found.float(), edges[scene, mine], atol=1e-6)


def test_a_perfect_dense_answer_costs_nothing() -> None:
    """And one that is off by d everywhere costs the weight times d; its backbone fits the detector."""
    data = batch(6)
    labels, sides = targets(data["boxes"], data["labels"], SIZE // 2)
    sure = 50.0 * torch.nn.functional.one_hot(labels, CLASSES + 1).float()
    for off in (0.0, 0.1):
        answer = Dense(8)
        answer.forward = lambda images, off=off: (sure, sides + off)  # type: ignore[method-assign, misc]
        assert float(dense_loss(answer, data)) == pytest.approx(SIDES_WEIGHT * off, abs=1e-5)
    one, other = Dense(8), Detector(8, 16)
    other.backbone.load_state_dict(one.backbone.state_dict())
    assert torch.equal(other.features(data["x"]), one.backbone(data["x"]))


# ------------------------------------------------------------------------------------------------------- detecting


def test_losses_and_detections_are_their_seeds() -> None:
    torch.manual_seed(0)
    detector, data = Detector(8, 16).eval(), batch()
    for loss in (lambda g: consistency_loss(detector, data, g)[0], lambda g: diffusion_loss(detector, data, g)):
        assert torch.equal(loss(generator(1)), loss(generator(1)))
        assert not torch.equal(loss(generator(1)), loss(generator(2)))
    for noising in (CONSISTENCY, DIFFUSION):
        one, same = (detect(detector, data["x"], noising, 3, generator(5), 8) for _ in range(2))
        assert all(torch.equal(a, b) for x, y in zip(one, same, strict=True) for a, b in zip(x, y, strict=True))


def test_a_run_takes_one_look_per_step_and_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    detector, images = Detector(8, 16).eval(), batch()["x"]
    calls: list[str] = []
    for name in ("look", "features"):
        method = getattr(Detector, name)

        def count(self: Detector, *rest: Any, method: Any = method, name: str = name) -> Any:
            calls.append(name)
            return method(self, *rest)

        monkeypatch.setattr(Detector, name, count)
    for noising in (CONSISTENCY, DIFFUSION):
        calls.clear()
        detect(detector, images, noising, 4, generator(), 8)
        assert sorted(calls) == ["features", *["look"] * 4]
        grid = step_grid(noising, 4)
        assert len(grid) == 5
        assert (grid[1:] < grid[:-1]).all()
        assert float(grid[0]) == noising.process.t_max


def test_finds_of_all_steps_are_joined() -> None:
    one, other = of_pixels((0, 0, 6, 6)), of_pixels((10, 10, 5, 5))
    steps = [Predictions(torch.stack([box]), torch.tensor([[[2.0, -1.0]]])) for box in (one, other, one)]
    (seen,) = joined(steps)
    assert len(seen.boxes) == 2
    assert (seen.labels == 0).all()


@pytest.mark.slow
def test_a_short_training_finds_objects() -> None:
    """From a pretrained backbone both ways beat what an untrained detector finds by far, at one step and at four."""
    made, held_out = scenes(400, np.random.default_rng(0)), scenes(60, np.random.default_rng(1))
    data = {"x": made.images, "boxes": made.boxes, "labels": made.labels, "counts": made.counts}

    def fitted(model: Any, loss: Any, steps: int) -> Any:
        options: dict[str, Any] = {"batch_size": 8, "lr": 2e-3, "ema": 0.97, "clip": 1.0, "seed": 0, "progress": False}
        return train(model, loss, data, steps=steps, **options).best

    def precision(detector: Detector, noising: Any, steps: int) -> float:
        return average_precision(detect(detector, held_out.images, noising, steps, generator()), *held_out[1:])

    torch.manual_seed(0)
    backbone = fitted(Dense(), dense_loss, 120).backbone.state_dict()
    for loss, noising in ((consistency_loss, CONSISTENCY), (diffusion_loss, DIFFUSION)):
        torch.manual_seed(0)
        detector = Detector()
        before = precision(detector, noising, 1)
        detector.backbone.load_state_dict(backbone)
        trained = fitted(detector, loss, 120)
        assert precision(trained, noising, 1) > before + 0.1
        assert precision(trained, noising, 4) > before + 0.1


def test_scenes_have_the_fields_that_training_takes() -> None:
    assert Scenes._fields == ("images", "boxes", "labels", "counts")
    assert ELLIPSE == 1
