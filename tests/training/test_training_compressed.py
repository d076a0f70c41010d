"""Training with self-compression: the packed file, its numbers, the record, interruptions, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from weightfold.artifact.packed import read_packed
from weightfold.audit.bits import read_bits
from weightfold.audit.folder import verify_folder
from weightfold.data import load as load_data
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export import load
from weightfold.export.opened import open_model
from weightfold.ledger import Ledger
from weightfold.models import Classes, ImageInput, TableInput, TaskSpec
from weightfold.training import TrainConfig, resume, train
from weightfold.training import run as run_module
from weightfold.training.again import train_again, undo_run
from weightfold.training.looks import Look
from weightfold.training.measure import evaluate

from .conftest import TINY

COMPRESSED: dict[str, Any] = {**TINY, "method": "self_compress", "target": "650 B", "lr": 0.01, "epochs": 20, "at": 0.1}

Finished = tuple[Path, dict[str, Any], list[Look]]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tiny run of self-compression: its folder, what `train` returned, what was told meanwhile."""
    out, looks = tmp_path_factory.mktemp("runs") / "small", []
    return out, train(TrainConfig(**COMPRESSED), out, watch=looks.append), looks


def test_the_file_is_the_network_to_the_bit(compressed: Finished) -> None:
    out, run, _ = compressed
    floats, packed = load(out / "model.safetensors").state_dict(), load(out / "model.wfp").state_dict()
    assert floats.keys() == packed.keys()
    assert all(torch.equal(floats[name], packed[name]) for name in floats)
    arm = run["results"]["arms"]["folded"]
    score = evaluate(load(out), load_data("digits", limit=160), "test", torch.device("cpu"))
    assert (score.value, pytest.approx(score.loss)) == (arm["score"], arm["loss"])


def test_the_numbers_are_those_of_the_file(compressed: Finished) -> None:
    out, run, _ = compressed
    arm = run["results"]["arms"]["folded"]
    packed, file = arm["packed"], out / "model.wfp"
    assert packed["coded_bytes"] == arm["size_bytes"] == file.stat().st_size <= packed["target_bytes"] == 650
    assert arm["plain_bytes"] == (out / "model.safetensors").stat().st_size
    assert packed["coded_bytes"] < packed["packed_bytes"] < packed["fp32_bytes"]
    assert packed["share"] == packed["coded_bytes"] / packed["fp32_bytes"]
    assert sum(packed["by_tensor"].values()) + packed["header_bytes"] == pytest.approx(packed["coded_bytes"], abs=8)
    coded = read_packed(file).coded
    assert arm["weights"][0] == 64 * 24 + 24 + 24 * 24 + 24 + 24 * 10 + 10
    assert arm["weights"][1] == sum((tensor.codes != 0).sum() for tensor in coded.values())
    for layer in arm["layers"]:
        bits_R = coded[layer["name"]].bits_R
        assert layer["rows"][1] == (bits_R > 0).sum()
        assert layer["weights"][1] == (coded[layer["name"]].codes != 0).sum()
        assert layer["bits"] == pytest.approx(bits_R[bits_R > 0].mean())
        assert sum(layer["bits_by_row"].values()) == layer["rows"][1]


def test_every_look_is_in_the_ledger(compressed: Finished) -> None:
    out, run, _ = compressed
    bits = read_bits(out)
    assert [layer.name for layer in bits.layers] == ["body.0.weight", "body.2.weight", "head.weight"]
    assert [(layer.rows, layer.weights) for layer in bits.layers] == [(24, 1536), (24, 576), (10, 240)]
    assert (bits.target, bits.float_bytes) == (650, run["results"]["arms"]["folded"]["packed"]["fp32_bytes"])
    assert bits.sizes[-1] == (run["total_steps"], run["results"]["arms"]["folded"]["size_bytes"])
    assert bits.sizes[0][1] > bits.sizes[-1][1]
    with Ledger.open(out / "ledger.db", readonly=True) as ledger:
        assert len(ledger.metrics("price")) == len(ledger.metrics("bytes")) - 2, "step 0 and the file have no price"


def test_the_run_is_told_while_it_goes_on(compressed: Finished) -> None:
    _, run, looks = compressed
    assert looks[0].record is None
    assert looks[-1].step == looks[-1].total_steps == run["total_steps"]
    assert looks[-1].record is not None
    assert len(looks) >= COMPRESSED["epochs"]
    assert [look.step for look in looks] == sorted(look.step for look in looks)


def test_the_folder_is_checked_as_a_whole(compressed: Finished, tmp_path: Path) -> None:
    out, *_ = compressed
    assert "model.wfp" in verify_folder(out)["files"]
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    data = bytearray((copy / "model.wfp").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.wfp").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.wfp.*checksum"):
        verify_folder(copy)


def test_an_interrupted_run_goes_on_to_the_same_file(
    compressed: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = run_module.write_checkpoint, []

    def interrupt(folder: Path, state: dict[str, Any]) -> None:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        write(folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**COMPRESSED), tmp_path / "cut")
    again = resume(tmp_path / "cut")
    assert again["results"]["head"] == compressed[1]["results"]["head"]
    assert (tmp_path / "cut" / "model.wfp").read_bytes() == (compressed[0] / "model.wfp").read_bytes()
    assert read_bits(tmp_path / "cut") == read_bits(compressed[0])


def test_the_run_done_again_is_the_same(compressed: Finished, tmp_path: Path) -> None:
    facts = train_again(compressed[0], tmp_path / "again")
    assert facts["same_structure"]
    assert facts["same_weights"]
    assert facts["first_difference"] is None


def test_the_run_s_own_network_is_not_undone(compressed: Finished) -> None:
    with pytest.raises(ConfigError, match=r"model\.wfp"):
        undo_run(compressed[0], force=True)


def test_codes_are_found_beside_the_model_of_the_same_moment(compressed: Finished, tmp_path: Path) -> None:
    out, *_ = compressed
    names = {"body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "head.weight", "head.bias"}
    assert {*open_model(str(out)).coded} == {*open_model(str(out / "model.wfp")).coded} == names
    assert not open_model(str(out / "dense.safetensors")).coded
    shutil.copy(out / "model.wfp", tmp_path / "model.wfp")
    undo_run(out, out=tmp_path / "model.safetensors")
    wider = open_model(str(tmp_path / "model.safetensors"))
    assert {*wider.coded} == names


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "fold", "target": "3 kB"}, "'target' is a setting of the method 'self_compress'"),
        ({"method": "fold", "max_accuracy_loss": 1.0, "strength": 1e-6}, "'strength' is a setting"),
        ({"target": "3 kB", "strength": 1e-6}, "exclude each other"),
        ({"target": "3 kB", "max_accuracy_loss": 1.0}, "exclude each other"),
        ({"method": "fold", "pareto": 2}, "'pareto' is a setting of the method 'self_compress'"),
        ({"time_goal": 0.5}, "'time_goal' is a setting of the method 'fold'"),
        ({"strength": 0}, "strength"),
    ],
)
def test_dials_of_other_methods_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        TrainConfig(**{"method": "self_compress", **changes})


@pytest.mark.parametrize(("target", "complaint"), [("3 quarters", "unknown unit"), ("50 B", "not possible")])
def test_a_target_that_cannot_be_met_leaves_no_folder(target: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(TrainConfig(**{**COMPRESSED, "target": target}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dial", [{"strength": 1e-5}, {"max_accuracy_loss": 5.0}])
def test_the_other_dials_work(dial: dict[str, float], tmp_path: Path) -> None:
    config = TrainConfig(**{**COMPRESSED, "target": None, "epochs": 6, "dense": False, **dial})
    arm = train(config, tmp_path / "run")["results"]["arms"]["folded"]
    assert arm["packed"]["target_bytes"] is None
    assert arm["size_bytes"] < arm["packed"]["fp32_bytes"] / 4


def test_what_is_left_open_suits_the_method() -> None:
    small = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
    large = TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10))
    table = TaskSpec(input=TableInput(n_features=3), output=Classes(n=2))
    config = TrainConfig(method="self_compress", target="3 kB")
    assert config.resolved(small).overrides == {"width": 16}
    assert config.resolved(large).overrides == config.resolved(table).overrides == {}
    assert {config.resolved(task).optimizer for task in (small, large, table)} == {"adamw"}
    assert TrainConfig().resolved(small).overrides == {}


def test_the_front_is_written_as_files_that_score_what_is_said(tmp_path: Path) -> None:
    config = TrainConfig(**{**COMPRESSED, "pareto": 3, "activation_strength": 1e-4, "epochs": 8})
    arm = train(config, tmp_path / "run")["results"]["arms"]["folded"]
    assert 1 <= len(arm["front"]) <= 3
    assert [row["bytes"] for row in arm["front"]] == sorted(row["bytes"] for row in arm["front"])
    for row in arm["front"]:
        path = tmp_path / "run" / row["file"]
        assert path.stat().st_size == row["bytes"]
        score = evaluate(load(path), load_data("digits", limit=160), "test", torch.device("cpu"))
        assert (score.value, pytest.approx(score.loss)) == (row["score"], row["loss"])
    file = tmp_path / "run" / arm["front"][0]["file"]
    held = file.read_bytes()
    file.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"front-1\.wfp"):
        verify_folder(tmp_path / "run")
    train(TrainConfig(**{**COMPRESSED, "epochs": 1, "method": "fold", "target": None}), tmp_path / "run", force=True)
    assert not list((tmp_path / "run").glob("front-*.wfp")), "files of an earlier run"
