"""Remedies of what reads, writes, compares and merges networks, and of the command line, are tried."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

import weightfold as wf
from weightfold.cli.main import app
from weightfold.data.checkpoint import load_weights_
from weightfold.data.user import load_model
from weightfold.ledger import Ledger
from weightfold.weights.align import align
from weightfold.weights.compare import weights_of
from weightfold.weights.merge import average, fisher, fisher_of, grams_of, regmean
from weightfold.weights.path import repair
from weightfold.weights.point import checked
from weightfold.weights.soft import soft
from weightfold.weights.symmetry import symmetries
from weightfold.weights.ties import untied

from .remedies import Do, Table

CASES = Table()
remedy = CASES.remedy
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
SOURCES = Path(wf.__file__).parent


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


# weights --------------------------------------------------------------------------------------------------------------


@remedy("soft(a, b, example)")
def models_of_other_widths() -> tuple[Do, Do]:
    a, b = mlp(), mlp(12)
    return lambda: average([a, b]), lambda: average([a, soft(a, b, X)])


@remedy("models of the same layers")
def models_of_other_layers() -> tuple[Do, Do]:
    a, b = mlp(), nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3, bias=False))
    return lambda: align(a, b, X), lambda: align(a, mlp(), X)


@remedy("Pass some inputs, or match weights.")
def activation_matching_without_data() -> tuple[Do, Do]:
    a, b = mlp(), mlp()

    def right() -> None:
        align(a, b, X, method="activations", data=[X])
        align(a, b, X, method="weights")

    return lambda: align(a, b, X, method="activations"), right


@remedy("labels are not needed")
def a_repair_without_inputs() -> tuple[Do, Do]:
    a, b = mlp(), mlp()
    return lambda: repair(average([a, b]), [a, b], []), lambda: repair(average([a, b]), [a, b], [X])


def _tied_and_free() -> tuple[nn.Module, nn.Module]:
    tied, free = (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)) for _ in range(2))
    tied[2].weight = tied[0].weight
    return tied, free


def _information(model: nn.Module) -> dict[str, Tensor]:
    words = torch.arange(5)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(net(batch), words[: len(batch)])

    return fisher_of(model, loss, [words])


@remedy("fisher_of(untied(model), ...)")
def fisher_information_of_tied_weights() -> tuple[Do, Do]:
    tied, free = _tied_and_free()
    return (
        lambda: fisher([tied, free], [_information(tied), _information(free)]),
        lambda: fisher([tied, free], [_information(untied(tied)), _information(free)]),
    )


@remedy("what fisher_of returns for this very model")
def fisher_information_of_another_model() -> tuple[Do, Do]:
    a, b = mlp(), mlp()

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().mean()

    one, two = (fisher_of(net, loss, [X]) for net in (a, b))
    return lambda: fisher([a, b], [one, {}]), lambda: fisher([a, b], [one, two])


class Twice(nn.Module):
    """Two layers that one of two models holds as one."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a if shared else nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@remedy("grams_of(untied(model), ...)")
def gram_matrices_of_shared_layers() -> tuple[Do, Do]:
    one, two = Twice(shared=True), Twice(shared=False)
    return (
        lambda: regmean([one, two], [grams_of(one, [X]), grams_of(two, [X])]),
        lambda: regmean([one, two], [grams_of(untied(one), [X]), grams_of(untied(two), [X])]),
    )


@remedy("weights of the model that the symmetries are of")
def weights_of_another_model() -> tuple[Do, Do]:
    found = symmetries(mlp(), X)
    return lambda: checked(found, weights_of(mlp(12))), lambda: checked(found, weights_of(mlp()))


# files ----------------------------------------------------------------------------------------------------------------


@remedy("Check the path.")
def weights_that_are_not_there(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(mlp().state_dict(), path)
    return lambda: load_weights_(mlp(), tmp_path / "no.safetensors"), lambda: load_weights_(mlp(), path)


@remedy("safetensors.torch.save_file(model.state_dict(), 'model.safetensors')")
def a_checkpoint_that_holds_code(tmp_path: Path) -> tuple[Do, Do]:
    model, path = mlp(), tmp_path / "net.pt"
    torch.save(model, path)

    def right() -> None:
        safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
        load_weights_(mlp(), tmp_path / "model.safetensors")

    return lambda: load_weights_(mlp(), path), right


@remedy("Choose one by its key", "net.pt:generator", "net.pt:critic")
def a_checkpoint_of_two_networks(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "net.pt"
    torch.save({"generator": mlp().state_dict(), "critic": mlp().state_dict()}, path)

    def right() -> None:
        for key in ("generator", "critic"):
            load_weights_(mlp(), f"{path}:{key}")

    return lambda: load_weights_(mlp(), path), right


@remedy("Did you mean 'generator'?")
def a_key_that_is_misspelt(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "net.pt"
    torch.save({"generator": mlp().state_dict(), "critic": mlp().state_dict()}, path)
    return lambda: load_weights_(mlp(), f"{path}:generater"), lambda: load_weights_(mlp(), f"{path}:generator")


@remedy("torch.save(torch.jit.load(path).state_dict(), 'model.pt')")
def a_program_for_weights(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "script.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(mlp()), path)

    def right() -> None:
        with pytest.warns(DeprecationWarning, match="torch.jit"):
            state = torch.jit.load(path).state_dict()
        torch.save(state, tmp_path / "model.pt")
        load_weights_(mlp(), tmp_path / "model.pt")

    return lambda: load_weights_(mlp(), path), right


@remedy("the settings that the weights were trained with")
def weights_of_another_width(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(mlp(12).state_dict(), path)
    return lambda: load_weights_(mlp(), path), lambda: load_weights_(mlp(12), path)


@remedy("weightfold.load(path, model)")
def a_saved_network_of_ones_own(tmp_path: Path) -> tuple[Do, Do]:
    net, path = mlp(), tmp_path / "net.safetensors"
    wf.save(net, path)

    def right() -> None:
        back = wf.load(path, mlp())
        assert torch.equal(back(X), net(X))

    return lambda: wf.load(path), right


@remedy("Did you mean '.onnx'?")
def an_ending_of_no_target(tmp_path: Path) -> tuple[Do, Do]:
    return lambda: wf.export(mlp(), tmp_path / "net.onx", X[:4]), lambda: wf.export(mlp(), tmp_path / "net.onnx", X[:4])


@remedy("calibration=[batch, ...]", 'calibration="drawn"')
def eight_bits_without_inputs(tmp_path: Path) -> tuple[Do, Do]:
    net, path = mlp(64), tmp_path / "net.onnx"

    def right() -> None:
        wf.export(net, path, X[:4], target="onnx-int8", calibration=[X])
        wf.export(net, path, X[:4], target="onnx-int8", calibration="drawn")

    return lambda: wf.export(net, path, X[:4], target="onnx-int8"), right


@remedy("Did you mean 'lenet5'?")
def a_model_that_is_not_there() -> tuple[Do, Do]:
    from weightfold.models import Classes, ImageInput, TaskSpec

    task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
    return lambda: load_model("lenet", task=task), lambda: load_model("lenet5", task=task)


@remedy("Pass task=dataset.task.")
def a_built_in_model_without_a_task() -> tuple[Do, Do]:
    dataset = wf.data.load("digits", limit=100)
    return lambda: load_model("lenet5"), lambda: load_model("lenet5", task=dataset.task)


# ledgers --------------------------------------------------------------------------------------------------------------


@remedy("Open it with Ledger.open, or choose another path.")
def a_ledger_that_exists(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "run.ledger"
    Ledger.create(path, run={}).close()

    def right() -> None:
        Ledger.open(path).close()
        Ledger.create(tmp_path / "other.ledger", run={}).close()

    return lambda: Ledger.create(path, run={}), right


@remedy("Make one with Ledger.create.")
def a_ledger_that_is_not_there(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "run.ledger"
    return lambda: Ledger.open(path), lambda: (Ledger.create(path, run={}).close(), Ledger.open(path).close())


@remedy("Open it again with Ledger.open.")
def a_ledger_that_was_closed(tmp_path: Path) -> tuple[Do, Do]:
    path = tmp_path / "run.ledger"
    ledger = Ledger.create(path, run={})
    ledger.close()

    def right() -> None:
        with Ledger.open(path) as again:
            again.append("note", {})

    return lambda: ledger.append("note", {}), right


@remedy(".item()", ".tolist()", "str()")
def a_tensor_in_an_entry(tmp_path: Path) -> tuple[Do, Do]:
    ledger = Ledger.create(tmp_path / "run.ledger", run={})
    value = torch.ones(2)

    def right() -> None:
        ledger.append("note", {"one": value[0].item(), "all": value.tolist(), "type": str(value.dtype)})
        ledger.close()

    return lambda: ledger.append("note", {"value": value}), right


# methods beside the compressor ----------------------------------------------------------------------------------------


@remedy("Call attach(model) first.")
def a_palette_that_is_not_attached() -> tuple[Do, Do]:
    palette = wf.Palette(k=4)
    return palette.convert, lambda: (palette.attach(mlp(64)), palette.convert())


@remedy("Use one Palette for each network.")
def a_palette_for_two_networks() -> tuple[Do, Do]:
    palette = wf.Palette(k=4)
    palette.attach(mlp(64))
    return lambda: palette.attach(mlp(64)), lambda: wf.Palette(k=4).attach(mlp(64))


@remedy("0.bias, 0.weight, 2.bias")
def a_pattern_without_a_parameter() -> tuple[Do, Do]:
    return lambda: wf.palettize(mlp(64), k=4, tensors="00.*"), lambda: wf.palettize(mlp(64), k=4, tensors="0.*")


@remedy("compressor.convert()", "palette.attach(net, optimizer, total_steps=n)", "palette.step()", "palette.convert()")
def a_palette_in_a_compressor() -> tuple[Do, Do]:
    net = mlp(64)

    def right() -> None:
        compressor = wf.Compressor(net, X[:4], [wf.Prune(keep=0.5)])
        compressor.prepare()
        compressor.once()
        compressor.convert()
        optimizer, palette = torch.optim.SGD(net.parameters(), lr=0.01), wf.Palette(k=4)
        palette.attach(net, optimizer, total_steps=2)
        for _ in range(2):
            net(X).square().mean().backward()
            optimizer.step()
            palette.step()
        palette.convert()
        assert net[0].weight.unique().numel() <= 4

    return lambda: wf.Compressor(net, X[:4], [wf.Palette(k=4)]), right  # type: ignore[list-item]


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_works(name: str, tmp_path: Path) -> None:
    CASES.follow(name, tmp_path)


# the command line -----------------------------------------------------------------------------------------------------


def _run(*args: object) -> Any:
    return CliRunner(env={"NO_COLOR": "1"}).invoke(app, [str(arg) for arg in args])


@pytest.fixture
def nets(tmp_path: Path) -> dict[str, object]:
    """Two networks with weights of their own, their base, and a place to write to."""
    for number in range(3):
        torch.manual_seed(number)
        load = load_model("lenet5", task=wf.data.load("digits", limit=50).task)
        safetensors.torch.save_file(load.state_dict(), tmp_path / f"{number}.safetensors")
    return {"here": tmp_path}


@pytest.mark.parametrize(
    ("wrong", "says", "right"),
    [
        ("trace lenet", "Did you mean 'lenet5'?", "trace lenet5"),
        ("trace torch.nn:Identity", "--example 1x3x32x32, or --data", "trace torch.nn:Identity --example 1x3x32x32"),
        ("trace torch.nn:ReLU", "--example 1x3x32x32, or --data", "trace torch.nn:ReLU --data digits"),
        ("lump lenet5 --eps 0.1 --target 50%", "Give one of them.", "lump lenet5 --eps 0.1"),
        (
            "lump lenet5 --eps 0.1 --repair 32",
            "Pass --data",
            "lump lenet5 --eps 0.1 --repair 32 --polish 0 --data digits",
        ),
        (
            "inspect lenet5 --weights {here}/none.safetensors",
            "Check the path.",
            "inspect lenet5 --weights {here}/0.safetensors",
        ),
        (
            "export lenet5 --to onnx-int8 --out {here}/a.onnx",
            "--calibrate drawn",
            "export lenet5 --to onnx-int8 --out {here}/a.onnx --calibrate drawn",
        ),
        (
            "zoo add {here}/zoo {here}/0.safetensors --fact accuracy",
            "--fact accuracy=0.97",
            "zoo add {here}/zoo {here}/0.safetensors --fact accuracy=0.97",
        ),
    ],
)
def test_a_remedy_of_a_command_works(wrong: str, says: str, right: str, nets: dict[str, object]) -> None:
    done = _run(*wrong.format(**nets).split())
    assert done.exit_code == 2, done.output
    assert says in done.stderr.strip().splitlines()[1], done.stderr
    done = _run(*right.format(**nets).split())
    assert done.exit_code == 0, done.output


def _commands(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{path} {name}".strip())


def _texts() -> Iterator[tuple[Path, str]]:
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value


def test_options_and_commands_that_messages_name_exist() -> None:
    commands = dict(_commands(typer.main.get_command(app)))
    options = {name for command in commands.values() for p in command.params for name in (*p.opts, *p.secondary_opts)}
    named = 0
    for path, text in _texts():
        found = re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
        assert set(found) <= {*options, "--help"}, (path.name, text)
        for one, two in re.findall(r"(?:: |with |on )weightfold ([a-z]+)(?: ([a-z]+))?", text):
            verbs = getattr(commands.get(one), "commands", None)
            assert one in commands, (path.name, text)
            assert verbs is None or two in verbs, (path.name, text)
            named += 1
    assert named > 10
