"""Runs small enough for a test: 160 digits, a network of 24 units a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfold.training import TrainConfig, train

TINY = {
    "data": "digits",
    "limit": 160,
    "model": "mlp",
    "overrides": {"hidden": [24, 24]},
    "epochs": 4,
    "batch_size": 16,
    "at": 0.4,
    "max_increase": 1.0,
    "seed": 3,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture
def tiny() -> Callable[..., TrainConfig]:
    """Make the settings of a tiny run."""
    return lambda **changes: TrainConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished tiny run: its folder, and what `train` returned."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return out, train(TrainConfig(**TINY), out)
