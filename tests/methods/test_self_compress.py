"""Self-compression in whole runs: what trains is what is written, the size is met, and nothing is lost on the way."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightfold.artifact import Builder
from weightfold.compressor import Compressor
from weightfold.errors import ConfigError
from weightfold.export import Blueprint, Source, load_packed, save_packed
from weightfold.fingerprint import fingerprint
from weightfold.methods.fold import Fold
from weightfold.methods.self_compress import SelfCompress
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.quant.attached import attached
from weightfold.quant.budget import Caution

STEPS = 60
STRONG = 1e-3
"""A price of bits that cuts channels of both hidden layers within a run."""
Batch = tuple[Tensor, Tensor]


def quadrants(n: int, seed: int = 0, size: int = 32) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, 6, generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in xs]


def perceptron(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def method(**settings: Any) -> SelfCompress:
    """Looks are rare, for speed; the first grid is coarse, so that there is something to cut in a short run."""
    given = {"target": 600, "at": 0.1, "reach": 0.6, "check": 0.1, "refresh": 3, "dwell": 1, "resolution": 1.0}
    given |= {"target": None} if {"max_accuracy_loss", "strength"} & settings.keys() else {}
    return SelfCompress(**{**given, **settings})


def compressor(model: nn.Module, *methods: Any, **settings: Any) -> Compressor:
    given = {"loss": F.cross_entropy, "probe": quadrants(3, 9), "total_steps": STEPS, "max_increase": 1e9}
    return Compressor(model, torch.zeros(2, 6), methods, **{**given, **settings})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    c: Compressor,
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    *,
    data: list[Batch] | None = None,
    scale: float = 1.0,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """A loop with a loss that may be multiplied, as a gradient scaler does."""
    data = data or quadrants(STEPS)
    for k in steps:
        x, y = data[k % len(data)]
        value = c.loss(c.network(x), y) + c.penalty()  # pyright: ignore
        (scale * value).backward()
        for p in c.model.parameters():
            if p.grad is not None and scale != 1:
                p.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        each(k + 1)
        c.step()


def run(*methods: SelfCompress | Fold, model: nn.Module | None = None, **settings: Any) -> tuple[Compressor, Any]:
    """A whole run on quadrants; the converted network."""
    model = perceptron() if model is None else model
    c = compressor(model, *methods, **settings)
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    return c, c.convert()


def written(
    model: nn.Module, method: SelfCompress, before: nn.Module, path: Path, builder: Any = None, head: str | None = None
) -> int:
    """Write a converted network, read it back, and compare to the bit; bytes on disk."""
    assert method.result is not None
    builder = builder or Builder(kind="instance", name=type(model).__name__)
    source = Source(model.eval(), (), Blueprint.of(before), builder, head)
    size = save_packed(source, method.result.coded, path).total_bytes
    twin = load_packed(path, None if builder.kind == "built-in" else copy.deepcopy(before))
    assert path.stat().st_size == size
    assert twin.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name
    return size


# whole networks -------------------------------------------------------------------------------------------------------


class Concatenated(nn.Module):
    """Branches that are put together, one padded, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(1, 12, 1)
        self.c, self.d = nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3, groups=24)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24 * 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1)))
        return self.head(F.max_pool2d(F.relu(self.norm(self.d(x))), 2).flatten(1))


IMAGE = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=8))
TEXT = TaskSpec(input=TextInput(vocab=16, context=10), output=NextToken(vocab=16))
NETWORKS: dict[str, tuple[TaskSpec, dict[str, Any]]] = {
    "resnet20": (IMAGE, {"width": 8, "depth": 8}),
    "resnet9": (IMAGE, {"width": 4}),
    "vit-tiny": (IMAGE, {"width": 24, "depth": 1, "num_heads": 2}),
    "char-gpt": (TEXT, {"width": 24, "depth": 1, "num_heads": 2}),
    "gru": (IMAGE, {"width": 24}),
    "concatenated": (IMAGE, {}),
}


TARGETS = {"resnet20": 1300, "resnet9": 1200, "vit-tiny": 900, "char-gpt": 1000, "gru": 280, "concatenated": 700}


def inputs_of(name: str, n: int) -> list[Batch]:
    g = torch.Generator().manual_seed(0)
    if NETWORKS[name][0] is TEXT:
        xs = [torch.randint(0, 16, (8, 10), generator=g) for _ in range(n)]
        return [(x, (x + 1) % 16) for x in xs]
    ys = [torch.randint(0, 8, (16,), generator=g) for _ in range(n)]
    return [(torch.randn(16, 1, 8, 8, generator=g) * 0.3 + F.one_hot(y, 8)[:, None, None], y) for y in ys]


def by_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@pytest.mark.filterwarnings("ignore:Every weight")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_shrinks_to_a_file_that_holds_exactly_it(name: str, tmp_path: Path) -> None:
    """The target is met, the promise is what lies on disk, and the file gives the network back to the bit."""
    task, settings = NETWORKS[name]
    torch.manual_seed(0)
    model = Concatenated() if name == "concatenated" else build(name, task, **settings)
    before = copy.deepcopy(model)
    plain = [type(m) for m in model.modules()]
    target = TARGETS[name]
    chosen = method(target=target, resolution=1.5, check=0.2, refresh=4)
    c = Compressor(
        model, task.example(), [chosen], loss=by_token, probe=inputs_of(name, 2), total_steps=40, max_increase=1e9
    )
    c.prepare(optimizer := torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(c, optimizer, range(40), data=inputs_of(name, 40))
    converted = c.convert().eval()
    assert [type(m) for m in converted.modules()] == plain
    builder = None
    if name != "concatenated":
        spec = {"task": task.model_dump(mode="json"), "overrides": settings}
        builder = Builder(kind="built-in", name=name, **spec)
    size = written(converted, chosen, before, tmp_path / "net.wfp", builder)
    assert size <= 1.01 * target + 16
    assert size == written(converted, chosen, before, tmp_path / "again.wfp", builder)
    own = written(converted, chosen, before, tmp_path / "own.wfp")
    assert abs(chosen._size - own) <= max(0.01 * own, 32)
    assert all(event.accepted for event in c.events)
    assert bool(c.events) == (name != "gru"), "recurrent layers keep their units"
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.a(x)[:, None].expand(-1, 3, -1)).mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.c, self.head = nn.ConvTranspose1d(16, 12, 2, stride=2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x[:, None])))))).mean(2))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.a(self.table((2 * x + 5).long().clamp(0, 9)).mean(1))))


@pytest.mark.filterwarnings("ignore:Every weight")
@pytest.mark.parametrize(
    ("kind", "groups"), [(Encoder, {"layer.linear1"}), (Grouped, {"a", "b", "c"}), (Embedded, {"table", "a"})]
)
def test_cuts_of_other_layers(kind: type[nn.Module], groups: set[str], tmp_path: Path) -> None:
    """Attention of torch's own, grouped and transposed convolutions, tables of embeddings."""
    torch.manual_seed(0)
    model = kind()
    before, chosen = copy.deepcopy(model), method(strength=1e-2)
    c, net = run(chosen, model=model)
    assert {e.group for e in c.events} == groups
    assert all(e.accepted and abs(e.measured or 0.0) < 1e-5 for e in c.events)
    written(net, chosen, before, tmp_path / "net.wfp")


# aims -----------------------------------------------------------------------------------------------------------------


def test_a_budget_is_met() -> None:
    chosen = method(target=300, resolution=0.3)
    run(chosen)
    assert chosen._size <= 300
    assert [h["step"] for h in chosen.history] == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    assert chosen.history[-1]["bytes"] < 0.6 * chosen.history[0]["bytes"]


def test_channels_are_cut_in_both_layers_and_the_network_works() -> None:
    chosen = method(strength=STRONG)
    c, net = run(chosen)
    assert {e.group for e in c.events} == {"0", "2"}
    assert net[0].out_features < 24
    assert min(e.step for e in c.events) < STEPS
    assert all(abs(e.measured or 0.0) < 1e-5 for e in c.events), "nothing changes when a channel goes"
    x, y = quadrants(1, 5, 2000)[0]
    assert float((net(x).argmax(1) == y).float().mean()) > 0.8


def test_only_widths_that_the_target_likes() -> None:
    free, _ = run(method(strength=STRONG))
    assert free.graph["0"].n_channels not in (22, 16, 12)
    chosen = method(strength=STRONG, liked={"0": [22, 16, 12]})
    c, net = run(chosen)
    assert net[0].out_features in (22, 16, 12)
    assert net[0].out_features >= free.graph["0"].n_channels
    assert all(abs(e.measured or 0.0) < 1e-5 for e in c.events)
    with pytest.raises(ConfigError, match="name no group '9'"):
        run(method(liked={"9": [4]}))


def test_what_trains_is_what_is_written() -> None:
    """The last output in training, biases aside, is that of the converted network."""
    model = perceptron()
    chosen = method(strength=1e-4, bias_bits=16)
    c = compressor(model, chosen)
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    x = quadrants(1, 5)[0][0]
    expected = model(x)
    net = c.convert()
    torch.testing.assert_close(net(x), expected, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore:Every weight")
def test_accuracy_decides_how_far_it_goes() -> None:
    """From a high price on: with hardly any room it is let go, with much of it the file shrinks further."""
    sizes, prices = [], []
    for room in (0.01, 60.0):
        model, chosen = perceptron(), method(max_accuracy_loss=room)
        c = compressor(model, chosen)
        c.prepare(optimizer := adam(model))
        assert isinstance(chosen._aim, Caution)
        chosen._aim.log_price = math.log(STRONG)
        train(c, optimizer)
        c.convert()
        sizes.append(chosen._size)
        prices.append(chosen.price)
    assert prices[0] < prices[1]
    assert sizes[0] > sizes[1]


def test_the_front_holds_networks_none_of_which_beats_another(tmp_path: Path) -> None:
    chosen = method(target=250, pareto=3, check=0.05, activation_strength=1e-6)
    before = perceptron()
    run(Fold(keep=0.9, at=0.95, stats_batches=40), chosen)
    assert 1 <= len(chosen.front) <= 3
    assert all(a.n_bytes < b.n_bytes and a.loss > b.loss for a, b in zip(chosen.front, chosen.front[1:], strict=False))
    for k, point in enumerate(chosen.front):
        assert not list(attached(point.network))
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in point.network.modules())
        source = Source(point.network, (), Blueprint.of(before), Builder(kind="instance", name="Sequential"))
        size = save_packed(source, point.tensors.coded, tmp_path / f"{k}.wfp").total_bytes
        assert abs(size - point.n_bytes) <= max(0.01 * size, 48)
        twin = load_packed(tmp_path / f"{k}.wfp", copy.deepcopy(before))
        batches = quadrants(3, 9)
        losses = [float(F.cross_entropy(twin(x), y).detach()) for x, y in batches]
        assert sum(losses) / 3 == pytest.approx(point.loss, abs=0.1)


@pytest.mark.parametrize("settings", [{"pareto": 2}, {"guard": 0.5}, {"max_accuracy_loss": 1.0}])
def test_what_is_measured_on_a_probe_needs_one(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} needs a probe"):
        compressor(perceptron(), method(**settings), probe=()).prepare()


def test_a_state_from_before_networks_were_kept_is_taken_up() -> None:
    c = compressor(perceptron(), method())
    c.prepare(optimizer := adam(c.model))
    train(c, optimizer, range(STEPS // 2))
    state = c.state_dict()
    del state["methods"][0]["front"]
    again = compressor(perceptron(), method())
    again.prepare(adam(again.model))
    again.load_state_dict(state)
    assert again.methods[0].front == []


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for k in range(2):
        chosen = method(target=300)
        _, net = run(chosen)
        written(net, chosen, perceptron(), tmp_path / f"{k}.wfp")
        files.append((tmp_path / f"{k}.wfp").read_bytes())
    assert files[0] == files[1]


# loops that people write ----------------------------------------------------------------------------------------------


def test_a_loss_that_is_scaled_teaches_the_same() -> None:
    """The factor of a scaler is told by the penalty's own gradient; a power of two, so that nothing is rounded."""
    nets = []
    for scale in (1.0, 1024.0):
        model = perceptron()
        c = compressor(model, method(target=300))
        c.prepare(optimizer := adam(model))
        train(c, optimizer, scale=scale)
        nets.append(c.convert())
    assert fingerprint(nets[0]) == fingerprint(nets[1])


def test_a_gradient_scaler_and_bf16(tmp_path: Path) -> None:
    model = perceptron()
    chosen = method(target=300)
    c = compressor(model, chosen)
    c.prepare(optimizer := adam(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x, y in quadrants(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            value = F.cross_entropy(c.network(x), y) + c.penalty()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        c.step()
    assert written(c.convert(), chosen, perceptron(), tmp_path / "net.wfp") <= 330
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradients_of_micro_batches_add_up() -> None:
    """Four quarters of a batch, each with its share of loss and penalty, teach what the whole batch does."""
    nets = []
    for k in (1, 4):
        model = perceptron()
        c = compressor(model, method(target=300), total_steps=12)
        c.prepare(optimizer := torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for x, y in quadrants(12):
            for part, wanted in zip(x.chunk(k), y.chunk(k), strict=True):
                ((F.cross_entropy(c.network(part), wanted) + c.penalty()) / k).backward()
            optimizer.step()
            optimizer.zero_grad()
            c.step()
        nets.append([p.detach() for p in model.parameters()])
    for a, b in zip(*nets, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_state_averages_and_schedules_follow(kind: str) -> None:
    """The average becomes the network before it is converted: its values are what is rounded then."""
    model: Any = perceptron()
    rate = {"SGD": 0.05, "AdamW": 1e-2}[kind]
    settings = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=rate, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    chosen = method(strength=STRONG)
    c = compressor(model, chosen)
    c.prepare(optimizer, [average])

    def each(_: int) -> None:
        schedule.step()
        average.update_parameters(model)

    train(c, optimizer, each=each)
    assert c.events
    assert all(event.accepted for event in c.events)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert not list(attached(average))
    for p in model.parameters():
        held = optimizer.state[p]["momentum_buffer" if kind == "SGD" else "exp_avg"]
        assert held.shape == p.shape
    model.load_state_dict(average.module.state_dict())
    net = c.convert()
    assert chosen.result is not None
    for name, tensor in chosen.result.coded.items():
        assert torch.equal(net.state_dict()[name], torch.from_numpy(tensor.values()))
    step = 2.0 ** (chosen.result.coded["2.weight"].steps / 8.0)
    held = chosen.result.coded["2.weight"]
    off = (average.module[2].weight.detach().numpy() - held.values())[held.codes != 0]
    assert abs(off).max() < 2 * step.max(), "the average itself was rounded"


def test_a_cut_is_undone() -> None:
    model: Any = perceptron()
    c = compressor(model, method(strength=STRONG))
    c.prepare(optimizer := adam(model))
    data = quadrants(STEPS)
    step = 0
    while not c.events:
        train(c, optimizer, range(step, step + 1), data=data)
        step += 1
    x = quadrants(1, 7)[0][0]
    narrow, width = model(x), model[0].out_features + model[2].out_features
    while c._hands.applied and c._hands.applied[-1].undo is not None:
        c.undo()
    assert model[0].out_features + model[2].out_features > width
    torch.testing.assert_close(model(x), narrow, rtol=0, atol=1e-5)
    train(c, optimizer, range(step, STEPS), data=data)
    c.convert()


COMPILED = """
import torch
from tests.methods.test_self_compress import STRONG, adam, compressor, method, perceptron, quadrants, train
torch.set_num_threads(1)
nets, events = [], []
for wrap in (lambda m: torch.compile(m, backend="aot_eager"), lambda m: m):
    c = compressor(wrap(perceptron()), method(strength=STRONG, check=0.4))
    c.prepare(optimizer := adam(c.model))
    train(c, optimizer)
    nets.append(c)
    events.append([(e.step, e.group, e.channels_after) for e in c.events])
assert events[0] == events[1] and events[0], events
x = quadrants(1, 3)[0][0]
with torch.no_grad():
    before = nets[0].network(x)
    torch.testing.assert_close(before, nets[1].network(x), rtol=1e-3, atol=1e-3)
    for c in nets:
        c.convert()
    torch.testing.assert_close(nets[0].network(x), nets[0].model(x))
    assert not torch.equal(nets[0].network(x), before), "biases are rounded when it is converted"
"""


def test_it_runs_compiled() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
