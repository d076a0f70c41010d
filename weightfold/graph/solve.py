"""Solve what the rules stated: connected components, with flags, hashes and reasons carried over to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from weightfold.graph import labels as L
from weightfold.graph.labels import Store

OUTPUT = "reaches the model's output"
"""The reason that explains most: no edit inside can change what the model returns."""

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def mix(x: Ints | Hashes | np.uint64 | int) -> Hashes:
    """A fixed 64-bit hash of integers (splitmix64), the same in every process."""
    with np.errstate(over="ignore"):
        z = np.asarray(x).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def components(n: int, a: Ints, b: Ints) -> Ints:
    graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(n, n))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def stacked(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[Ints, Ints]:
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return (
        torch.cat([p[0].flatten() for p in pairs]).numpy(),
        torch.cat([p[1].flatten() for p in pairs]).numpy(),
    )


@dataclass
class Atoms:
    """Every seeded atom as parallel arrays, and what is known of the component of each."""

    atom: Ints
    seed: Ints
    pos: Ints
    comp: Ints
    touch: Hashes


@dataclass
class Facts:
    """The solved store: components, flags, hashes and gauges by atom or component."""

    store: Store
    comp: Ints
    plain: Ints
    comp_flags: Ints
    atom_flags: Ints
    touch: Hashes
    comp_touch: Hashes
    is_block: NDArray[np.bool_]
    base: Atoms
    reason: dict[int, dict[int, int]]

    @property
    def n_comps(self) -> int:
        return len(self.comp_flags)


def block_families(store: Store, comp: Ints) -> Ints:
    """Blocks that one view split off, or that were said to be the same as such, belong together."""
    runs = [run.numpy() for run in store.block_runs]
    if not runs:
        return np.arange(int(comp.max()) + 1)
    left = np.concatenate([np.full(len(run), comp[run[0]]) for run in runs])
    return components(int(comp.max()) + 1, left, comp[np.concatenate(runs)])


def join_equal_blocks(store: Store, comp: Ints) -> Ints:
    """Blocks of two families that hold the same channels are the same blocks: give them one component."""
    labels, blocks = stacked(store.members)
    keep = (labels > 0) & (blocks > 0)
    if not keep.any():
        return comp
    family = block_families(store, comp)
    holds: dict[int, dict[int, int]] = {}
    for member, block in np.unique(np.stack([comp[labels[keep]], comp[blocks[keep]]]), axis=1).T.tolist():
        mine = holds.setdefault(int(family[block]), {})
        mine[member] = -1 if mine.get(member, block) != block else block
    by_member: dict[int, list[int]] = {}
    for fam, mine in holds.items():
        for member in mine:
            by_member.setdefault(member, []).append(fam)
    a: list[int] = []
    b: list[int] = []
    for left, right in sorted({(x, y) for fams in by_member.values() for x in fams for y in fams if x < y}):
        pairs = {(holds[left][c], holds[right][c]) for c in holds[left].keys() & holds[right].keys()}
        one_to_one = len({p for p, _ in pairs}) == len({q for _, q in pairs}) == len(pairs)
        if one_to_one and all(p >= 0 and q >= 0 for p, q in pairs):
            a += [p for p, _ in pairs]
            b += [q for _, q in pairs]
    return components(int(comp.max()) + 1, np.array(a, np.int64), np.array(b, np.int64))[comp]


def join_single_channels(store: Store, comp: Ints, seeded: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Blocks that hold one channel each are these channels, where a parameter met them as blocks (the scale of an image
    that a vector was laid out as). Returns the components, and the blocks that are channels now."""
    labels, blocks = stacked(store.members)
    keep = (labels > 0) & (blocks > 0)
    pairs = np.unique(np.stack([comp[labels[keep]], comp[blocks[keep]]]), axis=1)
    if not pairs.size:
        return comp, np.zeros(0, np.int64)
    met = np.zeros(int(comp.max()) + 1, bool)
    met[comp[seeded]] = True
    family = block_families(store, comp)[pairs[1]]
    single = []
    for fam in np.unique(family[met[pairs[1]]]):
        channels, own = pairs[:, family == fam]
        if len(channels) == len(np.unique(channels)) == len(np.unique(own)):
            single.append(pairs[:, family == fam])
    found = np.concatenate(single, axis=1) if single else np.zeros((2, 0), np.int64)
    joined = components(int(comp.max()) + 1, found[0], found[1])
    return joined[comp], joined[found[1]]


def spread_read(store: Store, flags: Ints) -> None:
    """A weight that is itself computed (a query made from learned latents) reads with all its parts, its bias too."""
    n = store.n_atoms
    a, b = stacked(store.pos_edges)
    node = lambda signed: 2 * np.abs(signed) + (signed < 0)  # noqa: E731
    root = components(2 * n, np.concatenate([node(a), node(a) ^ 1]), np.concatenate([node(b), node(b) ^ 1]))
    plus, minus = root[0::2], root[1::2]
    reads = np.zeros(int(root.max()) + 1, bool)
    reads[plus[(flags & L.COMPUTED) != 0]] = True
    flags[reads[plus] & (plus != minus)] |= L.COMPUTED


def solve(store: Store) -> Facts:
    """Take the connected components and carry flags and hashes over to them."""
    n = store.n_atoms
    comp = components(n, *stacked([(a, b) for a, b, _ in store.edges]))
    comp = join_equal_blocks(store, comp)
    atom = np.concatenate([np.arange(s.start, s.start + s.n) for s in store.seeds] or [np.zeros(0, np.int64)])
    seeded = np.zeros(n, bool)
    seeded[atom] = True
    comp, channels = join_single_channels(store, comp, seeded)
    plain = components(n, *stacked([(a, b) for a, b, is_plain in store.edges if is_plain]))
    n_comps = int(comp.max()) + 1
    atom_flags = np.zeros(n, np.int64)
    comp_flags = np.zeros(n_comps, np.int64)
    reason: dict[int, dict[int, int]] = {}
    for event, (atoms, bit, _, text) in enumerate(store.flags):
        index = atoms.numpy()
        atom_flags[index] |= bit
        if bit not in (L.READ, L.WRITE, L.COMPUTED, L.COMPUTED_WRITE):
            first = reason.setdefault(bit, {})
            for c in np.unique(comp[index]):
                if text == OUTPUT:
                    first[int(c)] = event
                first.setdefault(int(c), event)
    spread_read(store, atom_flags)
    np.bitwise_or.at(comp_flags, comp, atom_flags)
    touch = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for key, flat in store.touches:
            values = flat.numpy()
            np.add.at(touch, values[values > 0], mix(key))
        comp_touch = np.zeros(n_comps, np.uint64)
        np.add.at(comp_touch, comp, touch)
    is_block = np.zeros(n_comps, bool)
    is_block[comp[~seeded]] = True
    is_block[comp[0]] = False
    is_block[channels] = False
    base = Atoms(
        atom,
        np.repeat(np.arange(len(store.seeds)), [s.n for s in store.seeds]),
        np.concatenate([np.arange(s.n) for s in store.seeds] or [np.zeros(0, np.int64)]),
        comp[atom],
        touch[atom],
    )
    return Facts(store, comp, plain, comp_flags, atom_flags, touch, comp_touch, is_block, base, reason)


def table(channel: Ints, pos: Ints, touch: Hashes, n: int) -> Ints:
    """Positions by channel, (n, M), -1 where a channel has fewer."""
    order = np.lexsort((pos, touch, channel))
    channel, pos = channel[order], pos[order]
    counts = np.bincount(channel, minlength=n)
    rank = np.arange(len(channel)) - np.repeat(np.cumsum(counts) - counts, counts)
    out = np.full((n, int(counts.max())), -1, np.int64)
    out[channel, rank] = pos
    return out


def grids(facts: Facts) -> tuple[list[list[Ints]], Ints]:
    """Lines of components that must keep equal counts, and the components whose grid makes no sense."""
    families: list[list[Ints]] = []
    broken: list[Ints] = []
    for labels in facts.store.rects:
        array = np.where(labels.numpy() > 0, facts.comp[np.maximum(labels.numpy(), 0)], -1)
        for d in range(array.ndim):
            if array.shape[d] > 1 and (array == np.take(array, [0], d)).all():
                array = np.take(array, [0], d)
        array = array.squeeze()
        if array.ndim < 2:
            continue
        if (array < 0).any():
            broken.append(np.unique(array[array >= 0]))
            continue
        lines = list({tuple(np.unique(line).tolist()) for line in array.reshape(-1, array.shape[-1])})
        lines.sort()
        if len(lines) < 2:
            continue
        flat = np.array([c for line in lines for c in line], dtype=np.int64)
        if len(np.unique(flat)) != len(flat):
            broken.append(np.unique(flat))
            continue
        families.append([np.array(line, dtype=np.int64) for line in lines])
    bad = np.unique(np.concatenate(broken)) if broken else np.zeros(0, np.int64)
    return families, bad


def reason_of(facts: Facts, comps: Ints, bits: int, where: Sequence[str]) -> str:
    """The first recorded reason for any of some flags on any of some components."""
    events = [first[c] for bit, first in facts.reason.items() if bit & bits for c in comps.tolist() if c in first]
    if not events:
        return "is laid out in a grid whose lines overlap"
    best = min(events, key=lambda event: (facts.store.flags[event][3] != OUTPUT, event))
    _, _, node, text = facts.store.flags[best]
    return f"{text}{where[node]}" if text else f"is part of a layout that cannot change{where[node]}"
