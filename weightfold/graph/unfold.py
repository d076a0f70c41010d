"""Take an edit back after training has gone on: what it removed returns, what was learned since stays.

With W the tensor before the edit, W' what the edit made of it and N what training has made of W' since,

    W + E (N - W'),    E the embedding of the narrow tensor into the wide one, at the wide one's scale

(kept channels stand where they stood; a merged channel's change goes to each of its members). Applying the edit again
gives N, so the network differs from the narrow one by no more than what the edit had left out. With N = W' it is the
network before the edit, bit for bit. Moments of optimisers: those of today where a channel was kept, else the old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.graph import optim
from weightfold.graph.apply import Companion, Undo, after, axes_of, changed_biases, find_tensor, new_value, put_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup
from weightfold.graph.layout import from_front, gauge_factors, layout, scale_rows, to_front
from weightfold.graph.sizes import grouped_tensors, sync_sizes
from weightfold.graph.trace import flush_caches


def unfold(
    model: nn.Module,
    graph_before: ChannelGraph,
    edit: Edit,
    old: Mapping[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer] = (),
    old_states: Mapping[str, Mapping[str, Any]] | None = None,
    shifted: Mapping[str, Tensor] | None = None,
) -> None:
    """Take the latest edit of a model back, keeping what was trained since.

    Args:
        model: as it is now, narrow.
        graph_before: the graph from before the edit.
        old: every tensor that the edit replaced, as it was before, by name.
        optimizers: whose state follows.
        old_states: state from before the edit by tensor; what is missing starts at zero.
        shifted: biases that took a constant over, as the edit left them; without them they are made anew from ``old``.
    Raises:
        EditError: the model has not the tensors of that graph.
    Example:
        >>> import weightfold as wf
        >>> from weightfold.graph import apply, edit
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = wf.trace(net, torch.zeros(1, 4))
        >>> cut, old = edit.remove(graph["0"], torch.tensor([0, 3])), {n: t.clone() for n, t in net.named_parameters()}
        >>> _ = apply.apply(net, graph, cut)
        >>> unfold(net, graph, cut, old)
        >>> all(torch.equal(t, old[n]) for n, t in net.named_parameters())
        True
    """
    group, narrow = graph_before[edit.group], after(graph_before, edit)[edit.group]
    flush_caches(model)
    values = _reopened(model, group, narrow, edit, old, shifted)
    names = [name for name in values if any(axis.tensor == name for axis in group.axes)]
    states = {name: _states(model, name, group, narrow, edit, optimizers, old_states or {}) for name in names}
    for name, value in values.items():
        tensor = find_tensor(model, name)[2]
        put_tensor(tensor, value.to(tensor.device))
        for optimizer, state in states.get(name, []):
            optimizer.state[tensor] = state
    back = Edit(group.name, "unfold", edit.n_after, torch.arange(group.n_channels))
    sync_sizes(model, narrow, back, names, grouped_tensors(graph_before), [])
    optim.assert_live(model, optimizers, [find_tensor(model, name)[2] for name in graph_before.followers])


def unfold_undo(
    graph_before: ChannelGraph, edit: Edit, undo: Undo, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """The same from an `Undo` that is still in memory; averaged copies of the model follow."""
    for target, old in undo.by_module():
        states = {name: state for _, module, name, state in undo.optimizer if module is target}
        shifted = {name: value for module, name, value in undo.shifted if module is target}
        unfold(target, graph_before, edit, old, optimizers if states else (), states, shifted or None)
    undo.restore_attributes()
    group, narrow = graph_before[edit.group], after(graph_before, edit)[edit.group]
    for mapping, old in undo.by_mapping():
        names = {spelling: graph_before.aliases.get(spelling, spelling) for spelling in old}
        wide = _reopened({names[s]: mapping[s] for s in old}, group, narrow, edit, {names[s]: old[s] for s in old})
        mapping.update({spelling: wide[names[spelling]] for spelling in old})


def _reopened(
    target: Companion,
    group: ChannelGroup,
    narrow: ChannelGroup,
    edit: Edit,
    old: Mapping[str, Tensor],
    shifted: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """W + E (N - W') of every tensor."""
    shifted = changed_biases(old.get, group, edit) if shifted is None else shifted
    out = {}
    for name, before in old.items():
        now = find_tensor(target, name)[2] if isinstance(target, nn.Module) else target[name]
        at_edit = new_value(shifted.get(name, before), group, edit, name)
        change = now.detach().to(before.device, torch.float64) - at_edit.double()
        out[name] = (before.double() + widen(change, group, narrow, edit, name)).to(before.dtype)
    return out


def widen(value: Tensor, group: ChannelGroup, narrow: ChannelGroup, edit: Edit, tensor: str, power: int = -1) -> Tensor:
    """E: put a narrow tensor where it stood in the wide one; zero elsewhere.

    Args:
        power: what becomes of the edit's factors: -1 for weights, 1 for gradients, 2 for their squares.
    """
    for wide, thin in reversed(list(zip(axes_of(group, tensor), axes_of(narrow, tensor), strict=True))):
        front = to_front(value, thin.dim, thin.slabs)
        factors = gauge_factors(group, wide, edit, layout(group, wide, edit))
        front = front if factors is None else scale_rows(front, factors**power)
        value = from_front(_widened(front, wide, thin, group, edit), wide.dim, wide.slabs)
    return value


def _widened(front: Tensor, wide: Axis, thin: Axis, group: ChannelGroup, edit: Edit) -> Tensor:
    out = front.new_zeros(wide.size, *front.shape[1:])
    plan = layout(group, wide, edit)
    rest = (plan.channel < 0).nonzero().flatten()
    out[plan.source[rest]] = front[rest]
    of, share = _members(edit)
    if wide.role != "read":
        share = torch.ones_like(share)
    for m in range(min(wide.index.shape[1], thin.index.shape[1])):
        have = ((of >= 0) & (wide.index[:, m] >= 0) & (thin.index[of.clamp_min(0), m] >= 0)).nonzero().flatten()
        factor = share[have].to(front.dtype).reshape(-1, *(1,) * (front.ndim - 1))
        out[wide.index[have, m]] = front[thin.index[of[have], m]] * factor
    return out


def _members(edit: Edit) -> tuple[Tensor, Tensor]:
    """The new channel that each old one stands in, -1 for none, and its share of what that one is read with."""
    of = torch.full((edit.n_channels,), -1, dtype=torch.long)
    of[edit.carry] = torch.arange(edit.n_after)
    if edit.write is None or edit.read is None:
        return of, torch.ones(edit.n_channels, dtype=torch.float64)
    of = edit.read.abs().argmax(1)
    return of, 1 / torch.bincount(of, minlength=edit.n_after)[of].double()


def _states(
    model: nn.Module,
    name: str,
    group: ChannelGroup,
    narrow: ChannelGroup,
    edit: Edit,
    optimizers: Sequence[torch.optim.Optimizer],
    old: Mapping[str, Mapping[str, Any]],
) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
    parameter = find_tensor(model, name)[2]
    held = [(o, o.state[parameter]) for o in optimizers if parameter in o.state]
    return [(o, _state(s, parameter, name, group, narrow, edit, old.get(name, {}))) for o, s in held]


def _state(
    state: Mapping[str, Any],
    parameter: Tensor,
    name: str,
    group: ChannelGroup,
    narrow: ChannelGroup,
    edit: Edit,
    old: Mapping[str, Any],
) -> dict[str, Any]:
    """Today's moments where a channel was kept, the old ones elsewhere; factored state is forgotten."""
    ones = torch.ones(parameter.shape, dtype=torch.float64)
    kept = widen(ones, group, narrow, edit, name) > 0
    out: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            out[key] = value
        elif value.shape == parameter.shape:
            power = 2 if key in optim.SQUARE else 1 if key in optim.GRADIENT | optim.MAGNITUDE else -1
            today = widen(value.detach().double().cpu(), group, narrow, edit, name, power)
            before = old[key].detach().double().cpu() if key in old else torch.zeros_like(today)
            out[key] = torch.where(kept, today, before).to(value.device, value.dtype)
        else:
            return {}
    return out
