"""Every admitted edit of a network, tried on a float64 copy and compared by itself.

Nothing of the library's own checks is used: planting, comparing and the modes are written here once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import WeightfoldError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup

TOLERANCE = 1e-9
MODES = ("eval", "train")


def leaves(value: Any) -> list[Tensor]:
    """All tensors of whatever a network returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else []


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest difference of any output over its largest magnitude; infinite where kind or shape differ."""
    if len(before) != len(after):
        return float("inf")
    return max((_distance(a, b) for a, b in zip(before, after, strict=True)), default=0.0)


def _distance(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    apart = (a - b).abs().max() / a.abs().max().clamp_min(1e-6) if a.numel() else torch.zeros(())
    return float(apart) if bool(torch.isfinite(apart)) else float("inf")


@dataclass(frozen=True)
class Finding:
    """An admitted edit that was tried: which, how far off, and in which mode; ``raised`` where it ended in an error."""

    group: str
    kind: str
    error: float
    mode: str = ""
    raised: str = ""

    @property
    def wrong(self) -> bool:
        return not self.error <= TOLERANCE


class Subject:
    """A network of its own in float64, with its inputs."""

    def __init__(self, net: nn.Module, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
        self.net = net.double()
        self.args = [_double(a) for a in args]
        self.kwargs = {name: _double(a) for name, a in kwargs.items()}
        for module in self.net.modules():
            _without_dropout(module)
        self.kept = self.state()

    def state(self) -> dict[str, Tensor]:
        named = [*self.net.named_parameters(), *self.net.named_buffers()]
        return {name: value.detach().clone() for name, value in named}

    def put(self, state: Mapping[str, Tensor]) -> None:
        """Write values back in place."""
        named = dict([*self.net.named_parameters(), *self.net.named_buffers()])
        with torch.no_grad():
            for name, value in state.items():
                named[name].copy_(value)

    def shapes_differ(self) -> bool:
        state = self.state()
        return {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in self.kept.items()}

    def changed(self, base: list[list[Tensor]]) -> str:
        """What is not as it was at first, or ""."""
        if self.shapes_differ():
            return "shapes differ once the edits are taken back"
        state = self.state()
        different = [name for name, value in self.kept.items() if not torch.equal(value, state[name])]
        if different:
            return f"{different[0]} differs once the edits are taken back"
        try:
            worst = max(distance(a, b) for a, b in zip(base, self.outputs(), strict=True))
        except Exception as error:
            return told(error)
        return "outputs differ once the edits are taken back" if worst > 0 else ""

    def outputs(self) -> list[list[Tensor]]:
        """Outputs in evaluation and in training mode; statistics are left as they were."""
        buffers = {name: value.detach().clone() for name, value in self.net.named_buffers()}
        out = []
        with torch.no_grad():
            for mode in MODES:
                self.net.train(mode == "train")
                out.append([leaf.clone() for leaf in leaves(self.net(*self.args, **self.kwargs))])
                self.put(buffers)
        self.net.eval()
        return out


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _without_dropout(module: nn.Module) -> None:
    """A random mask does not permute."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    if isinstance(getattr(module, "dropout", None), float):
        module.dropout = 0.0


# planting -------------------------------------------------------------------------------------------------------------


def cells(tensor: Tensor, axis: Axis, channel: int) -> list[Tensor]:
    """Views of everything that a channel has along an axis of a tensor."""
    width = axis.size // axis.slabs
    places = [int(at) for at in axis.index[channel] if at >= 0]
    return [tensor.detach().chunk(axis.slabs, 0)[at // width].select(axis.dim, at % width) for at in places]


def _tensor(net: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(net.get_submodule(path), leaf)


def clear(net: nn.Module, group: ChannelGroup, channels: Sequence[int], roles: set[str]) -> None:
    """Zero some channels in all axes of some roles; of a weight norm the length alone, for zero has no direction."""
    for axis in group.axes:
        zero = axis.role in roles and not axis.tensor.endswith("weight.original1")
        for channel in channels if zero else ():
            for cell in cells(_tensor(net, axis.tensor), axis, channel):
                cell.zero_()


def duplicate(net: nn.Module, group: ChannelGroup, pairs: Sequence[tuple[int, int]]) -> None:
    """Write some channels as others are written."""
    for axis in group.axes:
        for original, twin in pairs if axis.role != "read" else ():
            tensor = _tensor(net, axis.tensor)
            for source, target in zip(cells(tensor, axis, original), cells(tensor, axis, twin), strict=False):
                target.copy_(source.clone())


# edits ----------------------------------------------------------------------------------------------------------------


def blocks_of(group: ChannelGroup) -> list[list[int]]:
    """Channels by block."""
    if group.block is None:
        return [list(range(group.n_channels))]
    return [(group.block == b).nonzero().flatten().tolist() for b in torch.unique(group.block)]


def shuffled(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    order = torch.arange(group.n_channels)
    for block in blocks_of(group):
        mine = torch.tensor(block)
        order[mine] = mine[torch.randperm(len(block), generator=generator)]
    return order


Trial = tuple[str, Callable[[], Edit]]


def symmetries(group: ChannelGroup, g: torch.Generator) -> Iterator[Trial]:
    """Edits that are exact whatever the weights are."""
    if "permute" in group.admits and group.n_channels > 1:
        yield "permute", lambda: edits.permute(group, shuffled(group, g))
    for number, gauge in enumerate(group.gauges):
        n = len(gauge)
        if gauge.kind == "positive" and "rescale" in group.admits:
            yield "rescale", lambda n=n, k=number: edits.rescale(group, torch.rand(n, generator=g) + 0.5, k)
        if gauge.kind == "sign" and "sign" in group.admits:
            yield "sign", lambda n=n, k=number: edits.sign(group, torch.rand(n, generator=g) > 0.5, k)
    if "merge" in group.admits:
        copies = torch.ones(group.n_channels, dtype=torch.long)
        copies[[block[int(torch.randint(len(block), (), generator=g))] for block in blocks_of(group)]] = 2
        yield "split", lambda: edits.split(group, copies)


def merged(group: ChannelGroup, pairs: Sequence[tuple[int, int]]) -> Edit:
    labels = torch.arange(group.n_channels)
    for original, twin in pairs:
        labels[twin] = original
    return edits.merge(group, labels)


def folded(group: ChannelGroup, pairs: Sequence[tuple[int, int]]) -> Edit:
    """Read the originals for the twins, with coefficient 1."""
    twins = {twin: original for original, twin in pairs}
    keep = [c for c in range(group.n_channels) if c not in twins]
    coefficients = torch.zeros(len(twins), len(keep), dtype=torch.float64)
    for row, twin in enumerate(sorted(twins)):
        coefficients[row, keep.index(twins[twin])] = 1.0
    maps = {axis.key: coefficients for axis in group.axes if axis.role == "read"}
    return edits.fold(group, torch.tensor(keep), maps)


def without(group: ChannelGroup, channels: Sequence[int]) -> Edit:
    return edits.remove(group, torch.tensor([c for c in range(group.n_channels) if c not in channels]))


Plant = tuple[Callable[[nn.Module], None], list[Trial]]


def plants(group: ChannelGroup, g: torch.Generator) -> Iterator[Plant]:
    """Weights on which removal and merging are exact, with the edits to try there."""
    parts = [torch.tensor(block)[torch.randperm(len(block), generator=g)].tolist() for block in blocks_of(group)]
    if min(map(len, parts)) < 2:
        return
    dead = [part[0] for part in parts]
    pairs = [(part[0], part[1]) for part in parts]
    roles = {axis.role for axis in group.axes}
    if "remove" in group.admits and group.zero_at_zero:
        writes = {"write", "pointwise", "both"}
        yield (lambda net: clear(net, group, dead, writes)), [("silent", lambda: without(group, dead))]
    elsewhere = getattr(group, "read_elsewhere", False)
    if "remove" in group.admits and "read" in roles and "both" not in roles and not elsewhere:
        yield (lambda net: clear(net, group, dead, {"read"})), [("unread", lambda: without(group, dead))]
    if "merge" in group.admits:
        tries: list[Trial] = [("merge", lambda: merged(group, pairs))]
        if "read" in roles:
            tries.append(("fold", lambda: folded(group, pairs)))
        yield (lambda net: duplicate(net, group, pairs)), tries


def check(
    fresh: Callable[[], Subject], graph: ChannelGraph, seed: int, kinds: Collection[str] = ()
) -> Iterator[Finding]:
    """Try every admitted edit of every group, then edits of all groups one upon another.

    Args:
        fresh: makes the network anew; it is asked again where an edit could not be taken back.
        kinds: the kinds of edit to try; all if empty.
    """
    generator = torch.Generator().manual_seed(seed)
    subject = fresh()
    base = subject.outputs()
    for name in [group.name for group in graph]:
        yield from _check_group(subject, graph, name, generator, base, kinds)
        problem = subject.changed(base)
        if problem:
            yield Finding(name, "undo", float("inf"), "undo", problem)
            subject = fresh()
    if len(graph) > 1 and (not kinds or "chain" in kinds):
        yield chained(subject, graph, generator, base)


def _check_group(
    subject: Subject,
    graph: ChannelGraph,
    name: str,
    generator: torch.Generator,
    base: list[list[Tensor]],
    kinds: Collection[str],
) -> Iterator[Finding]:
    group = graph[name]
    for kind, make in symmetries(group, generator):
        if not kinds or kind in kinds:
            yield attempt(subject, graph, name, kind, make, base)
    for plant, tries in plants(group, generator):
        if kinds and not any(kind in kinds for kind, _ in tries):
            continue
        plant(subject.net)
        reference = subject.outputs()
        if all(bool(torch.isfinite(leaf).all()) for mode in reference for leaf in mode):
            for kind, make in tries:
                yield attempt(subject, graph, name, kind, make, reference)
        if subject.shapes_differ():
            return
        subject.put(subject.kept)


def attempt(
    subject: Subject, graph: ChannelGraph, name: str, kind: str, make: Callable[[], Edit], before: list[list[Tensor]]
) -> Finding:
    """Apply one edit, compare all outputs in both modes, take it back."""
    try:
        _, undo = apply(subject.net, graph, make())
    except Exception as error:  # the finding says what it was
        return Finding(name, kind, float("inf"), "apply", told(error))
    finding = measured(subject, name, kind, before)
    undo.restore()
    return finding


def measured(subject: Subject, name: str, kind: str, before: list[list[Tensor]]) -> Finding:
    try:
        after = subject.outputs()
    except Exception as error:
        return Finding(name, kind, float("inf"), "train" if subject.net.training else "eval", told(error))
    errors = [distance(a, b) for a, b in zip(before, after, strict=True)]
    worst = max(range(len(MODES)), key=errors.__getitem__)
    return Finding(name, kind, errors[worst], MODES[worst])


def told(error: Exception) -> str:
    """An error in one line; those of the library are marked as such."""
    own = "" if isinstance(error, WeightfoldError) else "raw "
    return f"{own}{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def chained(subject: Subject, graph: ChannelGraph, generator: torch.Generator, before: list[list[Tensor]]) -> Finding:
    """One symmetry of every group, each found in the graph that the one before left; then all are taken back."""
    undos, current, done = [], graph, []
    finding = Finding("*", "chain", 0.0)
    for name in [group.name for group in graph]:
        group = next((g for g in current if g.name == name), None)
        tries = [] if group is None else list(symmetries(group, generator))
        if not tries:
            continue
        kind, make = tries[int(torch.randint(len(tries), (), generator=generator))]
        done.append(f"{kind} {name}")
        try:
            current, undo = apply(subject.net, current, make())
        except Exception as error:
            finding = Finding(", ".join(done), "chain", float("inf"), "apply", told(error))
            break
        undos.append(undo)
        finding = measured(subject, ", ".join(done), "chain", before)
        if finding.wrong:
            break
    for undo in reversed(undos):
        undo.restore()
    return finding
