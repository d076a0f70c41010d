"""`weightfold lump`: by tolerance, to a target, as a sweep; what it writes, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import Result

from weightfold.export.opened import open_model
from weightfold.ledger import Ledger
from weightfold.training.again import rebuild_run
from weightfold.training.lumped import LumpRunConfig, lump_network

Run = Callable[..., Result]
MODULE = """
import torch
from torch import nn

def doubled():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight[9], net[0].bias[9] = -net[0].weight[2], -net[0].bias[2]
        net[0].weight[4], net[0].bias[4] = net[0].weight[1], net[0].bias[1]
    return net
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lump_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "lump_nets:doubled"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    y = x[:, :1].sin() + x[:, 1:2]
    lines = [",".join(f"{v:.5f}" for v in row) for row in torch.cat([x, y], 1).tolist()]
    path = tmp_path / "rows.csv"
    path.write_text("a,b,c,d,e,f,y\n" + "\n".join(lines) + "\n")
    return path


def test_duplicates_are_merged_and_the_guarantee_is_printed(cli: Run, nets: str) -> None:
    result = cli("lump", nets, "--example", "1x6", "--eps", "0")
    assert result.exit_code == 0, result.stderr
    assert "merged   1 equal, 1 flipped" in result.stdout
    assert "bound    no output changes by more than" in result.stdout
    assert "(guaranteed)" in result.stdout
    assert "163 " in result.stdout.replace("\n", " ")
    assert "143" in result.stdout


def test_a_folder_holds_the_smaller_model_and_a_sound_ledger(cli: Run, nets: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli("lump", nets, "--example", "1x6", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    run = json.loads(result.stdout)
    assert run["results"]["parameters"] == [163, 143]
    assert run["results"]["bound"] < 1e-5
    assert sorted(p.name for p in out.iterdir()) == [
        *("dense.safetensors", "ledger.db", "model.safetensors", "run.json", "structure.json")
    ]
    with Ledger.open(out / "ledger.db") as ledger:
        ledger.verify()
        assert [e.kind for e in ledger.entries()] == ["run", "prepare", "edit", "convert", "result"]
        assert ledger.head == run["head"]
    small = open_model(str(out), maker=nets).model
    whole = open_model(nets, example=["1x6"]).model
    x = torch.randn(20, 6)
    assert small[0].out_features == 14
    assert torch.allclose(small(x), whole(x), atol=1e-6)


def test_a_lumped_model_is_replayed_from_its_ledger(cli: Run, nets: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("lump", nets, "--example", "1x6", "--eps", "1.0", "--out", out).exit_code == 0
    facts = rebuild_run(out, maker=nets)
    assert facts["edits"] > 0
    assert facts["same_structure"]
    assert facts["same_weights"]
    assert facts["unknown"] == []


def test_a_target_with_repair_reports_what_was_measured(cli: Run, rows: Path, tmp_path: Path) -> None:
    result = cli(
        *("lump", "mlp", "--data", rows, "--target", "25%", "--repair", "200", "--polish", "2"),
        *("--out", tmp_path / "out", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    results = json.loads(result.stdout)["results"]
    before, after = results["parameters"]
    assert 0.2 < after / before <= 0.25
    assert results["bound"] is None
    assert results["no_bound"] == "the readers were solved on data"
    assert results["repair"]["inputs"] == 200
    assert results["repair"]["mean_square_error"][1] < results["repair"]["mean_square_error"][0]
    assert results["measured"]["relative"] < 0.5
    with Ledger.open(tmp_path / "out" / "ledger.db") as ledger:
        assert "repair" in [e.kind for e in ledger.entries()]


def test_a_sweep_writes_the_curve_and_a_plot(cli: Run, nets: str, tmp_path: Path) -> None:
    result = cli("lump", nets, "--example", "1x6", "--sweep", "--out", tmp_path / "curve")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "curve" / "sweep.json").read_text())["rows"]
    kept = [row["kept"] for row in found]
    bounds = [row["bound"] for row in found]
    assert kept[0] == pytest.approx(143 / 163)
    assert kept[-1] < 0.5
    assert bounds[0] < 1e-5 < bounds[-1]
    svg = (tmp_path / "curve" / "sweep.svg").read_text()
    assert svg.startswith("<svg")
    assert "<polyline" in svg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--eps", "-1"), "'eps' setting"),
        (("--eps", "nan"), "'eps' setting"),
        (("--eps", "inf"), "'eps' setting"),
        (("--target", "much"), "--target must be a share"),
        (("--target", "150%"), "'target' setting"),
        (("--eps", "0.1", "--target", "50%"), "three ways to say how far"),
        (("--eps", "0.1", "--sweep"), "three ways to say how far"),
        (("--repair", "100"), "--repair needs unlabelled inputs"),
        (("--linkage", "ward"), "'linkage' setting"),
        (("--target", "0.001"), "cannot be met"),
    ],
)
def test_what_cannot_be_meant_is_refused(cli: Run, nets: str, args: tuple[str, ...], message: str) -> None:
    result = cli("lump", nets, "--example", "1x6", *args)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_refused_run_leaves_no_folder(cli: Run, nets: str, tmp_path: Path) -> None:
    result = cli("lump", nets, "--example", "1x6", "--target", "0.001", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_standardised_are_named_with_the_figure() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(200, 4) * torch.tensor([1.0, 50.0, 1.0, 80.0]) + torch.tensor([0.0, 300.0, 0.0, 0.0])
    [warning] = lump_network(net, x[:1], LumpRunConfig(eps=0.5), [x]).facts["warnings"]
    assert warning.startswith("2 of 4 inputs are not standardised (input 1: mean ")
    fine = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    assert lump_network(fine, x[:1], LumpRunConfig(eps=0.5), [torch.randn(200, 4)]).facts["warnings"] == []


def test_a_bound_that_cannot_be_given_says_why() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    facts = lump_network(net, torch.zeros(1, 4), LumpRunConfig(eps=1.0)).facts
    assert facts["bound"] is None
    assert facts["no_bound"].startswith("there is no interval rule for the operator 'layer_norm'")
