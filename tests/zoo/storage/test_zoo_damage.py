"""A flipped byte anywhere is an error that names the blob, the model and what to do; adding again heals."""

from __future__ import annotations

import random
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weightfold.errors import ArtifactError
from weightfold.fingerprint import digest
from weightfold.zoo.card import Card
from weightfold.zoo.delta.codec import decode, encode
from weightfold.zoo.storage.catalogue import _summed
from weightfold.zoo.store import Zoo

from ..conftest import EXAMPLE, equal, near, net, pair, switched

N_PLACES = 60


def blobs(zoo: Zoo) -> list[Path]:
    return sorted((zoo.folder / "blobs").glob("*/*"))


def blob_of(zoo: Zoo, name: str) -> Path:
    with sqlite3.connect(zoo.folder / "zoo.db") as db:
        sql = "SELECT blob FROM contents c JOIN models m ON m.digest = c.digest WHERE m.name = ?"
        ((digest,),) = db.execute(sql, (name,)).fetchall()
    return zoo.folder / "blobs" / digest[:2] / digest


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["parent", "child"])
def test_any_flipped_byte_is_named(zoo: Zoo, name: str) -> None:
    pair(zoo)
    blob = blob_of(zoo, name)
    whole = blob.read_bytes()
    places = {0, 7, 8, len(whole) - 1, *random.Random(0).choices(range(len(whole)), k=N_PLACES)}
    for at in places:
        flip(blob, at)
        with Zoo.open(zoo.folder) as fresh, pytest.raises(ArtifactError) as caught:
            fresh.state(name)
        assert str(blob) in caught.value.message
        assert f"'{name}'" in caught.value.message
        assert "add" in str(caught.value.remedy)
        blob.write_bytes(whole)
    with Zoo.open(zoo.folder) as fresh:
        fresh.state(name)


@pytest.mark.parametrize("left", [0, 1, 9, 100, -1])
def test_a_blob_that_was_cut_off_or_is_gone_is_named(zoo: Zoo, left: int) -> None:
    zoo.add(net(), name="a")
    blob = blob_of(zoo, "a")
    blob.write_bytes(blob.read_bytes()[:left])
    with pytest.raises(ArtifactError, match=f"'{blob}' was changed or cut off.*'a'"):
        zoo.state("a")
    blob.unlink()
    with pytest.raises(ArtifactError, match=f"'{blob}' is missing.*'a'"):
        zoo.get("a", zoo.folder.parent / "a.safetensors")
    assert not (zoo.folder.parent / "a.safetensors").exists()


def test_bytes_that_are_another_models_are_found_out(zoo: Zoo) -> None:
    """A blob that is whole, but of other tensors: only the content's own digest tells."""
    a, b = zoo.add(net(0), name="a"), zoo.add(net(1), name="b")
    other = blob_of(zoo, "b").name
    with zoo._catalogue.writing():
        held = zoo._catalogue.content(a.digest)
        assert held is not None
        zoo._catalogue.move_content(replace(held, blob=other))
    with pytest.raises(ArtifactError, match=r"gives other tensors than were stored.*'a'"):
        zoo.state("a")
    zoo.state(b.name)


def test_damage_of_a_parent_is_told_of_the_parent(zoo: Zoo) -> None:
    pair(zoo)
    flip(blob_of(zoo, "parent"), 300)
    with Zoo.open(zoo.folder) as fresh, pytest.raises(ArtifactError, match="It holds the model 'parent'"):
        fresh.state("child")


def test_verify_lists_everything_that_is_affected(zoo: Zoo) -> None:
    pair(zoo)
    zoo.add(net(4), name="sound")
    zoo.add(net(5), name="hashed", example=EXAMPLE)
    assert not zoo.verify()
    flip(blob_of(zoo, "parent"), 300)
    with sqlite3.connect(zoo.folder / "zoo.db") as db:
        ((symmetries,),) = db.execute("SELECT symmetries FROM models WHERE name = 'hashed'").fetchall()
    flip(zoo.folder / "blobs" / symmetries[:2] / symmetries, 20)
    found = zoo.verify()
    assert {name for problem in found for name in problem.names} == {"parent", "child", "hashed"}
    assert all(problem.remedy for problem in found)


def test_adding_again_heals(zoo: Zoo) -> None:
    parent, child = pair(zoo)
    for name, state in (("parent", parent), ("child", child)):
        flip(blob_of(zoo, name), 40)
        assert zoo.verify()
        zoo.add(state, name=name)
        assert not zoo.verify()
    assert equal(zoo.state("child"), child)


@pytest.mark.parametrize(
    "change",
    ["UPDATE models SET embedding = zeroblob(1024)", "UPDATE models SET body = replace(body, '0.9', '1.0')",
     "UPDATE models SET semantic_hash = NULL", "UPDATE contents SET n_parameters = n_parameters + 1"],
)  # fmt: skip
def test_a_row_that_was_changed_is_told(zoo: Zoo, change: str) -> None:
    zoo.add(net(), name="a", facts={"accuracy": 0.9}, example=EXAMPLE)
    with sqlite3.connect(zoo.folder / "zoo.db") as db:
        db.execute(change)
    with pytest.raises(ArtifactError, match=r"the row of '.*' was changed or is damaged"):
        zoo.card("a")
    with pytest.raises(ArtifactError, match="was changed or is damaged"):
        zoo.cards()
    assert zoo.verify()


def test_a_damaged_catalogue_is_told_and_no_defect(zoo: Zoo) -> None:
    """Whatever the damage, the answer is a WeightfoldError or the truth."""
    for seed in range(8):
        zoo.add(net(seed), name=f"n{seed}")
    wanted = zoo.cards()
    zoo.close()
    path = zoo.folder / "zoo.db"
    whole = path.read_bytes()
    told = 0
    for at in random.Random(1).choices(range(len(whole)), k=60):
        path.write_bytes(whole)
        for beside in zoo.folder.glob("zoo.db-*"):
            beside.unlink()
        flip(path, at)
        told += damage_is_told(zoo.folder, wanted)
    assert told == 60, "silently wrong"


def damage_is_told(folder: Path, wanted: list[Card]) -> bool:
    try:
        with Zoo.open(folder) as fresh:
            return bool(fresh.verify()) or fresh.cards() == wanted
    except ArtifactError as error:
        return str(folder / "zoo.db") in error.message


def test_a_difference_of_a_difference_is_verified_too(zoo: Zoo) -> None:
    _, child = pair(zoo)
    grandchild = near(child, 5)
    zoo.add(grandchild, name="grandchild")
    switched(zoo, "grandchild", "child")
    assert equal(zoo.state("grandchild"), grandchild)
    flip(blob_of(zoo, "child"), 30)
    with Zoo.open(zoo.folder) as fresh:
        assert torch.equal(fresh.state("parent")["0.bias"], zoo.state("parent")["0.bias"])
        with pytest.raises(ArtifactError, match="It holds the model 'child'"):
            fresh.state("grandchild")


def test_a_blob_is_read_even_where_it_gives_the_tensors_of_another(zoo: Zoo) -> None:
    """Two children so near that in steps they are their parent."""
    parent = net().state_dict()
    base = zoo.add(parent, name="parent")
    for name, step in (("one", 0.1), ("two", 0.2)):
        child = near(parent, int(10 * step))
        card, blob = zoo.add(child, name=name), encode(child, parent, step=step)
        assert digest(decode(blob, parent)) == base.digest
        zoo.switch(card.digest, blob=blob, parent=base.digest, lossy=True, decoded=base.digest)
    assert not zoo.verify()
    for name in ("one", "two"):
        flip(blob_of(zoo, name), 9)
        assert [problem.names for problem in zoo.verify()] == [(name,)]
        flip(blob_of(zoo, name), 9)


def test_a_zoo_without_its_catalogue_is_not_taken_for_a_new_one(zoo: Zoo) -> None:
    """A new catalogue names no blob: the next sweep would delete them all."""
    zoo.add(net(), name="a")
    blob = blob_of(zoo, "a")
    zoo.close()
    kept = (zoo.folder / "zoo.db").rename(zoo.folder.parent / "kept.db")
    with pytest.raises(ArtifactError, match="has lost its catalogue"):
        Zoo.open(zoo.folder)
    assert blob.exists()
    kept.rename(zoo.folder / "zoo.db")
    with Zoo.open(zoo.folder) as fresh:
        assert not fresh.verify()


@pytest.mark.parametrize(
    "body", ["", "[]", "null", '{"a": NaN}', '{"facts": 3}', '{"name": "x"}', '{"added": []}', "[" * 5000]
)
def test_a_row_of_something_else_is_an_error_of_ours(zoo: Zoo, body: str) -> None:
    """Its checksum is right: it was made so."""
    zoo.add(net(), name="a")
    names = "name, digest, semantic_hash, embedding, extras, symmetries, body"
    with sqlite3.connect(zoo.folder / "zoo.db") as db:
        row = db.execute(f"SELECT {names} FROM models").fetchone()
        db.execute("UPDATE models SET body = ?, checksum = ?", (body, _summed((*row[:-1], body))[-1]))
    with pytest.raises(ArtifactError, match="the row of 'a' was changed or is damaged"):
        zoo.cards()


@pytest.mark.parametrize(
    "text", ["{", '{"metadata": 3}', '{"files": {"README.md": 3}}', '{"a": {"b": []}}', '{"a": NaN}']
)
def test_texts_beside_a_model_that_are_none_are_an_error_of_ours(zoo: Zoo, tmp_path: Path, text: str) -> None:
    zoo.add(net(), name="a")
    with zoo._objects.lease():
        blob = zoo._objects.put(text.encode())
    model = zoo._catalogue.model("a")
    assert model is not None
    with zoo._catalogue.writing():
        zoo._catalogue.remove_model("a")
        zoo._catalogue.add_model(replace(model, extras=blob))
    with pytest.raises(ArtifactError, match="What lay beside the model is damaged"):
        zoo.get("a", tmp_path / "out")
    assert [problem.kind for problem in zoo.verify()] == ["extras"]
