"""A file names a built-in network: it is built if the file's length explains it, else refused with the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightfold as wf
from weightfold.artifact import Attribute, Builder, Input, Structure
from weightfold.artifact.format import to_metadata
from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest

TASK = {"input": {"kind": "table", "n_features": 3}, "output": {"kind": "classes", "n": 2}}
TEXT = {"input": {"kind": "text", "vocab": 96, "context": 8}, "output": {"kind": "next-token", "vocab": 96}}


def saved(folder: Path, builder: Builder, **more: Any) -> Path:
    tensors = {"w": torch.zeros(2)}
    path = folder / "saved.safetensors"
    save_file(tensors, path, metadata=to_metadata(Structure(builder=builder, fingerprint=digest(tensors), **more)))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": {"hidden": [1 << 40]}},
        {"overrides": {"hidden": [1 << 62, 1 << 62]}},
        {"overrides": {"width": 30_000, "depth": 4}},
        {"overrides": {"width": 1, "depth": 1 << 40}},
        {"overrides": {"hidden": -1}},
        {"overrides": {"hidden": [[]]}},
        {"overrides": {"hiden": [5]}},
        {"overrides": {"seed": "x"}},
        {"overrides": {"task": 1}},
        {"overrides": {"name": "mlp"}},
        {"task": None},
        {"task": {"input": 1}},
        {"task": TASK | {"output": {"kind": "classes", "n": 1 << 40}}},
        {"name": "no-such"},
        {"name": "char-gpt", "task": TEXT, "overrides": {"depth": 10**9, "width": 4, "num_heads": 1}},
        {"name": "char-gpt", "task": TEXT | {"input": TEXT["input"] | {"context": 1 << 30}}},
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    builder = Builder(**{"kind": "built-in", "name": "mlp", "task": TASK, "overrides": {"hidden": (5,)}} | changes)
    with pytest.raises(ArtifactError, match=r"saved.safetensors' names a network .* that cannot be built"):
        wf.load(saved(tmp_path, builder))


@pytest.mark.parametrize("name", ["_version", "__class__._version", "body._modules"])
def test_an_attribute_that_is_no_size_is_refused(tmp_path: Path, name: str) -> None:
    builder = Builder(kind="built-in", name="mlp", task=TASK, overrides={"hidden": (5,)})
    path = saved(tmp_path, builder, attributes=(Attribute(module="", name=name, before=1, after=2),))
    with pytest.raises(ArtifactError, match="is no size of a layer"):
        wf.load(path)
    assert torch.nn.Module._version == 1


@pytest.mark.parametrize("shape", [(1 << 40,), (1, 0), (1 << 20, 1 << 20), (-1,)])
def test_an_example_that_fills_the_memory_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="An example input holds"):
        Input(shape=shape)
