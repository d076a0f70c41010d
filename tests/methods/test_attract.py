"""Attraction: the pull is the gradient that is promised, clusters become one, and merging them is then nearly free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError
from weightfold.ledger import Ledger
from weightfold.methods.attract import Attract

STEPS = 60


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def data(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 2, 6, 6, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(n)]


def run(
    max_increase: float = 10.0, ledger: Ledger | None = None, **settings: Any
) -> tuple[nn.Module, Compressor, list[float]]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"keep": 0.5, "start": 0.1, "at": 0.8, "strength": 6.0} | settings
    compressor = Compressor(
        model, torch.zeros(2, 2, 6, 6), [Attract(**settings)], loss=F.cross_entropy, probe=data(4, 9),
        total_steps=STEPS, max_increase=max_increase, ledger=ledger,
    )  # fmt: skip
    compressor.prepare(optimizer)
    pulls = []
    for x, y in data(STEPS):
        pull = compressor.penalty()
        (F.cross_entropy(model(x), y) + pull).backward()
        optimizer.step()
        optimizer.zero_grad()
        pulls.append(float(pull.detach()))
        compressor.step()
    compressor.convert()
    return model, compressor, pulls


def test_the_pull_has_the_gradient_of_centripetal_sgd() -> None:
    model = net()
    method = Attract(keep=0.5, start=0.1, at=0.9, strength=2.0, groups="0")
    compressor = Compressor(model, torch.zeros(2, 2, 6, 6), [method], total_steps=10)
    compressor.prepare()
    compressor.step()
    [labels] = [torch.tensor(v) for v in method._labels.values()]
    compressor.penalty().backward()
    w = model[0].weight.detach()
    pull = 2.0 / 8
    for k in labels.unique():
        mine = labels == k
        expected = pull * (w[mine] - w[mine].mean(0))
        assert torch.allclose(model[0].weight.grad[mine], expected, atol=1e-6)


def spread(ledger: Ledger) -> float:
    return sum(entry.body["why"]["value"] for entry in ledger.entries() if entry.kind == "edit")


def test_clusters_become_one_and_are_merged(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "pulled.db", run={}) as pulled, Ledger.create(tmp_path / "free.db", run={}) as free:
        model, compressor, pulls = run(ledger=pulled)
        run(ledger=free, strength=0.0)
        assert spread(pulled) < 0.05 * spread(free)
    accepted = [event for event in compressor.events if event.accepted]
    assert (model[0].out_channels, model[3].out_channels, model[7].in_features) == (4, 3, 3)
    assert pulls[0] == 0.0
    assert max(pulls) > 0
    assert pulls[-1] == 0.0, "no pull after the merge"
    assert accepted[0].kind == "merge"


def test_what_is_too_dear_is_taken_back() -> None:
    model, compressor, _ = run(max_increase=-1.0)
    assert model[0].out_channels == 8
    assert not [event for event in compressor.events if event.accepted]


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="'start' not before 'at'"):
        Attract(start=0.5, at=0.5)
    model = net()
    with pytest.raises(ConfigError, match="name no group 'nope'") as caught:
        Compressor(model, torch.zeros(2, 2, 6, 6), [Attract(widths={"nope": 3})], total_steps=5).prepare()
    assert caught.value.remedy
