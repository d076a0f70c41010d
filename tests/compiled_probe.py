"""Train and fold networks that are compiled: ``python compiled_probe.py BACKEND [WAY...]``, JSON out."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from weightfold.compressor import Compressor
from weightfold.methods.fold import Fold

STEPS = 40


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(x))


class Net(nn.Module):
    """A small convolutional network with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.tail, self.head = Tail(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(F.relu(self.norm(self.one(x)))).mean((2, 3)))


def data(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Where in the picture the bright spot is."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        y = torch.randint(0, 4, (32,), generator=g)
        x = torch.randn(32, 1, 6, 6, generator=g) * 0.3
        x[torch.arange(32), 0, y, y] += 3 * (1 + y)
        out.append((x, y))
    return out


def run(how: str, backend: str) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    model = Net()
    network: Any = model
    if how == "wrapped":
        network = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a part":
        model.tail.compile(backend=backend)
    elif how == "the step":
        network = torch.compile(lambda x: model(x), backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    methods = [Fold(keep=0.75, at=0.1, stats_batches=4), Fold(keep=0.75, at=0.6, stats_batches=4)]
    probe = data(4, 9)
    c = Compressor(
        model if how == "the step" else network, probe[0][0][:2], methods, loss=F.cross_entropy, probe=probe,
        total_steps=STEPS, max_increase=1e9,
    )  # fmt: skip
    c.prepare(optimizer)
    losses, seen = [], []
    for x, y in data(STEPS, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "in place"):
            value = F.cross_entropy((network if how == "the step" else c.network)(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if c.step():
            with c._watcher.autocast():
                seen.append(torch.is_autocast_enabled("cpu"))
        losses.append(float(value.detach()))
    compiles = counters["stats"].get("unique_graphs", 0)
    converted = c.convert()
    return {
        "widths": [model.one.out_channels, model.tail.two.out_channels],
        "accepted": [e.accepted for e in c.events],
        "reasons": [e.reason for e in c.events],
        "losses": losses,
        "compiles": compiles,
        "same": c.network is network or how == "the step",
        "plain": converted is model,
        "autocast": seen,
        "batch": c._watcher.batch_size,
        "breaks": sum(counters["graph_break"].values()),
    }


if __name__ == "__main__":
    warnings.filterwarnings("error", module="weightfold")
    torch.set_num_threads(1)
    ways = sys.argv[2:] or ["eager", "wrapped", "in place", "a part", "the step"]
    print(json.dumps({way: run(way, sys.argv[1]) for way in ways}))
