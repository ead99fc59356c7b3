"""What the tests of the diffusion commands share."""

from __future__ import annotations

import sys

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
