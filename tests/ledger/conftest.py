"""A small ledger to read and to damage, and a way to run a snippet in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightfold.ledger import Ledger

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.ledger"


@pytest.fixture
def log(path: Path) -> Iterator[Ledger]:
    with Ledger.create(path, run={"seed": 7}) as ledger:
        yield ledger


@pytest.fixture
def filled(path: Path) -> Path:
    """A closed ledger with entries, blobs (one of several pages) and metrics."""
    with Ledger.create(path, run={"seed": 7, "versions": {"torch": "2.13"}}) as ledger:
        for step in range(12):
            ledger.append(
                "edit", {"step": step, "kept": [0, 2], "cost": step / 7, "name": "é\u2028"}, aside={"s": 0.25}
            )
            ledger.log_metrics(step, {"loss": 1 / (step + 1), "width": 64, "bad": float("nan")})
        ledger.put_blob(b"small")
        ledger.put_blob(bytes(range(256)) * 40)
        ledger.append("note", {"text": "x" * 6000})
    return path


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """Start a Python process on a snippet; its standard output is a pipe of lines."""

    def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    return start


@pytest.fixture(scope="session")
def run(spawn: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Run a snippet to its end and give what it printed."""

    def finish(code: str, *arguments: object, **environment: str) -> str:
        with spawn(code, *arguments, **environment) as process:
            output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return output

    return finish
