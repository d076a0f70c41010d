"""What a network shares, against counts by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.errors import TraceError
from weightfold.fingerprint import fingerprint
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build
from weightfold.sharing.report import KINDS, Report, Sharing, sharing
from weightfold.size import count_macs, parameters


def of(report: Report, kind: str) -> list[Sharing]:
    return [row for row in report.rows if row.kind == kind]


def test_a_convolution_shares_its_kernel_over_its_output() -> None:
    """A locally connected layer holds its kernel and bias once for each of 7 x 5 places."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 35, 3))
    report = sharing(net, torch.zeros(3, 2, 13, 9))
    [row] = of(report, "space")
    assert (row.places, row.uses, row.parameters) == (("0",), 35, 4 * 2 * 9 + 4)
    assert row.saved == (4 * 2 * 9 + 4) * 34
    [norm] = of(report, "norm")
    assert (norm.uses, norm.saved) == (35, 8 * 34)
    assert report.applied == 35 * (76 + 8) + 4 * 35 * 3 + 3
    assert report.parameters == parameters(net)
    assert not report.unknown


@pytest.mark.parametrize(
    ("layer", "x", "uses"),
    [
        (nn.Conv1d(2, 4, 3), (2, 2, 10), 8),
        (nn.Conv3d(1, 2, 2), (2, 1, 3, 4, 5), 2 * 3 * 4),
        (nn.ConvTranspose2d(2, 4, 2, stride=2), (2, 2, 3, 3), 9),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), 9),
    ],
)
def test_every_convolution_is_counted_as_its_multiplications_are(layer: nn.Module, x: Any, uses: int) -> None:
    """Independent count: multiply-accumulates over weights over samples."""
    [row] = sharing(layer, torch.zeros(x)).rows
    assert (row.kind, row.uses) == ("space", uses)
    weight: Any = layer.weight
    assert count_macs(layer, torch.zeros(x)).total == uses * weight.numel() * x[0]


def test_layers_that_read_a_whole_sample_at_once_share_nothing() -> None:
    report = sharing(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.zeros(7, 4))
    assert report.rows == ()
    assert report.applied == report.parameters == 37


def test_recurrence_over_time_steps() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.lstm = nn.GRUCell(3, 4), nn.LSTM(4, 5, num_layers=2)

        def forward(self, x: Tensor) -> Tensor:
            h, out = x.new_zeros(x.shape[0], 4), []
            for t in range(x.shape[1]):
                h = self.cell(x[:, t], h)
                out.append(h)
            return self.lstm(torch.stack(out))[0]

    net = Loop()
    cell, lstm = sharing(net, torch.zeros(2, 6, 3)).rows
    assert [row.kind for row in (cell, lstm)] == ["time", "time"]
    assert (cell.places, cell.uses, cell.saved) == (("cell",), 6, 5 * parameters(net.cell))
    assert (lstm.places, lstm.uses, lstm.saved) == (("lstm",), 6, 5 * parameters(net.lstm))


def test_tied_embeddings_and_layers_over_tokens() -> None:
    task = TaskSpec(input=TextInput(vocab=20, context=8), output=NextToken(vocab=20))
    net = build("char-gpt", task, width=16, depth=1, num_heads=2)
    report = sharing(net, torch.zeros(3, 8, dtype=torch.long))
    [tied] = of(report, "tied")
    assert tied.tensors == ("token.weight",)
    assert tied.places == ("token", "")
    assert tied.saved == 20 * 16
    over = {row.places[0]: row for row in of(report, "positions")}
    qkv = over["blocks.0.attn.qkv"]
    assert (qkv.uses, qkv.saved) == (8, 7 * (16 * 48 + 48))
    assert "position" not in over  # each row of the table belongs to one place
    assert not report.unknown


def test_aliased_parameters_and_a_module_called_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.again = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(F.relu(self.a(x)))
            for _ in range(3):
                x = F.relu(self.again(x))
            return x

    report = sharing(Net(), torch.zeros(2, 4))
    [tied], [reuse] = of(report, "tied"), of(report, "reuse")
    assert (tied.tensors, tied.places, tied.saved) == (("a.weight",), ("a", "b"), 16)
    assert (reuse.places, reuse.uses, reuse.saved) == (("again",), 3, 32)
    assert report.applied == report.parameters + 16 + 32


def test_grouped_key_and_value_heads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sharing(LlamaForCausalLM(config), {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    found = {row.places[0].rpartition(".")[2]: row for row in of(report, "heads")}
    assert found.keys() == {"k_proj", "v_proj"}
    assert all((row.uses, row.saved) == (2, 32 * 16) for row in found.values())
    assert all(row.uses == 5 for row in of(report, "positions"))


def test_a_transformer_of_torch() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = sharing(net, torch.zeros(2, 5, 8))
    assert {row.uses for row in report.rows} == {5}
    assert report.applied == 5 * parameters(net)


def test_products_written_out_are_counted_from_either_side() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b, self.v = (nn.Parameter(torch.randn(s)) for s in ((4, 12), (12,), (3, 12)))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.b, x.flatten(0, 1), self.w).unflatten(0, x.shape[:2])
            return torch.matmul(self.v, y.mT)

    report = sharing(Products(), torch.zeros(2, 5, 4))
    assert {t: row.uses for row in report.rows for t in row.tensors} == {"w": 5, "b": 5, "v": 5}


def test_weights_computed_from_parameters_are_followed() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3))
    assert {row.uses for row in sharing(net, torch.zeros(1, 2, 9)).rows} == {7}


def test_uses_that_are_not_understood_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x, self.w)

    report = sharing(Odd(), torch.zeros(2, 4))
    assert report.unknown.keys() == {"w"}
    assert report.applied == report.parameters == 12


def test_the_network_is_left_alone_and_a_failing_forward_is_refused() -> None:
    net = build("resnet20", TaskSpec(input=ImageInput(channels=3, height=16, width=16), output=Classes(n=4)))
    before, rng = fingerprint(net), torch.get_rng_state()
    report = sharing(net, torch.zeros(2, 3, 16, 16))
    assert fingerprint(net) == before
    assert torch.equal(rng, torch.get_rng_state())
    assert net.training
    assert report.by_kind().keys() == {"space", "norm"} <= KINDS.keys()
    with pytest.raises(TraceError):
        sharing(net, torch.zeros(2, 4, 16, 16))
