"""Training with a table of widths: the event keeps to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightfold.errors import ConfigError
from weightfold.training import TrainConfig, train

pytest.importorskip("sklearn")


@pytest.mark.parametrize("method", ["fold", "prune"])
def test_an_event_in_training_keeps_to_liked_widths(method: str, tmp_path: Path) -> None:
    config = TrainConfig(
        data="digits",
        limit=300,
        model="lenet5",
        epochs=2,
        method=method,
        keep=0.5,
        at=0.5,
        max_increase=100.0,
        dense=False,
        threads=1,
        liked={"fc1": [120, 96, 72, 32]},
    )
    run = train(config, tmp_path / "run")
    widths = {name: after for name, _, after in run["results"]["arms"]["folded"]["widths"]}
    assert widths["fc1"] == 72
    assert widths["fc2"] == 42


def test_other_methods_take_no_table() -> None:
    with pytest.raises(ConfigError, match="methods 'fold' and 'prune'"):
        TrainConfig(method="self_compress", liked={"fc1": [8]})
