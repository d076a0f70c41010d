"""`weightfold canon`, `same`, `diff`, `merge`, `inspect`."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weightfold.models import Classes, ImageInput, TaskSpec, build
from weightfold.weights.disguise import disguise

from .conftest import Run

TASK = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
MADE = ("--model", "lenet5", "--example", "1x1x8x8")


class Evil:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code was run')",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two networks, and of the first in disguise."""
    folder = tmp_path_factory.mktemp("weights")
    a, b = build("lenet5", TASK, seed=0), build("lenet5", TASK, seed=1)
    twin = disguise(a, TASK.example(), torch.Generator().manual_seed(0))
    for name, model in (("a", a), ("b", b), ("twin", twin)):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


def test_same_sees_through_a_disguise(cli: Run, files: Path) -> None:
    done = cli("same", files / "a.safetensors", files / "twin.safetensors", *MADE)
    assert done.exit_code == 0, done.output
    assert "same by symmetry" in done.stdout
    done = cli("same", files / "a.safetensors", files / "b.safetensors", *MADE, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["same"] is False
    assert "identical" in cli("same", files / "a.safetensors", files / "a.safetensors", *MADE).stdout


def test_same_says_how_architectures_differ(cli: Run) -> None:
    done = cli("same", "lenet5", "mlp", "--data", "digits")
    assert done.exit_code == 1
    assert "different architectures" in done.stdout
    assert "lacks" in done.stdout


def test_canon_writes_weights_with_the_same_hash(cli: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "canon.safetensors"
    take = ("canon", "lenet5", "--example", "1x1x8x8", "--weights")
    done = cli(*take, files / "a.safetensors", "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("wf1-")
    assert cli("same", files / "twin.safetensors", out, *MADE).exit_code == 0


def test_diff_lists_layers_and_units(cli: Run, files: Path) -> None:
    facts = json.loads(cli("diff", files / "a.safetensors", files / "twin.safetensors", *MADE, "--json").stdout)
    assert facts["moved"] < 1e-4 < facts["plain"]
    done = cli("diff", files / "a.safetensors", files / "b.safetensors", *MADE, "--top", "2")
    assert done.exit_code == 0, done.output
    assert "units that moved most" in done.stdout


def test_inspect_prints_groups_layers_and_hash(cli: Run, files: Path) -> None:
    done = cli("inspect", "lenet5", "--example", "1x1x8x8", "--weights", files / "a.safetensors")
    assert done.exit_code == 0, done.output
    for word in ("symmetries", "alpha", "stable rank", "wf1-"):
        assert word in done.stdout


def test_merge_says_no_and_yes(cli: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    done = cli("merge", files / "a.safetensors", files / "twin.safetensors", *MADE, "--out", out)
    assert done.exit_code == 0, done.output
    assert "after alignment" in done.stdout
    assert cli("same", files / "a.safetensors", out, *MADE).exit_code == 0
    refused = cli(
        "merge", files / "a.safetensors", files / "b.safetensors", *MADE, "--out", tmp_path / "no.safetensors"
    )
    assert refused.exit_code == 1
    assert "nothing in common" in refused.stdout
    assert not (tmp_path / "no.safetensors").exists()


def test_merge_repairs_scores_and_draws(cli: Run, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out, plot = tmp_path / "merged.safetensors", tmp_path / "path.svg"
    take = ("--model", "lenet5", "--data", "digits", "--repair", "--force", "--json", "--out", out, "--plot", plot)
    done = cli("merge", files / "a.safetensors", files / "twin.safetensors", *take)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert abs(facts["barriers"]["aligned"]) < 1e-4
    assert facts["scores"].keys() == {"first", "merged"}
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", "lenet5"), ("two models",)),
        (("merge", "lenet5", "lenet5", "--method", "tie"), ("no method 'tie'", "ties")),
        (("merge", "lenet5", "lenet5", "--method", "ties"), ("--base",)),
        (("merge", "lenet5", "lenet5", "--repair"), ("--data",)),
    ],
)
def test_what_merge_lacks_is_asked_for(cli: Run, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.exit_code == 2
    assert all(word in done.output for word in words)


@pytest.mark.parametrize("command", ["same", "diff", "merge"])
def test_hostile_and_truncated_checkpoints_are_refused(cli: Run, files: Path, tmp_path: Path, command: str) -> None:
    evil, cut = tmp_path / "evil.pt", tmp_path / "cut.safetensors"
    evil.write_bytes(pickle.dumps({"weight": Evil()}))
    cut.write_bytes((files / "a.safetensors").read_bytes()[:1000])
    for bad in (evil, cut):
        done = cli(command, files / "a.safetensors", bad, *MADE)
        assert done.exit_code == 2, done.output
        assert bad.name in done.output
        assert "defect" not in done.output
