"""What models are read from, and what is refused: code, cut-off and foreign files, folders that lack a part."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weightfold.errors import ArtifactError
from weightfold.fingerprint import digest
from weightfold.zoo.exchange.imports import find_models, read_model
from weightfold.zoo.storage.naming import checked_name
from weightfold.zoo.store import Zoo

from ..conftest import equal, net

README = """---
license: apache-2.0
base_model:
- org/base-model
datasets: [mnist, "cifar-10"]
tags:
  - tiny
  - 'test'
model-index:
- name: x
  results: {}
language: en # only
---
# A model
license: not this one
"""


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


def folder_of(path: Path, state: dict[str, Tensor], shards: int) -> Path:
    """A Hugging Face folder."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["TinyNet"], "model_type": "tiny"}))
    (path / "README.md").write_text(README)
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = sorted(state)
    places = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == shard}, path / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_a_hugging_face_folder_is_read_whole(tmp_path: Path, shards: int) -> None:
    state = net().state_dict()
    found = read_model(folder_of(tmp_path / "tiny-net", state, shards))
    assert equal(found.state, state)
    assert (found.name, found.architecture, found.parent) == ("tiny-net", "TinyNet", "org/base-model")
    assert found.facts == {
        "license": "apache-2.0",
        "data": ["mnist", "cifar-10"],
        "tags": ["tiny", "test"],
        "language": "en",
    }


def test_a_hugging_face_folder_comes_back_from_the_zoo(zoo: Zoo, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "tiny", net().state_dict(), 2)
    card = zoo.add(folder, parent="mine", facts={"license": "mit"})
    assert (card.parent, card.facts["license"]) == ("mine", "mit"), "the user's word comes first"
    out = zoo.get("tiny", tmp_path / "out").parent
    assert (out / "config.json").read_text() == (folder / "config.json").read_text()
    assert (out / "README.md").read_text() == README
    assert equal(read_model(out).state, net().state_dict())


def test_a_model_of_transformers_is_read_as_it_was_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path / "bert", max_shard_size="2KB")
    assert (tmp_path / "bert" / "model.safetensors.index.json").is_file()
    found = read_model(tmp_path / "bert")
    assert found.architecture == "BertModel"
    assert equal(found.state, {name: model.state_dict()[name] for name in found.state})
    assert len(found.state) == len(model.state_dict())


def test_an_index_must_hold_together(tmp_path: Path) -> None:
    state = net().state_dict()
    folder = folder_of(tmp_path / "a", state, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"no weights file .*model-00002-of-00002"):
        read_model(folder)
    index = folder / "model.safetensors.index.json"
    for places, complaint in (
        ({"0.bias": "../../other.safetensors"}, "lies elsewhere"),
        ({"0.bias": "/etc/passwd"}, "lies elsewhere"),
        ({"gone": "model-00001-of-00002.safetensors"}, "lacks 'gone'"),
        ({}, "names no tensors"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(ArtifactError, match=complaint):
            read_model(folder)
    index.write_text("{")
    with pytest.raises(ArtifactError, match="is no JSON"):
        read_model(folder)


def test_a_folder_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"holds no \.safetensors file"):
        read_model(tmp_path)
    for name in ("a", "b"):
        save_file(net().state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match=r"holds 2 \.safetensors files and no index"):
        read_model(tmp_path)


def test_an_adapter_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    save_file({"lora_A": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    assert read_model(tmp_path).parent == "org/base"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}},
        lambda s: {"model_state_dict": s, "loss": 0.5},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {"ema": s},
    ],
)
@pytest.mark.parametrize("ending", ["pt", "pth", "bin", "ckpt"])
def test_checkpoints_are_unwrapped(tmp_path: Path, wrap: Any, ending: str) -> None:
    state = dict(net().state_dict())
    path = tmp_path / f"a.{ending}"
    torch.save(wrap(state), path)
    assert equal(read_model(path).state, state)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"epoch": 3}, "'epoch' in .* is int"),
        ([torch.zeros(2)], "holds list, not tensors by name"),
        (torch.zeros(2), "holds Tensor, not tensors by name"),
        ({"model": {}}, "'model' in .* is dict, not a tensor"),
        ({"model": {"w": torch.zeros(2)}, "ema": {"w": torch.zeros(2)}}, "several networks"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_was_found(tmp_path: Path, content: Any, complaint: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ArtifactError, match=complaint):
        read_model(tmp_path / "a.pt")


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"model": e}, lambda e: {"state_dict": {"w": e}}])
def test_code_in_a_pickle_is_not_run(zoo: Zoo, tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(Evil()), tmp_path / "new.pt")
    torch.save(wrap(Evil()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(wrap(Evil())))
    for name, why in (("new", "holds code, not only"), ("old", "holds code, not only"), ("bare", "more than tensors")):
        with pytest.raises(ArtifactError, match=why) as caught:
            zoo.add(tmp_path / f"{name}.pt")
        assert "Convert it where it is trusted" in str(caught.value.remedy)
    assert not zoo.cards()


def test_a_whole_module_in_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ArtifactError, match=r"it would run 'torch\.nn\.modules\.linear\.Linear'"):
        read_model(tmp_path / "whole.pt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_that_was_cut_off_is_refused(zoo: Zoo, tmp_path: Path, ending: str, share: float) -> None:
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    state = dict(net().state_dict())
    torch.save(state, whole) if ending == "pt" else save_file(state, whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ArtifactError, match="cut"):
        zoo.add(cut)
    assert not zoo.cards()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    (tmp_path / "a.pt").write_text("hello")
    with pytest.raises(ArtifactError, match=r"ends in '\.gguf'; models are read from \.safetensors"):
        read_model(tmp_path / "a.gguf")
    for ending in ("safetensors", "pt"):
        with pytest.raises(ArtifactError, match="truncated, corrupt or no"):
            read_model(tmp_path / f"a.{ending}")
    with pytest.raises(ArtifactError, match="There is no model"):
        read_model(tmp_path / "gone.pt")


def test_names_come_from_what_tells_models_apart(tmp_path: Path) -> None:
    for place in ("runs/seed3/model.safetensors", "nets/small.safetensors"):
        path = tmp_path / place
        path.parent.mkdir(parents=True)
        save_file(net().state_dict(), path)
    found = find_models(tmp_path)
    assert [read_model(path).name for path in found] == ["small", "seed3"]


def test_all_models_below_a_folder_are_found(tmp_path: Path) -> None:
    folder_of(tmp_path / "hf", net().state_dict(), 3)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    torch.save(dict(net().state_dict()), tmp_path / "deep" / "er" / "a.pt")
    (tmp_path / "deep" / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    save_file(net().state_dict(), tmp_path / ".hidden" / "model.safetensors")
    assert find_models(tmp_path) == [tmp_path / "deep" / "er" / "a.pt", tmp_path / "hf"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no model"):
        find_models(tmp_path / "empty")


def test_a_packed_run_is_read_with_its_structure(tmp_path: Path, zoo: Zoo) -> None:
    import weightfold
    from weightfold.artifact import write_packed
    from weightfold.models import build

    from ..test_zoo_store import saved, weightfold_task

    model = build("mlp", weightfold_task(), hidden=(5,))
    saved(model, weightfold_task(), tmp_path / "run" / "model.safetensors")
    from weightfold.artifact import read_structure

    structure, _ = read_structure(tmp_path / "run" / "model.safetensors")
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    write_packed(tmp_path / "a.wfp", structure, {}, arrays)
    card = zoo.add(tmp_path / "a.wfp")
    assert (card.name, card.architecture, card.digest) == ("a", "mlp", digest(model.state_dict()))
    assert card.semantic_hash is not None
    assert weightfold.fingerprint.fingerprint(weightfold.load(zoo.get("a", tmp_path / "out"))) == card.digest


def test_changed_tensors_under_an_old_fingerprint_are_refused(tmp_path: Path) -> None:
    from weightfold.models import build

    from ..test_zoo_store import saved, weightfold_task

    path = tmp_path / "run" / "model.safetensors"
    saved(build("mlp", weightfold_task(), hidden=(5,)), weightfold_task(), path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="fingerprint"):
        read_model(path)


@pytest.mark.parametrize("name", ["__metadata__", "\ud800"])
def test_names_that_a_file_cannot_hold_are_refused_before_anything_is_written(zoo: Zoo, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot hold a tensor named"):
        zoo.add({name: torch.ones(2), "a": torch.ones(3)}, name="a")
    assert not zoo.cards()


def test_of_many_models_only_those_that_cannot_be_stored_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "wide.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "sound.pt")
    sources = [tmp_path / "wide.pt", tmp_path / "sound.pt", net(), net(1)]
    refused: list[str] = []
    cards = zoo.add_many(
        sources,
        names=["wide", "sound", " blank ", "odd"],
        facts=[{}, {}, {}, {"accuracy": float("nan")}],
        refused=lambda _, error: refused.append(error.message),
    )
    assert [card.name for card in cards] == ["sound"]
    assert [text for text in ("complex128", "no name of a model", "as JSON") if any(text in r for r in refused)] == [
        "complex128", "no name of a model", "as JSON"
    ]  # fmt: skip
    assert len(refused) == 3


@pytest.mark.parametrize(("file", "name"), [(b"two\nlines", "two_lines"), (b"\xff", "_"), (b"x" * 230, "x" * 120)])
def test_names_of_files_become_names_that_are_allowed(zoo: Zoo, tmp_path: Path, file: bytes, name: str) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    path = tmp_path / os.fsdecode(file + b".pt")
    try:
        (tmp_path / "plain.pt").rename(path)
    except OSError:
        pytest.skip("this file system knows no such names")
    card = zoo.add(path)
    assert card.name == checked_name(name)
    assert str(card.source).encode()


def test_links_in_a_ring_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "nets" / "old").mkdir(parents=True)
    torch.save({"w": torch.ones(2)}, tmp_path / "nets" / "old" / "a.pt")
    for name in ("up", "top"):
        (tmp_path / "nets" / "old" / name).symlink_to("..")
    assert find_models(tmp_path) == [tmp_path / "nets" / "old" / "a.pt"]
