"""Run the command line: in this process for most tests, in a fresh one where the process itself matters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from weightfold.cli.main import app

ROOT = Path(__file__).parent.parent.parent
TINY: tuple[str, ...] = (
    *("digits", "--limit", "160", "--model", "mlp", "--set", "hidden=24,24", "--epochs", "3", "--batch-size", "16"),
    *("--at", "0.4", "--max-increase", "1", "--seed", "3", "--threads", "1", "--device", "cpu"),
)

Run = Callable[..., Result]
Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def cli() -> Run:
    """Run a command in this process; its streams are kept apart."""
    return lambda *args: CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="session")
def shell() -> Shell:
    """Run a command in a process of its own, perhaps after some Python code."""

    def run(*args: object, before: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        code = f"{before}\nfrom weightfold.cli.main import main\nmain()"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *(str(arg) for arg in args)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)

    return run


@pytest.fixture(scope="session")
def finished(cli: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A tiny run, and what the command said."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, cli("train", *TINY, "--out", out)
