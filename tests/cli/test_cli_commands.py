"""What the commands do and print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

from weightfold.export import load
from weightfold.ledger import Ledger

from .conftest import TINY, Run, Shell

Finished = tuple[Path, Result]


def test_train_prints_a_comparison_and_writes_the_folder(finished: Finished) -> None:
    out, done = finished
    assert done.exit_code == 0, done.output
    for word in ("test accuracy", "parameters", "MACs", "bytes on disk", "training seconds", "batch 64", "report.html"):
        assert word in done.stdout
    names = {path.name for path in out.iterdir() if not path.name.endswith(("-wal", "-shm"))}
    assert names == {
        "run.json", "ledger.db", "dense.safetensors", "model.safetensors", "structure.json", "report.html",
    }  # fmt: skip


def test_train_prints_only_json_if_asked(cli: Run, tmp_path: Path) -> None:
    done = cli("train", *TINY, "--epochs", 1, "--method", "none", "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"]["arms"]["dense"]["parameters"] > 0
    assert not done.stderr


def test_a_finished_run_is_shown_again_by_resume(finished: Finished, cli: Run) -> None:
    done = cli("train", "--resume", finished[0])
    assert done.exit_code == 0, done.output
    assert done.stdout == finished[1].stdout


def test_an_interrupted_run_says_how_to_go_on_and_ends_alike(finished: Finished, shell: Shell, tmp_path: Path) -> None:
    before = """
from weightfold.training import run
write, calls = run.write_checkpoint, []
def interrupt(*args):
    calls.append(1)
    if len(calls) == 3:
        raise KeyboardInterrupt
    write(*args)
run.write_checkpoint = interrupt
"""
    out = tmp_path / "cut"
    done = shell("train", *TINY, "--out", out, before=before)
    assert done.returncode == 130
    assert not done.stdout
    assert "nothing half-written" in done.stderr
    assert f"--resume {out}" in done.stderr
    assert "Traceback" not in done.stderr
    assert shell("train", "--resume", out, "--json").returncode == 0
    heads = [json.loads((folder / "run.json").read_text())["results"]["head"] for folder in (out, finished[0])]
    assert heads[0] == heads[1]


def test_trace_lists_groups_and_frozen_axes(cli: Run) -> None:
    done = cli("trace", "lenet5")
    assert done.exit_code == 0, done.output
    for word in ("conv1", "fc2", "rescale" if "rescale" in done.stdout else "sign", "reaches the model's output"):
        assert word in done.stdout
    facts = json.loads(cli("trace", "lenet5", "--json").stdout)
    assert facts["totals"]["channels"] == 6 + 16 + 120 + 84
    assert [group["channels"] for group in facts["groups"]] == [6, 16, 120, 84]
    assert all(item["reason"] for item in facts["frozen"])


def test_trace_takes_a_function_of_the_user(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch.nn import *\ndef net():\n    return Sequential(Linear(6, 5), ReLU(), Linear(5, 2))\n"
    )
    done = shell("trace", "mine:net", "--example", "1x6", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [group["channels"] for group in json.loads(done.stdout)["groups"]] == [5]
    assert shell("trace", "mine:net", cwd=tmp_path).returncode == 2


def test_trace_takes_a_run(finished: Finished, cli: Run) -> None:
    facts = json.loads(cli("trace", finished[0], "--json").stdout)
    assert [group["channels"] for group in facts["groups"]] == [12, 12]


def test_ledger_show_lists_filters_and_ends(finished: Finished, cli: Run) -> None:
    out = finished[0]
    records = json.loads(cli("ledger", "show", out, "--json").stdout)
    with Ledger.open(out / "ledger.db", readonly=True) as ledger:
        assert [record["hash"] for record in records] == [entry.hash for entry in ledger.entries()]
        head = ledger.head
    text = cli("ledger", "show", out / "ledger.db").stdout
    assert head in text
    assert "24 → 12" in text
    only = json.loads(cli("ledger", "show", out, "--group", "body.0", "--json").stdout)
    assert [record["body"]["what"]["group"] for record in only] == ["body.0"]
    last = json.loads(cli("ledger", "show", out, "--last", 2, "--json").stdout)
    assert [record["kind"] for record in last] == ["convert", "result"]


def test_ledger_verify_checks_the_model_too(finished: Finished, cli: Run) -> None:
    done = cli("ledger", "verify", finished[0])
    assert done.exit_code == 0, done.output
    assert "model.safetensors carries this head" in done.stdout
    facts = json.loads(cli("ledger", "verify", finished[0], "--json").stdout)
    assert (facts["valid"], facts["model"]) == (True, "model.safetensors")


@pytest.mark.parametrize("target", ["safetensors", "pt2", "onnx"])
def test_export_writes_and_verifies(target: str, finished: Finished, cli: Run, tmp_path: Path) -> None:
    path = tmp_path / f"model.{target}"
    done = cli("export", finished[0], "--to", target, "--out", path, "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["size_bytes"] == path.stat().st_size
    assert facts["largest_difference"] <= facts["tolerance"]


def test_fold_makes_a_trained_network_smaller(finished: Finished, cli: Run, tmp_path: Path) -> None:
    dense = finished[0] / "dense.safetensors"
    done = cli("fold", dense, "--data", "digits", "--keep", 0.5, "--samples", 256, "--out", tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "before" in done.stdout
    assert "test accuracy" in done.stdout
    small, large = load(tmp_path / "small"), load(dense)
    count = [sum(p.numel() for p in net.parameters()) for net in (small, large)]
    assert count[0] < count[1] / 2
    assert cli("ledger", "verify", tmp_path / "small").exit_code == 0
    assert (tmp_path / "small" / "report.html").exists()


def test_fold_takes_plain_weights_of_a_built_in_network(cli: Run, tmp_path: Path) -> None:
    from weightfold.data import load as load_data
    from weightfold.models import build

    weights = tmp_path / "w.safetensors"
    save_file(build("lenet5", load_data("digits").task).state_dict(), weights)
    done = cli(
        "fold", "lenet5", "--weights", weights, "--data", "digits", "--macs", 0.7, "--out", tmp_path / "o", "--json"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    arms = json.loads(done.stdout)["results"]["arms"]
    assert arms["folded"]["macs"] <= 0.7 * arms["dense"]["macs"]


def test_training_on_a_table(cli: Run, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=generator)
    rows = [",".join(f"{v:.4f}" for v in [*row, row.sum() + 0.1]) for row in x.tolist() for row in [torch.tensor(row)]]
    (tmp_path / "t.csv").write_text("a,b,c,y\n" + "\n".join(rows))
    done = cli(
        "train", "--data", tmp_path / "t.csv", "--set", "hidden=16,16", "--epochs", 3, "--at", 0.5, "--threads", 1,
        "--max-increase", 1, "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "R²" in done.stdout
