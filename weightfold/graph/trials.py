"""Try admitted edits of many groups at once on a generic copy: plant what an edit may rely on, edit, compare outputs.

An edit promises something only where its condition holds: a removal where the channel is silent or unread, a merge
where two channels are duplicates. Each trial plants those conditions on channels of their own, runs the copy, makes the
edits and runs it again, in every mode. With nothing wrong, a few forwards settle the edits of all groups together.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from weightfold.errors import WeightfoldError
from weightfold.graph import edit as edits
from weightfold.graph.apply import Undo, apply, find_tensor
from weightfold.graph.copies import flush_caches
from weightfold.graph.edit import Edit
from weightfold.graph.export import Example
from weightfold.graph.failures import user_line
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.layout import from_front, to_front
from weightfold.graph.twin import Failure, Limits, Twin, change, copy_within

SILENT, UNREAD, MERGE, SPLIT, PERMUTE, RESCALE, SIGN = KINDS = (
    "silent", "unread", "merge", "split", "permute", "rescale", "sign",
)  # fmt: skip
PLANTED = (SILENT, UNREAD, MERGE)
DOING: Mapping[str, str] = {
    SILENT: "removing silent channels of",
    UNREAD: "removing unread channels of",
    MERGE: "merging equal channels of",
    SPLIT: "copying channels of",
    PERMUTE: "permuting the channels of",
    RESCALE: "rescaling the channels of",
    SIGN: "flipping signs of channels of",
}

SOME, LAST, FIRST = "some", "last", "first"

Item = tuple[str, str]
"""(name of a group, kind of trial)."""


@dataclass(frozen=True)
class Finding:
    """What a trial saw that should not be.

    Args:
        size: relative change of an output; infinite where a forward or an edit failed.
        output: number of the output that changed most.
        training: whether it was the training forward.
        failed: what was raised, with the user's line; empty where outputs merely differ.
    """

    size: float
    output: int = 0
    training: bool = False
    failed: str = ""

    def __str__(self) -> str:
        mode = " in training mode" if self.training else ""
        if self.failed:
            return f"the forward{mode} fails afterwards: {self.failed}"
        size = "another size or other infinities" if self.size == float("inf") else f"{self.size:.2g} of its size"
        return f"output {self.output}{mode} changes by {size}"


N_DRAWS = 3
"""Copies that are drawn at the most."""
ENOUGH = 0.75
"""Mean share of channels with a gradient from which a copy is taken at once."""
BLIND = Finding(float("inf"), failed="it cannot be tried: outputs are not finite with a channel planted for it")
CHANCE = Finding(float("inf"), failed="it cannot be tried: two forwards on the same input differ")


def kinds_of(group: ChannelGroup) -> list[str]:
    """The kinds of trial that a group's admitted edits call for."""
    n = smallest_block(group)
    readable = bool(group.role("read")) and not group.role("both") and not group.read_elsewhere
    wanted = {
        SILENT: "remove" in group.admits and group.zero_at_zero and n > 1,
        UNREAD: "remove" in group.admits and readable and n > 1,
        MERGE: "merge" in group.admits and n > 1,
        SPLIT: "merge" in group.admits,
        PERMUTE: "permute" in group.admits and n > 1,
        RESCALE: any(g.kind == "positive" for g in group.gauges),
        SIGN: any(g.kind == "sign" for g in group.gauges),
    }
    return [kind for kind in KINDS if wanted[kind]]


def members(group: ChannelGroup) -> list[Tensor]:
    """The channels of each block; all of them where there are no blocks."""
    if group.block is None:
        return [torch.arange(group.n_channels)]
    return [(group.block == b).nonzero().flatten() for b in torch.unique(group.block)]


def has_several_places(group: ChannelGroup) -> bool:
    """Whether a channel has several places on an axis: then a single one that is left over cannot be copied."""
    return any(axis.index.shape[1] > 1 for axis in group.axes)


def smallest_block(group: ChannelGroup) -> int:
    return min(map(len, members(group)))


@dataclass
class Picked:
    """Channels of one group, and the part that each plays in a trial: none plays two."""

    silent: list[int] = field(default_factory=list)
    unread: list[int] = field(default_factory=list)
    originals: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)

    def take(self, row: list[int], kinds: Collection[str], which: str, spare: int) -> None:
        """Give the channels of one block their parts; ``row``: its channels, those to go first in front; ``spare``:
        how many must stay besides one."""
        n, row = len(row), list(row)
        share = 1
        if which == SOME:
            others = len({UNREAD, MERGE} & set(kinds))
            share = max(1, min(n - 1 - others - spare, n // 3)) if SILENT in kinds else max(1, n // 4)
        for kind, out in ((SILENT, self.silent), (UNREAD, self.unread)):
            if kind in kinds:
                out += row[:share]
                del row[:share]
                share = 1
        if MERGE in kinds:
            self.copies.append(row.pop(0))
            self.originals.append(row[-1])
        if SPLIT in kinds:
            self.doubled.append(row[-1])


def pick(group: ChannelGroup, kinds: Collection[str], generator: torch.Generator, which: str = SOME) -> Picked:
    """Choose channels of each block for the trials of some kinds.

    Args:
        which: a few at random; the last one; the first one. What a forward picks by its position shows in
            one of these; so does what moves by half a channel (padding on both sides).
    """
    out, n = Picked(), smallest_block(group)
    for block in members(group):
        row = block[torch.randperm(len(block), generator=generator)].tolist()
        if which in (LAST, FIRST):
            end = int(block[-1 if which == LAST else 0])
            row = [end, *(c for c in row if c != end)]
        out.take(row[:n], kinds, which, int(SPLIT in kinds and has_several_places(group)))
    return out


def rounds(group: ChannelGroup, kinds: Sequence[str]) -> list[list[str]]:
    """Kinds that fit into one trial.

    What needs nothing planted goes first, on all that is alive. Then each removal needs a channel of its own, and half
    of the channels stay as they are: a network of which too much is dead shows nothing.
    """
    room = max(smallest_block(group) // 2, 1)
    spare = int(has_several_places(group))
    out: list[list[str]] = [[kind for kind in kinds if kind not in PLANTED], []]
    used = 0
    for kind in [kind for kind in kinds if kind in PLANTED]:
        need = int(kind in (SILENT, UNREAD, MERGE))
        if (used + need > room and need) or (kind == SPLIT and used + spare > room and used):
            out.append([])
            used = 0
        out[-1].append(kind)
        used += need
    return [kinds for kinds in out if kinds]


# planting -------------------------------------------------------------------------------------------------------------


class Planter:
    """Writes into a copy's tensors and puts them back."""

    def __init__(self, twin: Twin) -> None:
        self.model = twin.model
        self.held: dict[str, tuple[Tensor, Tensor]] = {}

    def plant(self, group: ChannelGroup, picked: Picked, *, gently: bool = False) -> None:
        """Make channels duplicates, silent or unread, in this order: a copy of a silent channel is silent.

        Args:
            gently: silence a weight by its magnitude where it has one beside its direction (weight norm), since a
                direction of length zero is none.
        """
        scaled = {a.tensor.rpartition(".")[0] for a in group.axes if a.role == "pointwise"} if gently else set()
        for axis in group.axes:
            written = axis.role in ("write", "pointwise", "both")
            rows = picked.silent if written else picked.unread if axis.role == "read" else []
            matrix = axis.role == "write" and find_tensor(self.model, axis.tensor)[2].ndim > 1
            if matrix and axis.tensor.rpartition(".")[0] in scaled:
                rows = []
            pairs = [p for p in zip(picked.originals, picked.copies, strict=True) if written]
            if not rows and not pairs:
                continue
            tensor = find_tensor(self.model, axis.tensor)[2]
            if axis.tensor not in self.held:
                self.held[axis.tensor] = (tensor, tensor.detach().clone())
            front = to_front(tensor.detach(), axis.dim, axis.slabs).clone()
            for original, copy in pairs:
                have = (axis.index[original] >= 0) & (axis.index[copy] >= 0)
                front[axis.index[copy][have]] = front[axis.index[original][have]]
            if rows:
                at = axis.index[rows]
                front[at[at >= 0]] = 0
            with torch.no_grad():
                tensor.copy_(from_front(front, axis.dim, axis.slabs))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, value in self.held.values():
                tensor.copy_(value)
        self.held.clear()


# edits ----------------------------------------------------------------------------------------------------------------


def edits_of(
    graph: ChannelGraph, name: str, kinds: Collection[str], picked: Picked, generator: torch.Generator
) -> Generator[tuple[ChannelGraph, Edit], ChannelGraph, None]:
    """The edits of one group's trial, one after the other; the graph that each is for is sent back in."""
    group = graph[name]
    dead = {*picked.silent, *picked.unread}
    first: Edit | None = None
    if dead:
        first = edits.remove(group, torch.tensor([c for c in range(group.n_channels) if c not in dead]))
    if PERMUTE in kinds:
        block = group.block if first is None or group.block is None else group.block[first.carry]
        order = _random_order(group.n_channels if first is None else first.n_after, block, generator)
        turn = Edit(name, "permute", len(order), order)
        first = turn if first is None else first.then(turn)
    if first is not None:
        graph = yield graph, first
    number = {int(c): k for k, c in enumerate((first.carry if first else torch.arange(group.n_channels)).tolist())}
    now = _found(graph, name)
    if picked.copies and now is not None:
        labels = torch.arange(now.n_channels)
        for original, copy in zip(picked.originals, picked.copies, strict=True):
            labels[number[copy]] = number[original]
        merged = edits.merge(now, labels)
        graph = yield graph, merged
        number = {c: int(merged.B[k].nonzero()[0]) for c, k in number.items()}
        now = _found(graph, name)
    if picked.doubled and now is not None:
        copies = torch.ones(now.n_channels, dtype=torch.long)
        copies[[number[c] for c in picked.doubled]] = 2
        graph = yield graph, edits.split(now, copies)
        now = _found(graph, name)
    for at, gauge in enumerate(now.gauges if now is not None else ()):
        assert now is not None
        if gauge.kind == "positive" and RESCALE in kinds:
            yield graph, edits.rescale(now, torch.rand(len(gauge), generator=generator) * 1.5 + 0.5, at)
        if gauge.kind == "sign" and SIGN in kinds:
            yield graph, edits.sign(now, torch.rand(len(gauge), generator=generator) > 0.5, at)


def _found(graph: ChannelGraph, name: str) -> ChannelGroup | None:
    return next((g for g in graph.groups if g.name == name), None)


def _random_order(n: int, block: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random order in which every channel moves: one cycle within each block."""
    order = torch.arange(n)
    for b in [None] if block is None else torch.unique(block):
        mine = order.clone() if b is None else (block == b).nonzero().flatten()
        cycle = mine[torch.randperm(len(mine), generator=generator)]
        order[cycle] = cycle.roll(1)
    return order


# trials ---------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class EditTrials:
    """Runs trials on one copy.

    Args:
        n_runs: forwards so far.
        latest: outputs with what was planted last.
    """

    twin: Twin
    generator: torch.Generator
    n_runs: int = 0
    latest: tuple[tuple[str, bool], dict[bool, list[Tensor]] | Finding] | None = None

    def run(self, graph: ChannelGraph, items: Sequence[Item], which: str = SOME) -> Finding | None:
        """Make the edits of all items at once; None where every output stays what it was.

        Each group's kinds must fit into one round (`rounds`), and no two groups may share an axis (`waves`).
        """
        found = self._run(graph, items, which, gently=False)
        if found is BLIND:
            found = self._run(graph, items, which, gently=True)
        return found if found is None or found.failed or self.twin.repeats() else CHANCE

    def _run(self, graph: ChannelGraph, items: Sequence[Item], which: str, *, gently: bool) -> Finding | None:
        wanted: dict[str, list[str]] = {}
        for name, kind in items:
            wanted.setdefault(name, []).append(kind)
        planter = Planter(self.twin)
        parts = {name: pick(graph[name], kinds, self.generator, which) for name, kinds in wanted.items()}
        undos: list[Undo] = []
        try:
            for name, part in parts.items():
                planter.plant(graph[name], part, gently=gently)
            flush_caches(self.twin.model)
            before = self._before((str(parts), gently)) if planter.held else self.twin.plain
            if isinstance(before, Finding):
                return replace(before, failed=f"it cannot be tried: {before.failed}")
            if not self._finite(before):
                return BLIND
            problem = self._edit(graph, wanted, parts, undos)
            return problem or self._compared(before)
        finally:
            for undo in reversed(undos):
                undo.restore(flush=False)
            planter.restore()
            flush_caches(self.twin.model)

    def _edit(
        self, graph: ChannelGraph, wanted: Mapping[str, Sequence[str]], parts: Mapping[str, Picked], undos: list[Undo]
    ) -> Finding | None:
        for name, kinds in wanted.items():
            if _found(graph, name) is None:
                continue
            steps = edits_of(graph, name, kinds, parts[name], self.generator)
            try:
                graph, edit = next(steps)
                while True:
                    graph, undo = apply(self.twin.model, graph, edit, flush=False)
                    undos.append(undo)
                    graph, edit = steps.send(graph)
            except StopIteration:
                continue
            except (WeightfoldError, RuntimeError, AttributeError, ValueError, TypeError, IndexError) as error:
                return Finding(float("inf"), failed=f"cannot be edited: {_first_line(error)}")
        flush_caches(self.twin.model)
        return None

    def _runs(self) -> dict[bool, list[Tensor]] | Finding:
        out = {}
        for mode in self.twin.modes:
            self.n_runs += 1
            try:
                out[mode] = self.twin.run(mode)
            except Failure as failure:
                text = f"{_first_line(failure.error)}{user_line(failure.error)}"
                return Finding(float("inf"), training=mode, failed=text)
        return out

    def _before(self, planted: tuple[str, bool]) -> dict[bool, list[Tensor]] | Finding:
        """The outputs with something planted; taken once where trials differ in what follows alone."""
        if self.latest is None or self.latest[0] != planted:
            self.latest = (planted, self._runs())
        return self.latest[1]

    def _finite(self, before: Mapping[bool, list[Tensor]]) -> bool:
        """Whether outputs are finite wherever they are without anything planted."""
        return all(
            x.shape == y.shape and bool((torch.isfinite(x) | ~y).all())
            for mode in self.twin.modes
            for x, y in zip(before[mode], (torch.isfinite(z) for z in self.twin.plain[mode]), strict=True)
        )

    def _compared(self, before: Mapping[bool, list[Tensor]]) -> Finding | None:
        after = self._runs()
        if isinstance(after, Finding):
            return after
        for mode in self.twin.modes:
            size, output = change(before[mode], after[mode])
            if not size <= self.twin.tolerance:
                return Finding(size, output, mode)
        return None


def trials_on(twin: Twin) -> EditTrials:
    """Trials with the channels that a fixed seed picks: the same graph on every call."""
    return EditTrials(twin, torch.Generator().manual_seed(1))


def trials_for(
    model: nn.Module,
    example: Example,
    graph: ChannelGraph,
    names: Sequence[str],
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    *,
    training: bool = True,
) -> EditTrials | str:
    """Trials on a copy whose outputs depend on the named groups; or why there is none.

    On a copy whose units happen to be dead an edit changes nothing, right or wrong. So the weights are drawn again
    where too few channels have a gradient, and the liveliest of a few copies is taken.
    """
    best: tuple[float, Twin] | None = None
    for seed in range(N_DRAWS):
        twin = copy_within(model, example, limits, training=training, seed=seed)
        if isinstance(twin, str):
            return twin
        share, asleep = awake(twin, graph, names)
        if asleep:
            also = f"{len(asleep)} groups on which no output depends here ('{asleep[0]}')"
            twin = replace(twin, left_out="; ".join(filter(None, (twin.left_out, also))))
        if best is None or share > best[0]:
            best = (share, twin)
        if share >= ENOUGH:
            break
    assert best is not None
    return trials_on(best[1])


def awake(twin: Twin, graph: ChannelGraph, names: Sequence[str]) -> tuple[float, list[str]]:
    """The mean share of channels that outputs depend on, and the groups that have none such."""
    slopes = twin.slopes()
    shares: dict[str, float] = {}
    for name in names:
        group = graph[name]
        axes = [axis for axis in group.axes if axis.role != "read" and axis.tensor in slopes]
        if not axes:
            continue
        alive = torch.zeros(group.n_channels, dtype=torch.bool)
        for axis in axes:
            front = to_front(slopes[axis.tensor], axis.dim, axis.slabs)
            moves = (front.reshape(front.shape[0], -1) != 0).any(1)
            alive |= (moves[axis.index.clamp_min(0)] & (axis.index >= 0)).any(1)
        shares[name] = float(alive.double().mean())
    if not shares:
        return 1.0, []
    return sum(shares.values()) / len(shares), [name for name, share in shares.items() if share == 0]


def _first_line(error: Exception) -> str:
    return ((str(error).splitlines() or [""])[0] or type(error).__name__)[:200]


def waves(graph: ChannelGraph, names: Sequence[str]) -> list[list[str]]:
    """Groups in few sets, none of which holds two that share an axis or an attribute."""
    waiting, out = list(names), []
    while waiting:
        taken: set[tuple[str, int | str]] = set()
        now = []
        for name in waiting:
            mine = {(a.tensor, a.dim) for a in graph[name].axes} | {a[:2] for a in graph[name].attributes}
            if not mine & taken:
                now.append(name)
                taken |= mine
        out.append(now)
        waiting = [name for name in waiting if name not in now]
    return out
