"""Everything a user can get wrong gives one clear message on stderr, exit code 2, and no traceback."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from weightfold.cli.door import explain
from weightfold.ledger import Ledger

from .conftest import TINY, Run, Shell


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch evil-was-here",))


def refused(done: Result, *words: str) -> None:
    """One message of one or two lines on stderr, nothing on stdout, exit code 2."""
    assert done.exit_code == 2, done.output
    assert not done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("Error: ")
    assert len(lines) <= 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("a,b,c\n")
    (tmp_path / "one.csv").write_text("a,b,label\n" + "\n".join(f"{i},{i * 2},cat" for i in range(30)))
    (tmp_path / "corrupt.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    torch.save({"weight": Evil()}, tmp_path / "code.pt")
    (tmp_path / "text.db").write_text("no database at all, but some text that is long enough")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("trace lenet", ("no model 'lenet'", "'lenet5'")),
        ("train digits --model vgg --out {0}/o", ("no model 'vgg'", "vgg-small")),
        ("trace lenet5 --weights {0}/none.safetensors", ("no weights file", "none.safetensors")),
        ("train --data {0}/none.csv --out {0}/o", ("no data set", "none.csv")),
        ("train --data {0}/empty.csv --out {0}/o", ("empty.csv",)),
        ("train --data {0}/header.csv --out {0}/o", ("header",)),
        ("train --data {0}/one.csv --out {0}/o", ("one class only", "'cat'")),
        ("trace lenet5 --weights {0}/corrupt.safetensors", ("corrupt.safetensors", "corrupt")),
        ("export {0}/corrupt.safetensors --to onnx --out {0}/a.onnx", ("corrupt.safetensors",)),
        ("trace lenet5 --weights {0}/code.pt", ("holds code",)),
        ("ledger verify {0}/text.db", ("text.db", "not a ledger")),
        ("ledger show {0}/other.db", ("other.db", "another program")),
        ("ledger show {0}/none.db", ("no ledger",)),
        ("ledger verify {0}", ("no ledger",)),
        ("train digits --out {0}/full", ("not empty", "--resume", "--force")),
        ("train digits --keep 0 --out {0}/o", ("'keep'", "greater than 0", "Got 0.0")),
        ("train digits --epochs 0 --out {0}/o", ("'epochs'",)),
        ("train digits --set width --out {0}/o", ("NAME=VALUE",)),
        ("train digits --set wdth=3 --out {0}/o", ("'wdth'", "'width'")),
        ("train --resume {0}/full", ("holds no run",)),
        ("train --resume {0}/full --epochs 3", ("takes all settings from the run", "epochs")),
        ("trace lenet5 --example 1x3", ("table input",)),
        ("trace lenet5 --example 1x1xEIGHT", ("no example input",)),
        ("trace torch.nn:Identity", ("needs an example",)),
        ("trace torch.nn:Nothing", ("no function 'Nothing'",)),
        ("fold lenet5 --data digits --keep 0.5 --macs 0.5 --out {0}/o", ("--keep and --macs",)),
        ("fold lenet5 --data digits --keep 0 --out {0}/o", ("'keep'",)),
        ("export lenet5 --to onnx --out {0}/a.pt2", ("must end in '.onnx'",)),
        ("export {0}/full --to onnx --out {0}/a.onnx", ("neither a run",)),
    ],
)
def test_a_wrong_input_gives_one_clear_message(command: str, words: tuple[str, ...], files: Path, cli: Run) -> None:
    before = {path.relative_to(files) for path in files.rglob("*")}
    refused(cli(*command.format(files).split()), *words)
    assert {path.relative_to(files) for path in files.rglob("*")} - before <= {
        Path("other.db-shm"),
        Path("other.db-wal"),
    }
    assert not Path("evil-was-here").exists()


def test_a_wrong_example_names_the_line_of_the_model_that_fails(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = torch.nn.Linear(6, 2)\n    def forward(self, x):\n        return self.fc(x)\n"
    )
    done = shell("trace", "mine:Net", "--example", "1x7", cwd=tmp_path)
    assert done.returncode == 2
    assert "mine.py:7" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_argument_of_the_wrong_kind_is_refused(cli: Run) -> None:
    done = cli("train", "--epochs", "many")
    assert done.exit_code == 2
    assert "--epochs" in done.stderr


def test_debug_shows_where_an_error_comes_from(cli: Run) -> None:
    done = cli("trace", "lenet", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert done.stderr.strip().splitlines()[-2].startswith("Error: ")


def test_a_defect_is_told_in_one_line_with_the_way_to_see_more(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("weightfold.export.opened.open_model", fail)
    done = cli("trace", "lenet5")
    assert done.exit_code == 1
    assert "ZeroDivisionError: by nothing" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" not in done.stderr


def test_interruption_is_130() -> None:
    assert explain(KeyboardInterrupt())[0] == 130
    code, words = explain(OSError(28, "No space left on device", "a/b"))
    assert code == 2
    assert "'a/b'" in words


@pytest.mark.parametrize("limit", [20_000, 150_000, 400_000])
def test_a_full_disk_leaves_nothing_half_written(limit: int, shell: Shell, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk; it strikes at the ledger, a checkpoint, or a model."""
    before = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    settings = [word if word != "hidden=24,24" else "hidden=220,220" for word in TINY]
    done = shell("train", *settings, "--epochs", 1, "--out", tmp_path / "run", before=before)
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    left = {path.name for path in (tmp_path / "run").glob("*")}
    assert not {name for name in left if name.startswith(".")}, left


def test_a_folder_that_cannot_be_made_is_named(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(cli("train", *TINY, "--out", tmp_path / "file" / "run"), "file", "could not be written")
    refused(cli("export", "lenet5", "--to", "pt2", "--out", tmp_path / "file" / "a.pt2"), "could not be written")


def test_a_ledger_that_lost_its_end_is_noticed(finished: tuple[Path, Result], cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    with Ledger.open(out / "ledger.db") as ledger:
        ledger.append("edit", {"group": "added"})
    refused(cli("ledger", "verify", out), "now it is", "cut off or added")


def test_a_changed_model_is_noticed(finished: tuple[Path, Result], cli: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-2] ^= 4
    (out / "model.safetensors").write_bytes(data)
    refused(cli("ledger", "verify", out), "model.safetensors", "head.", "was changed")
    refused(cli("export", out, "--to", "safetensors", "--out", tmp_path / "a.safetensors"), "fingerprint")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_is_an_interruption(
    number: signal.Signals, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightfold.training import run as module

    write, calls = module.write_checkpoint, [0]

    def end(folder: Path, state: dict[str, object]) -> None:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), number)
        write(folder, state)

    inherited = signal.signal(number, signal.SIG_DFL)  # one that was started under nohup ignores it
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checkpoint", end)
        done = cli("train", *TINY, "--epochs", 1, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert f"by the same command, or: weightfold train --resume {tmp_path / 'run'}" in done.stderr
    assert signal.getsignal(number) == before
    signal.signal(number, inherited)
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".") or "lock" in path.name]
    assert cli("train", *TINY, "--epochs", 1, "--out", tmp_path / "run").exit_code == 0
