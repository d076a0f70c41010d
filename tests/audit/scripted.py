"""A method that proposes what a test tells it to, and a network whose biases carry the numbers of its channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from weightfold.compressor import Compressor
from weightfold.config import Config
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGroup
from weightfold.ledger import Ledger
from weightfold.methods.base import Method, Moment, Proposal

Make = Callable[[ChannelGroup], Edit]


class Nothing(Config):
    """No settings."""


class Scripted(Method):
    """Proposes given edits of the group '0' at given steps."""

    name: ClassVar[str] = "scripted"
    Config: ClassVar[type[Config]] = Nothing

    def __init__(self, script: Mapping[int, Make | tuple[Make, dict]], watch: int = 0) -> None:
        super().__init__()
        self.script = script
        self._watch = watch

    def watch(self, total_steps: int) -> int:
        return self._watch

    def step(self, moment: Moment) -> list[Proposal]:
        found = self.script.get(moment.step)
        if found is None:
            return []
        make, why = found if isinstance(found, tuple) else (found, {})
        return [Proposal(make(moment.graph["0"]), why, 0.5)]


def network(channels: int = 8, seed: int = 0) -> nn.Sequential:
    """Two layers; channel i of the first has the bias i."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, channels), nn.ReLU(), nn.Linear(channels, 2))
    with torch.no_grad():
        net[0].bias.copy_(torch.arange(channels))
    return net


EXAMPLE = torch.zeros(2, 4)


def record(
    folder: Path, script: Mapping[int, Make | tuple[Make, dict]], steps: int, channels: int = 8
) -> nn.Sequential:
    """Run a script on an untrained network; the folder then holds its ledger."""
    net = network(channels)
    with Ledger.create(folder / "ledger.db", run={"config": {"epochs": 2}, "total_steps": steps}) as ledger:
        compressor = Compressor(net, EXAMPLE, [Scripted(script)], ledger=ledger, total_steps=steps)
        compressor.prepare()
        for _ in range(steps):
            compressor.step()
        compressor.convert()
    return net
