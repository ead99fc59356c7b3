"""What the tests of training and of the diffusion commands share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from consilience.cli import main


@pytest.fixture
def diffusion(monkeypatch, capsys):
    """Runs `consilience diffusion ...`: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilience", "diffusion", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def two_processes():
    """Runs Python with the arguments of rank 0 and of rank 1 as two processes of one gloo group on loopback."""

    def run(arguments: Callable[[str], list[str]], timeout: float) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        started = [
            subprocess.Popen(
                [sys.executable, *arguments(rank)],
                env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        try:
            for process in started:
                _, words = process.communicate(timeout=timeout)
                assert process.returncode == 0, words
        finally:
            for process in started:
                process.kill()

    return run
