"""The file of clustered tensors: what is damaged is an error of ours, and a small file cannot fill the memory."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightfold.errors import ArtifactError
from weightfold.quant.clustered import KEY, Clustered, Coding, Layout, cluster, read_clustered, write_clustered

RECORD: dict[str, Any] = {"shape": [16, 16], "dtype": "float32", "rows": None, "vector": 1, "coding": "packed"}


def planted(folder: Path, about: object, **tensors: torch.Tensor) -> Path:
    path = folder / "m.safetensors"
    held = {"w:codebook": torch.zeros(1, 8, 1), "w:index": torch.zeros(96, dtype=torch.uint8), "b": torch.zeros(3)}
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(held | tensors, path, metadata={KEY: text})
    return path


def about(**changes: Any) -> dict[str, Any]:
    return {"tensors": {"w": RECORD | changes}, "aliases": {}}


def test_the_planted_file_is_whole(tmp_path: Path) -> None:
    assert {name: tuple(value.shape) for name, value in read_clustered(planted(tmp_path, about())).items()} == {
        "b": (3,),
        "w": (16, 16),
    }


@pytest.mark.parametrize(
    "text",
    [
        "[]", "null", "{", "[" * 5000, '{"tensors": {}}', '{"tensors": {}, "aliases": {"c": "d"}}',
        '{"tensors": {}, "aliases": {"b": "b"}}', '{"tensors": {}, "aliases": {"c": ["b"]}}', about(shape=[]),
        about(shape=[[16], 16]), about(shape=[16, 17]), about(shape=[-16, -16]), about(shape=[16, 1e9]), about(rows=0),
        about(rows=-1), about(rows=3), about(rows=2**63), about(vector=0), about(vector=2), about(dtype="load"),
        about(dtype="int64"), about(coding="gzip"), about(coding="deflated"), about(more=1),
        {"tensors": {"w": RECORD, "b": RECORD}, "aliases": {}}, {"tensors": {"x": RECORD}, "aliases": {}},
        '{"tensors": {}, "tensors": {}, "aliases": {}}', r'{"tensors": {}, "aliases": {"\ud800": "b"}}',
    ],
)  # fmt: skip
def test_a_damaged_table_is_an_error_of_ours(tmp_path: Path, text: object) -> None:
    with pytest.raises(ArtifactError, match="no file of clusters"):
        read_clustered(planted(tmp_path, text))


@pytest.mark.parametrize(
    "tensors",
    [
        {"w:codebook": torch.zeros(8)},
        {"w:codebook": torch.zeros(1, 0, 1)},
        {"w:codebook": torch.zeros(1, 8, 1, dtype=torch.int32)},
        {"w:codebook": torch.zeros(2, 8, 1)},
        {"w:codebook": torch.zeros(1, 5, 1), "w:index": torch.full((96,), 255, dtype=torch.uint8)},
        {"w:index": torch.zeros(95, dtype=torch.uint8)},
        {"w:index": torch.zeros(96)},
        {"w:index": torch.zeros(2, 48, dtype=torch.uint8)},
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ArtifactError, match="no file of clusters"):
        read_clustered(planted(tmp_path, about(), **tensors))


def test_a_small_file_cannot_declare_much(tmp_path: Path) -> None:
    one = {"w:codebook": torch.zeros(1, 1, 1), "w:index": torch.zeros(0, dtype=torch.uint8)}
    with pytest.raises(ArtifactError, match="bytes explain"):
        read_clustered(planted(tmp_path, about(shape=[1 << 16, 1 << 16]), **one))


@pytest.mark.parametrize("coding", ["packed", "deflated"])
@pytest.mark.parametrize("layout", [Layout(1), Layout(4), Layout(2, vector=8), Layout(1, rows=700)])
def test_a_tensor_of_one_value_is_written_so_that_it_is_read(tmp_path: Path, layout: Layout, coding: Coding) -> None:
    weight = torch.full((1400, 1600), 0.5)
    label = (torch.zeros(weight.numel() // layout.vector // (2 if layout.rows else 1), dtype=torch.int64),)
    books = torch.full((2 if layout.rows else 1, layout.k, layout.vector), 0.5)
    item = Clustered(layout, books, label * len(books), (1400, 1600), torch.float32)
    write_clustered(tmp_path / "m.safetensors", {"w": item}, {}, coding=coding)
    assert torch.equal(read_clustered(tmp_path / "m.safetensors")["w"], weight)


def test_random_tables_are_read_as_declared_or_refused(tmp_path: Path) -> None:
    """Every legal choice comes back; every other one is an error of ours."""
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(40):
        shape = tuple(draw.choice([1, 2, 3, 8]) for _ in range(draw.randrange(1, 4)))
        layout = Layout(draw.choice([1, 2, 5]), draw.choice([None, 1, 2, 100]), draw.choice([1, 2]))
        weight = torch.randn(shape)
        if layout.refusal(shape):
            continue
        item = cluster(weight, layout, torch.float32)
        coding: Coding = draw.choice(["packed", "deflated"])
        write_clustered(tmp_path / "m.safetensors", {"w": item}, {"b": weight}, aliases={"c": "w"}, coding=coding)
        back = read_clustered(tmp_path / "m.safetensors")
        assert torch.equal(back["w"], item.values())
        assert torch.equal(back["b"], weight)
        assert back["c"] is back["w"]
