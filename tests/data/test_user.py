"""The user's own models: functions, Hugging Face folders, built-in names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightfold import models
from weightfold.data import load_model
from weightfold.errors import ArtifactError, ConfigError
from weightfold.models import Regression, TableInput, TaskSpec

TASK = TaskSpec(input=TableInput(n_features=3), output=Regression())
SOURCE = """
import torch
from torch import nn
def make(): return nn.Linear(3, 2)
def needs(width): return nn.Linear(width, 2)
def wrong(): return 3
NUMBER = 5
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Make the current folder hold a module of the user's; forget it afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_net.py").write_text(SOURCE)
    (tmp_path / "my_broken_net.py").write_text("import no_such_thing")
    yield tmp_path
    for name in ("my_own_net", "my_broken_net"):
        sys.modules.pop(name, None)


def test_a_function_of_the_current_folder(own_module: Path) -> None:
    path = list(sys.path)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    one, two, other = (load_model("my_own_net:make", seed=seed) for seed in (1, 1, 2))
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.state_dict()["weight"] for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_function_and_its_weights(own_module: Path) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, own_module / "w.safetensors")
    assert load_model("my_own_net:make", "w.safetensors").state_dict()["weight"].sum().item() == 6


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("my_own_net:mkae", "no function 'mkae'.*\n.*Did you mean 'make'"),
        ("my_own_net:NUMBER", "no function 'NUMBER'"),
        ("my_own_net:wrong", "must return a torch.nn.Module. Got int"),
        ("my_own_net:needs", "'my_own_net:needs' failed: TypeError.*\n.*without arguments"),
        ("no_such_net:make", "'no_such_net', the module of .* ModuleNotFoundError"),
        ("my_broken_net:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("mpl", "no model 'mpl'.*\n.*Did you mean 'mlp'"),
        ("mlp", "built for a task"),
    ],
)
def test_wrong_specs_say_what_to_do(own_module: Path, spec: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_model(spec)


def test_a_built_in_name(tmp_path: Path) -> None:
    built = models.build("mlp", TASK, seed=5)
    for (_, a), (_, b) in zip(
        built.state_dict().items(), load_model("mlp", task=TASK, seed=5).state_dict().items(), strict=True
    ):
        assert torch.equal(a, b)
    save_file(built.state_dict(), tmp_path / "m.safetensors")
    loaded = load_model("mlp", tmp_path / "m.safetensors", task=TASK)
    assert torch.equal(loaded.state_dict()["head.weight"], built.state_dict()["head.weight"])


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny BERT of random weights as its library does."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "bert"
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(hugging_face_folder: Path, tmp_path: Path) -> Path:
    """Give a copy to damage."""
    copy = tmp_path / "bert"
    copy.mkdir()
    for file in hugging_face_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_hugging_face_folder_gives_the_class_it_names(folder: Path, capfd: pytest.CaptureFixture) -> None:
    before = torch.get_rng_state()
    model = load_model(folder)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert capfd.readouterr() == ("", "")


NAME = "classifier.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(NAME), f"lacks '{NAME}'"),
        (lambda t: t.update(strange=torch.zeros(2)), "holds the unexpected 'strange'"),
        (lambda t: t.update({NAME: torch.zeros(3, 8)}), rf"'{NAME}' in .* shape \(3, 8\); the model needs \(2, 8\)"),
        (lambda t: t[NAME].fill_(torch.inf), f"'{NAME}' in '.*model.safetensors' holds 16 of 16 values that are not"),
    ],
)
def test_weights_that_do_not_fit_the_folder_are_named(folder: Path, change, complaint: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ArtifactError, match=complaint):
        load_model(folder)


def test_a_folder_with_code_of_its_own_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ArtifactError, match=r"asks for code.*not run"):
        load_model(folder)


def test_broken_folders_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match=r"model\.safetensors' is truncated, corrupt"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"holds no .safetensors file.*\n.*save_pretrained"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json' cannot be read"):
        load_model(folder)
    with pytest.raises(ConfigError, match="brings its own weights"):
        load_model(folder, "w.safetensors")


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["NovelNet"], "model_type": "novel"}))
    with pytest.raises(ArtifactError, match="cannot be loaded as NovelNet"):
        load_model(folder)


def test_the_class_stays_a_plain_module(folder: Path) -> None:
    assert isinstance(load_model(str(folder)), nn.Module)
