"""A zoo that cannot be written is listed, read and verified; nothing is made beside it, and changes are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.zoo.conftest import equal, net, pair
from weightfold.errors import ArtifactError
from weightfold.zoo.store import Zoo


def listed(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A zoo as it lies on a medium for reading: without its lock and its empty folders."""
    with Zoo.open(tmp_path / "made") as zoo:
        pair(zoo)
    shutil.copytree(tmp_path / "made", tmp_path / "zoo")
    (tmp_path / "zoo" / "lock").unlink()
    for fan in (tmp_path / "zoo" / "blobs").iterdir():
        if not any(fan.iterdir()):
            fan.rmdir()
    return tmp_path / "zoo"


def test_it_is_read_and_left_as_it_is(copied: Path) -> None:
    before = listed(copied)
    with Zoo.open(copied, readonly=True) as zoo:
        assert [card.name for card in zoo.cards()] == ["parent", "child"]
        assert equal(zoo.state("parent"), dict(net().state_dict()))
        assert zoo.state("child")
        assert zoo.verify() == []
    assert listed(copied) == before


def test_changes_are_refused_with_what_helps(copied: Path, tmp_path: Path) -> None:
    before = listed(copied)
    with Zoo.open(copied, readonly=True) as zoo:
        with pytest.raises(ArtifactError, match=r"opened for reading only.*\n.*Copy it"):
            zoo.add(net(5), name="new")
        with pytest.raises(ArtifactError, match=r"cannot be written|reading only"):
            zoo.remove("child")
    assert listed(copied) == before
    shutil.copytree(copied, tmp_path / "copy")
    with Zoo.open(tmp_path / "copy") as zoo:
        assert zoo.add(net(5), name="new").name == "new"


def test_a_folder_that_cannot_be_written_is_opened_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = listed(copied)
    with Zoo.open(copied, create=False) as zoo:
        assert len(zoo) == 2
    assert listed(copied) == before


def test_what_is_still_in_the_log_is_read(tmp_path: Path) -> None:
    with Zoo.open(tmp_path / "zoo") as writer:
        writer.add(net(), name="a")
        with Zoo.open(tmp_path / "zoo", readonly=True) as zoo:
            assert [card.name for card in zoo.cards()] == ["a"]


def test_there_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="There is no zoo"):
        Zoo.open(tmp_path / "none", readonly=True)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "zoo.db").write_bytes(b"")
    with pytest.raises(ArtifactError):
        Zoo.open(tmp_path / "some", readonly=True)
