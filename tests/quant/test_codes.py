"""From a network to the tensors of its file and back. References: NumPy, and bounds that the definitions give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from weightfold.errors import ConfigError
from weightfold.quant.attached import attach
from weightfold.quant.codes import coded_model, coded_vector, quantisable
from weightfold.size import unique_state


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(9, 8), nn.Conv2d(3, 8, 3)
        self.norm, self.flat = nn.BatchNorm2d(8), nn.LayerNorm([8, 2])
        self.head = nn.Linear(8, 9)
        self.head.weight = self.table.weight
        self.register_buffer("count", torch.tensor(3))


def values_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    named = dict(model.named_parameters())
    return {n: (torch.full((len(named[n]),), -4.0), torch.full((len(named[n]),), 4.0)) for n in quantisable(model)[0]}


def test_matrices_kernels_and_tables_are_found_and_tied_ones_once() -> None:
    assert quantisable(Mixed()) == (["table.weight", "conv.weight"], {})
    assert quantisable(Mixed(), "conv*")[0] == ["conv.weight"]
    with pytest.raises(ConfigError, match="No parameter matches 'konv"):
        quantisable(Mixed(), "konv.weight")


def test_what_cannot_be_compressed_says_why() -> None:
    model = Mixed()
    model.conv.weight.requires_grad_(False)
    found, refused = quantisable(model)
    assert found == ["table.weight"]
    assert "frozen" in refused["conv.weight"]
    model.table.bfloat16()
    assert "bfloat16" in quantisable(model)[1]["table.weight"]


def test_weights_that_are_quantised_already_are_refused() -> None:
    coarse = nn.Linear(32, 32)
    with torch.no_grad():
        coarse.weight.copy_(torch.randn(32, 32).mul(2).round().clamp(-3, 3))
    with pytest.raises(ConfigError, match="'weight' is quantised already: its 1,024 weights have 7 values"):
        quantisable(coarse)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="it holds int8"):
        quantisable(layer)
    with pytest.raises(ConfigError, match="parametrized"):
        quantisable(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))))
    under_way = Mixed()
    attach(under_way, values_of(under_way))
    with pytest.raises(ConfigError, match="by another run"):
        quantisable(under_way)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), st.integers(2, 16))
def test_a_vector_lies_within_half_a_step_of_its_codes(numbers: list[float], bits: int) -> None:
    vector = torch.tensor(numbers)
    coded = coded_vector(vector, bits)
    assert int(np.abs(coded.codes.astype(int)).max()) <= 2 ** (bits - 1) - 1
    step = 2.0 ** (float(coded.steps[0]) / 8)
    largest = float(vector.abs().max())
    if largest > 0:
        assert np.abs(coded.values() - vector.numpy()).max() <= 0.5 * step * (1 + 1e-4)
        assert step <= largest / (2 ** (bits - 1) - 1) * 2 ** (1.5 / 8)


def test_a_network_is_given_exactly_the_values_of_its_file() -> None:
    model = Mixed()
    with torch.no_grad():
        model.norm.running_var.fill_(1e6)
    tensors = coded_model(model, values_of(model), 8)
    assert set(tensors.coded) == {"table.weight", "conv.weight", "conv.bias", "head.bias", "norm.bias"}
    assert tensors.plain["norm.running_var"].dtype == np.float32, "half precision would overflow"
    assert tensors.plain["norm.weight"].dtype == np.float16
    tensors.load_into(model)
    state = unique_state(model)
    for name, tensor in tensors.coded.items():
        assert np.array_equal(state[name].numpy(), tensor.values())
    for name, array in tensors.plain.items():
        assert np.array_equal(state[name].numpy(), array.astype(state[name].numpy().dtype))
    assert model.head.weight is model.table.weight
    again = coded_model(model, values_of(model), 8)
    for name, tensor in tensors.coded.items():
        assert np.array_equal(again.coded[name].values(), tensor.values()), "rounding twice changes nothing"
