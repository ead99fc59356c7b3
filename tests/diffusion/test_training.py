"""The trainer by its laws: a run that stopped goes on bit for bit, parts make a whole, nothing saved is ever half."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from consilience.diffusion.training import Context, Decay, Power, Trained, cosine, snapshots, train
from consilience.diffusion.training.batches import Batches, shard_seed
from consilience.diffusion.training.checkpoints import CHECKPOINT, LOG, read, write
from consilience.errors import InputError

torch.set_num_threads(1)

ROWS = torch.randn(37, 3, generator=torch.Generator().manual_seed(7))


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(dropout), nn.BatchNorm1d(16), nn.Linear(16, 3))


def plain(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 3))


def noisy_loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    noise = torch.randn(batch.shape, generator=generator)
    loss = (model(batch + noise) - batch).square().mean()
    return loss, {"root": loss.detach().sqrt()}


def still_loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
    return (model(batch) - batch).square().mean()


class Restless:
    """A loss with a memory, that draws from every generator there is."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def __call__(self, model: nn.Module, batch: Tensor, generator: torch.Generator, context: Context) -> Tensor:
        assert context.ema is not None
        jitter = random.random() + float(np.random.rand()) + float(torch.rand(()))
        teacher = context.ema(batch)
        noise = torch.randn(batch.shape, generator=generator)
        loss = (model(batch + jitter * noise) - teacher - self.total).square().mean()
        self.total = 0.5 * self.total + 0.1 * loss.detach() + context.step / context.steps
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.total = state["total"]


RUN: dict[str, Any] = {"batch_size": 8, "lr": 1e-2, "progress": False, "log_every": 4, "seed": 5}


def weights(trained: Trained) -> list[Tensor]:
    modules = [trained.model, *trained.averages]
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def rows_without_speed(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in log]


# ---------------------------------------------------------------------------------------------------- resumption


def restless(out: Path | None, loss: Any = None, **more: Any) -> Trained:
    settings = RUN | {
        "ema": (Decay(0.9), Power(0.1)),
        "lr": cosine(1e-2, 23, 3),
        "clip": 0.5,
        "accumulate": 2,
        "optimizer": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    }
    return train(network(0, dropout=0.3), loss or Restless(), ROWS, steps=23, out=out, **settings | more)


@pytest.mark.parametrize("stopped_at", [1, 5, 10, 22])
def test_a_run_taken_up_again_is_bit_equal(tmp_path: Path, stopped_at: int):
    """Weights, averages, optimizer, rate, data order across epochs, dropout, loss memory, log, all generators."""
    whole = restless(tmp_path / "whole")

    def stop(step: int, model: nn.Module) -> None:
        if step == stopped_at:
            raise Stop

    with pytest.raises(Stop):
        restless(tmp_path / "parts", on_step=stop, save_every=1 if stopped_at < 10 else 5)
    torch.manual_seed(99)  # what happens in between is of no account
    random.seed(99)
    parts = restless(tmp_path / "parts")
    assert same(weights(whole), weights(parts))
    assert rows_without_speed(whole.log) == rows_without_speed(parts.log)
    saved = [read(tmp_path / name / CHECKPOINT) for name in ("whole", "parts")]
    assert equal(saved[0], saved[1])
    lines = [json.loads(line) for line in (tmp_path / "parts" / LOG).read_text().splitlines()]
    assert lines == parts.log
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 23]


class Stop(Exception):
    """Stands for a crash."""


def test_ctrl_c_finishes_the_step_saves_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = restless(None)
    handler = signal.getsignal(signal.SIGINT)
    for at in (3, 11):

        def interrupt(step: int, model: nn.Module, at: int = at) -> None:
            if step == at:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            restless(tmp_path, on_step=interrupt, save_every=1000)
        assert f"stopped after step {at + 1}: saved in {tmp_path}" in capsys.readouterr().err
        assert read(tmp_path / CHECKPOINT)["step"] == at + 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert same(weights(restless(tmp_path)), weights(whole))


def test_a_finished_run_is_not_trained_again_and_more_steps_go_on(tmp_path: Path):
    def run(steps: int) -> Trained:
        return train(plain(), noisy_loss, ROWS, steps=steps, out=tmp_path, **RUN)

    first = run(10)
    again = run(10)
    assert same(weights(first), weights(again))
    assert again.log == first.log
    straight = train(plain(), noisy_loss, ROWS, steps=20, **RUN)
    assert same(weights(run(20)), weights(straight))


def test_the_seed_decides_and_the_callers_generators_are_left_alone():
    torch.manual_seed(3)
    model = network(0, dropout=0.3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    results = []
    for seed in (1, 1, 2):
        model.load_state_dict(network(0).state_dict())
        torch.set_rng_state(before[0])
        results.append(weights(train(model, noisy_loss, ROWS, steps=6, **RUN | {"seed": seed})))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_looking_on_changes_nothing():
    """A sample hook that draws random numbers leaves the run bit-equal; it sees the average in evaluation mode."""
    seen = []

    def look(step: int, model: nn.Module) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append((step, float(torch.rand(())), model(ROWS).sum()))

    watched = restless(None, sample_every=5, on_sample=look)
    assert [step for step, *_ in seen] == [5, 10, 15, 20]
    assert same(weights(watched), weights(restless(None)))


def test_without_an_average_hooks_see_the_model_and_training_goes_on_in_training_mode():
    modes = []
    model = network(0, dropout=0.3)

    def look(step: int, shown: nn.Module) -> None:
        modes.append((shown is model, shown.training))

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        assert model.training
        return still_loss(model, batch, generator)

    trained = train(model, loss, ROWS, steps=3, ema=None, on_step=look, **RUN)
    assert modes == [(True, False)] * 3
    assert trained.best is model
    assert not model.training


# ------------------------------------------------------------------------------------------- parts make the whole


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_parts_are_the_big_batch(parts: int):
    """In float64 and without noise the gradients differ by rounding alone."""

    def run(accumulate: int) -> list[Tensor]:
        settings = RUN | {"optimizer": torch.optim.SGD, "accumulate": accumulate, "lr": 0.1}
        return weights(train(plain().double(), still_loss, ROWS.double(), steps=12, **settings))

    for whole, part in zip(run(1), run(parts), strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-12)


def twice_called(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Calls the model twice, once without gradients, as consistency losses do."""
    noise = torch.randn(batch.shape, generator=generator, dtype=batch.dtype)
    with torch.no_grad():
        aim = model(batch)
    value = (model(batch + noise) - aim - batch).square().mean()
    return value, {"root": value.detach().sqrt()}


def run_in_parts(out: Path | None, accumulate: int, steps: int) -> tuple[list[Tensor], list[dict[str, float]]]:
    """All weights and averages, and the log, of a run whose parts are ``accumulate`` per process."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # other weights in each process: those of the first count
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3)).double()
    model[3].requires_grad_(False)
    rows = torch.randn(21, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"batch_size": 8, "lr": 0.05, "clip": 0.5, "ema": (Decay(0.9), Power(0.1)), "log_every": 3}
    trained = train(model, twice_called, rows, steps=steps, accumulate=accumulate, out=out, progress=False, **settings)
    modules = [trained.model, *trained.averages]
    return [value for module in modules for value in module.state_dict().values()], trained.log


@pytest.mark.slow
def test_two_processes_do_what_two_parts_of_one_process_do(two_processes: Any, tmp_path: Path):
    """gloo on loopback: noise, clipping, frozen weights, averages and log; stopped after 4 of 7 steps and taken up."""
    two_processes(lambda rank: [__file__, str(tmp_path), rank], timeout=120)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert same(first["weights"], second["weights"])
    weights_of_one, log = run_in_parts(None, 2, 7)
    for expected, found in zip(weights_of_one, first["weights"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert [row["step"] for row in first["log"]] == [3, 4, 6, 7]
    for name in ("loss", "root", "gradient_norm"):
        for row in (0, -1):
            assert first["log"][row][name] == pytest.approx(log[row][name], rel=1e-12)
    assert read(tmp_path / "run" / CHECKPOINT)["settings"]["processes"] == 2


def test_a_plain_loop_does_the_same():
    """Written out by hand: rows, noise, Adam, clipping and the average."""
    trained = train(plain(), noisy_loss, ROWS, steps=9, clip=0.2, ema=Decay(0.9), **RUN)
    model, average = plain(), plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    order = np.concatenate([np.random.default_rng((5, 1, epoch)).permutation(37) for epoch in range(3)])
    for step in range(9):
        generator = torch.Generator().manual_seed(shard_seed(5, step, 0))
        optimizer.zero_grad()
        loss, _ = noisy_loss(model, ROWS[order[8 * step : 8 * step + 8]], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        rate = min(0.9, (2 + step) / (11 + step))
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                mine.copy_(rate * mine + (1 - rate) * theirs)
    for expected, found in zip([*model.parameters(), *average.parameters()], weights(trained), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_every_row_comes_once_per_epoch_in_a_new_order():
    batches = Batches(ROWS, seed=3)
    rows = np.concatenate([batches.rows(start, 10) for start in range(0, 37 * 3, 10)])[: 37 * 3].reshape(3, 37)
    assert (np.sort(rows, axis=1) == np.arange(37)).all()
    assert (rows[0] != rows[1]).any()
    assert (Batches(ROWS, seed=3).rows(30, 20) == rows.ravel()[30:50]).all()  # from the middle, without the beginning
    assert (np.bincount(Batches(ROWS[:3], 0).rows(0, 8), minlength=3) >= 2).all()  # a batch of several epochs


def test_data_of_every_kind_give_the_same_rows():
    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ROWS)

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"x": ROWS[row], "label": torch.tensor(row)}

    device, generator = torch.device("cpu"), torch.Generator()
    labels = torch.arange(37)
    kinds = [Batches(data, 0) for data in ({"x": ROWS, "label": labels}, Rows())]
    got = [batches.get(5, 6, generator, device) for batches in kinds]
    assert torch.equal(got[0]["x"], got[1]["x"])
    assert torch.equal(got[0]["label"], got[1]["label"])
    x, label = Batches((ROWS, labels), 0).get(5, 6, generator, device)
    assert torch.equal(x, got[0]["x"])
    assert torch.equal(ROWS[label], x)


def test_a_function_makes_fresh_data_from_the_steps_generator():
    seen = []

    def draw(count: int, generator: torch.Generator) -> Tensor:
        seen.append(torch.randn(count, 3, generator=generator))
        return seen[-1]

    train(plain(), still_loss, draw, steps=2, accumulate=2, **RUN)
    assert [len(part) for part in seen] == [4] * 4
    assert torch.equal(seen[3], torch.randn(4, 3, generator=torch.Generator().manual_seed(shard_seed(5, 1, 1))))
    assert len({float(part[0, 0]) for part in seen}) == 4


# -------------------------------------------------------------------------------------- precision, rate, context


def test_bf16_runs_the_loss_in_bf16_and_keeps_the_weights_in_float32():
    kinds = set()

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        made = model(batch)
        kinds.add(made.dtype)
        return (made.float() - batch).square().mean()

    half = train(plain(), loss, ROWS, steps=60, precision="bf16", **RUN)
    full = train(plain(), loss, ROWS, steps=60, **RUN)
    assert kinds == {torch.bfloat16, torch.float32}
    assert {value.dtype for value in half.model.state_dict().values()} == {torch.float32}
    assert half.log[-1]["loss"] < 0.5 * half.log[0]["loss"]
    assert half.log[-1]["loss"] == pytest.approx(full.log[-1]["loss"], rel=0.2)


def test_the_rate_follows_its_function_and_the_log_has_the_means():
    rate = cosine(0.1, 20, warmup=4)
    assert [rate(step) for step in (0, 3, 4, 12, 20)] == pytest.approx([0.025, 0.1, 0.1, 0.05, 0.0])
    losses = []

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
        value, numbers = noisy_loss(model, batch, generator)
        losses.append(float(value.detach()))
        return value, numbers | {"plain": 2.5}

    log = train(plain(), loss, ROWS, steps=6, **RUN | {"lr": rate}).log
    assert [row["step"] for row in log] == [4, 6]
    assert [row["loss"] for row in log] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])
    assert log[1]["root"] == pytest.approx(np.mean(np.sqrt(losses[4:])))
    assert [row["plain"] for row in log] == [2.5, 2.5]
    assert [row["lr"] for row in log] == pytest.approx([rate(3), rate(5)])


def test_a_loss_gets_the_step_and_the_average_as_a_teacher_without_gradients():
    seen = []

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator, *, context: Context) -> Tensor:
        assert context.ema is not None
        assert not any(part.requires_grad for part in context.ema.parameters())
        seen.append(
            (context.step, context.steps, float((model[0].weight - context.ema[0].weight).detach().abs().sum()))
        )
        return (model(batch) - context.ema(batch) - 1).square().mean()

    train(plain(), loss, ROWS, steps=3, **RUN)
    assert [entry[:2] for entry in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[0][2] == 0
    assert seen[2][2] > 0


# ---------------------------------------------------------------------------------------------------- snapshots


def test_snapshots_hold_weights_and_averages(tmp_path: Path):
    trained = train(plain(), noisy_loss, ROWS, steps=6, out=tmp_path, snapshot_every=3, ema=Power(0.1), **RUN)
    shots = snapshots(tmp_path)
    assert [shot["step"] for shot in shots] == [3, 6]
    assert torch.equal(shots[1]["model"]["0.weight"], trained.model.state_dict()["0.weight"])
    assert torch.equal(shots[1]["ema"][0]["0.weight"], trained.best.state_dict()["0.weight"])
    assert shots[0]["sigma_rel"] == [0.1]
    with pytest.raises(InputError, match="snapshot_every"):
        snapshots(tmp_path / "none")


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(tmp_path: Path):
    def run() -> Trained:
        return train(plain(), noisy_loss, ROWS, steps=8, out=tmp_path, **RUN)

    run()
    path = tmp_path / CHECKPOINT
    good = path.read_bytes()
    flipped = bytearray(good)
    at = good.find(read(path)["model"]["0.weight"].numpy().tobytes())
    flipped[at + 5] ^= 1
    for bad in (good[: len(good) // 2], bytes(flipped), b"", b"not a checkpoint at all"):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="is not a whole checkpoint"):
            run()
        assert path.read_bytes() == bad
    path.write_bytes(good)
    assert run().step == 8


def test_a_checkpoint_holds_no_code(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    write(tmp_path / CHECKPOINT, {"step": Evil()})
    with pytest.raises(InputError, match="not a whole checkpoint"):
        train(plain(), noisy_loss, ROWS, steps=8, out=tmp_path, **RUN)
    assert not (tmp_path / "ran").exists()


def test_dying_while_writing_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run() -> Trained:
        return train(plain(), noisy_loss, ROWS, steps=12, out=tmp_path, save_every=5, **RUN)

    save, calls = torch.save, []

    def half(content: Any, file: Any) -> None:
        calls.append(content["step"])
        if len(calls) == 2:
            file.write(b"half a")
            raise OSError("no space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        run()
    assert read(tmp_path / CHECKPOINT)["step"] == 5
    monkeypatch.setattr(torch, "save", save)
    assert same(weights(run()), weights(train(plain(), noisy_loss, ROWS, steps=12, **RUN)))


def test_a_folder_of_another_run_is_refused(tmp_path: Path):
    def run(model: nn.Module | None = None, **more: Any) -> Trained:
        return train(model or plain(), noisy_loss, ROWS, steps=4, out=tmp_path, **RUN | more)

    run()
    for change, words in (
        ({"seed": 6}, "seed = 5, this one has 6"),
        ({"batch_size": 4}, "batch_size = 8"),
        ({"accumulate": 2}, "accumulate = 1"),
        ({"ema": 0.5}, "ema = "),
    ):
        with pytest.raises(InputError, match=words):
            run(**change)
    with pytest.raises(InputError, match="another model"):
        run(nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3)))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path: Path):
    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator, context: Context) -> Tensor:
        return still_loss(model, batch, generator) / (0.0 if context.step == 6 else 1.0)

    with pytest.raises(
        FloatingPointError, match="the loss was first not finite at step 7; the checkpoint of step 6 is still"
    ):
        train(plain(), loss, ROWS, steps=12, out=tmp_path, save_every=2, **RUN | {"log_every": 8})
    saved = read(tmp_path / CHECKPOINT)
    assert saved["step"] == 6
    assert all(bool(torch.isfinite(value).all()) for value in saved["model"].values())


def test_what_diverged_first_is_named_with_its_step(tmp_path: Path):
    """The loss of untouched weights, a gradient before its loss, weights of the last step, and Adam's own overflow."""

    def nothing(model: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        return still_loss(model, batch, generator) / 0.0

    def steep(model: nn.Module, batch: Tensor, generator: torch.Generator, context: Context) -> Tensor:
        loss = still_loss(model, batch, generator)
        return loss + (1e-40 * loss.detach() - 1e-40 * loss).sqrt() if context.step == 2 else loss

    def run(loss: Any, **more: Any) -> Trained:
        return train(plain(), loss, ROWS, steps=4, **RUN | more)

    with pytest.raises(
        FloatingPointError, match=r"loss was first not finite at step 1; nothing .* still those it began"
    ):
        run(nothing)
    with pytest.raises(
        FloatingPointError, match="the gradient was first not finite at step 3; nothing was saved before"
    ):
        run(steep)
    with pytest.raises(FloatingPointError, match="the weights are no longer finite after step 4"):
        run(still_loss, lr=lambda step: float("inf") if step == 3 else 0.01, out=tmp_path)
    assert not (tmp_path / CHECKPOINT).exists()
    with pytest.raises(
        FloatingPointError, match=r"update at step 1 overflows: .* a rate of 1e\+300; nothing was saved"
    ):
        train(plain().float(), still_loss, ROWS.float(), steps=4, **RUN | {"lr": 1e300})


def test_a_half_written_line_of_the_log_is_dropped(tmp_path: Path):
    def run(steps: int) -> Trained:
        return train(plain(), noisy_loss, ROWS, steps=steps, out=tmp_path, **RUN)

    run(8)
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 12, "los')
    assert [row["step"] for row in run(12).log] == [4, 8, 12]
    assert [json.loads(line)["step"] for line in (tmp_path / LOG).read_text().splitlines()] == [4, 8, 12]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 9, "accumulate": 2}, "cannot be cut into 2"),
        ({"steps": 0}, "at least 1"),
        ({"clip": 0.0}, "clip"),
        ({"precision": "fp8"}, "precision"),
        ({"log_every": 0}, "intervals"),
        ({"snapshot_every": 0}, "intervals"),
        ({"ema": 1.0}, "below 1"),
        ({"data": ROWS[:0]}, "no data"),
        ({"data": {"x": ROWS, "y": ROWS[:4]}}, "equally many"),
        ({"data": iter(ROWS)}, "Dataset"),
        ({"loss_fn": lambda model, batch, generator: model(batch)}, "one number"),
        ({"model": nn.ReLU()}, "no parameter"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, Any], words: str):
    call = {"model": plain(), "loss_fn": still_loss, "data": ROWS, "steps": 2} | RUN | change
    with pytest.raises(ValueError, match=words):
        train(call.pop("model"), call.pop("loss_fn"), call.pop("data"), **call)


def test_the_progress_line_says_how_far_it_is(capsys: pytest.CaptureFixture[str]):
    train(plain(), noisy_loss, ROWS, steps=8, **RUN | {"progress": True})
    shown = capsys.readouterr()
    assert "step 8/8  loss " in shown.err
    assert "steps/s" in shown.err
    assert shown.out == ""


if __name__ == "__main__":  # one of two processes
    folder, index = Path(sys.argv[1]), sys.argv[2]
    run_in_parts(folder / "run", 1, 4)
    found, rows = run_in_parts(folder / "run", 1, 7)  # taken up again
    torch.save({"weights": found, "log": rows}, folder / f"{index}.pt")
    torch.distributed.destroy_process_group()
