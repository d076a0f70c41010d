"""Numbers that describe each channel by its place in the network alone: the same for every order of the channels.

Each channel carries K numbers, and each position of a tensor those of its channel. A round contracts every tensor with
the numbers of all its other dimensions, adds up what reaches each channel, and passes it through a smooth function:

    u_c = Σ_tensors Σ_positions of c  W · (numbers of the other dimensions),    h_c = tanh(α + u_c M + e_c N)

Rows and columns that are no channels (inputs, outputs, kernel places) carry fixed numbers of their own. Beside these
numbers, *even* ones e_c are passed on through the squared weights. Where a channel's sign is free its numbers are an
odd function of u alone, so that they change sign with it; where a block may be rotated they are a linear one times
something that the rotation leaves alone. So nothing here depends on the order of the channels, their signs or their
axes, all is continuous in the weights, and ties and dead channels need no care: equal channels get equal numbers.

Cost: a few matrix products with K columns for each tensor and round.

Reference: Weisfeiler & Leman 1968 (colour refinement); Lim et al. 2023, arXiv 2312.04501 (graph networks over weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from weightfold.weights.point import Point
from weightfold.weights.symmetry import Members, Slot, Symmetries

K = 8
"""Numbers a channel."""
ROUNDS = (4, 6)
"""Fewest and most rounds; one for each kind of channel in between."""
GAIN = 0.5
"""How much of what reaches a channel it takes in: small, so that rounding does not grow from round to round."""
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
class _Layer:
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
    layers: dict[tuple[str, int, int], list[_Layer]]
    signed: Tensor
    positive: Tensor
    reach: Tensor


@lru_cache(maxsize=64)
def nodes(found: Symmetries) -> Nodes:
    """Lay out the nodes of an architecture."""
    kinds: list[Tensor] = []
    units: list[Tensor] = []
    blocks: list[Tensor] = []
    start: dict[str, int] = {}
    layers: dict[tuple[str, int, int], list[_Layer]] = {}
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
            layers.setdefault(key, []).append(_Layer(node, code))
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


@dataclass(eq=False)
class _Tensor:
    """One tensor, without the dimensions that hold no channels: shape (G, n0/G, ...), K of them where some went."""

    name: str
    number: int
    value: Tensor
    square: Tensor
    expanded: bool
    dims: list[int]
    slabs: int
    norm: float


@dataclass(frozen=True, eq=False)
class Colours:
    """What `colours` found.

    Args:
        odd: numbers of the nodes, shape (N, K).
        even: numbers of the units, shape (U, K).
        sketch: numbers of the whole network, shape (F,).
    """

    nodes: Nodes
    odd: Tensor
    even: Tensor
    sketch: Tensor

    def of(self, group: Members) -> Tensor:
        """What describes each channel of a group whatever its sign or axes, shape (C, F)."""
        first = self.nodes.start[group.name]
        mine = (self.nodes.unit >= first) & (self.nodes.unit < first + group.n)
        parts = [self.even[first : first + group.n]]
        number = mine.nonzero().flatten()
        size = number.numel() // max(group.n, 1)
        out = torch.zeros(group.n, 2 * K * max(size, 1) + 2 * K, dtype=torch.float64)
        seen = torch.zeros(group.n, dtype=torch.long)
        for node in number.tolist():
            unit = int(self.nodes.unit[node]) - first
            kind = int(self.nodes.kind[node])
            value = self.odd[node] if kind == GENERIC else self.odd[node] * self.odd[node][:1].sign()
            if kind != ROTATED:
                at = int(seen[unit]) * K
                out[unit, at : at + K] += value
            seen[unit] += 1
        return torch.cat([*parts, out], 1)


def colours(point: Point, *, rounds: int | None = None, mark: dict[str, Tensor] | None = None) -> Colours:
    """Describe every channel by its place in the network.

    Args:
        point: balanced weights.
        rounds: how far a channel sees; by default as far as the network has kinds of channels, within bounds.
        mark: further numbers that tell channels of a group apart, shape (C,), by the group's name.
    Example:
        >>> from weightfold.weights.point import point
        >>> from weightfold.weights.symmetry import symmetries
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> seen = colours(point(symmetries(net, torch.zeros(1, 4)), net.state_dict()))
        >>> seen.even.shape
        torch.Size([8, 8])
    """
    table = nodes(point.symmetries)
    tensors = _prepared(point, table)
    n_units = len(table.block)
    odd = torch.where((table.kind == GENERIC)[:, None], 1.0, 0.0).double().repeat(1, K)
    even = torch.ones(n_units, K, dtype=torch.float64)
    hint = torch.zeros(n_units, dtype=torch.float64)
    for name, numbers in (mark or {}).items():
        first = table.start[name]
        hint[first : first + len(numbers)] = numbers
    if rounds is None:
        rounds = min(max(len(point.symmetries.members), ROUNDS[0]), ROUNDS[1])
    for at in range(rounds):
        odd, even = _round(tensors, table, odd, even, hint, at)
    return Colours(table, odd, even, _sketch(tensors, table, odd, even))


def _round(
    tensors: list[_Tensor], table: Nodes, odd: Tensor, even: Tensor, hint: Tensor, at: int
) -> tuple[Tensor, Tensor]:
    u_odd, u_even = torch.zeros_like(odd), torch.zeros_like(odd)
    for tensor in tensors:
        sides = _sides(tensor, table, odd, even)
        for d in range(len(tensor.dims)):
            slot = (tensor.name, tensor.dims[d], _slabs(tensor, table, tensor.dims[d]))
            if slot not in table.layers:
                continue
            reach_odd, reach_even = _reach(tensor, sides, d, slot[2])
            _collect(table, slot, odd, even, reach_odd, reach_even, u_odd, u_even)
    u_odd, u_even = u_odd * (GAIN / table.reach.sqrt())[:, None], u_even * (GAIN / table.reach)[:, None]
    loud = torch.zeros_like(even).index_add_(0, table.unit, u_even + u_odd.square())
    rotated = table.block >= 0
    if bool(rotated.any()):
        n = int(table.block.max()) + 1
        total = torch.zeros(n, K, dtype=torch.float64).index_add_(0, table.block[rotated], loud[rotated])
        size = torch.bincount(table.block[rotated], minlength=n).double()
        loud[rotated] = (total / size[:, None])[table.block[rotated]]
    loud = loud / (1 + loud)
    mix = fixed(3, at, shape=(K, K)) / K**0.5
    other = fixed(4, at, shape=(K, K)) / K**0.5
    told = fixed(6, shape=(K,)) * hint[:, None]
    even_new = 1.0 + 0.5 * torch.tanh(loud @ fixed(5, at, shape=(K, K)) + told)
    here = loud[table.unit] @ other
    bend = fixed(7, shape=(K,)) + told[table.unit]
    mixed = torch.where((table.kind == ROTATED)[:, None], u_odd, u_odd.asinh()) @ mix
    swell = 1.0 + 0.5 * torch.tanh(here)
    generic = torch.tanh(bend + mixed + here) * 1.3
    new = torch.where((table.kind == GENERIC)[:, None], generic, torch.tanh(mixed) * swell)
    return torch.where((table.kind == ROTATED)[:, None], mixed * swell * (1 - loud[table.unit]).sqrt(), new), even_new


def _slabs(tensor: _Tensor, table: Nodes, dim: int) -> int:
    return tensor.slabs if (tensor.name, dim, tensor.slabs) in table.layers else 1


def _at(table: Nodes, key: tuple[str, int, int], values: Tensor, codes: Tensor, base: Tensor, by_unit: bool) -> Tensor:
    """Numbers at each position: the product over the kinds of member that stand there; ``base`` elsewhere."""
    stack = table.layers.get(key, ())
    if not stack:
        return base
    out = base.clone()
    for number, layer in enumerate(stack):
        who = table.unit[layer.who] if by_unit else layer.who
        new = values[who] * codes[layer.how]
        if number:
            earlier = torch.stack([other.held for other in stack[:number]]).any(0)[layer.at]
            new = torch.where(earlier[:, None], out[layer.at] * new, new)
        out[layer.at] = new
    return out


def _sides(tensor: _Tensor, table: Nodes, odd: Tensor, even: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Numbers along each remaining dimension, signed and positive, shapes (G, n, K)."""
    out = []
    for d, dim in enumerate(tensor.dims):
        slabs = _slabs(tensor, table, dim)
        n = tensor.value.shape[d + 1 + tensor.expanded]
        total = n * tensor.slabs if d == 0 or slabs > 1 else n
        key = (tensor.name, dim, slabs)
        a = _at(table, key, odd, table.signed, fixed(8, tensor.number, dim, shape=(total, K)), False)
        b = _at(table, key, even, table.positive, fixed(9, tensor.number, dim, shape=(total, K), positive=True), True)
        shape = (tensor.slabs, n, K) if total == n * tensor.slabs else (1, n, K)
        out.append((a.reshape(shape).expand(tensor.slabs, n, K), b.reshape(shape).expand(tensor.slabs, n, K)))
    return out


def _reach(tensor: _Tensor, sides: list[tuple[Tensor, Tensor]], d: int, slabs: int) -> tuple[Tensor, Tensor]:
    """What a tensor hands to each position of one dimension, shapes (positions, K), about 1 in size."""
    results = []
    for kind, value in enumerate((tensor.value, tensor.square)):
        letters = "abcdefh"[: len(tensor.dims)]
        spec = ("k" if tensor.expanded else "") + "g" + letters
        others = [i for i in range(len(tensor.dims)) if i != d]
        terms = ",".join([spec, *(f"g{letters[i]}k" for i in others)])
        keep = "g" if d == 0 or slabs > 1 else ""
        if not others and not tensor.expanded:
            out = value.sum(0) if not keep else value
            out = out[..., None].expand(*out.shape, K)
        else:
            out = torch.einsum(f"{terms}->{keep}{letters[d]}k", value, *(sides[i][kind] for i in others))
        size = tensor.norm if kind == 0 else tensor.norm**2
        count = tensor.value.shape[d + 1 + tensor.expanded] * (tensor.slabs if keep else 1)
        spread = count**0.5 if kind == 0 else float(count)
        results.append(out.reshape(-1, K) * (spread / size))
    return results[0], results[1]


def _collect(
    table: Nodes,
    key: tuple[str, int, int],
    odd: Tensor,
    even: Tensor,
    reach_odd: Tensor,
    reach_even: Tensor,
    u_odd: Tensor,
    u_even: Tensor,
) -> None:
    """Add what reaches positions to their nodes, weighted by what else stands there."""
    stack = table.layers[key]
    for layer in stack:
        a, b = reach_odd[layer.at] * table.signed[layer.how], reach_even[layer.at] * table.positive[layer.how]
        for other in stack:
            if other is layer:
                continue
            both = other.held[layer.at]
            node = other.node[layer.at].clamp_min(0)
            code = other.code[layer.at].clamp_min(0)
            a = torch.where(both[:, None], a * odd[node] * table.signed[code], a)
            b = torch.where(both[:, None], b * even[table.unit[node]] * table.positive[code], b)
        u_odd.index_add_(0, layer.who, a / layer.slots**0.5)
        u_even.index_add_(0, layer.who, b / layer.slots)


def _prepared(point: Point, table: Nodes) -> list[_Tensor]:
    out = []
    slabs = {name: s for name, _, s in table.layers if s > 1}
    for number, name in enumerate(point.symmetries.shapes):
        value = point.tensors.get(name)
        if value is None or value.numel() == 0:
            continue
        norm = float(value.square().sum()) ** 0.5
        g = slabs.get(name, 1)
        sided = [d for d in range(value.ndim) if any(k[0] == name and k[1] == d for k in table.layers)]
        dims = sorted(set(sided) | ({0} if g > 1 else set()))
        out.append(_without_plain_dims(name, number, value, dims, g, norm))
    return out


def _without_plain_dims(name: str, number: int, value: Tensor, dims: list[int], g: int, norm: float) -> _Tensor:
    """Contract the dimensions that hold no channels with fixed numbers, once."""
    plain = [d for d in range(value.ndim) if d not in dims]
    letters = "abcdefh"[: value.ndim]
    tables = []
    expanded = bool(plain)
    for source, positive in ((value, False), (value.square(), True)):
        if expanded:
            key = 9 if positive else 8
            held = [fixed(key, number, d, shape=(value.shape[d], K), positive=positive) for d in plain]
            terms = ",".join([letters, *(f"{letters[d]}k" for d in plain)])
            source = torch.einsum(f"{terms}->k{''.join(letters[d] for d in dims)}", source, *held)
        head, rest = source.shape[: int(expanded)], source.shape[int(expanded) :]
        rest = (g, rest[0] // g, *rest[1:]) if rest else (1,)
        tables.append(source.reshape(*head, *rest))
    return _Tensor(name, number, tables[0], tables[1], expanded, dims, g, norm if norm > 0 else 1.0)


def _sketch(tensors: list[_Tensor], table: Nodes, odd: Tensor, even: Tensor) -> Tensor:
    """Contract every tensor with the numbers of all its dimensions; and its size: 2 K + 1 numbers a tensor."""
    parts = []
    for tensor in tensors:
        sides = _sides(tensor, table, odd, even)
        if sides:
            slot_slabs = _slabs(tensor, table, tensor.dims[0])
            a, b = _reach(tensor, sides, 0, slot_slabs)
            key = 0
            n = len(a)
            a = (a * sides[key][0].reshape(-1, K)[:n]).sum(0) / n**0.5
            b = (b * sides[key][1].reshape(-1, K)[:n]).sum(0) / n
        else:
            a, b = tensor.value.reshape(-1)[:K] / tensor.norm, tensor.square.reshape(-1)[:K] / tensor.norm**2
            a, b = (torch.nn.functional.pad(v, (0, K - v.numel())) for v in (a, b))
        a, b = a.asinh(), b.asinh()
        parts.append(torch.cat([a, b, torch.tensor([tensor.norm], dtype=torch.float64).log()]))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
