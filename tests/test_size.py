"""Parameters, bytes and multiply-accumulates. Expected numbers: closed forms, and the file that safetensors writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

import weightfold as wf
from weightfold import models, size
from weightfold.errors import TraceError
from weightfold.graph.apply import apply
from weightfold.graph.edit import remove
from weightfold.models import Classes, ImageInput, NextToken, TableInput, TaskSpec, TextInput
from weightfold.size import MacModel, Sizes, count_macs, file_bytes, macs, macs_per_channel, size_bytes

TASKS = (
    TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10)),
    TaskSpec(input=TextInput(vocab=11, context=8), output=NextToken(vocab=11)),
    TaskSpec(input=TableInput(n_features=7), output=Classes(n=3)),
)


def task_of(name: str) -> TaskSpec:
    return next(task for task in TASKS if name in models.serving(task))


@pytest.mark.parametrize("name", models.NAMES)
def test_bytes_of_built_in_models_are_those_of_the_file(name: str) -> None:
    model = models.build(name, task_of(name))
    assert size_bytes(model) == len(save(size.unique_state(model)))


names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
dtypes = st.sampled_from(list(size._DTYPES))
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.dictionaries(names.filter(lambda n: n != "__metadata__"), st.tuples(dtypes, shapes), max_size=6))
def test_bytes_of_any_tensors_are_those_of_the_file(specs: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    assert file_bytes(tensors) == len(save(tensors))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.token(x))


def test_what_is_tied_counts_once() -> None:
    model = Tied()
    assert size.parameters(model) == 40
    assert list(size.unique_state(model)) == ["token.weight"]
    assert size_bytes(model) == len(save({"token.weight": model.token.weight.detach()}))
    assert macs(model, torch.zeros(2, 3, dtype=torch.long)) == 2 * 3 * 40


def test_convolutions_with_stride_dilation_groups_and_transposed() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),  # 8x8 to 4x4
        nn.Conv2d(8, 8, (3, 1), dilation=(2, 1), padding=(2, 0), groups=8),  # stays 4x4
    )
    x = torch.zeros(3, 4, 8, 8)
    assert macs(net, x) == 3 * (16 * 8 * 2 * 9 + 16 * 8 * 3)
    up = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert macs(up, torch.zeros(1, 4, 5, 5)) == 25 * 4 * 6 * 4


class Attention(nn.Module):
    """Scaled dot-product attention on five different sizes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_has_two_products() -> None:
    q, k, v = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8)
    count = count_macs(Attention(), (q, k, v))
    assert count.total == count.loose == 2 * 3 * 7 * 5 * (8 + 8)


def test_multihead_attention_in_evaluation_mode_hides_nothing() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    n, t, d = 2, 5, 8
    projections, attention, mlp = n * t * 4 * d * d, 2 * n * t * t * d, 2 * n * t * d * 16
    assert macs(layer, torch.zeros(n, t, d)) == projections + attention + mlp


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind: type[nn.RNNBase], gates: int) -> None:
    net = kind(5, 7, num_layers=2, bidirectional=True, batch_first=True)
    steps, batch = 6, 3
    first, second = 2 * gates * 7 * (5 + 7), 2 * gates * 7 * (14 + 7)
    assert macs(net, torch.zeros(batch, steps, 5)) == steps * batch * (first + second)


class Undecided(nn.Module):
    """Looks at numbers to decide what to do: it cannot run without storage."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x)[0]
        return self.layer(h) if float(h.sum()) < 100 else h


def test_a_network_that_looks_at_numbers_is_run_on_a_copy() -> None:
    net = Undecided()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert macs(net, torch.ones(2, 5, 4)) == 2 * 5 * (4 * 3 * (4 + 3) + 9)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_counting_leaves_mode_random_state_and_statistics_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    macs(net, torch.zeros(3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    assert int(net[1].num_batches_tracked) == 0


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(TraceError, match="MACs of 'Linear' cannot be counted"):
        macs(nn.Linear(3, 2), torch.zeros(1, 4))


def test_resnet20_is_as_large_as_published() -> None:
    model = models.build("resnet20", TASKS[0])
    sizes = Sizes.of(model, TASKS[0].example(1))
    assert sizes.parameters == 269_722
    assert sizes.macs == 40_551_040
    assert sizes == Sizes.of(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "vgg-small", "resnet20", "resnet9"])
def test_macs_of_one_channel_are_what_its_removal_saves(name: str) -> None:
    task = task_of(name)
    model = models.build(name, task)
    example = task.example(1)
    graph = wf.trace(model, example)
    worth = macs_per_channel(model, graph, example)
    total = macs(model, example)
    inner = [g for g in graph if "remove" in g.admits and len(g.role("read")) == 1]
    for group in inner:
        twin = models.build(name, task)
        apply(twin, graph, remove(group, torch.arange(1, group.n_channels)))
        assert macs(twin, example) == total - worth[group.name], group.name


def test_macs_at_several_widths_at_once() -> None:
    task = task_of("vgg-small")
    model = models.build("vgg-small", task)
    example = task.example(1)
    graph = wf.trace(model, example)
    account = MacModel.of(model, graph, example)
    widths = {group.name: group.n_channels // (k + 2) for k, group in enumerate(graph)}
    for name, width in widths.items():
        graph, _ = apply(model, graph, remove(graph[name], torch.arange(width)))
    assert macs(model, example) == pytest.approx(account.at(widths), abs=0.5)
