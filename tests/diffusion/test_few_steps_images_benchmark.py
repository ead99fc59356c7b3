"""The benchmark of few-step students of pictures: its readers of files, and a run at a tiny size."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilience.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmarks' module that reads the files."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _image_files

    return _image_files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, count: int, prefix: str = "t10k") -> tuple[np.ndarray, np.ndarray]:
    """Pictures of 28 x 28 pixels with a bar whose place is their class, in the published format."""
    rng = np.random.default_rng(count)
    labels = (np.arange(count) % 10).astype(np.uint8)
    pixels = rng.integers(0, 40, (count, 28, 28)).astype(np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        picture[4:24, 2 * label + 3 : 2 * label + 7] = 250
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return pixels, labels


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=str)
def test_idx_files_are_read_back(files: Any, tmp_path: Path, pack: Any, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / "array-ubyte"
    path.write_bytes(pack(idx(array)))
    assert np.array_equal(files.idx(path), array)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0",
        idx(np.zeros((3, 4), np.uint8))[:-1],
        b"\x1f\x8bnot gzip",
        b"\0\0\x0d\x01\0\0\0\1\0",
        b"hello there",
    ],
    ids=["empty", "short", "cut", "gzip", "floats", "text"],
)
def test_what_is_no_idx_file_is_refused_with_its_name(files: Any, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "array-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError, match="array-ubyte"):
        files.idx(path)


def test_a_fifth_of_mnists_test_images_is_kept_back_where_there_are_no_others(files: Any, tmp_path: Path) -> None:
    pixels, labels = mnist(tmp_path, 50)
    sets = files.read_sets(tmp_path, "mnist", 28)
    assert (len(sets.train.x), len(sets.kept.x)) == (40, 10)
    rows = {picture.tobytes(): label for picture, label in zip(pixels, labels, strict=True)}
    seen = [
        (((x + 1) * 127.5).round().byte().numpy().tobytes(), int(label))
        for part in (sets.train, sets.kept)
        for x, label in zip(part.x[:, 0], part.labels, strict=True)
    ]
    assert dict(seen) == rows  # every picture once, with its own label


def test_mnists_training_images_are_trained_on_where_there_are_any(files: Any, tmp_path: Path) -> None:
    mnist(tmp_path, 20)
    mnist(tmp_path, 30, "train")
    sets = files.read_sets(tmp_path, "mnist", 28)
    assert (len(sets.train.x), len(sets.kept.x)) == (30, 20)


def test_sides_are_averaged_down_and_framed_up(files: Any, tmp_path: Path) -> None:
    pixels, _ = mnist(tmp_path, 10)
    large, small = (files.read_sets(tmp_path, "mnist", side) for side in (32, 16))
    whole = torch.cat([large.train.x, large.kept.x])
    assert whole.shape[1:] == (1, 32, 32)
    assert bool((whole[:, :, :2] == -1).all())
    assert bool((whole[:, :, :, 30:] == -1).all())
    assert float(whole[:, :, 2:30, 2:30].double().mean()) == pytest.approx(pixels.mean() / 127.5 - 1, abs=1e-6)
    averaged = torch.nn.functional.avg_pool2d(large.kept.x[:, :, 2:30, 2:30], 2)
    assert torch.allclose(small.kept.x[:, :, 1:15, 1:15], averaged, atol=1e-6)
    assert bool((small.kept.x[:, :, 0] == -1).all())


def archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_cifar_records_are_read(files: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8) for name in ("data_batch_1", "test_batch")}
    made = {
        f"cifar-10-batches-bin/{name}.bin": b"".join(bytes([k]) + x.tobytes() for k, x in enumerate(part))
        for name, part in rows.items()
    }
    archive(tmp_path / "cifar-10-binary.tar.gz", made | {"cifar-10-batches-bin/readme.html": b"text"})
    sets = files.read_sets(tmp_path, "cifar10", 32)
    assert sets.train.labels.tolist() == [0, 1, 2, 3]
    expected = torch.from_numpy(rows["data_batch_1"]).float() / 127.5 - 1
    assert torch.equal(sets.train.x, expected)
    assert torch.equal(sets.kept.x, torch.from_numpy(rows["test_batch"]).float() / 127.5 - 1)


def test_archives_of_pictures_are_read_by_their_folders(files: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    pictures = {"train": {}, "test": {}}  # type: dict[str, dict[str, np.ndarray]]
    for name, members in pictures.items():
        for kind in ("ship", "cat"):
            members[f"{name}/{kind}/0.png"] = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        packed = {}
        for path, pixels in members.items():
            file = io.BytesIO()
            image.fromarray(pixels).save(file, format="PNG")
            packed[path] = file.getvalue()
        archive(tmp_path / f"cifar10_{name}_pictures.tar.gz", packed)
    sets = files.read_sets(tmp_path, "cifar10", 32)
    assert sets.train.labels.tolist() == [1, 0]  # cat comes first in the alphabet
    ship = torch.from_numpy(pictures["train"]["train/ship/0.png"]).permute(2, 0, 1)
    assert torch.equal(sets.train.x[0], ship.float() / 127.5 - 1)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_missing_files_are_said_with_where_they_are(files: Any, tmp_path: Path, dataset: str) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"https?://"):
            files.read_sets(folder, dataset, 32)


def test_damaged_archives_are_refused(files: Any, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="not an archive"):
        files.read_sets(tmp_path, "cifar10", 32)
    archive(path, {"x/test_batch.bin": b"123"})
    with pytest.raises(InputError, match="records"):
        files.read_sets(tmp_path, "cifar10", 32)


def run(*flags: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "few_steps_images.py"
    return subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_the_benchmark_runs_at_a_tiny_size_and_takes_its_runs_up_again(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    mnist(tmp_path, 100)
    sizes = ["--side", 8, "--width", 8, "--batch", 8, "--count", 8, "--minutes", 0.02, "--objectives", "ect"]
    flags = ["--images", tmp_path, "--device", "cpu", *sizes, "--cache", tmp_path / "kept", "--json"]
    found = []
    for more in ([], ["--picture", tmp_path / "picture.png"]):
        done = run(*flags, *more)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert (tmp_path / "picture.png").stat().st_size > 1000
    for result in found:
        for row in result["rows"]:
            assert (row.pop("per_second") is None) == (row["model"] == "data")
    assert found[0] == found[1]
    asked = [(row["model"], row["nfe"]) for row in found[0]["rows"]]
    teacher = [("teacher", n) for n in (1, 2, 4, 5, 9, 17, 35)]
    assert asked == [("data", ""), *teacher, *(("ect", n) for n in (1, 2, 4))]
    assert [(run["name"], run["steps"] >= 2, run["gib"]) for run in found[0]["runs"]] == [
        ("teacher", True, None),
        ("ect", True, None),
    ]


@pytest.mark.slow
def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    done = run("--images", tmp_path / "nowhere", "--device", "cpu")
    assert done.returncode == 1
    assert "nowhere: no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = run()
    assert done.returncode == 0
    assert "was skipped" in done.stdout
