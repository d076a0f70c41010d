"""What goes into a zoo comes out as it was; contents are kept once; names, differences and removals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weightfold
from weightfold.errors import ArtifactError, ConfigError
from weightfold.fingerprint import digest, fingerprint
from weightfold.weights.canon import same_hash, semantic_hash
from weightfold.weights.disguise import disguise
from weightfold.zoo.delta.codec import encode
from weightfold.zoo.store import Zoo

from .conftest import EXAMPLE, equal, near, net, pair, switched


def odd_tensors() -> dict[str, Tensor]:
    tied, fused = torch.randn(3, 4), torch.randn(3, 2)
    return {
        "half": torch.randn(5).half(),
        "brain": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "wave": torch.randn(3, dtype=torch.complex64),
        "eighth": torch.randn(4).to(torch.float8_e4m3fn),
        "a.weight": tied,
        "b.weight": tied,
        "turned": torch.randn(4, 3).T,
        "part": fused[:2],
        "other part": fused[1:],
    }


def test_tensors_of_every_type_come_back_to_the_bit(zoo: Zoo) -> None:
    state = odd_tensors()
    card = zoo.add(state, name="odd")
    found = zoo.state("odd")
    assert equal(found, state)
    assert found["a.weight"] is found["b.weight"], "ties are kept"
    assert card.digest == digest(state) == card.decoded
    assert card.n_parameters == sum(value.numel() for value in state.values()) - 12


def test_a_type_that_no_file_holds_is_refused_by_name(zoo: Zoo) -> None:
    with pytest.raises(ArtifactError, match=r"'w' has the type torch.complex128"):
        zoo.add({"w": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(ArtifactError, match="'w' is sparse"):
        zoo.add({"w": torch.eye(3).to_sparse()})
    with pytest.raises(ArtifactError, match="holds no tensors"):
        zoo.add({})
    assert not zoo.cards()


def test_what_was_read_is_the_callers_own(zoo: Zoo) -> None:
    parent, child = pair(zoo)
    half = {**child, "2.weight": parent["2.weight"]}
    zoo.add(half, name="half")
    switched(zoo, "half", "parent")
    for value in zoo.state("half").values():
        value.zero_()
    assert equal(zoo.state("half"), half)
    zoo.state("child")["0.weight"].zero_()
    zoo.state("parent")["0.weight"].zero_()
    assert equal(zoo.state("child"), child)
    assert equal(zoo.state("parent"), parent)


def test_equal_contents_are_kept_once_under_two_names(zoo: Zoo) -> None:
    state = net().state_dict()
    a, b = zoo.add(state, name="a"), zoo.add(state, name="b")
    assert a.digest == b.digest
    assert len(list((zoo.folder / "blobs").glob("*/*"))) == 1
    zoo.remove("a")
    assert equal(zoo.state("b"), state)
    assert zoo.remove(a.digest[:8]) == ["b"]
    swept = zoo.sweep()
    assert swept is not None
    assert swept.n_files == 1
    assert not zoo.cards()


def test_names_are_unique_and_adding_again_changes_nothing(zoo: Zoo) -> None:
    first = zoo.add(net(0).state_dict(), name="a", facts={"accuracy": 0.9})
    assert zoo.add(net(0).state_dict(), name="a", facts={"accuracy": 0.1}) == first
    with pytest.raises(ConfigError, match=f"another model named 'a' .content {first.digest[:12]}"):
        zoo.add(net(1).state_dict(), name="a")
    assert zoo.cards() == [first]


def test_a_name_that_nobody_chose_gives_way(zoo: Zoo) -> None:
    cards = zoo.add_many([net(0), net(1), net(1), net(2)])
    assert cards[0].name == "Sequential"
    assert [card.name for card in cards[1:]] == [f"Sequential-{card.digest[:8]}" for card in cards[1:]]
    assert cards[1] == cards[2]


@pytest.mark.parametrize("name", ["", " a", "a\n", "x" * 201, "a\x00b"])
def test_names_that_cannot_be_told_apart_are_refused(zoo: Zoo, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a model"):
        zoo.add(net(), name=name)


def test_models_are_found_by_name_and_digest_and_near_names_are_told(zoo: Zoo) -> None:
    a = zoo.add(net(0).state_dict(), name="resnet-seed0")
    zoo.add(net(1).state_dict(), name="resnet-seed1")
    assert zoo.card(a.digest) == zoo.card(a.digest[:6]) == zoo.card("resnet-seed0") == a
    with pytest.raises(ConfigError, match="Did you mean 'resnet-seed0'"):
        zoo.card("resnet-sed0")
    with pytest.raises(ConfigError, match="no model"):
        zoo.card(a.digest[:5])
    with pytest.raises(ConfigError, match="no model"):
        zoo.card("%")


def test_a_digests_beginning_that_fits_two_is_refused(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightfold.zoo.storage import naming

    monkeypatch.setattr(naming, "SHORTEST_PREFIX", 1)
    zoo.add_many([{"w": torch.tensor(float(n))} for n in range(40)])
    digits = [card.digest[0] for card in zoo.cards()]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(ConfigError, match="begins several digests: 'model"):
        zoo.card(twice)


def test_facts_must_be_json(zoo: Zoo) -> None:
    facts = {"accuracy": 0.97, "tags": ["a"], "data": {"name": "mnist", "limit": None}}
    assert zoo.add(net(), name="a", facts=facts, parent="base").facts == facts
    assert zoo.card("a").parent == "base"
    for wrong in ({"x": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises(ConfigError, match="cannot be kept as JSON"):
            zoo.add(net(1), name="b", facts=wrong)


def test_add_many_reports_what_it_refuses_and_adds_the_rest(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    sources = [net(0), tmp_path / "cut.safetensors", net(1), net(2)]
    told: list[object] = []
    seen: list[tuple[int, int, str]] = []
    cards = zoo.add_many(
        sources,
        names=["a", "b", "c", "a"],
        refused=lambda source, error: told.append(source),
        progress=lambda *values: seen.append(values),
    )
    assert [card.name for card in cards] == ["a", "c"]
    assert told[0] == tmp_path / "cut.safetensors"
    assert len(told) == 2
    assert seen[-1][:2] == (4, 4)
    with pytest.raises(ConfigError, match="another model named 'a'"):
        zoo.add_many([net(5), net(6)], names=["new", "a"])
    assert len(zoo) == 2, "one transaction: all or none"
    with pytest.raises(ConfigError, match="There are 2 sources and 1 names"):
        zoo.add_many([net(5), net(6)], names=["new"])


# what is known of the architecture ------------------------------------------------------------------------------------


def test_the_hash_and_embedding_are_those_of_the_model(zoo: Zoo) -> None:
    model = net()
    twin = disguise(model, EXAMPLE, torch.Generator().manual_seed(1))
    cards = zoo.add_many([model, twin.state_dict(), net(3)], names=["a", "b", "c"], model=net(9), example=EXAMPLE)
    a, b, c = (str(card.semantic_hash) for card in cards)
    assert same_hash(a, semantic_hash(model, EXAMPLE))
    assert same_hash(a, b)
    assert not same_hash(a, c)
    assert set(cards[0].hash_keys or ()) & set(cards[1].hash_keys or ())
    assert cards[0].embedding is not None
    assert cards[0].embedding.shape == (256,)
    assert cards[0].embedding.dtype == np.float32


def test_an_architecture_is_traced_once(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightfold.zoo.exchange import describe

    traced: list[object] = []
    real = describe.untied_symmetries
    counted = lambda model, example: traced.append(model) or real(model, example)  # noqa: E731
    monkeypatch.setattr(describe, "untied_symmetries", counted)
    zoo.add_many([net(seed) for seed in range(4)], example=EXAMPLE)
    zoo.add(net(5), example=EXAMPLE)
    assert len(traced) == 1
    other = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3))
    zoo.add(other, name="gelu", example=EXAMPLE)
    assert len(traced) == 2, "other operators, another architecture"
    assert zoo.card("gelu").semantic_hash != zoo.cards()[0].semantic_hash


def test_symmetries_outlive_the_process_that_traced(zoo: Zoo) -> None:
    zoo.add(net(0), name="a", example=EXAMPLE)
    zoo.add(net(1).state_dict(), name="b")
    with Zoo.open(zoo.folder) as again:
        found = again.symmetries("a")
        assert found is not None
        assert [freedom.kind for freedom in found.freedoms] == ["scale"]
        assert again.symmetries("b") is None
        from weightfold.weights.canon import hash_of

        assert same_hash(hash_of(found, again.state("a")), str(again.card("a").semantic_hash))


def test_without_a_structure_the_card_says_why_there_is_no_hash(zoo: Zoo) -> None:
    assert "only tensors are known" in str(zoo.add(net().state_dict(), name="a").hash_reason)
    assert "no example" in str(zoo.add(net(1), name="b").hash_reason)
    broken = net(2)
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    card = zoo.add(broken, name="c", example=EXAMPLE)
    assert card.semantic_hash is None
    assert "NaN" in str(card.hash_reason)
    assert equal(zoo.state("c"), broken.state_dict())


def test_a_broken_first_model_does_not_spoil_the_others_hashes(zoo: Zoo) -> None:
    broken = net(2)
    with torch.no_grad():
        broken[2].weight.fill_(float("nan"))
    cards = zoo.add_many([broken, net(3)], names=["broken", "sound"], example=EXAMPLE)
    assert cards[0].semantic_hash is None
    assert same_hash(str(cards[1].semantic_hash), semantic_hash(net(3), EXAMPLE))


def test_tensors_of_another_architecture_than_was_named_are_refused(zoo: Zoo) -> None:
    wide = nn.Sequential(nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 3))
    with pytest.raises(ArtifactError, match=r"'0.weight' has shape \(12, 6\) in the model and \(13, 6\) in the file"):
        zoo.add(wide.state_dict(), model=net(), example=EXAMPLE)
    assert not zoo.cards()


# files out of the zoo -------------------------------------------------------------------------------------------------


def test_a_model_of_weightfold_loads_again_from_what_get_writes(zoo: Zoo, tmp_path: Path) -> None:
    task = weightfold_task()
    model = weightfold.models.build("mlp", task, hidden=(5,))
    saved(model, task, tmp_path / "run" / "model.safetensors")
    card = zoo.add(tmp_path / "run")
    assert (card.name, card.architecture) == ("run", "mlp")
    assert card.semantic_hash is not None
    file = zoo.get("run", tmp_path / "out.safetensors")
    assert file == tmp_path / "out.safetensors"
    assert fingerprint(weightfold.load(file)) == fingerprint(model)
    assert zoo.get("run", tmp_path / "folder") == tmp_path / "folder" / "model.safetensors"
    assert fingerprint(weightfold.load(tmp_path / "folder")) == fingerprint(model)


def test_a_named_builtin_makes_bare_tensors_loadable(zoo: Zoo, tmp_path: Path) -> None:
    from weightfold.models import Classes, ImageInput, TaskSpec, build

    task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
    model = build("lenet5", task, seed=3)
    card = zoo.add(model.state_dict(), name="a", model="lenet5", example=["1x1x8x8"])
    assert card.architecture == "lenet5"
    assert card.semantic_hash is not None
    assert fingerprint(weightfold.load(zoo.get("a", tmp_path / "a.safetensors"))) == fingerprint(model)


def test_ties_and_metadata_survive_get(zoo: Zoo, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    zoo.add(odd_tensors(), name="odd")
    found = load_file(zoo.get("odd", tmp_path / "odd.safetensors"))
    assert equal(found, zoo.state("odd"))
    (tmp_path / "x").touch()
    with pytest.raises(ArtifactError, match="is a file that does not end in"):
        zoo.get("odd", tmp_path / "x")


# differences ----------------------------------------------------------------------------------------------------------


def test_a_difference_reads_as_the_model_did(zoo: Zoo) -> None:
    parent, child = pair(zoo)
    assert equal(zoo.state("child"), child)
    assert equal(zoo.state("parent"), parent)
    card = zoo.card("child")
    assert (card.is_full, card.lossy, card.base) == (False, False, zoo.card("parent").digest)
    assert not zoo.verify()
    swept = zoo.sweep()
    assert swept is not None
    assert swept.n_files == 1
    assert not zoo.verify()
    zoo.unpack("child")
    assert zoo.card("child").is_full
    assert equal(zoo.state("child"), child)
    zoo.unpack("child")


def test_a_parent_stays_while_children_need_it(zoo: Zoo) -> None:
    _, child = pair(zoo)
    with pytest.raises(ConfigError, match="differences to it: 'child'") as caught:
        zoo.remove("parent")
    assert "--unpack" in str(caught.value.remedy)
    zoo.add(zoo.state("parent"), name="other name")
    assert zoo.remove("parent") == ["parent"], "its content stays under the other name"
    assert zoo.remove("other name", unpack=True) == ["other name"]
    assert equal(zoo.state("child"), child)
    assert not zoo.verify()


def test_children_can_go_with_their_parent(zoo: Zoo) -> None:
    pair(zoo)
    zoo.add(near(zoo.state("child"), 5), name="grandchild")
    switched(zoo, "grandchild", "child")
    zoo.add(net(8), name="stranger")
    assert zoo.remove("parent", children=True) == ["grandchild", "child", "parent"]
    zoo.sweep()
    assert [card.name for card in zoo.cards()] == ["stranger"]
    assert not zoo.verify()


def test_a_wrong_difference_changes_nothing(zoo: Zoo) -> None:
    a, b = net(0).state_dict(), net(1).state_dict()
    own, other = zoo.add(a, name="a").digest, zoo.add(b, name="b").digest
    before = zoo.cards()
    a, b = zoo.state("a"), zoo.state("b")
    good = encode(a, b)
    with pytest.raises(ArtifactError, match="cannot be read"):
        zoo.switch(own, blob=good[:-3], parent=other, lossy=False, decoded=own)
    with pytest.raises(ArtifactError, match="instead of"):
        zoo.switch(own, blob=encode(near(a, 3), b), parent=other, lossy=False, decoded=own)
    with pytest.raises(ConfigError, match="lossy"):
        zoo.switch(own, blob=good, parent=other, lossy=True, decoded=own)
    with pytest.raises(ArtifactError, match="holds no content"):
        zoo.switch("0" * 64, blob=good, parent=other, lossy=True, decoded=own)
    with pytest.raises(ArtifactError, match="holds no content"):
        zoo.switch(own, blob=good, parent="0" * 64, lossy=False, decoded=own)
    assert zoo.cards() == before


def test_rings_and_long_chains_are_refused(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightfold.zoo.storage import changes

    pair(zoo)
    with pytest.raises(ArtifactError, match="is itself a difference"):
        switched(zoo, "parent", "child")
    with pytest.raises(ArtifactError, match="is itself a difference"):
        switched(zoo, "parent", "parent")
    monkeypatch.setattr(changes, "MAX_DEPTH", 1)
    zoo.add(near(zoo.state("child"), 5), name="grandchild")
    with pytest.raises(ArtifactError, match="chain of 2"):
        switched(zoo, "grandchild", "child")
    zoo.add(net(7), name="above")
    with pytest.raises(ArtifactError, match="chain of 2"):
        switched(zoo, "parent", "above")


def test_a_lossy_model_says_so_and_its_original_comes_back_by_adding_it_again(zoo: Zoo, tmp_path: Path) -> None:
    _, child = pair(zoo)
    zoo.unpack("child")
    rounded = near(child, 9, 1e-5)
    card = zoo.card("child")
    base = zoo.card("parent").digest
    zoo.switch(card.digest, blob=encode(rounded, zoo.state("parent")), parent=base, lossy=True, decoded=digest(rounded))
    card = zoo.card("child")
    assert card.lossy
    assert card.decoded == digest(rounded)
    assert equal(zoo.state("child"), rounded)
    assert not zoo.verify()
    with pytest.raises(ArtifactError, match="packed lossily"):
        zoo.switch(card.digest, blob=encode(child, zoo.state("parent")), parent=base, lossy=False, decoded=card.digest)
    assert zoo.add(child, name="child").lossy is False
    assert equal(zoo.state("child"), child)


def test_what_others_are_differences_to_cannot_change(zoo: Zoo) -> None:
    _, child = pair(zoo)
    zoo.add(near(child, 5), name="grandchild")
    switched(zoo, "grandchild", "child")
    rounded = near(child, 9, 1e-5)
    own, base = zoo.card("child").digest, zoo.card("parent").digest
    with pytest.raises(ArtifactError, match=r"must stay.*'grandchild'"):
        zoo.switch(own, blob=encode(rounded, zoo.state("parent")), parent=base, lossy=True, decoded=digest(rounded))


# folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no zoo"):
        Zoo.open(tmp_path / "new", create=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ArtifactError, match="is no zoo: it holds other files"):
        Zoo.open(tmp_path)
    (tmp_path / "zoo.db").write_bytes(b"not a database, for sure not a database" * 100)
    with pytest.raises(ArtifactError, match="no zoo, or its header is damaged"):
        Zoo.open(tmp_path)


def test_a_newer_zoo_and_a_foreign_database_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    import sqlite3

    zoo.close()
    with sqlite3.connect(zoo.folder / "zoo.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ArtifactError, match="zoo format 99"):
        Zoo.open(zoo.folder)
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "zoo.db") as db:
        db.execute("CREATE TABLE things (x)")
    with pytest.raises(ArtifactError, match="of another program"):
        Zoo.open(tmp_path / "other")


# helpers --------------------------------------------------------------------------------------------------------------


def weightfold_task() -> weightfold.models.TaskSpec:
    from weightfold.models import Classes, TableInput, TaskSpec

    return TaskSpec(input=TableInput(n_features=3), output=Classes(n=2))


def saved(model: nn.Module, task: weightfold.models.TaskSpec, path: Path) -> None:
    from weightfold.artifact import Builder, Input
    from weightfold.blueprint import Blueprint
    from weightfold.export.saved import save_model

    path.parent.mkdir()
    builder = Builder(kind="built-in", name="mlp", task=json.loads(task.to_json()), overrides={"hidden": (5,)})
    save_model(model, path, before=Blueprint.of(model), builder=builder, inputs=(Input(shape=(2, 3)),))
