"""Quantisers beside parameters: what runs is quantised, everything else about the network is as it was."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from weightfold.quant.attached import attach, attached, detach
from weightfold.quant.fake import fake_quantise

Values = Mapping[str, tuple[Tensor, Tensor]]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, batch_first=True)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x.abs().mean(-1).long().clamp(0, 8)))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.scale


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 2), nn.Conv2d(2, 2, 1, groups=2)
    ),
    "attention": Attention,
    "transformer": Transformer,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "tied": Tied,
    "bare": Bare,
}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]()


def quantisers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.full((len(p),), -1.5, requires_grad=True), torch.full((len(p),), 3.0, requires_grad=True))
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


def reference(model: nn.Module, values: Values) -> nn.Module:
    """A plain copy whose parameters are rounded."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in values:
                p.copy_(fake_quantise(p, *values[name]))
    return twin


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_it_runs_on_quantised_weights_wherever_they_are_read(kind: str, training: bool) -> None:
    """Evaluation as well: attention has a fast path of its own there."""
    model = made(kind).train(training)
    values = quantisers(model)
    plain, expected = model(X), reference(model, values)(X)
    attach(model, values)
    with torch.set_grad_enabled(training):
        found = model(X)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)


@every_kind
def test_gradients_reach_weights_steps_and_widths(kind: str) -> None:
    model = made(kind)
    values = quantisers(model)
    twin = reference(model, values)
    attach(model, values)
    model(X).square().sum().backward()
    twin(X).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    assert all(e.grad is not None and b.grad is not None for e, b in values.values())


@every_kind
def test_names_state_and_objects_are_as_they_were(kind: str) -> None:
    model = made(kind)
    before = {name: id(p) for name, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    keys, attributes = list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    attach(model, quantisers(model))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == list(before.values())
    assert all(isinstance(m, k) for m, k in zip(model.modules(), kinds, strict=True))
    other = made(kind)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    model.load_state_dict(other.state_dict())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
    detach(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not list(attached(model))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    torch.testing.assert_close(model(X), other(X))
    torch.save(model.state_dict(), io.BytesIO())
    copy.deepcopy(model)


@every_kind
def test_a_copy_has_quantisers_of_its_own(kind: str) -> None:
    model = made(kind)
    values = quantisers(model)
    attach(model, values)
    model(X).sum().backward()
    twin, average = copy.deepcopy(model), AveragedModel(model)
    expected = model(X)
    torch.testing.assert_close(twin(X), expected)
    torch.testing.assert_close(average(X), expected)
    with torch.no_grad():
        for exponent_R, _ in values.values():
            exponent_R.add_(1)
    torch.testing.assert_close(twin(X), expected)
    assert not torch.allclose(model(X), expected)
    detach(twin)
    model(X).sum().backward()
    assert next(iter(values.values()))[0].grad is not None


def test_one_more_may_be_attached_and_all_are_taken_off_at_once() -> None:
    model = made("transformer")
    values = quantisers(model)
    for name, pair in values.items():
        attach(model, {name: pair})
    assert {leaf for _, leaf in attached(model)} == {"in_proj_weight", "weight"}
    assert len(list(attached(model))) == len(values)
    detach(model)
    assert not list(attached(model))


def test_bf16_autocast_runs_through() -> None:
    model = made("linear")
    values = quantisers(model)
    attach(model, values)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
