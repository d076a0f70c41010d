"""Gauges: what may be rescaled or flipped here and undone there, from the signed statements of the rules."""

from __future__ import annotations

import numpy as np
import torch

from weightfold.graph.group import Gauge
from weightfold.graph.labels import Store
from weightfold.graph.solve import Facts, Ints, components, mix, stacked, table


def gauge_roots(store: Store, kind: str) -> tuple[Ints, Ints]:
    """Root and exponent of the gauge of every atom; root -1 where it is dead.

    Signs are followed on the double cover: atom a is the pair of nodes (a, +), (a, -).
    """
    n = store.n_atoms
    edges = store.pos_edges if kind == "positive" else store.sgn_edges
    dead_list = store.dead_pos if kind == "positive" else store.dead_sgn
    a, b = stacked(edges)
    node = lambda signed: 2 * np.abs(signed) + (signed < 0)  # noqa: E731
    na, nb = node(a), node(b)
    root = components(2 * n, np.concatenate([na, na ^ 1]), np.concatenate([nb, nb ^ 1]))
    plus, minus = root[0::2], root[1::2]
    low = np.minimum(plus, minus)
    exponent = np.where(plus <= minus, 1, -1)
    dead = np.zeros(int(root.max()) + 1, bool)
    if kind == "positive":
        dead[low[plus == minus]] = True
    if dead_list:
        dead[low[torch.cat(dead_list).numpy()]] = True
    return np.where(dead[low], -1, low), exponent


def gauges_of(facts: Facts, channel: Ints, rows: Ints, roots: Ints, exponents: Ints, kind: str) -> list[Gauge]:
    """Gauges of one group. ``rows`` index the base atoms of the group, ``channel`` is the channel of each."""
    base, seeds = facts.base, facts.store.seeds
    root, sign = roots[base.atom[rows]], exponents[base.atom[rows]]
    alive = root >= 0
    rows, channel, root, sign = rows[alive], channel[alive], root[alive], sign[alive]
    if not len(rows):
        return []
    _, ids = np.unique(root, return_inverse=True)
    signature = np.zeros(ids.max() + 1, np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(signature, ids, mix(base.seed[rows].astype(np.uint64) * np.uint64(4) + (sign > 0).astype(np.uint64)))
    gauges = []
    for key in dict.fromkeys(signature.tolist()):
        mine = signature[ids] == np.uint64(key)
        r, c, s, i = rows[mine], channel[mine], sign[mine], ids[mine]
        order = np.lexsort((base.pos[r], base.seed[r]))
        first = dict.fromkeys(i[order].tolist())
        number = {g: k for k, g in enumerate(first)}
        local = np.array([number[g] for g in i.tolist()])
        channels = np.zeros(len(first), np.int64)
        channels[local] = c
        flip = 1 if s[np.argmin(base.seed[r])] > 0 else -1
        axes = []
        for seed_id in np.unique(base.seed[r]):
            for e in (1, -1):
                pick = (base.seed[r] == seed_id) & (s * flip == e)
                if pick.any():
                    index = table(local[pick], base.pos[r][pick], base.touch[r][pick], len(first))
                    seed = seeds[seed_id]
                    axes.append((seed.tensor, seed.dim, seed.slabs, e, torch.from_numpy(index)))
        if kind == "sign" or any(a[3] > 0 for a in axes):
            gauges.append(Gauge(kind, torch.from_numpy(channels), tuple(axes)))
    return gauges


def paired_role(role: str, exponents: Ints) -> str:
    """In a product of two activations (queries and keys) one side writes the channel, the other reads it."""
    if (exponents > 0).all():
        return "write" if role == "read" else role
    return "read" if (exponents < 0).all() else "both"
