"""From solved statements to channel groups: components sorted by kind, with what each kind admits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from weightfold.graph import labels as L
from weightfold.graph.gauges import gauge_roots, gauges_of, paired_role
from weightfold.graph.group import Axis, ChannelGroup, Frozen
from weightfold.graph.solve import (
    Facts,
    Hashes,
    Ints,
    block_families,
    components,
    grids,
    mix,
    reason_of,
    stacked,
    table,
)


@dataclass
class Verdict:
    """Edits that a group admits, and the reasons against the others: of several, the first counts."""

    admits: set[str]
    reasons: dict[str, str] = field(default_factory=dict)

    def revoke(self, kinds: Collection[str], reason: str) -> None:
        self.reasons |= dict.fromkeys(self.admits & set(kinds), reason)
        self.admits -= set(kinds)


@dataclass
class Builder:
    """Assembles groups from solved facts; ``where`` maps a node to " (file:line: code)"."""

    facts: Facts
    where: Sequence[str]

    def __post_init__(self) -> None:
        self.roots = {kind: gauge_roots(self.facts.store, kind) for kind in ("positive", "sign")}
        self.names: set[str] = set()
        self.stuck: list[tuple[Ints, Ints]] = []

    def channel_groups(self) -> list[ChannelGroup]:
        facts, base = self.facts, self.facts.base
        live = ~facts.is_block[base.comp] & (facts.comp_touch[base.comp] != 0)
        rows = np.flatnonzero(live)
        classes = self._classes(rows)
        lines, bad = grids(facts)
        family, block = self._families(classes, lines)
        groups = []
        order = np.argsort(family[base.comp[rows]], kind="stable")
        rows = rows[order]
        of = family[base.comp[rows]]
        edge = len(rows) > 0  # a network without parameters has no groups
        for start, end in pairwise(np.flatnonzero(np.r_[edge, of[1:] != of[:-1], edge])):
            group = self._channel_group(rows[start:end], block, bad)
            if group is not None:
                groups.append(group)
        return groups

    def _classes(self, rows: Ints) -> Ints:
        """Components of one kind: same tensors, same operators met, same restrictions."""
        facts, base = self.facts, self.facts.base
        key = np.zeros(facts.n_comps, np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(key, base.comp[rows], mix(base.touch[rows] + mix(base.seed[rows])))
            keep = ~(L.READ | L.WRITE | L.COMPUTED | L.COMPUTED_WRITE)
            key += mix(facts.comp_touch + mix(facts.comp_flags & keep))
        used = np.zeros(facts.n_comps, bool)
        used[base.comp[rows]] = True
        classes = np.full(facts.n_comps, -1, np.int64)
        classes[used] = np.unique(key[used], return_inverse=True)[1]
        return classes

    def _families(self, classes: Ints, families: list[list[Ints]]) -> tuple[Ints, Hashes]:
        """Join classes whose sizes hang together; number the blocks that must keep equal counts."""
        n = int(classes.max()) + 2 if len(classes) else 1
        block = mix(classes.astype(np.uint64))
        a, b = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        with np.errstate(over="ignore"):
            for number, lines in enumerate(families):
                anchor = classes[lines[0][0]]
                for k, line in enumerate(lines):
                    block[line] += mix(np.uint64(1 + number) * np.uint64(1 << 20) + np.uint64(k))
                    linked = np.unique(classes[line])
                    a.append(np.full(len(linked), anchor))
                    b.append(linked)
        left, right = np.concatenate(a), np.concatenate(b)
        keep = (left >= 0) & (right >= 0)
        joined = components(n, left[keep], right[keep])
        return np.where(classes >= 0, joined[classes], -1), block

    def _channel_group(self, rows: Ints, block: Hashes, bad: Ints) -> ChannelGroup | None:
        facts, base = self.facts, self.facts.base
        rows, comps, fixed = self._movable(rows, bad)
        if fixed == "all" and not self._any_gauge(rows):
            return None
        number = np.full(facts.n_comps, -1, np.int64)
        number[comps] = np.arange(len(comps))
        channel = number[base.comp[rows]]
        gauges = [
            g for kind, (roots, exps) in self.roots.items() for g in gauges_of(facts, channel, rows, roots, exps, kind)
        ]
        if len(comps) < 2 and not gauges:
            return None
        flags = int(np.bitwise_or.reduce(facts.comp_flags[comps]))
        met = facts.comp_flags[comps] & (L.PAIRED | L.READ)
        besides = bool((met == (L.PAIRED | L.READ)).any())
        axes = self._axes(rows, channel, len(comps), paired=comps[met == L.PAIRED])
        ids = _in_order_of_use(block[comps])
        verdict = self._verdict(comps, ids, fixed, axes)
        if besides:
            verdict.revoke({"merge"}, "is multiplied with others of its kind, and read by a weight besides")
        return ChannelGroup(
            name=self._name(axes),
            kind="channels",
            n_channels=len(comps),
            axes=axes,
            block=torch.from_numpy(ids) if ids.any() else None,
            admits=frozenset(verdict.admits | {{"positive": "rescale"}.get(g.kind, g.kind) for g in gauges}),
            reasons=verdict.reasons,
            gauges=tuple(gauges),
            zero_at_zero=not flags & L.OFFSET,
            written=self._written(comps),
            read_elsewhere=besides or bool(flags & (L.ELSEWHERE | L.ELSEWHERE_IN)),
        )

    def _movable(self, rows: Ints, bad: Ints) -> tuple[Ints, Ints, str]:
        """Rows and components (in order of first use) that are not fixed, and how many were fixed: none, some or all.

        Where all are fixed, all are returned: they may still admit a rescale.
        """
        facts, base = self.facts, self.facts.base
        in_order = base.comp[rows[np.lexsort((base.pos[rows], base.seed[rows]))]]
        comps = np.array(list(dict.fromkeys(in_order.tolist())), dtype=np.int64)
        fixed = ((facts.comp_flags[comps] & (L.FROZEN | L.FROZEN_IN)) != 0) | np.isin(comps, bad)
        if not fixed.any() or fixed.all():
            return rows, comps, "all" if fixed.any() else "none"
        return rows[np.isin(base.comp[rows], comps[~fixed])], comps[~fixed], "some"

    def _verdict(self, comps: Ints, ids: Ints, fixed: str, axes: Sequence[Axis]) -> Verdict:
        """What a group of channels in the blocks ``ids`` admits apart from rescaling, and why not the rest."""
        facts = self.facts
        verdict = Verdict({"permute", "remove", "merge"})
        if fixed == "all":
            verdict.revoke(verdict.admits, reason_of(facts, comps, L.FROZEN | L.FROZEN_IN, self.where))
        flags = int(np.bitwise_or.reduce(facts.comp_flags[comps]))
        no_remove = L.NO_REMOVE | L.NO_REMOVE_IN
        no_merge = L.NO_MERGE | L.NO_MERGE_IN | no_remove
        if flags & no_remove:
            verdict.revoke({"remove"}, reason_of(facts, comps, no_remove, self.where))
        if flags & no_merge:
            verdict.revoke({"merge"}, reason_of(facts, comps, no_merge, self.where))
        sizes = np.bincount(ids)
        if fixed == "some" or len(set(sizes.tolist())) > 1:
            text = "shares a layout with channels that are frozen, or whose blocks differ in size"
            verdict.revoke({"remove", "merge"}, text)
        if any(a.role == "both" for a in axes):
            verdict.revoke({"merge"}, "one tensor both writes and reads these channels (tied weights)")
        if len(sizes) == len(comps):
            verdict.revoke({"remove", "merge"}, "each block holds one channel: edit the blocks as wholes")
        return verdict

    def _written(self, comps: Ints) -> tuple[str, ...]:
        mine = set(comps.tolist())
        hits = (node for node, atom in self.facts.store.written if int(self.facts.comp[int(atom[0])]) in mine)
        return tuple(dict.fromkeys(self.where[node] for node in hits if self.where[node]))

    def _any_gauge(self, rows: Ints) -> bool:
        atoms = self.facts.base.atom[rows]
        return any(bool((roots[atoms] >= 0).any()) for roots, _ in self.roots.values())

    def _axes(
        self, rows: Ints, channel: Ints, n: int, *, paired: Ints | Sequence[int] = (), whole: bool = False
    ) -> tuple[Axis, ...]:
        """The axes of a group. ``paired``: channels of queries and keys; ``whole``: blocks, whose parts all write."""
        facts, base = self.facts, self.facts.base
        axes = []
        for seed_id in np.unique(base.seed[rows]):
            mine = base.seed[rows] == seed_id
            r = rows[mine]
            seed = facts.store.seeds[seed_id]
            index = torch.from_numpy(table(channel[mine], base.pos[r], base.touch[r], n))
            meets = np.isin(base.comp[r], paired)
            roles = {self._role(r[part], whole, part is meets) for part in (meets, ~meets) if part.any()}
            role = roles.pop() if len(roles) == 1 else "both"
            axes.append(Axis(seed.tensor, seed.dim, role, index, seed.n, seed.slabs, facts.store.tap(seed)))
        return tuple(axes)

    def _role(self, rows: Ints, whole: bool, paired: bool) -> str:
        facts, atoms = self.facts, self.facts.base.atom[rows]
        bits = int(np.bitwise_or.reduce(facts.atom_flags[atoms]))
        read, write = bool(bits & L.READ), bool(bits & L.WRITE)
        if bits & L.COMPUTED and not whole:
            whole_comp = int(np.bitwise_or.reduce(facts.comp_flags[facts.base.comp[rows]]))
            read = True
            write = bool(whole_comp & L.COMPUTED_WRITE or (facts.atom_flags[atoms] & L.COMPUTED == 0).any())
        role = "both" if read and write else "read" if read else "write" if write else "pointwise"
        return paired_role(role, self.roots["positive"][1][atoms]) if paired and role != "both" else role

    def _name(self, axes: Sequence[Axis], suffix: str = "") -> str:
        first = next((a for a in axes if a.role == "write"), axes[0])
        module, _, leaf = first.tensor.rpartition(".")
        name = (
            module if leaf.startswith(("weight", "bias")) and "_l" not in leaf and module else first.tensor
        ) + suffix
        candidate, k = name, 2
        while candidate in self.names:
            candidate = f"{name}#{k}"
            k += 1
        self.names.add(candidate)
        return candidate

    # blocks -----------------------------------------------------------------------------------------------------------

    def block_groups(self) -> list[ChannelGroup]:
        facts = self.facts
        if not facts.store.used:
            return []
        labels, blocks = stacked(facts.store.members)
        keep = (labels > 0) & (blocks > 0)
        used = np.unique(facts.comp[torch.cat([u.flatten() for u in facts.store.used]).numpy()])
        used = used[facts.is_block[used]]
        family = block_families(facts.store, facts.comp)
        root_of_label, root_of_block = facts.plain[labels[keep]], facts.comp[blocks[keep]]
        groups = []
        for fam in dict.fromkeys(family[used].tolist()):
            roots = used[family[used] == fam]
            group = self._block_group(roots, root_of_label, root_of_block)
            if group is not None:
                groups.append(group)
        return groups

    def _block_group(self, roots: Ints, root_of_label: Ints, root_of_block: Ints) -> ChannelGroup | None:
        facts, base = self.facts, self.facts.base
        if len(roots) < 2:
            return None
        mine = np.isin(root_of_block, roots)
        pairs = np.unique(np.stack([root_of_label[mine], root_of_block[mine]]), axis=1)
        owners, counts = np.unique(pairs[0], return_counts=True)
        single = np.isin(pairs[0], owners[counts == 1])
        owner = np.full(int(facts.plain.max()) + 1, -1, np.int64)
        owner[pairs[0][single]] = pairs[1][single]
        block_of_atom = owner[facts.plain[base.atom]]
        direct = np.isin(base.comp, roots)
        block_of_atom[direct] = base.comp[direct]
        problem = self._slab_problem(len(roots), block_of_atom)
        slabbed = np.array([seed.slabs > 1 for seed in facts.store.seeds])[base.seed]
        rows = np.flatnonzero((block_of_atom >= 0) & ~slabbed)
        if not len(rows):
            return None
        problem = problem or self._block_problem(roots, rows, block_of_atom, np.unique(root_of_label))
        order = np.lexsort((base.pos[rows], base.seed[rows]))
        ordered = np.array(list(dict.fromkeys(block_of_atom[rows[order]].tolist())))
        number = np.full(facts.n_comps, -1, np.int64)
        number[ordered] = np.arange(len(ordered))
        channel = number[block_of_atom[rows]]
        children = np.unique(base.comp[rows])
        flags = int(np.bitwise_or.reduce(facts.comp_flags[np.concatenate([roots, children])]))
        own = int(np.bitwise_or.reduce(facts.comp_flags[roots]))
        signature = np.zeros(len(ordered), np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(signature, channel, mix(base.touch[rows] + mix(base.seed[rows])))
        inside = int(np.bitwise_or.reduce(facts.atom_flags[base.atom[rows]]))
        if (own | inside) & L.FROZEN:
            self.stuck.append((np.unique(base.seed[rows]), roots if own & L.FROZEN else children))
        if problem or len(np.unique(signature)) > 1 or (own | inside) & L.FROZEN:
            return None
        pairs = np.unique(np.stack([channel, base.comp[rows]]), axis=1)
        inner = facts.comp_flags[children] & (L.FROZEN_IN | L.NO_REMOVE_IN | L.NO_MERGE_IN)
        if pairs.shape[1] == len(ordered) == len(children) and not inner.any() and not np.isin(children, roots).any():
            return None
        axes = self._axes(rows, channel, len(ordered), whole=True)
        verdict, whole = Verdict({"permute", "remove", "merge"}), np.concatenate([roots, children])
        if flags & L.NO_REMOVE:
            verdict.revoke({"remove"}, reason_of(facts, whole, L.NO_REMOVE, self.where))
        roles = {a.role for a in axes}
        if flags & (L.NO_MERGE | L.NO_REMOVE) or "both" in roles or "read" not in roles:
            verdict.revoke({"merge"}, reason_of(facts, whole, L.NO_MERGE | L.NO_REMOVE, self.where))
        return ChannelGroup(
            name=self._name(axes, ".blocks"),
            kind="blocks",
            n_channels=len(ordered),
            axes=axes,
            block=None,
            admits=frozenset(verdict.admits),
            reasons=verdict.reasons,
            zero_at_zero=not flags & L.OFFSET,
            read_elsewhere=bool(flags & L.ELSEWHERE),
        )

    def _slab_problem(self, n_blocks: int, block_of_atom: Ints) -> bool:
        """Whether the blocks cut through a grouped convolution: its slabs must be these very blocks, its rows too."""
        base, seeds = self.facts.base, self.facts.store.seeds
        for seed_id, seed in enumerate(seeds):
            if seed.slabs < 2:
                continue
            mine = (base.seed == seed_id) & (block_of_atom >= 0)
            if not mine.any():
                continue
            pairs = np.unique(np.stack([base.pos[mine] // (seed.n // seed.slabs), block_of_atom[mine]]), axis=1)
            if n_blocks != seed.slabs or pairs.shape[1] != seed.slabs:
                return True
            rows_id = next(i for i, s in enumerate(seeds) if s.tensor == seed.tensor and s.dim == 0)
            rows = base.seed == rows_id
            slab = base.pos[rows] // (seeds[rows_id].n // seed.slabs)
            if dict(pairs.T.tolist()) != dict(zip(slab.tolist(), block_of_atom[rows].tolist(), strict=True)):
                return True
        return False

    def _block_problem(self, roots: Ints, rows: Ints, block_of_atom: Ints, in_blocks: Ints) -> bool:
        """Whether a channel inside the blocks has a part that is in no block and not shared by all of them.

        A part is shared if the channel has a place in every block, and no more places in that part than in one block,
        unless the part lies in blocks of its own (another layer's heads): ``in_blocks``, their roots.
        """
        base = self.facts.base
        children = np.unique(base.comp[rows])
        children = children[~np.isin(children, roots)]
        inside = np.isin(base.comp, children)
        loose = inside & (block_of_atom < 0)
        if not loose.any():
            return False
        per_block = np.zeros(self.facts.n_comps, np.int64)
        (_, comp, _), places = _counted(base.seed[rows], base.comp[rows], block_of_atom[rows])
        np.maximum.at(per_block, comp, places)
        plain = loose & ~np.isin(self.facts.plain[base.atom], in_blocks)
        (_, comp), places = _counted(base.seed[plain], base.comp[plain])
        if (places > per_block[comp]).any():
            return True
        suspects = np.unique(base.comp[loose])
        mine = np.isin(base.comp[rows], suspects)
        pairs = np.unique(np.stack([base.comp[rows][mine], block_of_atom[rows][mine]]), axis=1)
        _, counts = np.unique(pairs[0], return_counts=True)
        return bool((counts < len(roots)).any())

    # what is left -----------------------------------------------------------------------------------------------------

    def frozen(self, groups: Sequence[ChannelGroup]) -> list[Frozen]:
        """Dimensions that belong to no group that could be edited, with the reason."""
        facts, base = self.facts, self.facts.base
        covered: dict[tuple[str, int, int], set[int]] = {}
        for group in groups:
            if group.kind == "channels" and group.free:
                for axis in group.axes:
                    covered.setdefault((axis.tensor, axis.dim, axis.slabs), set()).update(
                        axis.index[axis.index >= 0].tolist()
                    )
        starts = np.cumsum([0, *(seed.n for seed in facts.store.seeds)])
        out = []
        for seed_id, seed in enumerate(facts.store.seeds):
            if seed.n < 2 or seed.slabs > 1:
                continue
            have = covered.get((seed.tensor, seed.dim, seed.slabs), set())
            lost = np.ones(seed.n, bool)
            lost[np.fromiter(have, np.int64, len(have))] = False
            if not lost.any():
                continue
            comps = np.unique(base.comp[starts[seed_id] : starts[seed_id] + seed.n][lost])
            if (facts.comp_touch[comps] == 0).all():
                text = "is not used by the traced forward"
            else:
                text = reason_of(facts, comps, L.FROZEN | L.FROZEN_IN, self.where)
            if " kernel" in text or " slabs" in text:
                continue
            out.append(Frozen(seed.tensor, seed.dim, int(lost.sum()), text))
        return [*out, *self._stuck_blocks({(f.tensor, f.dim) for f in out})]

    def _stuck_blocks(self, told: set[tuple[str, int]]) -> list[Frozen]:
        """Dimensions whose blocks (heads) cannot be edited as wholes, though the channels inside may be."""
        out = {}
        for seeds, comps in self.stuck:
            text = f"its blocks cannot be edited: it {reason_of(self.facts, comps, L.FROZEN, self.where)}"
            for seed in (self.facts.store.seeds[i] for i in seeds.tolist()):
                if seed.slabs == 1 and (seed.tensor, seed.dim) not in told:
                    out[seed.tensor, seed.dim] = Frozen(seed.tensor, seed.dim, seed.n, text)
        return list(out.values())


def _counted(*columns: Ints) -> tuple[Ints, Ints]:
    """Distinct rows of a table, column by column, and how often each occurs."""
    return np.unique(np.stack(columns), axis=1, return_counts=True)


def _in_order_of_use(keys: Hashes) -> Ints:
    """Equal keys get equal numbers, counted up in order of first use."""
    first = {key: k for k, key in enumerate(dict.fromkeys(keys.tolist()))}
    return np.array([first[key] for key in keys.tolist()], dtype=np.int64)
