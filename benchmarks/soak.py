"""Thousands of random edits on networks in training, taken back and forth; outputs compared after every one.

    python benchmarks/soak.py --edits 10000 --seed 0 [--seconds 600]

Three networks in float64, in turns: one with depthwise and grouped convolutions and both norms, a transformer, stacked
LSTMs. Each is prepared once; then edits that its groups admit are drawn (permute, rescale, sign, split, merge of what
was split, remove), with steps of the optimiser in between, and taken back by undo or unfold. At most eight stand at a
time. Every edit, undo and unfold is compared with an independent reference:

- an exact edit: the network as it was before;
- a removal: a copy in which nothing writes or reads the channels;
- a step after a permutation or a change of signs: the same step of a copy that was not edited;
- an undo: a copy from before the edit, with what was trained since in the tensors that the edit left alone;
- an averaged copy: the network's own tensors.

`wrong` counts comparisons off by more than 1e-8 of the outputs, sizes that modules tell wrongly, and exceptions.
`growth_mib` is what the process holds at the end beyond what it held after the first fifth. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightfold.errors import EditError
from weightfold.graph import edit as edits
from weightfold.graph.edit import Edit
from weightfold.graph.exactness import random_order
from weightfold.graph.group import ChannelGroup
from weightfold.graph.proof import prepared
from weightfold.models.attention import Block
from weightfold.surgeon import Surgeon

MOST = 8
"""Edits that stand at a time."""
CLOSE = 1e-8


class Convolutions(nn.Module):
    """Plain, depthwise and grouped convolutions, batch norm and group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.deep, self.wide = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 1)
        self.grouped, self.groups = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deep(F.relu(self.norm(self.stem(x)))))
        x = F.relu(self.groups(self.grouped(F.relu(self.wide(x)))))
        return self.head(torch.tanh(self.hidden(x.mean((2, 3)))))


class Transformer(nn.Module):
    """Two blocks of attention and hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 12), nn.Linear(12, 5)
        self.blocks = nn.Sequential(*(Block(12, 3, 16, causal=False) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x.flatten(2).mT)).mean(1))


class Recurrent(nn.Module):
    """Stacked LSTM layers between linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(3, 10), nn.LSTM(10, 9, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(torch.tanh(self.embed(x.flatten(2).mT)))
        return self.head(F.relu(self.hidden(states[:, -1])))


NETS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "transformer": Transformer,
    "recurrent": Recurrent,
}


@dataclass
class Standing:
    """An edit that stands, and the network and its training from before it."""

    edit: Edit
    before: nn.Module
    tensors: frozenset[str]
    trained: bool = False


@dataclass
class Soak:
    """One network under random edits."""

    name: str
    generator: torch.Generator
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(int(self.draw(1, 2**31)))
        self.model = NETS[self.name]().double()
        self.optimizer = self.make(self.model)
        self.x = torch.randn(6, 3, 5, 5, generator=self.generator, dtype=torch.float64)
        self.hands = Surgeon(self.model, prepared(self.model, self.x[:2]))
        self.average: dict[str, Tensor] = {}
        self.hands.attach([self.optimizer], [self.average])
        self.standing: list[Standing] = []
        self.told = sizes(self.model)

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.name == "convolutions":
            return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        return torch.optim.Adam(model.parameters(), lr=1e-3)

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=self.generator))

    def outputs(self, model: nn.Module) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(self.x)

    def compare(self, what: str, found: nn.Module, expected: Tensor) -> None:
        self.counts["checks"] += 1
        off = float((self.outputs(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        if not off <= CLOSE:
            self.wrong.append(f"{self.name}: {what}: off by {off:.2g}")

    def act(self) -> None:
        """One edit, or one edit taken back; sometimes a step of training first."""
        if self.draw(0, 3) == 0:
            self.train(self.model, self.optimizer)
            for standing in self.standing:
                standing.trained = True
        full = len(self.standing) >= MOST
        if self.standing and (full or self.draw(0, 5) < 2):
            self.take_back()
        else:
            self.edit()

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model.train()
        F.cross_entropy(model(self.x), torch.arange(len(self.x)) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()

    # edits ----------------------------------------------------------------------------------------------------------

    def edit(self) -> None:
        graph = self.hands.graph
        group = graph.groups[self.draw(0, len(graph.groups))]
        kinds = sorted(k for k in (*group.admits, *(["split"] if "merge" in group.admits else [])))
        if not kinds:
            return
        kind = kinds[self.draw(0, len(kinds))]
        change = self.proposal(group, kind)
        if change is None:
            return
        before, state = copy.deepcopy(self.model), copy.deepcopy(self.optimizer.state_dict())
        expected = before
        if kind == "remove":
            expected = copy.deepcopy(before)
            unread_(expected, group, sorted(set(range(group.n_channels)) - set(change.carry.tolist())))
        self.average.clear()
        self.average.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        try:
            self.hands.keep(change, *self.hands.attempt(change))
        except EditError as error:
            self.counts["refused"] += 1
            self.wrong.append(f"{self.name}: {kind} of '{group.name}' is admitted and refused: {error.message}")
            return
        self.hands.journal.clear()
        self.counts["edits"] += 1
        self.counts[kind] += 1
        self.standing.append(Standing(change, before, frozenset(axis.tensor for axis in group.axes)))
        what = f"{kind} of '{group.name}' to {change.n_after}"
        self.compare(what, self.model, self.outputs(expected))
        own = dict(self.model.named_parameters())
        if any(not torch.equal(value, own[name]) for name, value in self.average.items()):
            self.wrong.append(f"{self.name}: {what}: the averaged copy differs")
        if kind in ("permute", "sign") and self.draw(0, 2):
            twin = copy.deepcopy(before)
            other = self.make(twin)
            other.load_state_dict(state)
            self.train(self.model, self.optimizer)
            self.train(twin, other)
            for standing in self.standing:
                standing.trained = True
            self.compare(f"a step after {what}", self.model, self.outputs(twin))

    def proposal(self, group: ChannelGroup, kind: str) -> Edit | None:
        if kind == "permute":
            return edits.permute(group, random_order(group, self.generator))
        if kind in ("rescale", "sign"):
            gauges = [g for g in group.gauges if g.kind == ("positive" if kind == "rescale" else "sign")]
            number = group.gauges.index(gauges[self.draw(0, len(gauges))])
            u = torch.rand(len(group.gauges[number]), generator=self.generator, dtype=torch.float64)
            return edits.rescale(group, 0.5 + u, number) if kind == "rescale" else edits.sign(group, u < 0.5, number)
        block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
        parts = [(block == b).nonzero().flatten() for b in block.unique()]
        one = [int(part[self.draw(0, len(part))]) for part in parts]
        if kind == "remove":
            if len(parts[0]) < 2:
                return None
            gone = set(one)
            return edits.remove(group, torch.tensor([c for c in range(group.n_channels) if c not in gone]))
        if kind == "split":
            copies = torch.ones(group.n_channels, dtype=torch.long)
            copies[one] = 2
            return edits.split(group, copies)
        last = self.standing[-1] if self.standing else None
        if last is None or last.trained or last.edit.kind != "split" or last.edit.group != group.name:
            return None
        return edits.merge(group, last.edit.carry)

    # back -----------------------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        last = self.standing.pop()
        expected = copy.deepcopy(last.before)
        mine = dict((*self.model.named_parameters(), *self.model.named_buffers()))
        with torch.no_grad():
            for name, value in (*expected.named_parameters(), *expected.named_buffers()):
                if name not in last.tensors:
                    value.copy_(mine[name])
        unfolds = not last.trained and self.draw(0, 2) == 0
        how = "unfold" if unfolds else "undo"
        if unfolds:
            self.hands.unfold(1)
        else:
            self.hands.undo()
        self.hands.journal.clear()
        self.counts[how] += 1
        self.compare(f"{how} of {last.edit.kind} of '{last.edit.group}'", self.model, self.outputs(expected))
        if sizes(self.model) != sizes(expected):
            self.wrong.append(f"{self.name}: {how} of {last.edit.kind} of '{last.edit.group}': sizes differ")
        if not self.standing and sizes(self.model) != self.told:
            self.wrong.append(f"{self.name}: nothing stands, and sizes are not those of the start")


def unread_(model: nn.Module, group: ChannelGroup, channels: list[int]) -> None:
    """Let nothing write or read some channels: written here anew, apart from the library's own edits."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for axis in (a for a in group.axes if a.role != "pointwise" and a.tensor in named):
            tensor, places = named[axis.tensor], axis.index[channels]
            width, rows = axis.size // axis.slabs, tensor.shape[0] // axis.slabs
            for place in places[places >= 0].tolist():
                if axis.slabs == 1:
                    tensor.select(axis.dim, place).zero_()
                else:
                    slab = place // width
                    tensor[slab * rows : (slab + 1) * rows, place % width] = 0


def sizes(model: nn.Module) -> dict[str, Any]:
    """Numbers that modules tell of themselves, and the shapes of tensors."""
    told = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | tuple) and name != "training" and not name.startswith("_")
    }
    return told | {name: tuple(t.shape) for name, t in model.state_dict().items()}


def held_mib() -> float:
    """Memory of the process now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(args.seed)
    soaks = [Soak(name, generator) for name in NETS]
    started, first = time.perf_counter(), None
    done = 0
    while done < args.edits and time.perf_counter() - started < args.seconds:
        for soak in soaks:
            try:
                soak.act()
            except Exception as error:
                soak.wrong.append(f"{soak.name}: {type(error).__name__}: {str(error)[:200]}")
                soak.__post_init__()
        done = sum(soak.counts["edits"] for soak in soaks)
        spent = max(done / args.edits, (time.perf_counter() - started) / args.seconds)
        if first is None and spent >= 0.2:
            first = held_mib()
    counts = sum((soak.counts for soak in soaks), Counter[str]())
    wrong = [text for soak in soaks for text in soak.wrong]
    for text in wrong[:20]:
        print("WRONG", text)
    print(
        json.dumps(
            {
                "edits": done,
                "wrong": len(wrong),
                "growth_mib": round(held_mib() - (first or held_mib()), 1),
                "seconds": round(time.perf_counter() - started, 1),
                "seed": args.seed,
                **{key: counts[key] for key in sorted(counts) if key != "edits"},
            }
        )
    )


if __name__ == "__main__":
    main()
