"""Image sets come in as they are on disk; pictures show every pixel; quality tells data from what is not."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from consilience.diffusion import pictures
from consilience.errors import InputError

torch.set_num_threads(1)


def images(n: int = 6, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


def put(folder: Path, arrays: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{i}.png")


def test_a_folder_is_read_pixel_by_pixel_with_sub_folders_as_classes(tmp_path):
    cats, dogs = images(3, 4, 6, 3), images(2, 4, 6, 3)
    put(tmp_path / "dog", dogs)
    put(tmp_path / "cat", cats)
    (tmp_path / "notes.txt").write_text("no image")
    found = pictures.read(tmp_path)
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    assert found.classes == 2
    assert found.x.shape == (5, 3, 4, 6)
    np.testing.assert_allclose(found.x.permute(0, 2, 3, 1), np.concatenate([cats, dogs]) / 127.5 - 1, atol=1e-6)


def test_a_flat_folder_of_grey_images_has_no_classes(tmp_path):
    put(tmp_path, images(4, 5, 5))
    found = pictures.read(tmp_path)
    assert (found.labels, found.classes, tuple(found.x.shape)) == (None, None, (4, 1, 5, 5))


@pytest.mark.parametrize(
    ("made", "shape"), [((4, 4), (1, 4, 4)), ((4, 5, 3), (3, 4, 5)), ((3, 4, 5), (3, 4, 5)), ((1, 6, 6), (1, 6, 6))]
)
def test_arrays_of_every_layout_and_range_are_the_same_images(tmp_path, made, shape):
    whole = images(6, *made)
    np.savez(tmp_path / "whole.npz", images=whole, labels=np.arange(6))
    np.savez(tmp_path / "unit.npz", images=whole / 255)
    torch.save({"images": torch.from_numpy(whole / 127.5 - 1)}, tmp_path / "both.pt")
    torch.save(torch.from_numpy(whole), tmp_path / "plain.pt")
    first = pictures.read(tmp_path / "whole.npz")
    assert first.x.shape == (6, *shape)
    assert first.labels.tolist() == list(range(6))
    assert (float(first.x.min()), float(first.x.max())) == (
        whole.min() / 127.5 - 1,
        pytest.approx(whole.max() / 127.5 - 1),
    )
    for name in ("unit.npz", "both.pt", "plain.pt"):
        torch.testing.assert_close(pictures.read(tmp_path / name).x, first.x)


def bad_folder(path: Path, kind: str) -> Path:
    if kind == "sizes":
        put(path, images(2, 4, 4))
        Image.fromarray(images(1, 4, 5)[0]).save(path / "9.png")
    elif kind == "levels":
        put(path, images(2, 4, 4))
        put(path / "sub", images(2, 4, 4))
    elif kind == "damaged":
        put(path, images(2, 40, 40))
        (path / "1.png").write_bytes((path / "1.png").read_bytes()[:60])
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("sizes", r"9.png: 5 x 4 pixels of grey, but 0.png is 4 x 4 pixels of grey"),
        ("levels", r"images both in the folder and in sub-folders"),
        ("damaged", r"1.png: not an image that can be read"),
        ("empty", r"no .png, .jpg, .jpeg file in it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path, kind, said):
    with pytest.raises(InputError, match=said):
        pictures.read(bad_folder(tmp_path / "set", kind))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"pictures": images(3, 4, 4)}, "no array `images` in it; there are: pictures"),
        ({"images": images(3, 4)}, "images of shape (3, 4)"),
        ({"images": images(3, 4, 4, 4, 4)}, "images of shape"),
        ({"images": images(3, 4, 4) * 7.0}, "values from"),
        ({"images": np.full((3, 4, 4), np.nan)}, "not finite"),
        ({"images": images(1, 4, 4)}, "fewer than two images"),
        ({"images": images(3, 4, 4), "labels": np.arange(2)}, "labels must be 3 whole numbers"),
        ({"images": images(3, 4, 4), "labels": np.array([0.0, 1.0, 2.0])}, "labels must be 3 whole numbers"),
        ({"images": images(3, 4, 4), "labels": np.array([0, -1, 2])}, "labels must be 3 whole numbers"),
    ],
)
def test_an_array_that_cannot_be_used_is_named(tmp_path, content, said):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=re.escape(said)):
        pictures.read(tmp_path / "a.npz")


def test_what_is_no_data_is_said(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "b.npz").write_bytes(b"nothing")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    (tmp_path / "a.csv").write_text("1,2")
    for name, said in (
        ("a.npz", r"cannot be read \(BadZipFile\); expected arrays alone, as numpy.savez writes them"),
        ("b.npz", r"cannot be read \(ValueError\); expected arrays alone, as numpy.savez"),
        ("a.pt", r"cannot be read \(UnpicklingError\); expected arrays alone, as torch.save"),
        ("a.csv", "expected a folder of images"),
    ):
        with pytest.raises(InputError, match=said):
            pictures.read(tmp_path / name)


def test_a_grid_shows_every_image_in_its_place():
    x = torch.from_numpy(images(5, 3, 8, 8)) / 127.5 - 1
    page = np.asarray(pictures.grid(x, columns=2))
    assert page.shape == (3 * 68 + 4, 2 * 68 + 4, 3)
    for i in range(5):
        top, left = 4 + 68 * (i // 2), 4 + 68 * (i % 2)
        cell = page[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(cell[3::8, 5::8], images(5, 3, 8, 8)[i].transpose(1, 2, 0))
    assert (page[-67:, -67:-4] == 128).all()  # no sixth image


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    from consilience.diffusion.folders import filling

    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "old").write_text("old")
    (tmp_path / "out" / "mine").write_text("mine")

    def interrupted():
        with filling(tmp_path / "out") as folder:
            (folder / "unet").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "out" / "unet" / "old").read_text() == "old"
    with filling(tmp_path / "out") as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "new").write_text("new")
    assert {file.name for file in (tmp_path / "out").rglob("*")} == {"unet", "new", "mine"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="is a file, expected a folder"), filling(tmp_path / "out" / "mine"):
        pass


# ------------------------------------------------------------------------------------------------------------ quality


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="needs scikit-learn (extra diffusion) for its digits")
    return pictures.read("digits")


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_the_classifier_is_scikit_learns_and_a_damaged_or_old_cache_is_made_anew(digits, tmp_path, monkeypatch):
    from sklearn.neural_network import MLPClassifier

    from consilience.diffusion.quality import classifier

    few = pictures.Images(digits.x[:300], digits.labels[:300], "few")
    made = classifier(few, tmp_path / "kept.npz")
    own = MLPClassifier((64, 16), alpha=1e-2, max_iter=100, random_state=0)
    expected = own.fit(few.x.flatten(1).numpy(), few.labels.numpy()).predict_proba(digits.x.flatten(1).numpy())
    np.testing.assert_allclose(made.probabilities(digits.x), expected, atol=1e-5)
    spread = made.features(few.x).std(0)
    alive = spread > 1e-5
    np.testing.assert_allclose(spread[alive], 1, rtol=1e-6)
    np.testing.assert_allclose(made.scale[~alive], np.median(made.scale[alive]))  # unlit ones
    again = classifier(few, tmp_path / "kept.npz")
    torch.testing.assert_close(again.probabilities(digits.x), made.probabilities(digits.x))
    (tmp_path / "kept.npz").write_bytes(b"PK nothing")
    torch.testing.assert_close(classifier(few, tmp_path / "kept.npz").scale, made.scale)
    kept = (tmp_path / "kept.npz").read_bytes()
    monkeypatch.setattr("consilience.diffusion.quality.FEATURES", b"of another version")
    classifier(few, tmp_path / "kept.npz")
    assert (tmp_path / "kept.npz").read_bytes() != kept


def test_quality_sees_noise_missing_classes_and_blends(digits):
    from consilience.diffusion.quality import classifier, quality

    judge = classifier(digits)
    order = torch.randperm(len(digits.x), generator=torch.Generator().manual_seed(0))
    real, made, labels = digits.x[order[::2]], digits.x[order[1::2]], digits.labels[order[1::2]]
    noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    floor = quality(judge, real, made)
    assert floor.confidence > 0.97
    assert floor.entropy == pytest.approx(np.log(10), abs=0.02)
    noisy = [quality(judge, real, made + scale * noise) for scale in (0.125, 0.5, 1.0)]
    assert floor.frechet < noisy[0].frechet < noisy[1].frechet < noisy[2].frechet
    assert floor.precision > noisy[1].precision > noisy[2].precision
    dropped = quality(judge, real, made[labels > 1])
    assert dropped.entropy == pytest.approx(np.log(8), abs=0.03)
    assert dropped.frechet > 3 * floor.frechet
    assert dropped.recall < floor.recall - 0.1
    blended = quality(judge, real, (made + made.roll(1, 0)) / 2)
    assert blended.confidence < floor.confidence - 0.05
    assert blended.frechet > 3 * floor.frechet
