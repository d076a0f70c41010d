"""The header reader: agrees with safetensors, and refuses every damaged file by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from weightfold.artifact import fingerprint, read_header
from weightfold.errors import ArtifactError
from weightfold.fingerprint import fingerprint as model_fingerprint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.ones((), dtype=torch.int64),
        "d": torch.ones(3, dtype=torch.bfloat16),
        "e": torch.tensor([True, False]),
    }
    save_file(tensors, path, metadata={"who": "test"})
    return path


def test_it_reads_what_safetensors_wrote(file: Path) -> None:
    header = read_header(file)
    assert header.metadata == {"who": "test"}
    assert header.size_bytes == file.stat().st_size
    for name, tensor in load_file(file).items():
        stored = header.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        data = file.read_bytes()[stored.begin : stored.end]
        assert data == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_the_fingerprint_is_that_of_the_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)).bfloat16()
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert fingerprint(tmp_path / "net.safetensors") == model_fingerprint(net)


def test_one_changed_bit_changes_the_fingerprint(file: Path) -> None:
    before = fingerprint(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(file) != before


@given(st.integers(0, 400))
def test_every_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, left: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole, cut = folder / "whole.safetensors", folder / "cut.safetensors"
    save_file({"a": torch.zeros(40)}, whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: min(left, len(data) - 1)])
    with pytest.raises(ArtifactError, match=r"cut\.safetensors"):
        read_header(cut)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"__metadata__": {"x": 3}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ArtifactError, match="truncated, corrupt or no safetensors"):
        read_header(path)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip", b"\xff" * 64, b"\x05" + bytes(7) + b"hello"])
def test_foreign_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="foreign"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"There is no model file .*none\.safetensors"):
        read_header(tmp_path / "none.safetensors")
