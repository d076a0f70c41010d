"""`weightfold zoo search`, `dedupe`, `tree`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import symmetries
from weightfold.zoo.delta.codec import encode
from weightfold.zoo.store import Zoo

from .conftest import Run

EXAMPLE = torch.zeros(1, 6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A root, a child, the root once more and in disguise, and a stranger."""

    def made(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))

    root = made(0)
    found = symmetries(root, EXAMPLE)
    child = made(0)
    with torch.no_grad():
        for p in child.parameters():
            p.mul_(1.02).add_(0.01 * torch.randn(p.shape))
    nets = {
        "root": root,
        "child": disguise(child, EXAMPLE, torch.Generator().manual_seed(1), found=found),
        "again": made(0),
        "hidden": disguise(root, EXAMPLE, torch.Generator().manual_seed(2), found=found),
        "stranger": made(5),
    }
    with Zoo.open(tmp_path / "zoo") as zoo:
        for number, (name, model) in enumerate(nets.items()):
            zoo.add(model, name=name, facts={"accuracy": 0.9 + 0.01 * number}, example=EXAMPLE)
    return tmp_path / "zoo"


def test_search(cli: Run, folder: Path) -> None:
    done = cli("zoo", "search", folder, "--like", "root", "-k", "4", "--json")
    names = [m["name"] for m in json.loads(done.stdout)["models"]]
    assert set(names[:3]) == {"root", "again", "hidden"}
    assert names[3] == "child"
    done = cli("zoo", "search", folder, "--where", "accuracy > 0.905 and name != hidden")
    assert "child" in done.stdout
    assert "hidden" not in done.stdout
    wrong = cli("zoo", "search", folder, "--where", "accuracy >")
    assert "ends at 10" in wrong.stderr
    assert "nobody" in cli("zoo", "search", folder, "--like", "nobody").stderr
    none = cli("zoo", "search", folder, "--where", "accurracy > 0.9 and name == root").stdout
    assert "no card has 'accurracy'; there are: accuracy, " in none
    assert "no card has" not in cli("zoo", "search", folder, "--where", "accuracy > 2").stdout
    assert "there are more: -k 20" in cli("zoo", "search", folder, "-k", "2").stdout
    assert "there are more" not in cli("zoo", "search", folder, "-k", "5").stdout


def test_a_model_of_the_zoo_comes_before_a_folder_of_its_name(
    cli: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    done = cli("zoo", "search", folder, "--like", "root")
    assert done.exit_code == 0, done.stderr


def test_dedupe_looks_and_removes_only_what_was_asked_for(cli: Run, folder: Path) -> None:
    found = json.loads(cli("zoo", "dedupe", folder, "--json").stdout)
    assert found["counts"] == {"identical": 1, "permuted": 0, "rescaled": 1, "quantised": 0, "noisy": 0}
    assert found["removed"] == []
    assert json.loads(cli("zoo", "dedupe", folder, "--remove", "--json").stdout)["removed"] == ["again"]
    assert json.loads(cli("zoo", "dedupe", folder, "--remove", "--level", "rescaled", "--json").stdout)["removed"] == [
        "hidden"
    ]
    assert "no copies among 3 models" in cli("zoo", "dedupe", folder).stdout
    with Zoo.open(folder) as zoo:
        assert [card.name for card in zoo.cards()] == ["root", "child", "stranger"]


def test_what_was_rounded_never_stays_for_what_it_was_rounded_from(cli: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    half = {name: value.half() for name, value in net.state_dict().items()}
    with Zoo.open(tmp_path / "zoo") as zoo:
        zoo.add(half, name="half", model=net, example=EXAMPLE)
        zoo.add(half, name="half too", model=net, example=EXAMPLE)
        zoo.add(net, name="net", example=EXAMPLE)
    done = json.loads(cli("zoo", "dedupe", tmp_path / "zoo", "--remove", "--level", "quantised", "--json").stdout)
    assert done["groups"][0]["keeper"] == "net"
    assert sorted(done["removed"]) == ["half", "half too"]


def test_a_copy_that_others_are_differences_to_is_removed_too(cli: Run, folder: Path) -> None:
    with Zoo.open(folder) as zoo:
        before = zoo.state("child")
        root, child = zoo.card("hidden"), zoo.card("child")
        blob = encode(before, zoo.state("hidden"))
        zoo.switch(child.digest, blob=blob, parent=root.digest, lossy=False, decoded=child.digest)
    done = cli("zoo", "dedupe", folder, "--remove", "--level", "rescaled")
    assert done.exit_code == 0, done.stderr
    with Zoo.open(folder) as zoo:
        assert [card.name for card in zoo.cards()] == ["root", "child", "stranger"]
        assert all(torch.equal(zoo.state("child")[name], value) for name, value in before.items())


def test_tree(cli: Run, folder: Path) -> None:
    families = json.loads(cli("zoo", "tree", folder, "--json").stdout)["families"]
    assert [len(f["edges"]) for f in families] == [2, 1]
    first, second = families[0]["edges"]
    assert (first["child"], first["parent"]) == ("root", None)
    assert set(first["copies"]) == {"again", "hidden"}
    assert (second["child"], second["parent"]) == ("child", "root")
    text = cli("zoo", "tree", folder).stdout
    assert "└─ child   confidence " in text
    assert "1 model without relatives" in text
