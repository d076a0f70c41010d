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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightfold.weights.nodes import GENERIC, ROTATED, K, Nodes, fixed, nodes
from weightfold.weights.point import Point
from weightfold.weights.symmetry import Members, Symmetries

ROUNDS = (4, 6)
"""Fewest and most rounds; one for each kind of channel in between."""
GAIN = 0.5
"""How much of what reaches a channel it takes in: small, so that rounding does not grow from round to round."""


@dataclass(eq=False)
class _Tensor:
    """One tensor of B models without the dimensions that hold no channels: (B, [K if some went,] G, n0/G, ...)."""

    name: str
    number: int
    value: Tensor
    square: Tensor
    expanded: bool
    dims: list[int]
    slabs: int
    norm: Tensor


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
    stack = {name: tensor[None] for name, tensor in point.tensors.items()}
    odd, even, sketch = _described(point.symmetries, stack, rounds, mark or {})
    return Colours(nodes(point.symmetries), odd[0], even[0], sketch[0])


def sketches(found: Symmetries, stack: Mapping[str, Tensor]) -> Tensor:
    """Numbers of whole networks, shape (B, F), for balanced weights of B models of one architecture (`points`)."""
    return _described(found, stack, None, {})[2]


def _described(
    found: Symmetries, stack: Mapping[str, Tensor], rounds: int | None, mark: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    table = nodes(found)
    tensors = _prepared(found, stack, table)
    n_units, n_models = len(table.block), len(next(iter(stack.values())))
    odd = torch.where((table.kind == GENERIC)[:, None], 1.0, 0.0).double().repeat(n_models, 1, K)
    even = torch.ones(n_models, n_units, K, dtype=torch.float64)
    hint = torch.zeros(n_units, dtype=torch.float64)
    for name, numbers in mark.items():
        first = table.start[name]
        hint[first : first + len(numbers)] = numbers
    if rounds is None:
        rounds = min(max(len(found.members), ROUNDS[0]), ROUNDS[1])
    for at in range(rounds):
        odd, even = _round(tensors, table, odd, even, hint, at)
    return odd, even, _sketch(tensors, table, odd, even)


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
    loud = _loudness(table, u_odd, u_even, torch.zeros_like(even))
    mix = fixed(3, at, shape=(K, K)) / K**0.5
    other = fixed(4, at, shape=(K, K)) / K**0.5
    told = fixed(6, shape=(K,)) * hint[:, None]
    even_new = 1.0 + 0.5 * torch.tanh(loud @ fixed(5, at, shape=(K, K)) + told)
    here = loud[:, table.unit] @ other
    bend = fixed(7, shape=(K,)) + told[table.unit]
    if table.plain:
        return torch.tanh(bend + u_odd.asinh() @ mix + here) * 1.3, even_new
    mixed = torch.where((table.kind == ROTATED)[:, None], u_odd, u_odd.asinh()) @ mix
    swell = 1.0 + 0.5 * torch.tanh(here)
    generic = torch.tanh(bend + mixed + here) * 1.3
    new = torch.where((table.kind == GENERIC)[:, None], generic, torch.tanh(mixed) * swell)
    turned = mixed * swell * (1 - loud[:, table.unit]).sqrt()
    return torch.where((table.kind == ROTATED)[:, None], turned, new), even_new


def _loudness(table: Nodes, u_odd: Tensor, u_even: Tensor, loud: Tensor) -> Tensor:
    """How much reaches each unit, between 0 and 1; the mean of its block where axes may be rotated."""
    loud.index_add_(1, table.unit, u_even + u_odd.square())
    if table.rotated.numel():
        mine = table.block[table.rotated]
        n = int(mine.max()) + 1
        total = loud.new_zeros(len(loud), n, K).index_add_(1, mine, loud[:, table.rotated])
        size = torch.bincount(mine, minlength=n).double()
        loud[:, table.rotated] = (total / size[:, None])[:, mine]
    return loud / (1 + loud)


def _slabs(tensor: _Tensor, table: Nodes, dim: int) -> int:
    return tensor.slabs if (tensor.name, dim, tensor.slabs) in table.layers else 1


def _at(table: Nodes, key: tuple[str, int, int], values: Tensor, codes: Tensor, base: Tensor, by_unit: bool) -> Tensor:
    """Numbers at each position: the product over the kinds of member that stand there; ``base`` elsewhere."""
    stack = table.layers.get(key, ())
    if not stack:
        return base[None].expand(len(values), *base.shape)
    if len(stack) == 1 and len(stack[0].at) == len(base):
        return values[:, table.unit[stack[0].who] if by_unit else stack[0].who] * codes[stack[0].how]
    out = base.repeat(len(values), 1, 1)
    for number, layer in enumerate(stack):
        who = table.unit[layer.who] if by_unit else layer.who
        new = values[:, who] * codes[layer.how]
        if number:
            earlier = torch.stack([other.held for other in stack[:number]]).any(0)[layer.at]
            new = torch.where(earlier[:, None], out[:, layer.at] * new, new)
        out[:, layer.at] = new
    return out


def _sides(tensor: _Tensor, table: Nodes, odd: Tensor, even: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Numbers along each remaining dimension, signed and positive, shapes (B, G, n, K)."""
    out = []
    for d, dim in enumerate(tensor.dims):
        slabs = _slabs(tensor, table, dim)
        n = tensor.value.shape[d + 2 + tensor.expanded]
        total = n * tensor.slabs if d == 0 or slabs > 1 else n
        key = (tensor.name, dim, slabs)
        a = _at(table, key, odd, table.signed, fixed(8, tensor.number, dim, shape=(total, K)), False)
        b = _at(table, key, even, table.positive, fixed(9, tensor.number, dim, shape=(total, K), positive=True), True)
        shape = (len(odd), tensor.slabs if total == n * tensor.slabs else 1, n, K)
        full = (len(odd), tensor.slabs, n, K)
        out.append((a.reshape(shape).expand(full), b.reshape(shape).expand(full)))
    return out


def _reach(tensor: _Tensor, sides: list[tuple[Tensor, Tensor]], d: int, slabs: int) -> tuple[Tensor, Tensor]:
    """What a tensor hands to each position of one dimension, shapes (B, positions, K), about 1 in size."""
    results = []
    letters = "abcdefh"[: len(tensor.dims)]
    spec = ("mkg" if tensor.expanded else "mg") + letters
    others = [i for i in range(len(tensor.dims)) if i != d]
    terms = ",".join([spec, *(f"mg{letters[i]}k" for i in others)])
    keep = "g" if d == 0 or slabs > 1 else ""
    for kind, value in enumerate((tensor.value, tensor.square)):
        if not others and not tensor.expanded:
            out = value if keep else value.sum(1)
            out = out[..., None].expand(*out.shape, K)
        else:
            out = torch.einsum(f"{terms}->m{keep}{letters[d]}k", value, *(sides[i][kind] for i in others))
        size = tensor.norm if kind == 0 else tensor.norm.square()
        count = tensor.value.shape[d + 2 + tensor.expanded] * (tensor.slabs if keep else 1)
        spread = count**0.5 if kind == 0 else float(count)
        results.append(out.reshape(len(value), -1, K) * (spread / size)[:, None, None])
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
        a, b = reach_odd[:, layer.at] * table.signed[layer.how], reach_even[:, layer.at] * table.positive[layer.how]
        for other in stack:
            if other is layer:
                continue
            both = other.held[layer.at]
            node = other.node[layer.at].clamp_min(0)
            code = other.code[layer.at].clamp_min(0)
            a = torch.where(both[:, None], a * odd[:, node] * table.signed[code], a)
            b = torch.where(both[:, None], b * even[:, table.unit[node]] * table.positive[code], b)
        u_odd.index_add_(1, layer.who, a / layer.slots**0.5)
        u_even.index_add_(1, layer.who, b / layer.slots)


def _prepared(found: Symmetries, stack: Mapping[str, Tensor], table: Nodes) -> list[_Tensor]:
    out = []
    slabs = {name: s for name, _, s in table.layers if s > 1}
    sided: dict[str, set[int]] = {}
    for name, dim, _ in table.layers:
        sided.setdefault(name, set()).add(dim)
    for number, name in enumerate(found.shapes):
        value = stack.get(name)
        if value is None or value.numel() == 0:
            continue
        g = slabs.get(name, 1)
        dims = sorted(sided.get(name, set()) | ({0} if g > 1 else set()))
        out.append(_without_plain_dims(name, number, value, dims, g))
    return out


def _without_plain_dims(name: str, number: int, value: Tensor, dims: list[int], g: int) -> _Tensor:
    """Contract the dimensions that hold no channels with fixed numbers, once."""
    n_dims, square = value.ndim - 1, value.square()
    plain = [d for d in range(n_dims) if d not in dims]
    letters = "abcdefh"[:n_dims]
    norm = square.flatten(1).sum(1).sqrt()
    tables = []
    expanded = bool(plain)
    for source, positive in ((value, False), (square, True)):
        if expanded:
            key = 9 if positive else 8
            held = [fixed(key, number, d, shape=(value.shape[d + 1], K), positive=positive) for d in plain]
            terms = ",".join([f"m{letters}", *(f"{letters[d]}k" for d in plain)])
            source = torch.einsum(f"{terms}->mk{''.join(letters[d] for d in dims)}", source, *held)
        head, rest = source.shape[: 1 + int(expanded)], source.shape[1 + int(expanded) :]
        rest = (g, rest[0] // g, *rest[1:]) if rest else (1,)
        tables.append(source.reshape(*head, *rest))
    return _Tensor(name, number, tables[0], tables[1], expanded, dims, g, torch.where(norm > 0, norm, 1.0))


def _sketch(tensors: list[_Tensor], table: Nodes, odd: Tensor, even: Tensor) -> Tensor:
    """Contract every tensor with the numbers of all its dimensions; and its size: 2 K + 1 numbers a tensor."""
    parts = []
    for tensor in tensors:
        sides = _sides(tensor, table, odd, even)
        if sides:
            slot_slabs = _slabs(tensor, table, tensor.dims[0])
            a, b = _reach(tensor, sides, 0, slot_slabs)
            n = a.shape[1]
            a = (a * sides[0][0].reshape(len(a), -1, K)[:, :n]).sum(1) / n**0.5
            b = (b * sides[0][1].reshape(len(b), -1, K)[:, :n]).sum(1) / n
        else:
            size = tensor.norm[:, None]
            a, b = tensor.value.flatten(1)[:, :K] / size, tensor.square.flatten(1)[:, :K] / size.square()
            a, b = (torch.nn.functional.pad(v, (0, K - v.shape[1])) for v in (a, b))
        parts += [a.asinh(), b.asinh(), tensor.norm.log()[:, None]]
    return torch.cat(parts, 1) if parts else odd.new_zeros(len(odd), 0)
