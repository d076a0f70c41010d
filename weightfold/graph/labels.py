"""Labels: who is who along every dimension of every tensor in a traced program.

Each index of each dimension of each parameter is an *atom* (a positive integer). A value in the program carries
*fields*: integer arrays, broadcastable to the value's shape, that say which atom each element belongs to. Moving data
moves labels (the operator itself is run on them), adding two values says that their atoms are the same channel, and a
matrix product says that a column of the weight and a channel of the input are the same channel. In the end the
connected components of everything that was said are the channels.

Two gauges ride along: ``pos`` (how a value answers a positive rescale of its channel: +atom, -atom, or 0 when not at
all) and ``sgn`` (the same for a change of sign).

Level 0 is the channel itself; level 1 is a *block* of channels (an attention head, a group of a grouped convolution)
that a view split off. A field of level `REPEAT` has no atoms: it says that the value is the same all along its
dimensions (keys that all heads share).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

REPEAT = 2
FOREIGN, UNIFORM, ZERO = 0, -1, -2
"""Labels of elements that belong to no channel: data that varies, a constant, and a constant that is zero."""

(
    FROZEN,
    FROZEN_IN,
    NO_REMOVE,
    NO_REMOVE_IN,
    NO_MERGE,
    NO_MERGE_IN,
    OFFSET,
    READ,
    WRITE,
    PAIRED,
    COMPUTED,
    COMPUTED_WRITE,
    ELSEWHERE,
    ELSEWHERE_IN,
) = (1 << bit for bit in range(14))
"""Flags on atoms. ``_IN`` forbids it among the channels of one block and leaves whole blocks alone. ``ELSEWHERE``: more
than the columns of weights reads the channel, so it is not unread where these are zero."""

INNER = {FROZEN: FROZEN_IN, NO_REMOVE: NO_REMOVE_IN, NO_MERGE: NO_MERGE_IN, ELSEWHERE: ELSEWHERE_IN}


@dataclass(frozen=True, eq=False)
class Field:
    """Labels of one value: arrays with the value's number of dimensions, each dimension full or of size 1.

    ``loud``: the value may differ from zero where all that writes the channel is zero (the probabilities of a head
    without queries, the exponential of a weight). ``curved``: the value is no linear function of what the channel
    holds, so two of them do not add up.
    """

    labels: Tensor
    pos: Tensor
    sgn: Tensor
    level: int = 0
    loud: bool = False
    curved: bool = False

    @property
    def support(self) -> frozenset[int]:
        """Dimensions along which the label varies."""
        return frozenset(d for d, n in enumerate(self.labels.shape) if n > 1)

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.labels, self.pos, self.sgn

    def map(self, function: Callable[[Tensor], Tensor]) -> Field:
        """Run a data movement on all three arrays."""
        labels, pos, sgn = (function(array) for array in self.arrays())
        return replace(self, labels=labels, pos=pos, sgn=sgn)

    def lifted(self, ndim: int) -> Field:
        """Prepend dimensions of size 1, as broadcasting does."""
        extra = ndim - self.labels.ndim
        return self if extra <= 0 else self.map(lambda array: array.reshape((1,) * extra + tuple(array.shape)))

    def without_gauge(self) -> Field:
        return replace(self, pos=torch.zeros_like(self.pos), sgn=torch.zeros_like(self.sgn))


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of one tensor in the program.

    ``state`` means: a function of parameters alone. ``uniform``: the same number everywhere; ``zero``: it is 0;
    ``name``: the parameter that this value is, untouched; ``computed``: the result of arithmetic on parameters;
    ``known``: the numbers themselves, where the forward makes them from nothing but written-down ones;
    ``copies``, of data: where its numbers are copies of each other by construction (a mask repeated for every head):
    equal integers, equal numbers; broadcastable to the shape.
    """

    shape: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    state: bool = False
    uniform: bool = False
    zero: bool = False
    name: str | None = None
    computed: bool = False
    known: Tensor | None = None
    copies: Tensor | None = None

    @property
    def raw(self) -> bool:
        """A parameter, at most moved: its layout is that of a weight, not of an activation."""
        return self.state and not self.computed

    def without_repeats(self) -> Value:
        return replace(self, fields=tuple(f for f in self.fields if f.level != REPEAT), copies=None)

    def blocks(self) -> tuple[Field, ...]:
        return tuple(f for f in self.fields if f.level == 1)

    def varies(self, dim: int) -> bool:
        return self.shape[dim] > 1 and not self.uniform

    def lifted(self, ndim: int) -> Value:
        extra = ndim - len(self.shape)
        if extra <= 0:
            return self
        copies = None if self.copies is None else self.copies[(None,) * extra]
        fields = tuple(f.lifted(ndim) for f in self.fields)
        return replace(self, shape=(1,) * extra + self.shape, fields=fields, copies=copies)


def compress(item: Field) -> Field | None:
    """Give dimensions along which nothing varies the size 1; None when no dimension is left."""
    keep = list(item.arrays())
    for d in range(keep[0].ndim):
        if keep[0].shape[d] > 1 and all(bool((a == a.narrow(d, 0, 1)).all()) for a in keep):
            keep = [a.narrow(d, 0, 1) for a in keep]
    if all(n == 1 for n in keep[0].shape):
        return None
    return replace(item, labels=keep[0], pos=keep[1], sgn=keep[2])


def kept(store: Store, item: Field) -> list[Field]:
    """Compress the labels that a movement left over. A channel picked out alone has a part of its own to play."""
    if item.labels.numel() == 0:
        return []
    small = compress(item)
    if small is not None:
        return [small]
    store.flag(item.labels, FROZEN, "is picked out alone")
    store.kill(item)
    return []


@dataclass(frozen=True)
class Seed:
    """Where a run of atoms stands: dimension ``dim`` of ``tensor``, atoms ``start`` to ``start + n``.

    With ``slabs`` > 1 the atoms are laid out (slabs, n / slabs): dimension 0 of the tensor is cut into that many equal
    slabs and each slab has its own meaning for the positions of ``dim`` (a grouped convolution's input channels).
    """

    tensor: str
    dim: int
    start: int
    n: int
    slabs: int = 1


@dataclass
class Store:
    """Everything that the rules say of atoms, kept as flat lists until the groups are built."""

    n_atoms: int = 1
    seeds: list[Seed] = field(default_factory=list)
    edges: list[tuple[Tensor, Tensor, bool]] = field(default_factory=list)
    pos_edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sgn_edges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    dead_pos: list[Tensor] = field(default_factory=list)
    dead_sgn: list[Tensor] = field(default_factory=list)
    flags: list[tuple[Tensor, int, int, str]] = field(default_factory=list)
    members: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rects: list[Tensor] = field(default_factory=list)
    used: list[Tensor] = field(default_factory=list)
    block_runs: list[Tensor] = field(default_factory=list)
    touches: list[tuple[int, Tensor]] = field(default_factory=list)
    written: list[tuple[int, Tensor]] = field(default_factory=list)
    taps: dict[tuple[str, int], set[tuple[str, int] | None]] = field(default_factory=dict)
    reads: dict[tuple[str, int], set[tuple[Any, int]]] = field(default_factory=dict)
    node: int = 0
    _slabs: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _entering: dict[int, dict[str, set[torch.fx.Node]]] = field(default_factory=dict)

    # atoms ----------------------------------------------------------------------------------------------------------

    def fresh(self, n: int) -> Tensor:
        """Allocate n atoms."""
        start = self.n_atoms
        self.n_atoms += n
        return torch.arange(start, start + n)

    def fresh_blocks(self, n: int) -> Tensor:
        """Allocate atoms for n blocks of one kind."""
        atoms = self.fresh(n)
        self.block_runs.append(atoms)
        return atoms

    def seed(self, tensor: str, shape: Sequence[int]) -> Value:
        """Give every index of every dimension of a parameter its atom."""
        fields = []
        for dim, n in enumerate(shape):
            atoms = self.fresh(n)
            self.seeds.append(Seed(tensor, dim, int(atoms[0]) if n else 0, n))
            if n > 1:
                labels = atoms.reshape([n if d == dim else 1 for d in range(len(shape))])
                fields.append(Field(labels, labels, labels))
        return Value(tuple(shape), tuple(fields), state=True, name=tensor)

    def slab(self, tensor: str, dim: int, slabs: int, n: int) -> Tensor:
        """Atoms (slabs, n) of a dimension whose meaning differs between equal slabs of dimension 0."""
        key = (tensor, dim, slabs)
        if key not in self._slabs:
            atoms = self.fresh(slabs * n)
            self.seeds.append(Seed(tensor, dim, int(atoms[0]), slabs * n, slabs))
            self._slabs[key] = atoms.reshape(slabs, n)
        return self._slabs[key]

    def entering(self, graph: torch.fx.Graph) -> dict[str, set[torch.fx.Node]]:
        """What enters each call of a module from outside, but for parameters, buffers and constants."""
        if id(graph) not in self._entering:
            found = self._entering[id(graph)] = defaultdict(set)
            for node in graph.nodes:
                for call in node.meta.get("nn_module_stack") or ():
                    for source in node.all_input_nodes:
                        inside = call in (source.meta.get("nn_module_stack") or ())
                        stored = source.op == "get_attr" or (
                            source.op == "placeholder" and source.name.startswith(("p_", "b_", "c_"))
                        )
                        if not inside and not stored:
                            found[call].add(source)
        return self._entering[id(graph)]

    def tap(self, seed: Seed) -> tuple[str, int] | None:
        """Where all that a weight reads along a dimension can be observed; None where there is no such place."""
        places = self.taps.get((seed.tensor, seed.dim), set())
        return next(iter(places)) if len(places) == 1 else None

    # statements -----------------------------------------------------------------------------------------------------

    def same(self, a: Tensor, b: Tensor) -> None:
        """Say that two broadcastable label arrays name the same channels."""
        a, b = torch.broadcast_tensors(a, b)
        keep = (a > 0) & (b > 0) & (a != b)
        both = torch.unique(a[keep] << 32 | b[keep])
        if both.numel() == 0:
            return
        pairs = torch.stack([both >> 32, both & 0xFFFFFFFF])
        plain = all(torch.unique(side).numel() == pairs.shape[1] for side in pairs)
        self.edges.append((pairs[0], pairs[1], plain))

    def same_pos(self, a: Tensor, b: Tensor) -> None:
        """Say that two gauges answer a rescale alike (signed labels; zeros are skipped by the caller)."""
        keep = a != b
        if bool(keep.any()):
            self.pos_edges.append((a[keep], b[keep]))

    def same_sgn(self, a: Tensor, b: Tensor) -> None:
        keep = a.abs() != b.abs()
        if bool(keep.any()):
            self.sgn_edges.append((a[keep].abs(), b[keep].abs()))

    def kill_pos(self, a: Tensor) -> None:
        atoms = a[a != 0].abs()
        if atoms.numel():
            self.dead_pos.append(torch.unique(atoms))

    def kill_sgn(self, a: Tensor) -> None:
        atoms = a[a != 0].abs()
        if atoms.numel():
            self.dead_sgn.append(torch.unique(atoms))

    def kill(self, item: Field) -> None:
        """No rescale and no change of sign commutes with what happens to this value."""
        self.kill_pos(item.pos)
        self.kill_sgn(item.sgn)

    def flag(self, labels: Tensor, bit: int, reason: str = "") -> None:
        atoms = torch.unique(labels[labels > 0])
        if atoms.numel():
            self.flags.append((atoms, bit, self.node, reason))

    def forbid(
        self, value: Value, item: Field, dims: frozenset[int], bit: int, reason: str, *, gauge: bool = False
    ) -> None:
        """Forbid something for a field because of what happens along ``dims``.

        Whole blocks stay free when the value has blocks and none of them varies along those dimensions. What is frozen
        cannot be rescaled either, unless ``gauge`` says so.
        """
        if bit == FROZEN and not gauge:
            self.kill(item)
        if item.level == 0 and any(not (block.support & dims) for block in value.blocks()):
            bit = INNER[bit]
        self.flag(item.labels, bit, reason)

    def freeze(self, value: Value, reason: str) -> None:
        """Nothing in this value may be edited."""
        for item in value.fields:
            self.flag(item.labels, FROZEN, reason)
            self.kill(item)

    def touch(self, *values: Value) -> None:
        """Note that an operator which is no mere movement met these channels (two channels are of one kind only if
        they met the same operators)."""
        for slot, value in enumerate(values):
            for item in value.fields:
                self.touches.append((self.node * 64 + slot, item.labels.flatten()))

    def rect(self, labels: Tensor) -> None:
        """Say that a grid of channels must stay a full grid."""
        self.rects.append(labels)


def combine_labels(a: Tensor, b: Tensor) -> Tensor:
    """Labels of a result of two values: whoever has one; otherwise the less constant of the two codes."""
    a, b = torch.broadcast_tensors(a, b)
    code = torch.maximum(a.clamp(max=0), b.clamp(max=0))
    return torch.where(a > 0, a, torch.where(b > 0, b, code))


def _spoken_for(a: Field, b: Field, matches: Sequence[tuple[Field, Field]]) -> bool:
    """Whether blocks of these dimensions met their counterpart already."""
    block = a if a.level == 1 else b
    return any(x.level == y.level == 1 and x.support == block.support for x, y in matches)


def pair_fields(
    left: Sequence[Field], right: Sequence[Field]
) -> tuple[list[tuple[Field, Field]], list[Field], list[Field]]:
    """Decide which field of one value speaks of the same channels as which field of the other.

    Equal supports first (same level, then across levels: a per-head bias meets the heads), then any overlap. Channels
    that only share their blocks (the values of a head and the taps of its kernel) are not the same.
    """
    matches: list[tuple[Field, Field]] = []
    rest_l, rest_r = list(left), list(right)
    shared = {f.support for f in left if f.level == 1} & {f.support for f in right if f.level == 1}

    def overlap(a: Field, b: Field) -> bool:
        both = a.support & b.support
        only_blocks = both in shared and a.support > both and b.support > both
        return bool(both) and not (a.level == b.level == 0 and only_blocks)

    tests: list[Callable[[Field, Field], Any]] = [
        lambda a, b: a.level == b.level and a.support == b.support,
        lambda a, b: a.support == b.support,
        lambda a, b: a.level == 0 and b.level == 0 and overlap(a, b),
        overlap,
    ]
    for test in tests:
        for a in list(rest_l):
            b = next((b for b in rest_r if test(a, b)), None)
            if b is not None and not (a.level != b.level and _spoken_for(a, b, matches)):
                matches.append((a, b))
                rest_l = [x for x in rest_l if x is not a]
                rest_r = [x for x in rest_r if x is not b]
    return matches, rest_l, rest_r
