"""The structure of a saved model: JSON both ways; damage and newer formats are refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightfold.artifact import Attribute, Builder, Input, Resized, Structure, read_structure
from weightfold.artifact.format import KEY, check_tensors, parse_structure, to_metadata
from weightfold.errors import ArtifactError

STRUCTURE = Structure(
    builder=Builder(kind="built-in", name="mlp", task={"x": 1}, overrides={"width": 8}),
    sizes={"w": Resized(before=(4, 2), after=(3, 2))},
    attributes=(Attribute(module="body.0", name="out_features", before=4, after=3),),
    aliases={"v": "w"},
    inputs=(Input(shape=(2, 1, 8, 8)), Input(shape=(1, 4), dtype="int64", name="ids", high=9)),
    ledger_head="ab" * 32,
    fingerprint="cd" * 32,
    versions={"torch": "2"},
)


def test_it_survives_json() -> None:
    assert Structure.from_json(STRUCTURE.to_json()) == STRUCTURE
    assert parse_structure(STRUCTURE.to_json(), "here") == STRUCTURE


def test_it_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3, 2)}, path, metadata=to_metadata(STRUCTURE))
    structure, header = read_structure(path)
    assert structure == STRUCTURE
    check_tensors(structure, header, path)
    assert header.metadata["ledger"] == STRUCTURE.ledger_head


def test_plain_weights_are_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(3, 2)}, path)
    with pytest.raises(ArtifactError, match="not written by weightfold"):
        read_structure(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "no JSON"),
        ("3", "damaged structure"),
        ("{}", "builder"),
        (json.dumps({"format": 99}), "reads up to 1"),
        (STRUCTURE.to_json().replace('"sizes"', '"sises"'), "no setting 'sises'"),
        (STRUCTURE.to_json().replace('"built-in"', '"magic"'), "kind"),
    ],
)
def test_damage_is_refused_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ArtifactError, match=complaint):
        parse_structure(text, "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"w": torch.zeros(4, 2)}, r"'w' in .* has the shape \(4, 2\); its structure says \(3, 2\)"),
        ({"other": torch.zeros(1)}, "lacks 'w'"),
    ],
)
def test_tensors_that_do_not_fit_the_structure_are_named(
    tmp_path: Path, tensors: dict[str, torch.Tensor], complaint: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={KEY: STRUCTURE.to_json()})
    structure, header = read_structure(path)
    with pytest.raises(ArtifactError, match=complaint):
        check_tensors(structure, header, path)
