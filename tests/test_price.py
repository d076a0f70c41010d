"""Prices on single samples. Expected numbers: the definition with autograd, one sample at a time; measured losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.fingerprint import fingerprint
from weightfold.gate import losses
from weightfold.graph.apply import apply
from weightfold.graph.edit import fold
from weightfold.price import error_percent, predict, trails


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutional() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def batches(*shape: int, n: int = 3, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, *shape, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def test_residuals_are_the_first_order_change_of_each_samples_loss() -> None:
    model, data = mlp(), batches(5)
    group = wf.trace(model, data[0][0])["0"]
    found = trails(model, [group], data, F.cross_entropy)
    keep, drop = np.arange(4), np.arange(4, 12)
    g = torch.Generator().manual_seed(2)
    map_SK = torch.randn(8, 4, generator=g, dtype=torch.float64).numpy() / 4
    left = torch.randn(8, generator=g, dtype=torch.float64).numpy()
    u = found.residual("0", ("2.weight", 1), keep, drop, map_SK, left)
    expected = []
    for inputs, targets in data:
        for x, y in zip(inputs, targets, strict=True):
            a = model[1](model[0](x)).detach().requires_grad_()
            F.cross_entropy(model[4](model[3](model[2](a))), y).backward()
            rest = a.detach()[4:] - torch.from_numpy(map_SK).float() @ a.detach()[:4] - torch.from_numpy(left).float()
            assert a.grad is not None
            expected.append(float(a.grad[4:] @ rest))
    assert found.n_samples == 48
    assert u.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("make", "shape"), [(mlp, (5,)), (convolutional, (2, 6, 6))])
def test_the_predicted_change_is_near_the_measured_one(make: type, shape: tuple[int, ...]) -> None:
    model, data = make(), batches(*shape, n=8, size=32)
    graph = wf.trace(model, data[0][0])
    group = graph["0"]
    [axis] = group.role("read")
    n = group.n_channels
    keep, drop = np.arange(n - 2), np.arange(n - 2, n)
    map_SK = np.full((2, n - 2), 1 / (n - 2))
    found = trails(model, [group], data, F.cross_entropy)
    predicted = predict(found.residual("0", axis.key, keep, drop, map_SK, None))
    before = losses(model, data, F.cross_entropy)
    apply(model, graph, fold(group, torch.from_numpy(keep), {axis.key: torch.from_numpy(map_SK)}))
    measured = float(np.mean(losses(model, data, F.cross_entropy)) - np.mean(before))
    assert measured == pytest.approx(predicted, rel=0.3, abs=2e-3)


def test_pricing_changes_nothing() -> None:
    model, data = convolutional().train(), batches(2, 6, 6)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    graph, state = wf.trace(model, data[0][0]), torch.get_rng_state()
    before = fingerprint(model)
    trails(model, list(graph), data, F.cross_entropy)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_a_reader_whose_samples_cannot_be_told_apart_is_left_out() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.one(x)).transpose(0, 1)
            return self.two(h).mean(0)

    torch.manual_seed(0)
    model = Transposed()
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 5, 4, generator=g), torch.randint(0, 3, (8,), generator=g))]
    group = wf.trace(model, data[0][0])["one"]
    assert trails(model, [group], data, F.cross_entropy).by_reader == {}


def test_errors_are_counted_for_classes_alone() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 1.0]])
    assert error_percent(scores, torch.tensor([0, 1, 1, 1])) == 25.0
    assert error_percent(scores, torch.tensor([0, 1, 1, -100])) == pytest.approx(100 / 3)
    assert error_percent(scores.reshape(1, 4, 2), torch.tensor([[0, 1, 1, 1]])) == 25.0
    assert error_percent(scores, torch.randn(4, 2)) is None
    assert error_percent("words", torch.tensor([0])) is None


def test_answers_are_counted_on_all_samples_where_memory_holds_the_trails_of_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)) for n in (16, 16, 8)]
    monkeypatch.setattr("weightfold.price.MAX_NUMBERS", 1)
    found = trails(net, list(wf.trace(net, torch.zeros(2, 4))), batches, nn.functional.cross_entropy)
    wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in batches)
    assert (found.n_samples, found.n_judged) == (16, 40)
    assert found.error_percent == pytest.approx(100 * wrong / 40)
