"""`weightfold zoo add`, `list`, `get`, `rm`, `verify`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightfold.cli import show
from weightfold.models import Classes, ImageInput, TaskSpec, build
from weightfold.zoo.delta.codec import encode
from weightfold.zoo.store import Zoo

from .conftest import Run

TASK = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
MADE = ("--model", "lenet5", "--example", "1x1x8x8")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Weights of three networks."""
    folder = tmp_path / "nets"
    folder.mkdir()
    for seed in range(3):
        save_file(build("lenet5", TASK, seed=seed).state_dict(), folder / f"net{seed}.safetensors")
    return folder


@pytest.fixture
def filled(cli: Run, files: Path, tmp_path: Path) -> Path:
    """A zoo of those."""
    done = cli("zoo", "add", tmp_path / "zoo", files, *MADE, "--fact", "accuracy=0.97")
    assert done.exit_code == 0, done.stderr
    return tmp_path / "zoo"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_folder_of_models_is_added_and_listed(cli: Run, filled: Path) -> None:
    done = cli("zoo", "list", filled)
    assert done.exit_code == 0
    assert "3 models; 259 kB on disk" in done.stdout
    assert all(f"net{seed}" in done.stdout for seed in range(3))
    assert "accuracy 0.97" in flat(done.stdout)
    facts = json.loads(cli("zoo", "list", filled, "--json").stdout)
    assert [card["name"] for card in facts["models"]] == ["net0", "net1", "net2"]
    assert all(card["semantic_hash"] and card["has_embedding"] for card in facts["models"])
    assert facts["contents"] == 3
    assert "vector" not in facts["models"][0]


def test_adding_tells_what_is_new(cli: Run, filled: Path, files: Path) -> None:
    again = cli("zoo", "add", filled, files)
    assert again.exit_code == 0
    assert "0 models; 3 were there already" in again.stdout
    facts = json.loads(cli("zoo", "add", filled, files / "net0.safetensors", "--name", "copy", "--json").stdout)
    assert (facts["new"], facts["added"][0]["name"], facts["refused"]) == (1, "copy", [])


def test_what_cannot_be_read_is_named_and_the_rest_added(cli: Run, files: Path, tmp_path: Path) -> None:
    (files / "evil.pt").write_bytes(pickle.dumps({"w": Evil()}))
    (files / "cut.safetensors").write_bytes(b"1234567890")
    done = cli("zoo", "add", tmp_path / "zoo", files)
    assert done.exit_code == 2
    assert "added 3 models" in flat(done.stdout)
    assert "only tensors are known" in flat(done.stdout)
    assert "evil.pt" in done.stderr
    assert "cut.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    alone = cli("zoo", "add", tmp_path / "zoo", files / "cut.safetensors", "--json")
    assert alone.exit_code == 2
    assert not alone.stdout


def test_a_model_comes_out_as_it_went_in(cli: Run, filled: Path, files: Path, tmp_path: Path) -> None:
    done = cli("zoo", "get", filled, "net1", tmp_path / "out.safetensors")
    assert done.exit_code == 0
    assert "bit for bit" in flat(done.stdout)
    assert load_file(tmp_path / "out.safetensors").keys() == load_file(files / "net1.safetensors").keys()
    same = cli("same", tmp_path / "out.safetensors", files / "net1.safetensors", *MADE[:2], *MADE[2:])
    assert "identical" in same.stdout, same.stderr
    wrong = cli("zoo", "get", filled, "net7", tmp_path / "x")
    assert wrong.exit_code == 2
    assert "Valid: net0, net1, net2" in flat(wrong.stderr) or "Did you mean" in flat(wrong.stderr)


def test_a_model_that_others_need_is_not_removed(cli: Run, filled: Path) -> None:
    with Zoo.open(filled) as zoo:
        parent, child = zoo.card("net0"), zoo.card("net1")
        blob = encode(zoo.state("net1"), zoo.state("net0"))
        zoo.switch(child.digest, blob=blob, parent=parent.digest, lossy=False, decoded=child.digest)
    refused = cli("zoo", "rm", filled, "net0")
    assert refused.exit_code == 2
    assert "others are stored as differences to it: 'net1'" in flat(refused.stderr)
    assert "--unpack" in refused.stderr
    assert cli("zoo", "rm", filled, "net0", "--unpack", "--children").exit_code == 2
    assert cli("zoo", "verify", filled).exit_code == 0
    done = cli("zoo", "rm", filled, "net0", "--unpack", "--json")
    assert json.loads(done.stdout)["removed"] == ["net0"]
    assert json.loads(done.stdout)["freed_bytes"] > 10_000
    assert "intact 2 models" in flat(cli("zoo", "verify", filled).stdout)


def test_verify_says_what_is_wrong(cli: Run, filled: Path) -> None:
    facts = json.loads(cli("zoo", "verify", filled, "--sweep", "--json").stdout)
    assert facts == {"models": 3, "valid": True, "problems": [], "swept": {"n_files": 0, "n_bytes": 0}}
    blob = max((filled / "blobs").glob("*/*"), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[1000] ^= 4
    blob.write_bytes(data)
    done = cli("zoo", "verify", filled)
    assert done.exit_code == 2
    assert blob.name in flat(done.stderr)
    assert "Restore that file" in done.stderr
    facts = json.loads(cli("zoo", "verify", filled, "--json").stdout)
    assert not facts["valid"]
    assert len(facts["problems"][0]["names"]) == 1


def test_mistakes_are_told(cli: Run, filled: Path, files: Path, tmp_path: Path) -> None:
    for args, complaint in (
        (("list", tmp_path / "gone"), "There is no zoo"),
        (("list", files), "is no zoo: it holds other files"),
        (("add", filled, files, "--name", "x"), "--name names one model; there are 3"),
        (("add", filled, files, "--fact", "accuracy"), "'accuracy' is no fact"),
        (("add", filled, tmp_path / "gone.pt"), "There is no model"),
        (("add", filled, files / "net0.safetensors", "--name", "net1"), "another model named 'net1'"),
        (("add", filled, files / "net0.safetensors", "--name", "n", "--model", "vgg-small"), "does not belong"),
    ):
        done = cli("zoo", *args)
        assert done.exit_code == 2, (args, done.stderr)
        assert complaint in flat(done.stderr), (args, done.stderr)
        assert "->" in done.stderr


def test_no_folder_is_made_where_a_file_was_meant(cli: Run, filled: Path, tmp_path: Path) -> None:
    done = cli("zoo", "get", filled, "net0", tmp_path / "out.pt")
    assert done.exit_code == 2
    assert "does not end in .safetensors" in done.stderr
    assert not (tmp_path / "out.pt").exists()


def test_facts_may_be_json_or_text(cli: Run, files: Path, tmp_path: Path) -> None:
    facts = ("--fact", "data=mnist", "--fact", 'tags=["a", "b"]', "--fact", "note=a=b", "--fact", "x=NaN")
    cli("zoo", "add", tmp_path / "zoo", files / "net0.safetensors", *facts, "--parent", "base")
    (card,) = json.loads(cli("zoo", "list", tmp_path / "zoo", "--json").stdout)["models"]
    assert card["facts"] == {"data": "mnist", "tags": ["a", "b"], "note": "a=b", "x": "NaN"}
    assert card["parent"] == "base"


def test_a_list_fits_into_80_columns(cli: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "WIDTH", 80)
    facts = ("--fact", "accuracy=0.9712", "--fact", "data=a-data-set-of-a-long-name", "--fact", "method=fold")
    name = "a-name-of-25-characters-1"
    cli("zoo", "add", tmp_path / "zoo", files / "net0.safetensors", *MADE, *facts, "--name", name)
    for verb in ("list", "search"):
        lines = cli("zoo", verb, tmp_path / "zoo").stdout.splitlines()
        assert max(map(len, lines)) <= 80
        (row,) = [line for line in lines if name in line]
        assert row.rstrip().endswith("…"), "facts are cut, not folded"


def test_of_many_paths_those_that_can_be_read_are_added(cli: Run, files: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    done = cli("zoo", "add", tmp_path / "zoo", empty, tmp_path / "gone.pt")
    assert done.exit_code == 2
    assert "holds no model" in done.stderr
    assert "There is no model" in done.stderr
    assert not (tmp_path / "zoo").exists(), "nothing to add, no zoo"
    done = cli("zoo", "add", tmp_path / "zoo", empty, files, "--json")
    assert done.exit_code == 2
    facts = json.loads(done.stdout)
    assert facts["new"] == 3
    assert [row["source"] for row in facts["refused"]] == [str(empty)]


def test_facts_of_what_is_there_already_are_not_dropped_in_silence(cli: Run, filled: Path, files: Path) -> None:
    again = cli("zoo", "add", filled, files / "net0.safetensors", "--fact", "accuracy=0.5")
    assert again.exit_code == 0
    assert "facts and parent stay as they were" in flat(again.stderr)
    assert not cli("zoo", "add", filled, files / "net0.safetensors").stderr


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


def test_a_trained_run_is_added_with_its_score(cli: Run, finished: tuple[Path, object], tmp_path: Path) -> None:
    run, _ = finished
    facts = json.loads(cli("zoo", "add", tmp_path / "zoo", run, "--json").stdout)
    (card,) = facts["added"]
    assert card["architecture"] == "mlp"
    assert card["semantic_hash"]
    wanted = json.loads((run / "run.json").read_text())["results"]["arms"]["folded"]["score"]
    assert card["facts"] == {"accuracy": wanted, "data": "digits", "method": "fold"}
    (dense,) = json.loads(cli("zoo", "add", tmp_path / "zoo", run / "dense.safetensors", "--json").stdout)["added"]
    assert (dense["name"], dense["facts"]) == ("dense", {}), "the score is the other model's"
    cli("zoo", "get", tmp_path / "zoo", card["name"], tmp_path / "out")
    import weightfold

    wanted = weightfold.load(run).state_dict()
    found = weightfold.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
