"""Every kind of batch, and layers called by keyword, under every method: the same network comes out.

Reference: the run whose batches are tuples and whose layers are called by position.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.contracts.test_methods import METHODS
from weightfold.compressor import Compressor
from weightfold.fingerprint import fingerprint
from weightfold.methods.base import Method
from weightfold.methods.lump import Lump
from weightfold.stats.running import call

STEPS = 6


class Two(nn.Module):
    """Two inputs; its layers are called by position or by keyword."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.out = nn.Linear(4, 10), nn.Linear(4, 10), nn.Linear(10, 8), nn.Linear(8, 3)
        self.by_keyword = by_keyword

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h = F.relu(self.a(x) + self.b(z))
        if self.by_keyword:
            return self.out(input=F.relu(self.c(input=h)))
        return self.out(F.relu(self.c(h)))


def batch(seed: int, n: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g), torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


KINDS = {
    "tuple": lambda x, z, y: (x, z),
    "list": lambda x, z, y: [x, z],
    "dict": lambda x, z, y: {"x": x, "z": z},
    "both": lambda x, z, y: ((x,), {"z": z}),
    "keyword": lambda x, z, y: (x, z),
}
LOADED = {
    **KINDS,
    "flat, with targets": lambda x, z, y: [x, z, y],
    "with targets": lambda x, z, y: ((x, z), y),
    "dict with targets": lambda x, z, y: {"x": x, "z": z, "y": y},
    "dict, and targets": lambda x, z, y: ({"x": x, "z": z}, y),
}
TRAINED: dict[str, dict[str, Any]] = {
    "attract": {"at": 0.5, "keep": 0.5},
    "fold": {"at": 0.5, "keep": 0.5, "stats_batches": 3},
    "lump": {"at": 0.5, "target": 0.6},
    "prune": {"at": 0.5, "keep": 0.5, "criterion": "wanda", "stats_batches": 3},
    "self_compress": {"at": 0.2, "activation_strength": 1e-3, "check": 0.2, "refresh": 1},
}


@cache
def trained(name: str, kind: str) -> str:
    """The fingerprint after a short run."""
    model, wrap = Two(kind == "keyword"), KINDS[kind]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    probe = [(wrap(*b), b[2]) for b in map(batch, (7, 8))]
    compressor = Compressor(
        model,
        wrap(*batch(9, 2)),
        [METHODS[name](**TRAINED[name])],
        loss=F.cross_entropy,
        probe=probe,
        total_steps=STEPS,
        max_increase=9.0,
    )
    compressor.prepare(optimizer)
    for number in range(STEPS):
        x, z, y = batch(number)
        (F.cross_entropy(call(compressor.network, wrap(x, z, y)), y) + compressor.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    assert all(event.accepted for event in compressor.events), compressor.events
    assert compressor.events or name == "self_compress"
    return fingerprint(compressor.convert())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["dict", "both", "keyword"])
def test_a_run(name: str, kind: str) -> None:
    assert trained(name, kind) == trained(name, "tuple")


@cache
def at_once(name: str, kind: str) -> str:
    """The fingerprint after a one-shot, the example being of the plain kind."""
    model, wrap = Two(kind == "keyword"), LOADED[kind]
    batches = [wrap(*b) for b in map(batch, (7, 8))]
    settings = {k: v for k, v in TRAINED[name].items() if k != "at"}
    method: Method = Lump(inputs=batches, **settings) if name == "lump" else METHODS[name](**settings)
    example = {"x": batch(9, 2)[0], "z": batch(9, 2)[1]} if kind.startswith("dict") else batch(9, 2)[:2]
    compressor = Compressor(model, example, [method])
    compressor.prepare()
    events = compressor.once(batches)
    assert events
    assert all(event.accepted for event in events), events
    return fingerprint(compressor.convert())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"attract", "self_compress"}))
@pytest.mark.parametrize("kind", sorted(set(LOADED) - {"tuple"}))
def test_at_once(name: str, kind: str) -> None:
    """All methods that take something from batches and work at once."""
    assert at_once(name, kind) == at_once(name, "tuple")
