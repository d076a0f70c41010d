"""Networks of one's own on the command line, and weights of another network than the one that is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import weightfold
from weightfold.artifact import Builder, Input
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export import Blueprint, save_model
from weightfold.export.opened import open_model
from weightfold.models import Classes, ImageInput, build
from weightfold.models.task import TaskSpec

from .conftest import Run

TASK = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
CODE = """
from torch import nn, relu

class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 3)

    def forward(self, x):
        return self.b(relu(self.a(x)))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own code, and what they have of its folded network."""
    (tmp_path / "own_code.py").write_text(CODE.format(name="MyNet") + CODE.format(name="Other"))
    monkeypatch.chdir(tmp_path)
    net = open_model("own_code:MyNet", example=["2x8"]).model
    compressor = weightfold.Compressor(net, torch.randn(2, 8), [weightfold.Fold(keep=0.5)])
    compressor.prepare()
    compressor.once([torch.randn(64, 8)])
    small = compressor.convert().eval()
    weightfold.save(small, "small.safetensors")
    save_model(small, Path("bare.safetensors"), before=None, builder=Builder(kind="instance", name="MyNet"))
    torch.save(small.state_dict(), "state.pt")
    torch.save(small, "module.pt")
    palette = weightfold.palettize(small, k=4)
    palette.save("clustered.safetensors", small)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        "small.safetensors",
        "small.safetensors --model own_code:MyNet",
        "bare.safetensors --model own_code:MyNet --example 1x8",
        "own_code:MyNet --weights small.safetensors",
        "own_code:MyNet --weights state.pt --example 1x8",
        "own_code:MyNet --weights clustered.safetensors --example 1x8",
    ],
)
def test_a_folded_network_is_exported(arguments: str, folder: Path, cli: Run) -> None:
    done = cli("export", *arguments.split(), "--to", "pt2", "--out", "out.pt2")
    assert done.exit_code == 0, done.output
    x = torch.randn(4, 8)
    wanted = weightfold.load("small.safetensors")(x)
    if "clustered" in arguments:
        twin = open_model("own_code:MyNet").model
        wanted = weightfold.load("clustered.safetensors", twin)(x)
    assert torch.allclose(weightfold.load("out.pt2")(x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bare.safetensors", ("made by 'MyNet'", "--model MODULE:MyNet")),
        ("state.pt", ("4 tensors", "--weights state.pt")),
        ("clustered.safetensors", ("4 tensors", "--weights clustered.safetensors")),
        ("module.pt", ("holds code",)),
        ("own_code.py", ("is a file, but no model",)),
    ],
)
def test_a_file_that_is_no_whole_model_is_said_to_be_what_it_is(
    name: str, words: tuple[str, ...], folder: Path, cli: Run
) -> None:
    done = cli("export", name, "--to", "pt2", "--out", "out.pt2")
    assert done.exit_code == 2
    for word in words:
        assert word in done.stderr
    assert not Path("out.pt2").exists()


def test_the_advice_for_a_pickled_module_works_when_followed(folder: Path, cli: Run) -> None:
    from safetensors.torch import save_file

    save_file(torch.load("module.pt", weights_only=False).state_dict(), "model.safetensors")
    said = cli("export", "model.safetensors", "--to", "pt2", "--out", "out.pt2").stderr
    assert "--weights model.safetensors" in said
    arguments = ("own_code:MyNet", "--weights", "model.safetensors", "--example", "1x8")
    assert cli("export", *arguments, "--to", "pt2", "--out", "out.pt2").exit_code == 0


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved built-in networks, and weights alone."""
    made = tmp_path_factory.mktemp("saved")
    for name in ("vgg-small", "lenet5", "mlp"):
        net = build(name, TASK, seed=0).eval()
        builder = Builder(kind="built-in", name=name, task=TASK.model_dump(mode="json"))
        inputs = (Input(shape=(1, 1, 8, 8)),)
        save_model(net, made / f"{name}.safetensors", before=Blueprint.of(net), builder=builder, inputs=inputs)
        torch.save(net.state_dict(), made / f"{name}.pt")
    weightfold.save(build("lenet5", TASK, seed=1), made / "own.safetensors", torch.zeros(1, 1, 8, 8))
    return made


COMMANDS = {
    "inspect": "{named} --weights {file} --example 1x1x8x8",
    "trace": "{named} --weights {file} --example 1x1x8x8",
    "sharing": "{named} --weights {file} --example 1x1x8x8",
    "canon": "{named} --weights {file} --example 1x1x8x8",
    "export": "{named} --weights {file} --example 1x1x8x8 --to pt2 --out {out}/a.pt2",
    "tune": "{named} --weights {file} --example 1x1x8x8 --out {out}/a.json",
    "fold": "{named} --weights {file} --data digits --out {out}/run",
    "lump": "{named} --weights {file} --example 1x1x8x8 --out {out}/run",
    "same": "{file} {file} --model {named} --example 1x1x8x8",
    "diff": "{file} {file} --model {named} --example 1x1x8x8",
    "merge": "{file} {file} --model {named} --example 1x1x8x8 --out {out}/a.safetensors",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_of_another_network_are_refused_by_every_command(
    command: str, saved: Path, tmp_path: Path, cli: Run
) -> None:
    for named, file in (("lenet5", "vgg-small"), ("mlp", "lenet5"), ("vgg-small", "own")):
        arguments = COMMANDS[command].format(named=named, file=saved / f"{file}.safetensors", out=tmp_path)
        done = cli(command, *arguments.split())
        assert done.exit_code == 2, done.output
        assert f"'{named}'" in done.stderr
        assert ("'LeNet5'" if file == "own" else f"'{file}'") in done.stderr
    assert not list(tmp_path.iterdir())


def test_weights_of_the_network_that_is_named_are_taken(saved: Path) -> None:
    for file in ("lenet5.safetensors", "lenet5.pt", "own.safetensors"):
        seed = 1 if file == "own.safetensors" else 0
        source = open_model("lenet5", weights=saved / file, example=["1x1x8x8"])
        wanted = build("lenet5", TASK, seed=seed).eval()
        assert torch.equal(source.model(torch.ones(2, 1, 8, 8)), wanted(torch.ones(2, 1, 8, 8)))


def test_a_maker_of_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'MyNet', not of 'own_code:Other'"):
        open_model("small.safetensors", maker="own_code:Other")
    with pytest.raises(ConfigError, match=r"'MyNet', not of 'own_code:Other'"):
        open_model("own_code:Other", weights="small.safetensors")


def test_a_model_that_brings_its_weights_takes_no_others(saved: Path) -> None:
    with pytest.raises(ConfigError, match="brings its own weights"):
        open_model(str(saved / "lenet5.safetensors"), weights=saved / "vgg-small.safetensors")
    with pytest.raises(ConfigError, match="'lenet5', not of 'vgg-small'"):
        open_model(str(saved / "lenet5.safetensors"), maker="vgg-small")


def test_a_network_of_the_same_name_and_other_sizes_is_refused(tmp_path: Path) -> None:
    class MyNet(nn.Sequential):
        pass

    net = MyNet(nn.Linear(8, 4), nn.Linear(4, 3))
    save_model(
        net, tmp_path / "a.safetensors", before=Blueprint.of(net), builder=Builder(kind="function", name="gone:make")
    )
    with pytest.raises(ArtifactError, match=r"holds 'gone:make', not 'torch.nn:Identity'"):
        open_model("torch.nn:Identity", weights=tmp_path / "a.safetensors")
