"""The end of a run whose file is still too large: the target is met to the byte, and the network is hardly worse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weightfold as wf

Data = tuple[Tensor, Tensor]


def waves() -> tuple[nn.Module, Data, Data]:
    """A regression of six numbers."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 6, generator=g)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] + 0.3 * x[:, 3:4].abs()
    y = (y - y.mean()) / y.std()
    net = nn.Sequential(nn.Linear(6, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 1))
    return net, (x[:2400], y[:2400]), (x[2400:], y[2400:])


def digits() -> tuple[nn.Module, Data, Data]:
    """A small convolutional network, norms in it, on digits."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.images).float()[order, None] / 8 - 1, torch.tensor(bunch.target)[order]
    net = nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10)),
    )
    return net, (x[:1300], y[:1300]), (x[1300:], y[1300:])


@torch.no_grad()
def score(net: nn.Module, data: Data) -> float:
    """R² of a regression, accuracy of classes."""
    x, y = data
    answer = net.eval()(x)
    if y.is_floating_point():
        return float(1 - (answer - y).square().mean() / y.var())
    return float((answer.argmax(1) == y).float().mean())


def loss(answer: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(answer, targets) if targets.is_floating_point() else F.cross_entropy(answer, targets)


@pytest.mark.filterwarnings("ignore:Every weight")
@pytest.mark.parametrize(
    ("task", "target", "ledger"), [(waves, 3000, False), (digits, 1500, True), (digits, 1500, False)]
)
def test_the_file_is_at_most_one_per_cent_below_its_target(
    task: Callable[[], Any], target: int, ledger: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net, (x, y), held = task()
    before = copy.deepcopy(net)
    book = wf.Ledger.create(tmp_path / "ledger.db", {}) if ledger else None
    method = wf.SelfCompress(target=target)
    probe = [(x[:256], y[:256]), (x[256:512], y[256:512])]
    c = wf.Compressor(net, x[:8], [method], loss=loss, probe=probe, ledger=book, total_steps=200)
    c.prepare(optimizer := torch.optim.AdamW(net.parameters(), lr=5e-3))
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        rows = torch.randint(len(x), (64,), generator=generator)
        (loss(c.network(x[rows]), y[rows]) + c.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        c.step()
    reached, promised = score(c.network, held), method.promised_bytes
    assert promised > 1.02 * target, "there is something to trim"
    small = c.convert()
    head = book.head if book is not None else None
    file = tmp_path / "net.wfp"
    wf.save_compressed(small, method.result, file, original=before, ledger_head=head)
    assert 0.99 * target <= file.stat().st_size <= target
    assert abs(method.promised_bytes - file.stat().st_size) <= 4
    assert score(small, held) > reached - 0.02
