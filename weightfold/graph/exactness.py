"""Check a graph against the model it claims to describe: random symmetries, planted dead channels, planted duplicates.

Run it in float64: then an admitted edit changes the output by rounding alone, and a wrong one shows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightfold.graph import edit as edits
from weightfold.graph.apply import apply, find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.layout import from_front, to_front
from weightfold.graph.trace import Example, arguments
from weightfold.graph.twin import float64 as float64


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """All numbers that the model returns: tensors of any type (indices and masks too), and plain numbers."""
    args, kwargs = arguments(example)
    with torch.no_grad():
        leaves = pytree.tree_leaves(_open(model(*args, **kwargs)))
    found = [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, Tensor | bool | int | float | complex)]
    found = [torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf for leaf in found]
    return [leaf if leaf.is_floating_point() else leaf.double() for leaf in found]


def _open(value: Any) -> Any:
    """Look into plain objects that are no registered containers."""
    plain = hasattr(value, "__dict__") and not isinstance(value, (Tensor, dict, list, tuple))
    return {k: _open(v) for k, v in vars(value).items()} if plain else value


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest magnitude, over all outputs.

    Infinite where shapes differ, where one is finite and the other is not, and where the first is no number.
    """
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape or bool(x.isnan().any()) or not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        x, y = (torch.nan_to_num(v.double(), posinf=2.0, neginf=-2.0) for v in (x, y))
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1e-300)))
    return worst


def random_order(group: ChannelGroup, generator: torch.Generator) -> Tensor:
    """A random admitted permutation: any order within each block."""
    order = torch.arange(group.n_channels)
    block = torch.zeros(group.n_channels) if group.block is None else group.block
    for b in torch.unique(block):
        mine = (block == b).nonzero().flatten()
        order[mine] = mine[torch.randperm(mine.numel(), generator=generator)]
    return order


def symmetries(group: ChannelGroup, generator: torch.Generator) -> list[Edit]:
    """One random edit for every symmetry that the group admits."""
    out = []
    if "permute" in group.admits and group.n_channels > 1:
        out.append(edits.permute(group, random_order(group, generator)))
    for number, gauge in enumerate(group.gauges):
        if gauge.kind == "positive":
            out.append(edits.rescale(group, torch.rand(len(gauge), generator=generator) * 1.5 + 0.5, number))
        else:
            out.append(edits.sign(group, torch.rand(len(gauge), generator=generator) > 0.5, number))
    return out


def _one_per_block(group: ChannelGroup, generator: torch.Generator, n: int) -> list[Tensor] | None:
    """n disjoint sets with one channel of every block each; None when a block is too small."""
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    sets: list[list[int]] = [[] for _ in range(n)]
    for b in torch.unique(block):
        mine = (block == b).nonzero().flatten()
        if mine.numel() < n + (n == 1):
            return None
        picked = mine[torch.randperm(mine.numel(), generator=generator)[:n]]
        for k in range(n):
            sets[k].append(int(picked[k]))
    return [torch.tensor(s) for s in sets]


def _edit_rows(
    model: nn.Module, group: ChannelGroup, roles: set[str], change: Callable[[Tensor, Tensor], None]
) -> None:
    """Let ``change(front, index)`` write into the rows of every axis of some roles, tensor by tensor."""
    for axis in group.axes:
        if axis.role not in roles:
            continue
        tensor = find_tensor(model, axis.tensor)[2]
        front = to_front(tensor.detach(), axis.dim, axis.slabs).clone()
        change(front, axis.index)
        with torch.no_grad():
            tensor.copy_(from_front(front, axis.dim, axis.slabs))


def plant_dead(model: nn.Module, group: ChannelGroup, channels: Tensor, *, silent: bool) -> None:
    """Make channels dead: silent (nothing writes them) or unread (nothing reads them).

    A direction without a length (the v of a weight norm) is left: its length beside it says that it is zero.
    """

    def clear(front: Tensor, index: Tensor) -> None:
        rows = index[channels]
        front[rows[rows >= 0]] = 0

    roles = {"write", "pointwise", "both"} if silent else {"read"}
    axes = [axis for axis in group.axes if not _is_direction(model, axis.tensor)]
    _edit_rows(model, replace(group, axes=tuple(axes)), roles, clear)


def _is_direction(model: nn.Module, tensor: str) -> bool:
    """Whether a tensor is divided by its own norm under a weight norm, so that zero is no value of it."""
    path, _, leaf = tensor.rpartition(".")
    owner = model.get_submodule(path)
    if leaf.endswith("_v"):
        return hasattr(owner, f"{leaf[:-1]}g")
    return leaf == "original1" and type(next(iter(cast(nn.ModuleList, owner)), None)).__name__ == "_WeightNorm"


def plant_duplicates(model: nn.Module, group: ChannelGroup, original: Tensor, copy: Tensor) -> None:
    """Make channels ``copy`` equal to ``original`` in everything that writes them; what reads them stays."""

    def duplicate(front: Tensor, index: Tensor) -> None:
        have = (index[original] >= 0) & (index[copy] >= 0)
        front[index[copy][have]] = front[index[original][have]].clone()

    _edit_rows(model, group, {"write", "pointwise", "both"}, duplicate)


@dataclass(frozen=True)
class Check:
    """One exactness check of one group: which, the relative error, and what went wrong if anything did."""

    group: str
    kind: str
    error: float
    problem: str = ""


def _saved(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def check_group(
    model: nn.Module, graph: ChannelGraph, name: str, example: Example, generator: torch.Generator
) -> Iterator[Check]:
    """Run every check that a group's admitted edits allow; the model is left as it was."""
    group = graph[name]
    reference = outputs(model, example)
    for edit in symmetries(group, generator):
        yield _try(model, graph, edit, example, reference, edit.kind)
    state = _saved(model)
    try:
        yield from _planted(model, graph, group, example, generator, state)
    finally:
        model.load_state_dict(state)


def check_cuts(model: nn.Module, graph: ChannelGraph, name: str, example: Example) -> Iterator[Check]:
    """Remove every channel in turn, once it is dead; of every block the one at the same place."""
    group = graph[name]
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    rows = [(block == b).nonzero().flatten().tolist() for b in torch.unique(block)]
    if "remove" not in group.admits or min(map(len, rows)) < 2:
        return
    state = _saved(model)
    for dead in zip(*rows, strict=True):
        plant_dead(model, group, torch.tensor(dead), silent=group.zero_at_zero)
        edit = edits.remove(group, torch.tensor([c for c in range(group.n_channels) if c not in dead]))
        yield _try(model, graph, edit, example, outputs(model, example), f"remove {dead}")
        model.load_state_dict(state)


def _planted(
    model: nn.Module,
    graph: ChannelGraph,
    group: ChannelGroup,
    example: Example,
    generator: torch.Generator,
    state: dict[str, Tensor],
) -> Iterator[Check]:
    if "remove" in group.admits:
        dead = _one_per_block(group, generator, 1) or []
        kinds = [k for k in (True, False) if (group.zero_at_zero or not k) and dead]
        for silent in kinds:
            if not silent and (not group.role("read") or group.role("both") or group.read_elsewhere):
                continue
            plant_dead(model, group, dead[0], silent=silent)
            keep = torch.ones(group.n_channels, dtype=torch.bool)
            keep[dead[0]] = False
            edit = edits.remove(group, keep.nonzero().flatten())
            yield _try(model, graph, edit, example, outputs(model, example), "silent" if silent else "unread")
            model.load_state_dict(state)
    if "merge" in group.admits:
        pair = _one_per_block(group, generator, 2)
        if pair:
            plant_duplicates(model, group, *pair)
            labels = torch.arange(group.n_channels)
            labels[pair[1]] = pair[0]
            yield _try(model, graph, edits.merge(group, labels), example, outputs(model, example), "merge")
            copies = torch.ones(group.n_channels, dtype=torch.long)
            copies[pair[0]] = 2
            yield _try(model, graph, edits.split(group, copies), example, outputs(model, example), "split")
            model.load_state_dict(state)


def _try(
    model: nn.Module, graph: ChannelGraph, edit: Edit, example: Example, reference: list[Tensor], kind: str
) -> Check:
    try:
        _, undo = apply(model, graph, edit)
    except Exception as error:
        return Check(edit.group, kind, float("inf"), f"apply: {type(error).__name__}: {str(error)[:200]}")
    try:
        return Check(edit.group, kind, relative_error(reference, outputs(model, example)))
    except Exception as error:
        return Check(edit.group, kind, float("inf"), f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        undo.restore()
