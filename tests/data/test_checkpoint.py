"""Weights from files: only tensors, only if they all fit, and never code."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
    save_file({f"x{name}": value for name, value in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ArtifactError, match=r"\(and 7 more\)\.\n.*'x0\.bias'"):
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
    with pytest.raises(ArtifactError, match=r"ending '.pkl'; weights are read from .* and .ckpt"):
        read_tensors(tmp_path / "m.pkl")


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: prefixed(t, "module."),
        lambda t: prefixed(t, "_orig_mod."),
        lambda t: prefixed(t, "module._orig_mod."),
        lambda t: {name.replace(".", "._orig_mod."): value for name, value in t.items()},
        lambda t: {"state_dict": prefixed(t, "model."), "optimizer_states": [OPTIMIZER], "epoch": 3},
        lambda t: {"state_dict": prefixed(t, "model.net."), "hyper_parameters": argparse.Namespace(lr=0.1)},
        lambda t: {"model": t, "optimizer": OPTIMIZER, "rng_state": torch.get_rng_state(), "args": Path("x")},
        lambda t: {"model": {"state_dict": t}, "scaler": {"scale": torch.ones(())}},
        lambda t: {"net": t, "best": np.float64(0.5), "when": np.arange(3)},
        lambda t: {"model_ema": t},
        lambda t: {**t, "step": 3, "note": "x", "best": np.float32(1)},
        lambda t: {"module": OrderedDict(prefixed(t, "module.")), "lr_scheduler": OPTIMIZER},
        lambda t: {"model": {name: nn.Parameter(value) for name, value in t.items()}},
    ],
)  # fmt: skip
def test_checkpoints_are_read_as_they_are_written(tmp_path: Path, tensors: dict, suffix: str, wrap: Callable) -> None:
    path = tmp_path / f"m{suffix}"
    torch.save(wrap(tensors), path)
    model = network()
    load_weights_(model, path)
    for name, value in tensors.items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_model_in_a_wrapper_takes_plain_names(tmp_path: Path, tensors: dict) -> None:
    save_file(tensors, tmp_path / "m.safetensors")
    model = nn.ModuleDict({"module": network()})
    load_weights_(model, tmp_path / "m.safetensors")
    assert torch.equal(model.state_dict()["module.0.weight"], tensors["0.weight"])


def test_of_several_networks_one_is_chosen(tmp_path: Path, tensors: dict) -> None:
    path = tmp_path / "m.pt"
    other = {name: value + 1 for name, value in tensors.items()}
    torch.save({"model": tensors, "ema": other, "optimizer": OPTIMIZER}, path)
    with pytest.raises(ArtifactError, match=r"several networks: under 'model', 'ema'") as caught:
        read_tensors(path)
    named = caught.value.remedy.rpartition(" ")[2]  # type: ignore[union-attr]
    assert torch.equal(read_tensors(named)["0.weight"], other["0.weight"])
    assert torch.equal(read_tensors(f"{path}:model")["0.weight"], tensors["0.weight"])
    with pytest.raises(ArtifactError, match=r"no tensors under 'emma'.*\n.*'ema'"):
        read_tensors(f"{path}:emma")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        (
            "m.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n",
            "Git LFS.*\n.*git lfs",
        ),
        ("m.pt", b"\n <!DOCTYPE html><html></html>", "a web page"),
        ("m.pth", b"\x1f\x8b" + b"0" * 600, "gzip.*\n.*Unpack"),
        ("m.bin", b"0" * 257 + b"ustar" + b"0" * 300, "a tar archive"),
        ("m.pt", b"\x93NUMPY\x01\x00", "array of NumPy"),
        ("m.pt", b"\x89HDF\r\n", "HDF5"),
        ("m.bin", b"GGUF\x03", "llama.cpp"),
        ("m.pt", b'{"a": 1}', "a text"),
        ("m.ckpt", b"", "empty"),
        ("m.safetensors", b"PK\x03\x04" + b"0" * 100, "ending .pt"),
    ],
)
def test_what_a_file_is_is_told(tmp_path: Path, name: str, data: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"(?s){name}' is .*{complaint}"):
        read_tensors(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_a_program_and_a_renamed_file_are_told(tmp_path: Path, tensors: dict) -> None:
    torch.jit.trace(network().eval(), torch.zeros(2, 3)).save(tmp_path / "m.pt")
    with pytest.raises(ArtifactError, match="TorchScript program") as caught:
        read_tensors(tmp_path / "m.pt")
    assert "weights_only" not in str(caught.value)
    save_file(tensors, tmp_path / "n.pt")
    with pytest.raises(ArtifactError, match=r"a safetensors file.*\n.*\.safetensors"):
        read_tensors(tmp_path / "n.pt")


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        str(t): torch.ones(3).to(t)
        for t in (
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int8,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.uint16,
        )
    }
    content |= {"view": base[1:, ::2], "t": base.t(), "wide": torch.ones(3, 1).expand(3, 5), "none": torch.empty(0, 3),
                "scalar": torch.tensor(2), "tied": base}  # fmt: skip
    torch.save(content, tmp_path / "m.pt")
    back = read_tensors(tmp_path / "m.pt")
    for name, value in content.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name].view(torch.uint8) if value.itemsize == 1 else back[name],
                           value.view(torch.uint8) if value.itemsize == 1 else value)  # fmt: skip
    assert back["tied"].data_ptr() == back["t"].data_ptr()


def test_a_small_pickle_cannot_declare_much(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    with pytest.raises(ArtifactError, match="no file of tensors: a tensor of shape"):
        read_tensors(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "n.pt", "w") as archive:
        archive.writestr("n/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(ArtifactError, match="remembers an object"):
        read_tensors(tmp_path / "n.pt")


def test_damaged_pickles_are_errors_of_ours(tmp_path: Path, tensors: dict) -> None:
    draw = random.Random(0)
    torch.save({"model": tensors, "args": argparse.Namespace(a=1)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    place = next(name for name in parts if name.endswith("data.pkl"))
    for _ in range(300):
        data = bytearray(parts[place])
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with zipfile.ZipFile(tmp_path / "n.pt", "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, bytes(data) if name == place else part)
        with contextlib.suppress(ArtifactError):
            read_tensors(tmp_path / "n.pt")
