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


def test_a_table_of_another_network_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(
        data="digits", limit=200, model="lenet5", method="self_compress", epochs=1, dense=False, liked={"fc9": [8]}
    )
    with pytest.raises(ConfigError, match="name no group 'fc9'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
