"""Files that are whole or not there, the state of the random generators, and a Ctrl-C that waits for the step's end."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from consilience.errors import InputError

CHECKPOINT, LOG, SNAPSHOTS = "checkpoint.pt", "log.jsonl", "snapshots"


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Save a dictionary of plain values and tensors: beside ``path`` first, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """What `write` saved, on the CPU; raises InputError where the file is damaged. No code in it is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        reason = f"the checksum of {damaged} is wrong"
    except FileNotFoundError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds for a file that is no checkpoint
        reason = str(error).split("\n")[0][:200] or type(error).__name__
    raise InputError(
        f"{path} is not a whole checkpoint ({reason}): put a copy in its place, or delete it to begin anew"
    )


def steps_done(path: Path) -> int:
    """How many steps a run had done when it saved this checkpoint, 0 where there is none; raises as `read` does."""
    return int(read(path)["step"]) if path.exists() else 0


def snapshots(out: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The snapshots of a run, oldest first: ``step``, ``model`` (a state), ``ema`` (states) and their ``sigma_rel``.

    ``sigma_rel`` is None for an average that is not a power-function one. Raises InputError where there is none.
    """
    paths = sorted((Path(out) / SNAPSHOTS).glob("*.pt"))
    if not paths:
        raise InputError(f"{out} holds no snapshots: train with snapshot_every=...")
    return [read(path) for path in paths]


# ----------------------------------------------------------------------------------------------------- randomness


def random_state() -> dict[str, Any]:
    """The state of the global generators of python, numpy and torch, as plain values and tensors."""
    version, internal, gauss = random.getstate()
    old = np.random.get_state(legacy=False)
    assert isinstance(old, dict)
    key = torch.from_numpy(old["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(internal), gauss],
        "numpy": [key, int(old["state"]["pos"]), int(old["has_gauss"]), float(old["gauss"])],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo what was drawn since `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, position, has_gauss, value = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, value))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators as they were found."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


# -------------------------------------------------------------------------------------------------------- the log


class Log:
    """JSON lines; without a path they are kept in memory alone. ``rows`` are those of the whole run."""

    def __init__(self, path: Path | None, step: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is not None:
            self.rows = [row for row in _rows(path) if row["step"] <= step]  # later ones were not saved with a state
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            part.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line a killed run was writing
    return rows


# ------------------------------------------------------------------------------------------------------ interrupts


class Interrupts:
    """While it is open, the first Ctrl-C or SIGTERM sets ``asked``; a second Ctrl-C interrupts at once.

    Outside the main thread signals cannot be caught, and nothing is changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
