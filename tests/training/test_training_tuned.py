"""Training with a table of widths: the event keeps to it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from weightfold.bench.tune import SLOWER
from weightfold.errors import ConfigError, ExportError
from weightfold.export import Source
from weightfold.ledger import Ledger
from weightfold.training import TrainConfig, train
from weightfold.training.again import train_again
from weightfold.training.config import Race
from weightfold.training.speed import lost_races

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


def pretend(monkeypatch: pytest.MonkeyPatch, slow_below: int) -> list[int]:
    """Have networks whose first layer is narrower than that lose the race; gives the widths that have run."""
    module, seen = importlib.import_module("weightfold.training.speed"), []

    def race(dense: Source, narrow: Source, target: str, *, batch: int, threads: int) -> tuple[float, float]:
        assert (dense.model.fc1.out_features, target, batch, threads) == (120, "onnx-cpu", 4, 1)
        seen.append(narrow.model.fc1.out_features)
        if seen[-1] < slow_below:
            raise ExportError("On onnx-cpu the narrowed network takes 1.500 ms, 1.50 times the 1.000 ms of the dense")
        return 1.0, 0.8

    monkeypatch.setattr(module, "check_not_slower", race)
    monkeypatch.setattr(module, "check_runs", lambda *_: None)
    return seen


RACED = TrainConfig(
    data="digits",
    limit=300,
    model="lenet5",
    epochs=2,
    keep=0.5,
    at=0.5,
    max_increase=100.0,
    threads=1,
    liked={"fc1": [120, 72]},
    race=Race(batch=4),
)


def test_a_plan_that_would_be_slower_is_refused_with_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pretend(monkeypatch, slow_below=100)
    arms = train(RACED, tmp_path / "run")["results"]["arms"]
    assert {name: after for name, _, after in arms["folded"]["widths"]} == {
        "conv1": 3, "conv2": 8, "fc1": 120, "fc2": 42
    }  # fmt: skip
    refused = [event for event in arms["folded"]["events"] if not event["accepted"]]
    assert [event["group"] for event in refused] == ["fc1"]
    assert "takes 1.500 ms, 1.50 times the 1.000 ms of the dense" in refused[0]["reason"]
    assert 72 in seen
    assert seen[-1] == 120
    assert (arms["dense"]["target_ms"], arms["folded"]["target_ms"]) == (1.0, 0.8)
    with Ledger.open(tmp_path / "run" / "ledger.db") as ledger:
        assert any("1.500 ms" in str(entry.body) for entry in ledger.entries() if entry.kind in ("refusal", "rollback"))


def test_where_nothing_is_slower_the_record_is_that_of_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slow_below=0)
    heads = [train(RACED, tmp_path / name)["results"]["head"] for name in ("a", "b")]
    assert heads[0] == heads[1]


def test_the_race_is_run_in_the_real_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    config = RACED.model_copy(update={"overrides": {}, "race": Race(batch=16)})
    arms = train(config, tmp_path / "run")["results"]["arms"]
    accepted = [event for event in arms["folded"]["events"] if event["accepted"]]
    refused = [event for event in arms["folded"]["events"] if not event["accepted"]]
    assert accepted or all("times the" in event["reason"] for event in refused)
    assert not accepted or arms["folded"]["target_ms"] <= 1.1 * arms["dense"]["target_ms"]


def test_a_race_of_a_method_without_events_is_refused() -> None:
    with pytest.raises(ConfigError, match="'race' is no setting of the method 'none'"):
        TrainConfig(method="none", race=Race())


def test_what_cannot_be_raced_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no target 'onnx-gpu'"):
        train(RACED.model_copy(update={"race": Race(target="onnx-gpu")}), tmp_path / "run")

    def unable(*_: object) -> None:
        raise ExportError("ONNX has no counterpart for the operator 'odd' of this model.")

    monkeypatch.setattr(importlib.import_module("weightfold.bench.tune"), "_session", unable)
    monkeypatch.setattr(importlib.import_module("weightfold.bench.tune"), "require", lambda _: None)
    with pytest.raises(ExportError, match="no counterpart"):
        train(RACED, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_replay_goes_by_the_record_and_not_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, slow_below=0)
    train(RACED, tmp_path / "a")
    seen = pretend(monkeypatch, slow_below=1000)
    facts = train_again(tmp_path / "a", tmp_path / "again")
    assert (facts["same_structure"], facts["same_weights"], seen) == (True, True, [])


def test_only_a_lost_race_makes_learned_bits_race_again(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        ledger.append("rollback", {"attempts": [{"reason": "the probe loss may rise by 1"}]})
        assert not lost_races(ledger.entries())
        ledger.append("rollback", {"attempts": [{"reason": f"On onnx-cpu {SLOWER} 2.000 ms"}]})
        assert lost_races(ledger.entries())
