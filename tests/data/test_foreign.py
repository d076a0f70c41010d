"""A foreign config.json: what would fetch or run something is refused by name, damage is an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weightfold.data import load_model
from weightfold.data.foreign import RUNNING, read_config
from weightfold.errors import ArtifactError


def planted(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_what_every_config_holds_passes(tmp_path: Path) -> None:
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "_name_or_path": "x",
        "auto_map": None,
        "_attn_implementation": "sdpa",
        "use_pretrained_backbone": False,
        "text_config": {"dtype": "float32"},
    }
    assert read_config(planted(tmp_path, config)) == config


@pytest.mark.parametrize("key", [*RUNNING, "_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"text_config": c}, lambda c: {"parts": [{"a": c}]}])
def test_a_field_that_runs_something_is_refused_by_name(tmp_path: Path, key: str, wrap: Any) -> None:
    with pytest.raises(ArtifactError, match=rf"asks for .*{key}'\); it is not run"):
        read_config(planted(tmp_path, wrap({key: "org/kernel"})))


def test_attention_by_part_is_looked_through(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="kernels from the hub"):
        read_config(planted(tmp_path, {"_attn_implementation": {"": "sdpa", "vision": "kernels-community/flash-attn"}}))


@pytest.mark.parametrize(
    "config",
    ["[1]", "null", "3", '"x"', "{", "[" * 200_000, '{"a": NaN}', '{"a": 1e999}', r'{"a": "\ud800"}', '{"a":1,"a":2}',
     {"architectures": 5}, {"architectures": [["x"]]}, {"architectures": "X"}, {"architectures": {"a": 1}}],
)  # fmt: skip
def test_damage_is_an_error_of_ours(tmp_path: Path, config: Any) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json"):
        read_config(planted(tmp_path, config))


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["pipeline"]},
        {"architectures": ["AutoTokenizer"], "model_type": "bert"},
        {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 1 << 40},
        {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 1 << 40, "hidden_size": 12},
        {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": "x"},
        {"model_type": "no-such"},
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path, config: Any) -> None:
    pytest.importorskip("transformers")
    planted(tmp_path, config)
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="cannot be loaded as"):
        load_model(tmp_path)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    planted(tmp_path, {"model_type": "bert"})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="holds an adapter"):
        load_model(tmp_path)
