"""Where every channel of an architecture stands: the nodes that carry numbers in `weightfold.weights.colours`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from weightfold.weights.symmetry import Slot, Symmetries

K = 8
"""Numbers a channel."""
GENERIC, ODD, ROTATED = 0, 1, 2


@lru_cache(maxsize=4096)
def fixed(*key: int, shape: tuple[int, ...], positive: bool = False) -> Tensor:
    """Fixed numbers of mean 0 and variance 1 (or between 0.5 and 1.5) by key, the same on every machine.

    Example:
        >>> torch.equal(fixed(1, 2, shape=(3,)), fixed(1, 2, shape=(5,))[:3])
        True
    """
    n = 1
    for size in shape:
        n *= size
    state = 0x9E3779B97F4A7C15
    for part in key:
        state = _mixed((state ^ (part & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF)
    counter = torch.arange(n, dtype=torch.int64) * -7046029254386353131 + (state - (1 << 64) if state >> 63 else state)
    counter = (counter ^ ((counter >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    counter = (counter ^ ((counter >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    counter = counter ^ ((counter >> 31) & ((1 << 33) - 1))
    unit = ((counter >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)
    return (unit + 0.5 if positive else (unit - 0.5) * 12**0.5).reshape(shape)


def _mixed(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


@dataclass(frozen=True, eq=False)
class Layer:
    """One kind of member along a dimension: node and weight number of each position, -1 where there is none."""

    node: Tensor
    code: Tensor

    @cached_property
    def held(self) -> Tensor:
        """Whether anything stands at each position."""
        return self.node >= 0

    @cached_property
    def at(self) -> Tensor:
        """Positions where something stands."""
        return self.held.nonzero().flatten()

    @cached_property
    def who(self) -> Tensor:
        """Its node there."""
        return self.node[self.at]

    @cached_property
    def how(self) -> Tensor:
        """Its weight number there."""
        return self.code[self.at]

    @cached_property
    def slots(self) -> int:
        """Positions a node, on average."""
        return max(1, len(self.at) // max(1, torch.unique(self.who).numel()))


@dataclass(frozen=True, eq=False)
class Nodes:
    """The nodes that carry numbers: a channel, or the part of one whose sign is free.

    Args:
        kind: GENERIC, ODD or ROTATED, shape (N,).
        unit: channel (over all groups) of each node, shape (N,).
        block: rotated block of each unit, -1 for none, shape (U,).
        start: first unit of each group, by its name.
        layers: by (tensor, dim, slabs), what stands at each position.
        signed, positive: weights of (group, axis, slot), shape (S, K).
        reach: how many axes reach each node, shape (N,).
    """

    kind: Tensor
    unit: Tensor
    block: Tensor
    start: dict[str, int]
    layers: dict[tuple[str, int, int], list[Layer]]
    signed: Tensor
    positive: Tensor
    reach: Tensor

    @cached_property
    def plain(self) -> bool:
        """Whether no channel's sign or axis is free."""
        return bool((self.kind == GENERIC).all())

    @cached_property
    def rotated(self) -> Tensor:
        """Units that belong to a rotated block."""
        return (self.block >= 0).nonzero().flatten()


@lru_cache(maxsize=64)
def nodes(found: Symmetries) -> Nodes:
    """Lay out the nodes of an architecture."""
    kinds: list[Tensor] = []
    units: list[Tensor] = []
    blocks: list[Tensor] = []
    start: dict[str, int] = {}
    layers: dict[tuple[str, int, int], list[Layer]] = {}
    signed: list[Tensor] = []
    positive: list[Tensor] = []
    n_nodes = n_units = n_blocks = n_codes = 0
    in_channels = _in_channels(found)
    for number, group in enumerate(found.members):
        start[group.name] = n_units
        base = n_nodes
        kind = torch.full((group.n,), GENERIC)
        block = torch.full((group.n,), -1)
        of: dict[tuple[str, int, int], Tensor] = {}
        unit = [torch.arange(group.n)]
        extra = [kind]
        for freedom in found.freedoms if group.kind == "channels" else ():
            if freedom.group != group.name or freedom.kind == "scale":
                continue
            if freedom.kind == "linear":
                kind[freedom.channel] = ROTATED
                block[freedom.channel] = n_blocks + freedom.block
                n_blocks += int(freedom.block.max()) + 1
                continue
            here = base + sum(map(len, unit))
            unit.append(freedom.channel)
            extra.append(torch.full((len(freedom.channel),), ODD))
            for slot in (*freedom.plus, *freedom.minus):
                table = of.setdefault((slot.tensor, slot.dim, slot.slabs), torch.full((_size(found, slot),), -1))
                valid = slot.index >= 0
                node = torch.arange(here, here + len(freedom.channel))[:, None].expand_as(slot.index)
                table[slot.index[valid]] = node[valid]
        for at, slot in enumerate(group.slots):
            key = (slot.tensor, slot.dim, slot.slabs)
            node, code = torch.full((_size(found, slot),), -1), torch.full((_size(found, slot),), -1)
            for m in range(slot.index.shape[1]):
                have = slot.index[:, m] >= 0
                places = slot.index[have, m]
                node[places] = base + torch.arange(group.n)[have]
                quiet = group.kind == "blocks" and key in in_channels
                code[places] = n_codes
                if quiet:
                    code[places[in_channels[key][places]]] = n_codes + 1
                signed += [fixed(1, number, at, m, shape=(K,)), torch.ones(K, dtype=torch.float64)]
                positive += [fixed(2, number, at, m, shape=(K,), positive=True), torch.ones(K, dtype=torch.float64)]
                n_codes += 2
            if key in of:
                node = torch.where(of[key] >= 0, of[key], node)
            layers.setdefault(key, []).append(Layer(node, code))
        kinds += extra
        units += [u + n_units for u in unit]
        blocks.append(block)
        n_nodes += sum(map(len, unit))
        n_units += group.n
    cat = lambda parts: torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)  # noqa: E731
    stack = lambda parts: torch.stack(parts) if parts else torch.zeros(0, K, dtype=torch.float64)  # noqa: E731
    reach = torch.zeros(n_nodes, dtype=torch.float64)
    for stacked in layers.values():
        for layer in stacked:
            reach[torch.unique(layer.node[layer.node >= 0])] += 1
    reach = reach.clamp_min(1)
    return Nodes(cat(kinds), cat(units), cat(blocks), start, layers, stack(signed), stack(positive), reach)


def _size(found: Symmetries, slot: Slot) -> int:
    return found.shapes[slot.tensor][slot.dim] * slot.slabs


def _in_channels(found: Symmetries) -> dict[tuple[str, int, int], Tensor]:
    """Where single channels stand: there a block does not tell its positions apart."""
    out: dict[tuple[str, int, int], Tensor] = {}
    for group in found.members:
        for slot in group.slots if group.kind == "channels" else ():
            key = (slot.tensor, slot.dim, slot.slabs)
            table = out.setdefault(key, torch.zeros(_size(found, slot), dtype=torch.bool))
            table[slot.index[slot.index >= 0]] = True
    return out
