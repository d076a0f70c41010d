"""Apply an edit to a live model: weights, buffers, attributes, optimiser, averages; and take it back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import EditError
from weightfold.graph import optim
from weightfold.graph.edit import Edit
from weightfold.graph.group import EDITS, Axis, ChannelGraph, ChannelGroup, Gauge
from weightfold.graph.layout import Layout, edited, from_front, gauge_factors, layout, to_front
from weightfold.graph.sizes import grouped_tensors, sync_sizes
from weightfold.graph.trace import flush_caches

Companion = nn.Module | MutableMapping[str, Tensor]
"""An averaged copy of the model: a module (`AveragedModel` too) or a mapping from names to tensors."""


@dataclass
class Undo:
    """Everything an edit replaced, and the biases that it shifted. `restore` puts all back bit for bit."""

    tensors: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    mappings: list[tuple[MutableMapping[str, Tensor], str, Tensor]] = field(default_factory=list)
    optimizer: list[tuple[torch.optim.Optimizer, nn.Module, str, dict[str, Any]]] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    shifted: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)

    def restore(self, *, flush: bool = True) -> None:
        """Put everything back; ``flush`` as in `apply`."""
        for model, name, old in reversed(self.tensors):
            put_tensor(find_tensor(model, name)[2], old)
        for optimizer, model, name, state in reversed(self.optimizer):
            optimizer.state[find_tensor(model, name)[2]] = state
        for mapping, name, old in reversed(self.mappings):
            mapping[name] = old
        self.restore_attributes()
        for model, _ in self.by_module() if flush else ():
            flush_caches(model)

    def restore_attributes(self) -> None:
        """Put the sizes that modules tell of themselves back."""
        for owner, name, value in reversed(self.attributes):
            setattr(owner, name, value)

    def by_module(self) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """The tensors that were replaced in the model and in each averaged copy, by name."""
        found: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
        for model, name, old in self.tensors:
            found.setdefault(id(model), (model, {}))[1][name] = old
        return list(found.values())

    def by_mapping(self) -> list[tuple[MutableMapping[str, Tensor], dict[str, Tensor]]]:
        """The same of averaged copies that are mappings."""
        found: dict[int, tuple[MutableMapping[str, Tensor], dict[str, Tensor]]] = {}
        for mapping, name, old in self.mappings:
            found.setdefault(id(mapping), (mapping, {}))[1][name] = old
        return list(found.values())

    def to_state(self, companions: Sequence[Companion] = ()) -> dict[str, Any]:
        """What was replaced in the model, its optimisers and averaged copies, for a checkpoint: tensors by name."""
        model, tensors = self.by_module()[0]
        states = {name: dict(state) for _, owner, name, state in self.optimizer if owner is model}
        replaced = [*self.by_module(), *self.by_mapping()]
        averaged = [dict(old) for c in companions for target, old in replaced if target is _inside(c)]
        shifted = {name: value for owner, name, value in self.shifted if owner is model}
        return {"tensors": dict(tensors), "states": states, "averaged": averaged, "shifted": shifted}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Any],
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        companions: Sequence[Companion] = (),
    ) -> Undo:
        """Read back what `to_state` gave; state belongs to the optimiser that holds the tensor.

        Raises:
            EditError: there were more or fewer averaged copies.
        """
        if len(state["averaged"]) != len(companions):
            raise EditError(
                f"The checkpoint holds {len(state['averaged'])} averaged copies of the model, not {len(companions)}.",
                remedy="Prepare with the averaged copies that the run had.",
            )
        undo = cls([(model, name, old) for name, old in state["tensors"].items()])
        undo.shifted = [(model, name, value) for name, value in state.get("shifted", {}).items()]
        for companion, replaced in zip(map(_inside, companions), state["averaged"], strict=True):
            if isinstance(companion, nn.Module):
                undo.tensors += [(companion, name, old) for name, old in replaced.items()]
            else:
                undo.mappings += [(companion, name, old) for name, old in replaced.items()]
        for name, held in state["states"].items():
            parameter = find_tensor(model, name)[2]
            for optimizer in optimizers:
                if any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                    undo.optimizer.append((optimizer, model, name, dict(held)))
        return undo


def _inside(companion: Companion) -> Companion:
    return companion.module if isinstance(companion, torch.optim.swa_utils.AveragedModel) else companion


def find_tensor(model: nn.Module, name: str) -> tuple[nn.Module, str, Tensor]:
    """The module that holds a parameter or buffer, the leaf name, and the tensor."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
        held: Any = owner._parameters  # TorchScript's are no dictionary
        return owner, leaf, held[leaf] if leaf in held and held[leaf] is not None else getattr(owner, leaf)
    except AttributeError as error:
        raise EditError(
            f"The model has no tensor '{name}' any more.", remedy="It changed after it was traced: trace it again."
        ) from error


def put_tensor(tensor: Tensor, value: Tensor) -> Tensor:
    """Give a parameter or buffer new contents of any shape; return the old ones.

    The object stays the same, so that ties, hooks, optimisers and every other reference follow, whoever else holds it.
    A passing change of type makes autograd forget the gradient accumulator, which the user's last loss may keep alive
    and which insists on the old shape. A graph that was recorded before can no longer be run backward.
    """
    old = tensor.detach()
    tensor.grad = None
    tensor.data = torch.empty(0, dtype=_other_type(tensor.dtype), device=tensor.device)
    tensor.data = value.detach()
    torch.autograd.graph.increment_version(tensor)
    return old


def _other_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else torch.float16


def axes_of(group: ChannelGroup, tensor: str) -> list[Axis]:
    """A group's axes on one tensor, in the order in which they are edited."""
    return sorted((a for a in group.axes if a.tensor == tensor), key=lambda a: (-a.slabs, a.dim))


def new_value(old: Tensor, group: ChannelGroup, edit: Edit, tensor: str) -> Tensor:
    """What an edit makes of one tensor."""
    value = old.detach()
    for axis in axes_of(group, tensor):
        plan = layout(group, axis, edit)
        front = to_front(value, axis.dim, axis.slabs)
        front = edited(front, axis, plan, edit, gauge_factors(group, axis, edit, plan))
        value = from_front(front, axis.dim, axis.slabs)
    return value.to(old.dtype)


def _bias_name(tensor: str) -> str:
    path, _, leaf = tensor.rpartition(".")
    return f"{path}.{leaf.replace('weight', 'bias')}".lstrip(".")


def changed_biases(get: Callable[[str], Tensor | None], group: ChannelGroup, edit: Edit) -> dict[str, Tensor]:
    """New biases of readers that take over a constant: ``bias + W @ shift``, spatial windows summed."""
    out = {}
    for (tensor, dim), vector in edit.shift.items():
        axis, name = group.axis(tensor, dim), _bias_name(tensor)
        weight, bias = get(tensor), None if name == tensor else get(name)
        if weight is None or bias is None:
            raise EditError(
                f"'{tensor}' has no bias to fold a constant into.", remedy="Fold without an intercept for this reader."
            )
        if axis.slabs != 1:
            raise EditError(f"'{tensor}' is a grouped convolution: a constant cannot be folded into its bias.")
        front = to_front(weight.detach(), dim, 1).double()
        added = torch.zeros_like(bias, dtype=torch.float64)
        for m in range(axis.index.shape[1]):
            have = axis.index[:, m] >= 0
            rows = front.index_select(0, axis.index[have, m].to(front.device))
            rows = rows.reshape(rows.shape[0], rows.shape[1], -1).sum(-1)
            added += vector[have].to(rows.device) @ rows
        out[name] = (bias.detach().double() + added).to(bias.dtype)
    return out


def _tensor_or_none(model: nn.Module, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)


def check(model: nn.Module, group: ChannelGroup, edit: Edit) -> None:
    """Refuse an edit that does not fit the group or the model.

    Raises:
        EditError: names the group or the tensor.
    """
    if edit.group != group.name or edit.n_channels != group.n_channels:
        raise EditError(
            f"An edit on {edit.n_channels} channels of '{edit.group}' does not fit group '{group.name}' "
            f"with {group.n_channels}.",
            remedy="Build the edit from the current graph.",
        )
    for axis in group.axes:
        shape = find_tensor(model, axis.tensor)[2].shape
        size = axis.size if axis.slabs == 1 else axis.size // axis.slabs
        if axis.dim >= len(shape) or shape[axis.dim] != size:
            raise EditError(
                f"'{axis.tensor}' has shape {tuple(shape)}; the graph expects {size} along dimension {axis.dim}.",
                remedy="The model changed after it was traced: trace it again.",
            )
    for name, value in edit.tensors().items():
        if not bool(torch.isfinite(value.sum())):  # a sum holds every NaN and infinity, without a copy of a wide map
            kind, _, key = name.partition(":")
            of = key.rpartition(":")[0] or group.name
            raise EditError(f"The {kind} of '{of}' is not finite.", remedy="Raise the ridge, or check the data.")


def apply(
    model: nn.Module,
    graph: ChannelGraph,
    edit: Edit,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    companions: Sequence[Companion] = (),
    *,
    flush: bool = True,
) -> tuple[ChannelGraph, Undo]:
    """Apply one edit in place, everywhere that the group reaches.

    Args:
        model: the traced module.
        optimizers: their state follows; gradients of edited parameters become None.
        companions: averaged copies of the model, edited alike.
        flush: whether modules drop what they computed from their weights; of many edits in a row, the last must.
    Returns:
        The graph of the edited model, and what is needed to take the edit back.
    Raises:
        EditError: the edit does not fit; nothing was changed.
    Example:
        >>> import weightfold as wf
        >>> from weightfold.graph import edit
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = wf.trace(net, torch.zeros(1, 4))
        >>> graph, undo = apply(net, graph, edit.remove(graph["0"], torch.tensor([0, 3, 5])))
        >>> net[0].out_features, net[2].in_features
        (3, 3)
    """
    group = graph[edit.group]
    check(model, group, edit)
    if flush:
        flush_caches(model)
    beside = [find_tensor(model, name)[2] for name in graph.followers]
    optim.assert_live(model, optimizers, beside)
    new_graph = after(graph, edit)
    undo = Undo()
    try:
        for target in [model, *companions]:
            _apply_to(target, graph, group, edit, optimizers if target is model else (), undo)
        optim.assert_live(model, optimizers, beside)
    except BaseException:
        undo.restore()
        raise
    return new_graph, undo


def _apply_to(
    target: Companion,
    graph: ChannelGraph,
    group: ChannelGroup,
    edit: Edit,
    optimizers: Sequence[torch.optim.Optimizer],
    undo: Undo,
) -> None:
    names = list(dict.fromkeys(axis.tensor for axis in group.axes))
    if not isinstance(target, nn.Module):
        _apply_to_mapping(target, graph, group, edit, names, undo)
        return
    module = _inside(target)
    assert isinstance(module, nn.Module)
    names = [name for name in names if name not in graph.followers or _tensor_or_none(module, name) is not None]
    values = changed_biases(lambda name: _tensor_or_none(module, name), group, edit)
    undo.shifted += [(module, name, value.clone()) for name, value in values.items()]
    found = {name: find_tensor(module, name) for name in {**dict.fromkeys(names), **values}}
    values |= {name: new_value(values.get(name, found[name][2]), group, edit, name) for name in names}
    states = {
        name: optim.new_states(optimizers, found[name][2], group, edit, name)
        for name in names
        if found[name][2] is not None
    }
    for name, value in values.items():
        old = found[name][2]
        for optimizer, state in states.get(name, []):
            undo.optimizer.append((optimizer, module, name, optimizer.state[old]))
            if state is None:
                undo.reset.append(name)
            optimizer.state[old] = {} if state is None else state
        undo.tensors.append((module, name, put_tensor(old, value)))
    sync_sizes(module, group, edit, names, grouped_tensors(graph), undo.attributes)


def check_names(target: Mapping[str, Tensor], graph: ChannelGraph, names: Iterable[str]) -> dict[str, list[str]]:
    """Under which names a mapping holds tensors of the graph; tied tensors have several.

    Raises:
        EditError: it holds one under a longer name alone.
    """
    held = {}
    for name in names:
        spellings = [name, *(a for a, first in graph.aliases.items() if first == name)]
        held[name] = [s for s in spellings if s in target]
        foreign = next((key for key in target if key.endswith(f".{name}")), None)
        if not held[name] and foreign is not None and foreign not in graph.shapes:
            raise EditError(
                f"The averaged copy names '{name}' as '{foreign}'.", remedy="Key it by the model's own parameter names."
            )
    return held


def _apply_to_mapping(
    target: MutableMapping[str, Tensor],
    graph: ChannelGraph,
    group: ChannelGroup,
    edit: Edit,
    names: Sequence[str],
    undo: Undo,
) -> None:
    """Edit what a mapping holds of a group, under any of the tied tensors' names."""
    held = check_names(target, graph, names)
    old = {spelling: target[spelling] for spellings in held.values() for spelling in spellings}
    reads = [tensor for tensor, _ in edit.shift]
    shifted = changed_biases(target.get, group, edit) if all(tensor in target for tensor in reads) else {}
    old |= {name: target[name] for name in shifted}
    new = {s: new_value(shifted.get(s, target[s]), group, edit, name) for name, all_s in held.items() for s in all_s}
    for spelling, value in (shifted | new).items():
        undo.mappings.append((target, spelling, old[spelling]))
        target[spelling] = value


def after(graph: ChannelGraph, edit: Edit) -> ChannelGraph:
    """The graph of the edited model: every group that shares an edited axis is renumbered."""
    group = graph[edit.group]
    plans: dict[tuple[str, int, int], Layout] = {}
    for axis in group.axes:
        plans[axis.tensor, axis.dim, axis.slabs] = layout(group, axis, edit)
    if not edit.resizes and torch.equal(edit.carry, torch.arange(group.n_channels)):
        return graph
    groups = []
    edited = {tensor for tensor, _, _ in plans}
    for other in graph.groups:
        touched = other is group or any(
            (a.tensor, a.dim, a.slabs) in plans or (a.slabs > 1 and a.tensor in edited) for a in other.axes
        )
        new = _renumbered(other, group, edit, plans) if touched else other
        if new is not None:
            groups.append(new)
    shapes = dict(graph.shapes)
    for (tensor, dim, slabs), plan in plans.items():
        shape = list(shapes[tensor])
        shape[dim] = plan.size // slabs
        shapes[tensor] = tuple(shape)
    return replace(graph, groups=tuple(_with_sizes(g, shapes) for g in groups), shapes=shapes)


def _with_sizes(group: ChannelGroup, shapes: Mapping[str, tuple[int, ...]]) -> ChannelGroup:
    axes = tuple(
        a if a.slabs == 1 and a.size == shapes[a.tensor][a.dim] else replace(a, size=shapes[a.tensor][a.dim] * a.slabs)
        for a in group.axes
    )
    group = replace(group, axes=axes)
    if group.n_channels == 1 and any(a.index.shape[1] > 1 for a in axes):
        return group.without({"merge"}, "one channel is left, whose several places cannot be told apart")
    return group


def _moved_index(index: Tensor, plan: Layout, size: int) -> Tensor:
    """Follow positions through a layout: each goes where its contents went, -1 where they are gone."""
    target = torch.full((size + 1,), -1, dtype=torch.long)
    order = torch.arange(plan.size - 1, -1, -1)
    target[plan.source[order]] = order
    return target[index]


def _move_of(axis: Axis, group: ChannelGroup, plans: Mapping[tuple[str, int, int], Layout]) -> Layout | None:
    """How an edit lays out an axis of another group; None where it leaves it alone.

    Whole groups of a grouped convolution's rows take their slabs along.
    """
    rows = plans.get((axis.tensor, 0, 1))
    if axis.slabs == 1 or rows is None or group.kind != "blocks":
        return plans.get((axis.tensor, axis.dim, axis.slabs))
    depth, width = group.axis(axis.tensor, 0).size // axis.slabs, axis.size // axis.slabs
    source = (rows.source[::depth] // depth)[:, None] * width + torch.arange(width)
    return Layout(
        source.flatten(), rows.channel[::depth].repeat_interleave(width), torch.zeros(source.numel(), dtype=torch.long)
    )


def _renumbered(
    other: ChannelGroup, group: ChannelGroup, edit: Edit, plans: Mapping[tuple[str, int, int], Layout]
) -> ChannelGroup | None:
    if other is group:
        return _renumbered_self(group, edit, plans)
    moves = [_move_of(axis, group, plans) for axis in other.axes]
    rows = _rows_after(other, group, edit, moves)
    tables = [
        axis.index[[c for c, _ in rows]] if plan is None else _followed(axis.index, plan, axis.size, rows)
        for axis, plan in zip(other.axes, moves, strict=True)
    ]
    alive = torch.stack([(table >= 0).any(1) for table in tables]).any(0)
    for axis, table in zip(other.axes, tables, strict=True):
        alive &= ~((axis.index >= 0).any(1)[[c for c, _ in rows]] & ~(table >= 0).any(1))
    rows = [row for row, lives in zip(rows, alive.tolist(), strict=True) if lives]
    if not rows:
        return None
    axes = [
        replace(axis, index=_trim(_in_order(other, table[alive])), **_slabs_after(axis, plan))
        for axis, table, plan in zip(other.axes, tables, moves, strict=True)
    ]
    gauges = tuple(_gauge_followed(gauge, other, rows, moves) for gauge in other.gauges)
    moved = replace(
        other,
        n_channels=len(rows),
        axes=tuple(axes),
        block=_blocks_after(other, rows),
        gauges=gauges,
        attributes=_attributes_followed(other, group, edit, len(rows)),
    )
    copied = len({c for c, _ in rows}) < len(rows)
    if copied and any(plan is None for plan in moves):
        return moved.without(set(EDITS), "has a part outside of blocks that were copied: trace the model again")
    return moved


def _attributes_followed(
    other: ChannelGroup, group: ChannelGroup, edit: Edit, n_after: int
) -> tuple[tuple[str, str, Fraction], ...]:
    """Another group's attributes keep their value where the edited group does not set them: their factor follows."""
    mine = {(path, name): factor for path, name, factor in group.attributes}
    out = []
    for path, name, factor in other.attributes:
        value = edit.n_after * mine[path, name] if (path, name) in mine else other.n_channels * factor
        out.append((path, name, Fraction(value) / n_after))
    return tuple(out)


def _in_order(group: ChannelGroup, index: Tensor) -> Tensor:
    """A block moves as it lies, with what is no part of it inside (the columns of a grouped convolution); the places of
    a channel keep their order."""
    return torch.sort(index, 1).values if group.kind == "blocks" else index


def _slabs_after(axis: Axis, plan: Layout | None) -> dict[str, int]:
    if axis.slabs == 1 or plan is None:
        return {}
    return {"size": plan.size, "slabs": plan.size * axis.slabs // axis.size}


Rows = Sequence[tuple[int, int]]
"""Channels of a group after blocks of another were edited: (old channel, the new block that it lies in or -1)."""


def _rows_after(other: ChannelGroup, group: ChannelGroup, edit: Edit, moves: Sequence[Layout | None]) -> Rows:
    """A channel inside a single block is copied with it; one that several blocks share stays one channel."""
    if group.kind != "blocks" or torch.unique(edit.carry).numel() == edit.n_after:
        return [(c, -1) for c in range(other.n_channels)]
    lies, several = torch.full((other.n_channels,), -1), torch.zeros(other.n_channels, dtype=torch.bool)
    for axis, plan in zip(other.axes, moves, strict=True):
        if plan is None:
            continue
        block = torch.full((axis.size + 1,), -1)
        mine = plan.channel >= 0
        block[plan.source[mine]] = edit.carry[plan.channel[mine]]
        for column in block[axis.index].T:
            several |= (column >= 0) & (lies >= 0) & (lies != column)
            lies = torch.where(column >= 0, column, lies)
    copies = [(edit.carry == b).nonzero().flatten().tolist() for b in range(edit.n_channels)]
    inside = torch.where(several, -1, lies).tolist()
    return [(c, k) for c, b in enumerate(inside) for k in (copies[b] if b >= 0 else [-1])]


def _followed(index: Tensor, plan: Layout, size: int, rows: Rows) -> Tensor:
    """Positions of channels through a layout: each goes wherever its contents went, -1 where they are gone.

    A channel that stays one takes all copies of its positions; a copy takes those in its own block.
    """
    if torch.unique(plan.source).numel() == plan.size and all(k < 0 for _, k in rows):
        return _moved_index(index, plan, size)[[c for c, _ in rows]]
    owner, slot = (torch.full((size + 1,), -1) for _ in range(2))
    have = index >= 0
    owner[index[have]] = torch.arange(index.shape[0])[:, None].expand_as(index)[have]
    slot[index[have]] = torch.arange(index.shape[1]).expand_as(index)[have]
    places: list[list[int]] = [[] for _ in rows]
    number = {row: k for k, row in enumerate(rows)}
    for at in torch.argsort(slot[plan.source], stable=True).tolist():
        c = int(owner[plan.source[at]])
        row = number.get((c, int(plan.channel[at])), number.get((c, -1)))
        if row is not None:
            places[row].append(at)
    most = max(map(len, places), default=0)
    return torch.tensor([p + [-1] * (most - len(p)) for p in places], dtype=torch.long).reshape(len(rows), most)


def _gauge_followed(gauge: Gauge, other: ChannelGroup, rows: Rows, moves: Sequence[Layout | None]) -> Gauge:
    """The freedoms of another group's gauge follow its channels, each with every copy."""
    of: dict[int, list[int]] = {}
    for f, channel in enumerate(gauge.channel.tolist()):
        of.setdefault(channel, []).append(f)
    freedoms = [(f, n, k) for n, (c, k) in enumerate(rows) for f in of.get(c, ())]
    inner = [(f, k) for f, _, k in freedoms]
    axes = []
    for t, d, s, exponent, index in gauge.axes:
        at = next(i for i, a in enumerate(other.axes) if (a.tensor, a.dim, a.slabs) == (t, d, s))
        axis, plan = other.axes[at], moves[at]
        table = index[[f for f, _ in inner]] if plan is None else _followed(index, plan, axis.size, inner)
        axes.append((t, d, _slabs_after(axis, plan).get("slabs", s), exponent, _trim(table)))
    return replace(gauge, channel=torch.tensor([n for _, n, _ in freedoms], dtype=torch.long), axes=tuple(axes))


def _blocks_after(other: ChannelGroup, rows: Rows) -> Tensor | None:
    """Blocks of another group's channels: those in copies of a block are blocks of their own."""
    if other.block is None:
        return None
    old = other.block[[c for c, _ in rows]]
    keys = torch.stack([old, torch.tensor([k for _, k in rows])], 1)
    block = torch.unique(keys, dim=0, return_inverse=True)[1]
    return block if int(block.max()) > 0 else None


def _trim(index: Tensor) -> Tensor:
    """Close gaps, in the order of the slots, and drop slots that no channel has any more."""
    index = index.gather(1, torch.argsort((index < 0).byte(), dim=1, stable=True))
    return index[:, (index >= 0).any(0)] if index.shape[1] > 1 else index


def _renumbered_self(group: ChannelGroup, edit: Edit, plans: Mapping[tuple[str, int, int], Layout]) -> ChannelGroup:
    axes = []
    for axis in group.axes:
        plan = plans[axis.tensor, axis.dim, axis.slabs]
        index = torch.full((edit.n_after, axis.index.shape[1]), -1, dtype=torch.long)
        mine = (plan.channel >= 0).nonzero().flatten()
        index[plan.channel[mine], plan.slot[mine]] = mine
        axes.append(replace(axis, index=index))
    gauges = [g for gauge in group.gauges if (g := _gauge_after(gauge, group, edit, plans)) is not None]
    lost = {"rescale" if g.kind == "positive" else "sign" for g in group.gauges} - {
        "rescale" if g.kind == "positive" else "sign" for g in gauges
    }
    return replace(
        group.without(lost, "some channels were copied, and freedoms that are not one for each channel end there"),
        n_channels=edit.n_after,
        axes=tuple(axes),
        block=None if group.block is None else group.block[edit.carry],
        gauges=tuple(gauges),
    )


def _gauge_after(gauge: Any, group: ChannelGroup, edit: Edit, plans: Mapping[tuple[str, int, int], Layout]) -> Any:
    """A gauge whose freedoms are the channels follows them; any other is dropped when channels are copied."""
    copies = torch.unique(edit.carry).numel() < edit.n_after
    simple = len(gauge) == group.n_channels and torch.equal(torch.sort(gauge.channel).values, torch.arange(len(gauge)))
    if copies and not simple:
        return None
    if not simple:
        number = torch.full((group.n_channels,), -1, dtype=torch.long)
        number[edit.carry] = torch.arange(edit.n_after)
        keep = number[gauge.channel] >= 0
        size = {(a.tensor, a.dim, a.slabs): a.size for a in group.axes}
        axes = tuple((t, d, s, e, _moved_index(i, plans[t, d, s], size[t, d, s])[keep]) for t, d, s, e, i in gauge.axes)
        return replace(gauge, channel=number[gauge.channel[keep]], axes=axes)
    freedom = torch.argsort(gauge.channel)
    axes = []
    for t, d, s, e, index in gauge.axes:
        plan = plans[t, d, s]
        axis = next(a for a in group.axes if (a.tensor, a.dim, a.slabs) == (t, d, s))
        mine = (plan.channel >= 0).nonzero().flatten()
        where = torch.full((edit.n_after, axis.index.shape[1]), -1, dtype=torch.long)
        where[plan.channel[mine], plan.slot[mine]] = mine
        old = axis.index[edit.carry]
        belongs = (old[:, :, None] == index[freedom[edit.carry]][:, None, :]).any(2)
        axes.append((t, d, s, e, _trim(torch.where(belongs & (old >= 0), where, -1))))
    return replace(gauge, channel=torch.arange(edit.n_after), axes=tuple(axes))
