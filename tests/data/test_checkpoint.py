"""Weights from files: only tensors, only if they all fit, and never code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightfold.data import load_weights_, read_tensors
from weightfold.errors import ArtifactError


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(value.shape) for name, value in network().state_dict().items() if value.ndim}


def test_safetensors_load_strictly_without_the_counters_of_batch_norm(tmp_path: Path, tensors: dict) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    model = network()
    load_weights_(model, tmp_path / "m.safetensors")
    for name, value in tensors.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": 3}, lambda t: {"model": t}])
def test_pickles_of_tensors_load(tmp_path: Path, tensors: dict, suffix: str, wrap: Callable) -> None:
    torch.save(wrap(tensors), tmp_path / f"m{suffix}")
    model = network()
    load_weights_(model, tmp_path / f"m{suffix}")
    assert torch.equal(model.state_dict()["0.weight"], tensors["0.weight"])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, tensors: dict, legacy: bool) -> None:
    path, proof = tmp_path / "m.pt", tmp_path / "it-ran"
    if legacy:
        path.write_bytes(pickle.dumps({"0.weight": Bomb(proof)}))
    else:
        torch.save({**tensors, "extra": Bomb(proof)}, path)
    with pytest.raises(ArtifactError, match=r"m\.pt' was not read: .*\n.*safetensors") as caught:
        load_weights_(network(), path)
    assert not proof.exists()
    assert "code" in caught.value.message or legacy


def test_a_whole_module_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "m.pt")
    with pytest.raises(ArtifactError, match=r"holds code.*'torch.nn.modules.container.Sequential'.*\n.*safetensors"):
        read_tensors(tmp_path / "m.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 5, 40, -20])
def test_truncated_files_are_named(tmp_path: Path, tensors: dict, suffix: str, keep: int) -> None:
    path = tmp_path / f"m{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=rf"m\{suffix}'") as caught:
        read_tensors(path)
    assert caught.value.remedy


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["2.bias"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["3.weight"] = torch.zeros(7)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["0.weight"] = torch.zeros(5, 3)


def diverge(tensors: dict[str, Tensor]) -> None:
    tensors["1.running_var"][2] = torch.nan


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (drop, r"m.safetensors' lacks '2.bias' of shape \(2,\)"),
        (add, r"m.safetensors' holds '3.weight' of shape \(7,\), which the model lacks"),
        (reshape, r"'0.weight' in '.*m.safetensors' has the shape \(5, 3\); the model needs \(4, 3\)"),
        (diverge, r"'1.running_var' in '.*m.safetensors' holds 1 of 4 values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, tensors: dict, damage: Callable, complaint: str
) -> None:
    damage(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=complaint) as caught:
        load_weights_(model, tmp_path / "m.safetensors")
    assert caught.value.remedy
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_several_faults_are_counted(tmp_path: Path, tensors: dict) -> None:
    save_file({f"module.{name}": value for name, value in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"\(and 7 more\)\.\n.*'module\.0\.bias'"):
        load_weights_(network(), tmp_path / "m.safetensors")


def test_a_tied_tensor_need_stand_in_the_file_once(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    weight = torch.arange(15.0).view(5, 3)
    for name in ("embed.weight", "head.weight"):
        save_file({name: weight}, tmp_path / "m.safetensors")
        model = tied()
        load_weights_(model, tmp_path / "m.safetensors")
        assert torch.equal(model.state_dict()["embed.weight"], weight)
        assert model["embed"].weight is model["head"].weight


@pytest.mark.parametrize(
    ("content", "complaint"),
    [([torch.zeros(2)], "holds list, not tensors by name"), ({"a": 3}, "'a' in .* is int"), ({}, "holds dict")],
)
def test_pickles_of_something_else(tmp_path: Path, content: object, complaint: str) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ArtifactError, match=complaint):
        read_tensors(tmp_path / "m.pt")


def test_missing_files_and_other_endings(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no weights file"):
        read_tensors(tmp_path / "m.safetensors")
    (tmp_path / "m.pkl").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"ending '.pkl'; weights are read from .safetensors, .pt, .pth and .bin"):
        read_tensors(tmp_path / "m.pkl")
