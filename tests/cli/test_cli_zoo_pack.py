"""`weightfold zoo pack`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weightfold.models import Classes, ImageInput, TaskSpec, build
from weightfold.weights.disguise import disguise

from .conftest import Run

TASK = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
MADE = ("--model", "lenet5", "--example", "1x1x8x8")


@pytest.fixture
def zoo(cli: Run, tmp_path: Path) -> Path:
    """A zoo of a network, a child, and a child in disguise."""
    base = build("lenet5", TASK, seed=0)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        child = build("lenet5", TASK, seed=0)
        with torch.no_grad():
            for value in child.parameters():
                value += 1e-3 * torch.randn(value.shape, generator=generator)
        if seed == 2:
            child = disguise(child, TASK.example(), generator)
        save_file(child.state_dict(), tmp_path / f"child{seed}.safetensors")
    done = cli("zoo", "add", tmp_path / "zoo", *sorted(tmp_path.glob("*.safetensors")), *MADE)
    assert done.exit_code == 0, done.output
    return tmp_path / "zoo"


def test_a_plan_changes_nothing_and_packing_keeps_every_bit(cli: Run, zoo: Path) -> None:
    plan = cli("zoo", "pack", zoo, "--plan", "--json")
    assert plan.exit_code == 0, plan.output
    facts = json.loads(plan.stdout)
    assert sum(row["parent"] is not None for row in facts["rows"]) == 2
    assert facts["after"] < 0.8 * facts["before"]
    assert "would pack" in cli("zoo", "pack", zoo, "--plan").stdout
    done = cli("zoo", "pack", zoo)
    assert done.exit_code == 0, done.output
    assert "2 of 3 models as differences" in done.stdout
    assert "moved" in done.stdout
    assert "change" not in done.stdout, "a column that says nothing"
    assert "2 packed before stay as they are" in " ".join(cli("zoo", "pack", zoo, "--lossy", "1e-3").stdout.split())
    for name in ("base", "child1", "child2"):
        out = zoo.parent / "out.safetensors"
        assert cli("zoo", "get", zoo, name, out).exit_code == 0
        mine, theirs = load_file(out), load_file(zoo.parent / f"{name}.safetensors")
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    assert cli("zoo", "verify", zoo).exit_code == 0


def test_steps_and_bounds(cli: Run, zoo: Path) -> None:
    steps = json.loads(cli("zoo", "pack", zoo, "--plan", "--json", "--lossy", "0.003").stdout)
    bound = json.loads(cli("zoo", "pack", zoo, "--json", "--max-difference", "0.02", *MADE).stdout)
    packed = [row for row in bound["rows"] if row["parent"]]
    assert len(packed) == 2
    assert all(row["change"] <= 0.02 and row["step"] > 0 for row in packed)
    assert {row["step"] for row in steps["rows"] if row["parent"]} == {0.003}
    assert steps["after"] < 0.5 * steps["before"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--relative",), "Add --lossy STEP"),
        (("--lossy", "-1"), "must be above 0"),
        (("--lossy", "0.1", "--max-difference", "0.1", *MADE), "either a step, or a bound"),
        (("--max-difference", "0.1", "--model", "nobody:knows"), "nobody"),
        (("--depth", "99"), "between 1 and"),
        (("nobody",), "no model 'nobody'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cli: Run, zoo: Path, options: tuple[str, ...], words: str) -> None:
    done = cli("zoo", "pack", zoo, *options)
    assert done.exit_code == 2, done.output
    assert words in done.output
