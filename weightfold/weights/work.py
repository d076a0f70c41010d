"""What alignment works on: both models' tensors, the places of each group, and moves along them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from weightfold.graph.apply import find_tensor
from weightfold.graph.layout import from_front, to_front
from weightfold.weights.symmetry import Freedom, Members, Slot, Symmetries


@dataclass(eq=False)
class Work:
    """Both models' tensors, and what has been done to the second's."""

    found: Symmetries
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    orders: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folded: bool = False
    least: float = 1e-9

    def places(self, group: Members) -> tuple[Slot, ...]:
        """All that a group touches."""
        return self.slots(group.slots if self.folded else graph_slots(self.found, group))

    def slots(self, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        return tuple(s for s in slots if s.tensor in self.a)


def graph_slots(found: Symmetries, group: Members) -> tuple[Slot, ...]:
    """All places that a group touches in the model's own tensors, norms' statistics among them."""
    axes = found.graph[group.name].axes
    return tuple(Slot(axis.tensor, axis.dim, axis.slabs, axis.index) for axis in axes)


def in_reach(found: Symmetries) -> list[Members]:
    """Free groups, each as soon as most of what it touches is settled."""
    left = [g for g in found.members if g.free and g.n > 1]
    numbers = dict.fromkeys(found.shapes, 1)
    for name, shape in found.shapes.items():
        for size in shape:
            numbers[name] *= size
    grouped: dict[str, set[str]] = {}
    for group in left:
        for slot in graph_slots(found, group):
            grouped.setdefault(slot.tensor, set()).add(group.name)
    order: list[Members] = []
    done: set[str] = set()
    while left:

        def share(group: Members) -> float:
            names = {s.tensor for s in graph_slots(found, group)}
            both = touched_twice(graph_slots(found, group))
            known = sum(numbers[t] for t in names - both if grouped[t] <= done | {group.name})
            return known / max(1, sum(numbers[t] for t in names))

        best = max(left, key=share)
        left.remove(best)
        done.add(best.name)
        order.append(best)
    return order


def touched_twice(slots: tuple[Slot, ...]) -> set[str]:
    """Tensors that a group touches along more than one dimension: its channels write what they read themselves."""
    dims: dict[str, set[int]] = {}
    for slot in slots:
        dims.setdefault(slot.tensor, set()).add(slot.dim)
    return {tensor for tensor, found in dims.items() if len(found) > 1}


def tensors_of(found: Symmetries, model: nn.Module) -> dict[str, Tensor]:
    names = [name for name in found.shapes if "@" not in name]
    return {name: find_tensor(model, name)[2].detach().cpu().clone() for name in names}


def rows_float(tensors: Mapping[str, Tensor], slot: Slot) -> Tensor:
    """The numbers at one slot, one row a member, shape (C, F), in the tensors' own type."""
    front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
    flat = front.reshape(front.shape[0], -1)
    have = (slot.index >= 0).to(flat.dtype)
    rows = flat[slot.index.clamp_min(0).reshape(-1)].reshape(*slot.index.shape, -1) * have[:, :, None]
    return rows.reshape(slot.index.shape[0], -1)


def scores_of(work: Work, slots: tuple[Slot, ...], n: int) -> Tensor:
    """Inner products of the rows of both models, shape (C of a, C of b)."""
    total = torch.zeros(n, n, dtype=torch.float64)
    for slot in slots:
        one, two = rows_float(work.a, slot), rows_float(work.b, slot)
        total += (one @ two.T).double()
    return total


def assign(scores: Tensor, block: Tensor | None = None, movable: Tensor | None = None) -> Tensor:
    """The order that maximises Σ_i scores[i, order[i]], block by block.

    Example:
        >>> assign(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    n = len(scores)
    order = torch.arange(n)
    movable = torch.ones(n, dtype=torch.bool) if movable is None else movable
    blocks = torch.zeros(n, dtype=torch.long) if block is None else block
    for b in torch.unique(blocks):
        mine = ((blocks == b) & movable).nonzero().flatten()
        if len(mine) > 1:
            _, best = linear_sum_assignment(scores[mine][:, mine].numpy(), maximize=True)
            order[mine] = mine[torch.from_numpy(best)]
    return order


def permute_(tensors: dict[str, Tensor], slots: tuple[Slot, ...], order: Tensor) -> None:
    """Put member ``order[k]`` in place k, wherever the slots reach."""
    for slot in slots:
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs)
        new = front.clone()
        both = (slot.index >= 0) & (slot.index[order] >= 0)
        new[slot.index[both]] = front[slot.index[order][both]]
        tensors[slot.tensor] = from_front(new, slot.dim, slot.slabs)


def signs_of(found: Symmetries, group: Members) -> Freedom | None:
    """The sign that every channel of a group is free to take as a whole, if it is."""
    places = sum(int((s.index >= 0).sum()) for s in graph_slots(found, group))
    for gauge in found.graph[group.name].gauges:
        reached = sum(int((index >= 0).sum()) for *_, index in gauge.axes)
        if gauge.kind == "sign" and reached == places and len(gauge) == group.n:
            return next(
                (f for f in found.freedoms if f.kind == "sign" and f.group == group.name and len(f.channel) == group.n),
                None,
            )
    return None


def multiply_signs_(tensors: dict[str, Tensor], freedom: Freedom, factor: Tensor) -> None:
    for slot in (*freedom.plus, *freedom.minus):
        if slot.tensor not in tensors:
            continue
        front = to_front(tensors[slot.tensor], slot.dim, slot.slabs).clone()
        for m in range(slot.index.shape[1]):
            have = slot.index[:, m] >= 0
            rows = slot.index[have, m]
            front[rows] = front[rows] * factor[have].to(front.dtype).reshape(-1, *[1] * (front.ndim - 1))
        tensors[slot.tensor] = from_front(front, slot.dim, slot.slabs)
