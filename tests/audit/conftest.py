"""One small run of two networks, and its folder to damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from weightfold.report import write_report
from weightfold.training import TrainConfig, train

from ..training.conftest import TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(TrainConfig(**TINY), out)
    write_report(out)
    return out


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    return out
