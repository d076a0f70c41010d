"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightfold.artifact import drafting, make_folder, write_bytes, write_json
from weightfold.errors import ArtifactError


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def fail_halfway(path: Path, error: BaseException) -> None:
    with drafting(path) as draft:
        draft.write_bytes(b"half")
        raise error


def test_a_write_replaces_the_old_file_at_one_stroke(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("defect"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises((ArtifactError, ValueError, KeyboardInterrupt)):
        fail_halfway(path, error)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.bin"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.bin' could not be written: No space"), drafting(tmp_path / "a.bin"):
        raise OSError(28, "No space left on device")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file"):
        make_folder(tmp_path / "file" / "inner")
    with pytest.raises(ArtifactError, match="could not be written"):
        write_bytes(tmp_path / "missing" / "a.bin", b"")


def test_json_refuses_what_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ü": [1, 2.5, None]})
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()
