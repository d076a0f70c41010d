"""A zoo in an empty folder, and small networks to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weightfold.zoo.delta.codec import encode
from weightfold.zoo.store import Zoo

EXAMPLE = torch.zeros(1, 6)


def net(seed: int = 0) -> nn.Sequential:
    """A network of its own numbers."""
    made = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return made


def near(state: dict[str, Tensor], seed: int, size: float = 1e-3) -> dict[str, Tensor]:
    """A child: the same tensors, a little different."""
    generator = torch.Generator().manual_seed(seed)
    return {name: v + size * torch.randn(v.shape, generator=generator) for name, v in state.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether tensors by name are the same to the bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return value.contiguous().reshape(-1).view(torch.uint8) if value.numel() else value.reshape(-1).byte()


def pair(zoo: Zoo) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A parent, and a child that is kept as a difference to it."""
    parent = net().state_dict()
    child = near(parent, 1)
    zoo.add(parent, name="parent")
    zoo.add(child, name="child")
    switched(zoo, "child", "parent")
    return parent, child


def switched(zoo: Zoo, child: str, parent: str) -> None:
    """Keep a model as the difference to another one."""
    blob = encode(zoo.state(child), zoo.state(parent))
    own = zoo.card(child).digest
    zoo.switch(own, blob=blob, parent=zoo.card(parent).digest, lossy=False, decoded=own)


@pytest.fixture
def zoo(tmp_path: Path) -> Iterator[Zoo]:
    """An empty zoo."""
    with Zoo.open(tmp_path / "zoo") as opened:
        yield opened
