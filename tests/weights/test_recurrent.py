"""Recurrent networks: exact disguises are taken off, whatever the cell; a start that stood right is not lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightfold.weights.align import align
from weightfold.weights.canon import same_hash, semantic_hash
from weightfold.weights.difference import difference
from weightfold.weights.disguise import disguise

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "tanh": (nn.RNN, {}),
    "relu, two layers": (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
    "tanh, bidirectional": (nn.RNN, {"bidirectional": True}),
    "gru, three layers": (nn.GRU, {"num_layers": 3}),
    "gru, bidirectional, two layers": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "gru without biases": (nn.GRU, {"bias": False}),
    "lstm, bidirectional, two layers": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "lstm, projected": (nn.LSTM, {"proj_size": 5}),
    "lstm, projected, two layers": (nn.LSTM, {"proj_size": 5, "num_layers": 2}),
}


class Net(nn.Module):
    """A recurrent layer and a classifier of all steps."""

    def __init__(self, kind: type[nn.RNNBase], settings: dict[str, Any]) -> None:
        super().__init__()
        self.rnn = kind(4, 10, batch_first=True, **settings)
        width = (settings.get("proj_size") or 10) * (2 if settings.get("bidirectional") else 1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


def made(kind: str, seed: int = 0) -> nn.Module:
    net = Net(*KINDS[kind])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_disguises_are_taken_off(kind: str) -> None:
    net, x = made(kind), inputs()
    for seed in range(2):
        twin = disguise(net, x, torch.Generator().manual_seed(seed), spread=0.0)
        assert torch.allclose(twin(x), net(x), atol=1e-5)
        assert same_hash(semantic_hash(net, x), semantic_hash(twin, x))
        found = difference(net, twin, x)
        assert found.plain > 0.3
        assert found.moved < 1e-5
        turned = align(net, twin, x).model
        for name, value in turned.state_dict().items():
            assert torch.allclose(value, net.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["tanh", "gru, three layers", "lstm, projected, two layers"])
def test_noise_does_not_hide_the_order(kind: str) -> None:
    net, x = made(kind), inputs()
    generator = torch.Generator().manual_seed(1)
    twin = disguise(net, x, generator, spread=0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    turned = align(net, twin, x)
    assert turned.cosine_after > 0.99 > turned.cosine_before
    assert torch.allclose(turned.model(x), twin(x), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_aligning_never_ends_further_away_than_it_began(seed: int) -> None:
    net, x = made("tanh", seed), inputs()
    twin = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed + 10)
    with torch.no_grad():  # what the first sweep looks at says nothing
        for name, parameter in twin.named_parameters():
            if "hh_l0" not in name or "bias" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    turned = align(net, twin, x)
    assert turned.cosine_after >= turned.cosine_before - 1e-9
    assert torch.allclose(turned.model(x), twin(x), atol=1e-5)
