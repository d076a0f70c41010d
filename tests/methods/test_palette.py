"""Clustered weights: at once, in training, in a file."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.errors import ArtifactError, ConfigError, DataError
from weightfold.fingerprint import fingerprint
from weightfold.graph.apply import apply
from weightfold.graph.edit import remove
from weightfold.methods.palette import Palette, PaletteConfig, Palettized, fisher, input_energy, palettize
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.quant.clustered import read_clustered
from weightfold.size import parameters, unique_values

ROOT = Path(__file__).parents[2]
IMAGES = TaskSpec(input=ImageInput(channels=3, height=8, width=8), output=Classes(n=4))
TEXT = TaskSpec(input=TextInput(vocab=32, context=16), output=NextToken(vocab=32))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batches(n: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, 16, (8,), generator=g)) for _ in range(n)]


def train(model: nn.Module, palette: Palette, optimizer: torch.optim.Optimizer, data: list[Any]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        palette.step()


# at once --------------------------------------------------------------------------------------------------------------


def test_weights_take_few_values_and_norms_and_biases_stay() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    palettized = palettize(model, k=4)
    assert set(palettized.tensors) == {"conv.weight", "head.weight"}
    assert palettized.refused == dict.fromkeys(
        ("norm.weight", "norm.bias", "head.bias"), "norm scales and biases are kept"
    )
    assert len(model.conv.weight.unique()) == len(model.head.weight.unique()) == 4
    for name in ("norm.weight", "norm.bias", "norm.running_var", "head.bias"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert palettized.unique_values() == sum(row["unique_values"] for row in palettized.summary()) == 8
    assert palettized.summary()[0] == {
        "name": "conv.weight", "shape": [12, 3, 3, 3], "codebooks": 1, "bits": 2, "vector": 1, "unique_values": 4,
        "packed_bytes": 12 * 27 // 4 + 4 * 2,
    }  # fmt: skip
    assert unique_values(model) == 8 + len(before["norm.weight"].unique()) + 1 + len(before["head.bias"].unique())


def test_norms_of_two_dimensions_are_kept() -> None:
    model = nn.Sequential(nn.LayerNorm((4, 64)), nn.Linear(64, 64))
    assert set(palettize(model, k=4).tensors) == {"1.weight"}


@pytest.mark.parametrize("group_size", [1, 5, 12, None])
def test_each_group_of_rows_has_its_own_values(group_size: int | None) -> None:
    model = net()
    palettize(model, k=2, group_size=group_size, tensors="conv.*")
    for rows in model.conv.weight.split(group_size or 12):
        assert len(rows.unique()) == 2


def test_finer_codebooks_come_nearer() -> None:
    reference = net().conv.weight.detach()
    errors = []
    for settings in ({"k": 2}, {"k": 4}, {"k": 4, "group_size": 4}, {"k": 16}, {"k": 64}):
        model = net()
        palettize(model, **settings)  # pyright: ignore[reportArgumentType]
        errors.append(float((model.conv.weight.detach() - reference).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_vectors_are_entries_of_the_codebook() -> None:
    model = nn.Linear(64, 64)
    palettized = palettize(model, k=16, vector=4)
    assert len(model.weight.reshape(-1, 4).unique(dim=0)) == 16
    assert palettized.tensors["weight"].bits == 4
    assert palettized.tensors["weight"].size_bytes() == 64 * 64 // 4 // 2 + 16 * 4 * 2
    other = nn.Linear(64, 64)
    other.load_state_dict(model.state_dict())
    assert "do not divide" in palettize(nn.Sequential(nn.Linear(30, 64), other), k=16, vector=4).refused["0.weight"]


def test_a_tied_parameter_is_clustered_once_and_stays_tied() -> None:
    a, b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, nn.ReLU(), b)
    palettized = palettize(model, k=4)
    assert list(palettized.tensors) == ["0.weight"]
    assert b.weight is a.weight


def test_a_network_folded_to_odd_widths_can_be_clustered(tmp_path: Path) -> None:
    model, example = build("resnet20", IMAGES, width=8).eval(), torch.zeros(1, 3, 8, 8)
    graph = wf.trace(model, example)
    group = next(g for g in graph if g.name == "layer1.0.conv1")
    apply(model, graph, remove(group, torch.arange(5)))
    palettized = palettize(model, k=8, group_size=4)
    assert palettized.tensors["layer1.0.conv1.weight"].shape == (5, 8, 3, 3)
    _comes_back(palettized, model, tmp_path)


def test_importance_draws_the_values_to_where_it_counts() -> None:
    weight = torch.tensor([[0.0, 0.1, 0.2, 1.0, 1.1, 1.2]] * 8)
    importance = torch.zeros_like(weight)
    importance[:, 0] = importance[:, 5] = 1.0
    model = nn.Linear(6, 8, bias=False)
    model.weight.data.copy_(weight)
    palettize(model, k=2, book="float32", importance={"weight": importance})
    torch.testing.assert_close(model.weight[0, [0, 5]].detach(), torch.tensor([0.0, 1.2]), atol=1e-4, rtol=0)


def test_fisher_is_the_mean_of_squared_gradients() -> None:
    model, data = net(), batches(3)
    found = fisher(model, data, F.cross_entropy)
    expected = torch.zeros_like(model.conv.weight)
    model.eval()
    for x, y in data:
        [grad] = torch.autograd.grad(F.cross_entropy(model(x), y), [model.conv.weight])
        expected += grad.square() / 3
    torch.testing.assert_close(found["conv.weight"], expected)
    assert model.conv.weight.grad is None
    with pytest.raises(DataError, match="one batch"):
        fisher(model, [], F.cross_entropy)


def test_input_energy_is_the_diagonal_of_the_layers_error() -> None:
    """Independent reference: the output's change when single weights change, by the layer itself."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 1, groups=2, bias=False).double(), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    energy = input_energy(layer, [x])["weight"]
    reference = layer(x).detach()
    for o, i in ((0, 0), (2, 1), (3, 0), (5, 1)):
        with torch.no_grad():
            layer.weight[o, i] += 1
            torch.testing.assert_close((layer(x) - reference)[:, o].square().mean(), energy[o, i, 0, 0])
            layer.weight[o, i] -= 1
    assert not layer._forward_pre_hooks
    model = net()
    palettize(model, k=4, importance=input_energy(model, [x for x, _ in batches()]))
    assert model.training


def test_what_would_not_shrink_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(64, 64))
    assert "more room" in palettize(model, k=64, book="float32").refused["0.weight"]


def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_changes() -> None:
    model = net()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    before = fingerprint(model)
    with pytest.raises(DataError, match=r"'head.weight'.*finite"):
        palettize(model, k=4)
    with pytest.raises(DataError, match=r"'head.weight'.*finite"):
        Palette(k=4).attach(model)
    assert fingerprint(model) == before
    assert type(model.conv) is nn.Conv2d


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'k'"):
        palettize(net(), k=1)
    with pytest.raises(ConfigError, match="mode"):
        Palette(mode="soft")
    with pytest.raises(ConfigError, match="No parameter matches"):
        palettize(net(), tensors="cnv.*")
    with pytest.raises(ConfigError, match="no parameter 'cnv'"):
        palettize(net(), importance={"cnv": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"'conv.weight'.*Importance of shape"):
        palettize(net(), k=4, importance={"conv.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="No weights"):
        palettize(nn.BatchNorm2d(4))
    assert PaletteConfig.from_json(PaletteConfig(k=7).to_json()) == PaletteConfig(k=7)


def test_values_too_large_for_half_precision_are_refused() -> None:
    model = nn.Linear(32, 32)
    model.weight.data[0, 0] = 1e6
    with pytest.raises(DataError, match="float16"):
        palettize(model, k=4)
    palettize(model, k=4, book="float32")


# the file -------------------------------------------------------------------------------------------------------------


def _comes_back(palettized: Palettized, model: nn.Module, folder: Path) -> None:
    for coding in ("packed", "deflated"):
        path = folder / f"{coding}.safetensors"
        size = palettized.save(path, model, coding=coding)
        assert size == path.stat().st_size
        state = read_clustered(path)
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
            assert state[name].dtype == value.dtype
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [{"k": 2}, {"k": 11}, {"k": 256}, {"k": 4, "group_size": 5}, {"k": 16, "vector": 3}, {"k": 8, "book": "float32"}],
)
def test_the_file_reads_back_to_exactly_the_clustered_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    model = build("lenet5", IMAGES.model_copy(update={"output": Classes(n=10)}))
    _comes_back(palettize(model, **settings), model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_come_back_too(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(40, 40).to(dtype)
    _comes_back(palettize(model, k=8), model, tmp_path)


def test_tied_tensors_come_back_under_all_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    model[1].weight = model[0].weight
    palettized = palettize(model, k=4)
    _comes_back(palettized, model, tmp_path)
    assert len(load_file(tmp_path / "packed.safetensors")) == 2


def test_the_bytes_are_those_of_indices_and_codebook(tmp_path: Path) -> None:
    model = nn.Linear(256, 256, bias=False)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    palettized = palettize(model, k=16)
    size = palettized.save(tmp_path / "p.safetensors", model)
    assert palettized.tensors["weight"].size_bytes() == 256 * 256 // 2 + 16 * 2
    assert 0 < size - palettized.tensors["weight"].size_bytes() < 500
    assert size < (tmp_path / "dense.safetensors").stat().st_size / 7.8


def test_changed_weights_are_not_saved_as_clustered(tmp_path: Path) -> None:
    model = net()
    palettized = palettize(model, k=4)
    with torch.no_grad():
        model.conv.weight += 1
    with pytest.raises(DataError, match=r"'conv.weight'"):
        palettized.save(tmp_path / "x.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_corrupt_files_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(32, 32)
    path = tmp_path / "p.safetensors"
    palettize(model, k=5).save(path, model)
    data = path.read_bytes()
    for broken in (data[:50], data[:-9], b""):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError):
            read_clustered(path)
    save_file(model.state_dict(), path)
    with pytest.raises(ArtifactError, match="no clustered tensors"):
        read_clustered(path)
    with pytest.raises(ArtifactError):
        read_clustered(tmp_path / "missing.safetensors")
    path.write_bytes(data[:-100] + b"\xff" * 100)
    with pytest.raises(ArtifactError, match="entry 7 of 5"):
        read_clustered(path)


# in training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dkm", "ste"])
def test_training_lowers_the_loss_below_that_of_one_shot(mode: str) -> None:
    data = batches(3) * 40
    once, model = net(), net()
    palettize(once, k=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    palette = Palette(k=3, mode=mode)
    palette.attach(model, optimizer, total_steps=len(data))
    train(model, palette, optimizer, data)
    palette.convert()

    def loss(m: nn.Module) -> float:
        return sum(F.cross_entropy(m.train()(x), y).item() for x, y in data[:3])

    assert loss(model) < 0.85 * loss(once)
    assert len(model.conv.weight.unique()) <= 3


@pytest.mark.parametrize("mode", ["dkm", "ste"])
def test_convert_leaves_plain_modules_that_compute_what_evaluation_did(mode: str) -> None:
    model, data = net(), batches()
    kinds, names = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    held = {id(p) for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    palette = Palette(k=4, mode=mode, group_size=4)
    palette.attach(model, optimizer, total_steps=4)
    train(model, palette, optimizer, data)
    x = data[0][0]
    before = model.eval()(x)
    palettized = palette.convert()
    assert torch.equal(model(x), before)
    assert [type(m) for m in model.modules()] == kinds
    assert [n for n, _ in model.named_parameters()] == names
    assert {id(p) for p in model.parameters()} == held
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == held
    assert {id(p) for p in optimizer.state} == held
    assert not any(type(v).__module__.startswith("weightfold") for m in model.modules() for v in vars(m).values())
    for name, item in palettized.tensors.items():
        assert torch.equal(model.state_dict()[name], item.values())
    copy.deepcopy(model)
    model.train()
    F.cross_entropy(model(x), data[0][1]).backward()
    optimizer.step()


def test_only_what_was_attached_is_clustered_and_frozen_weights_stay() -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.clone()
    palette = Palette(k=4)
    palette.attach(model)
    palettized = palette.convert()
    assert "frozen" in palettized.refused["conv.weight"]
    assert torch.equal(model.conv.weight, before)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        Palette(k=4).attach(model)


def test_a_fused_recurrent_layer_is_refused_in_training_and_clustered_at_once() -> None:
    model = build("gru", IMAGES)
    palette = Palette(k=4)
    palette.attach(model)
    assert "recurrent" in palette.convert().refused["gru.weight_hh_l0"]
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert "gru.weight_hh_l0" in palettize(model, k=4).tensors
    assert not torch.equal(model(x), before)


def test_a_tied_embedding_is_clustered_in_training() -> None:
    model = build("char-gpt", TEXT, width=32, depth=1)
    tied = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    tied[1].weight = tied[0].weight
    for example, module in ((torch.randint(0, 32, (2, 16)), model), (torch.randint(0, 32, (2, 16)), tied)):
        n = parameters(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        palette = Palette(k=4, mode="ste")
        palette.attach(module, optimizer)
        module(example).square().mean().backward()
        optimizer.step()
        palette.convert()
        assert parameters(module) == n
    assert tied[1].weight is tied[0].weight
    assert len(tied[0].weight.unique()) == 4


def test_attach_leaves_evaluation_at_the_one_shot_result_and_is_not_done_twice() -> None:
    model, once, x = net().eval(), net().eval(), batches(1)[0][0]
    palettize(once, k=4)
    palette = Palette(k=4)
    palette.attach(model)
    assert torch.equal(model(x), once(x))
    with pytest.raises(ConfigError, match="already"):
        palette.attach(model)
    with pytest.raises(ConfigError, match="parametrized already"):
        Palette(k=4).attach(model)
    palette.convert()
    with pytest.raises(ConfigError, match="not attached"):
        palette.convert()


def test_weights_that_diverge_are_refused_at_the_end() -> None:
    model = net()
    palette = Palette(k=4)
    palette.attach(model)
    with torch.no_grad():
        model.head.parametrizations.weight.original[0, 0] = torch.inf  # pyright: ignore
    with pytest.raises(DataError, match=r"'head.weight'.*finite"):
        palette.convert()


@pytest.mark.parametrize("mode", ["dkm", "ste"])
def test_a_run_goes_on_after_a_restart_as_if_it_had_not_stopped(mode: str) -> None:
    def start() -> tuple[nn.Module, Palette, torch.optim.Optimizer]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        palette = Palette(k=4, mode=mode)
        palette.attach(model, optimizer, total_steps=4)
        return model, palette, optimizer

    whole = start()
    train(*whole, batches())
    first = start()
    train(*first, batches()[:2])
    state = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, value in zip(second, state, strict=True):
        part.load_state_dict(value)
    train(*second, batches()[2:])
    for run in (whole, second):
        run[1].convert()
    assert fingerprint(whole[0]) == fingerprint(second[0])


SNIPPET = """
import json, torch
from tests.methods.test_palette import batches, fingerprint, net, train
from weightfold.methods.palette import Palette, palettize
found = []
for mode in ("dkm", "ste"):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    palette = Palette(k=4, mode=mode)
    palette.attach(model, optimizer, total_steps=4)
    train(model, palette, optimizer, batches())
    palette.convert()
    found.append(fingerprint(model))
model = net()
palettize(model, k=4, vector=3)
print(json.dumps([*found, fingerprint(model)]))
"""


def test_the_hash_seed_does_not_matter() -> None:
    found = []
    for seed in ("0", "1234"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", SNIPPET], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
