"""One flipped byte anywhere in a run's folder is found, and the file that holds it is named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from weightfold.artifact import read_header
from weightfold.audit.folder import verify_folder, verify_ledger
from weightfold.errors import ArtifactError, LedgerError, WeightfoldError
from weightfold.ledger import Ledger

FILES = ("model.safetensors", "dense.safetensors", "structure.json", "run.json", "report.html", "ledger.db")


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << bit)]))


def test_a_whole_folder_passes_and_every_file_is_covered(tiny_run: Path) -> None:
    facts = verify_folder(tiny_run)
    assert facts["model"] == "model.safetensors"
    assert {facts["model"], *facts["files"], "ledger.db"} == set(FILES)
    assert facts["unchecked"] == []
    with Ledger.open(tiny_run / "ledger.db", readonly=True) as ledger:
        assert facts["head"] == ledger.head
        assert facts["entries"] == len(ledger)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found_and_its_file_named(name: str, run: Path, tiny_run: Path) -> None:
    size = (run / name).stat().st_size
    choice = random.Random(name)
    places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1, *(choice.randrange(size) for _ in range(24))}
    for at in sorted(places):
        shutil.copyfile(tiny_run / name, run / name)
        flip(run / name, at, choice.randrange(8))
        with pytest.raises(WeightfoldError) as error:
            verify_folder(run)
        assert name in str(error.value), f"byte {at}: {error.value}"


def test_a_changed_tensor_is_named(run: Path) -> None:
    for file in ("model.safetensors", "dense.safetensors"):
        path = run / file
        for name, stored in read_header(path).tensors.items():
            flip(path, stored.begin + 1)
            with pytest.raises(ArtifactError, match=rf"'{name}' in .*{file}' was changed"):
                verify_folder(run)
            flip(path, stored.begin + 1)
    verify_folder(run)


def test_a_changed_undo_blob_is_named(run: Path) -> None:
    with Ledger.open(run / "ledger.db", readonly=True) as ledger:
        edit = next(ledger.entries(kind="edit"))
        blob = ledger.get_blob(edit.body["proof"]["undo"])
    data = (run / "ledger.db").read_bytes()
    at = data.index(blob[-64:]) + 32
    flip(run / "ledger.db", at)
    with pytest.raises(LedgerError, match=r"Blob \d+ \('" + edit.body["proof"]["undo"]):
        verify_ledger(run)


def test_a_blob_that_an_entry_names_must_be_there(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        ledger.append("edit", {"proof": {"undo": "0" * 64}})
    with pytest.raises(LedgerError, match="undo blob of entry 1"):
        verify_ledger(tmp_path)


def test_a_blob_that_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        ledger.append("edit", {"what": {"edit": {"maps": ledger.put_blob(b"nothing")}}})
    with pytest.raises(LedgerError, match="maps of entry 1"):
        verify_ledger(tmp_path)


def test_a_missing_file_of_the_run_is_named(run: Path) -> None:
    (run / "dense.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"dense\.safetensors' is missing"):
        verify_folder(run)


def test_results_that_were_written_anew_with_their_digest_do_not_agree_with_the_ledger(run: Path) -> None:
    from weightfold.audit.folder import as_text, run_digest

    facts = json.loads((run / "run.json").read_text())
    facts["results"]["arms"]["folded"]["score"] = 1.0
    facts["digest"] = run_digest(facts)
    (run / "run.json").write_text(as_text(facts))
    with pytest.raises(ArtifactError, match="another 'score' of the folded network than entry"):
        verify_folder(run)


def test_foreign_files_are_named_as_not_checked(run: Path) -> None:
    (run / "notes.txt").write_text("mine")
    assert verify_folder(run)["unchecked"] == ["notes.txt"]
