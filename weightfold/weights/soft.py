"""Soft matching: bring a model of other widths into a model's basis, by optimal transport between channels.

Between the rows of a group of n channels (first model) and of m (second model) a transport plan T (n, m) with equal
masses is found; the second model's channels are then mixed by it:

    writers  W -> P W,  P = n T  (each new channel is a mean of old ones)
    readers  W -> W Q,  Q = m Tᵀ (each old channel is shared out among new ones)

With n = m and little smoothing T is a permutation and this is weight matching; where a unit was split in equal copies,
and where copies are merged, it is exact. Otherwise it changes the function: measure, and repair.

Reference: Singh & Jaggi 2020, arXiv 1910.05653 (OTFusion); Cuturi 2013, arXiv 1306.0895 (Sinkhorn); differs in: readers
share what they read, so that widths may differ; groups are inferred; further sweeps look at readers too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weightfold.errors import GraphError
from weightfold.graph import ChannelGraph, ChannelGroup, edit
from weightfold.graph.apply import apply, find_tensor
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import Edit
from weightfold.graph.proof import prepared
from weightfold.graph.trace import Example, structural_copy
from weightfold.weights.compare import PAIR, differences, fitting, require_finite, unmixable, weights_of
from weightfold.weights.symmetry import Slot, Symmetries
from weightfold.weights.ties import common_owners, untied
from weightfold.weights.work import assign, in_reach, rows_float

ITERATIONS = 300


def sinkhorn(cost: Tensor, smoothing: float = 0.01) -> Tensor:
    """The transport plan between equal masses that costs least, smoothed by entropy, in logarithms.

    Args:
        cost: shape (n, m), >= 0.
        smoothing: temperature as a share of the mean cost, > 0.
    Returns:
        plan: shape (n, m), float64; rows sum to 1/n, columns to 1/m.
    Example:
        >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    cost = cost.double()
    n, m = cost.shape
    scaled = -cost / (smoothing * cost.mean().clamp_min(1e-300))
    u, v = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, m, dtype=torch.float64)
    for _ in range(ITERATIONS):
        u = -torch.logsumexp(scaled + v, 1, keepdim=True) - torch.tensor(float(n)).log()
        v = -torch.logsumexp(scaled + u, 0, keepdim=True) - torch.tensor(float(m)).log()
    return (scaled + u + v).exp()


def soft(
    a: nn.Module,
    b: nn.Module,
    example: Example,
    *,
    smoothing: float = 0.01,
    sweeps: int = 2,
    found: Symmetries | None = None,
) -> nn.Module:
    """Bring model b, of the same layers but perhaps other widths, into model a's basis and widths.

    Args:
        smoothing: temperature of the transport as a share of the mean cost.
        sweeps: rounds over all groups after the first.
    Returns:
        A copy of b with a's shapes.
    Raises:
        GraphError: the layers differ, or a group whose widths differ cannot be mixed; names it.
    Example:
        >>> a = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> b = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> soft(a, b, torch.zeros(1, 4))[0].weight.shape
        torch.Size([8, 4])
    """
    require_finite([weights_of(a), weights_of(b)], PAIR)
    owners = common_owners([a, b])
    a, b = untied(a, owners), untied(b, owners)
    found = fitting(found, a, example)
    if lacks := [text for text in differences(weights_of(a), weights_of(b)) if "lacks" in text]:
        raise _other_layers(lacks[0])
    if left := unmixable(found, weights_of(a), weights_of(b)):
        raise GraphError(
            f"The models cannot be brought to one shape: {left[0]}.",
            remedy="Bring both to the same inputs, vocabulary and classes first, entry by entry.",
        )
    theirs = prepared(structural_copy(b).eval(), example)
    _require_groups(found.graph, theirs, a)
    order = [g for g in in_reach(found) if g.kind == "channels" or g.n == theirs[g.name].n_channels]
    edits: dict[str, Edit] = {}
    own = weights_of(a)
    for round_ in range(sweeps + 1):
        for group in order:
            others = {name: e for name, e in edits.items() if name != group.name}
            now = _edited(b, theirs, others)
            edits[group.name] = _edit_of(own, now, found.graph[group.name], theirs[group.name], smoothing)
        if round_ and all(e.kind == "permute" for e in edits.values()):
            break
    mapped = _edited(b, theirs, edits)
    left = differences(own, weights_of(mapped))
    if left:
        raise GraphError(f"The models cannot be brought to one shape: {left[0]}.")
    return mapped


def _edited(b: nn.Module, graph: ChannelGraph, edits: dict[str, Edit]) -> nn.Module:
    twin = independent_copy(b)
    for e in edits.values():
        graph, _ = apply(twin, graph, e)
    return twin


def _other_layers(what: str) -> GraphError:
    return GraphError(f"The models differ in their layers: {what}.", remedy="Only widths may differ in soft matching.")


def _require_groups(one: ChannelGraph, two: ChannelGraph, a: nn.Module) -> None:
    names = [[g.name for g in graph] for graph in (one, two)]
    if names[0] != names[1]:
        raise _other_layers(f"their channel groups are {names[0]} and {names[1]}")
    for mine, other in zip(one, two, strict=True):
        if mine.n_channels != other.n_channels and ("merge" not in other.admits or mine.block is not None):
            raise GraphError(
                f"Group '{mine.name}' has {mine.n_channels} and {other.n_channels} channels, which cannot be mixed: "
                f"{other.reasons.get('merge', 'they lie in blocks')}.",
                remedy="Match models of the same width there."
                if untied(a) is a
                else "Match untied copies: weightfold.weights.ties.untied(model) of both.",
            )


def _edit_of(own: dict[str, Tensor], now: nn.Module, mine: ChannelGroup, other: ChannelGroup, smoothing: float) -> Edit:
    """The edit that brings one group of the second model to the first's, the others as they are now."""
    one, two = _comparable(own, now, mine, other)
    if "merge" not in other.admits or other.block is not None:
        score = one @ two.T
        return edit.permute(other, assign(score.double(), other.block))
    cost = (one.square().sum(1)[:, None] - 2 * one @ two.T + two.square().sum(1)).clamp_min(0)
    plan = sinkhorn(cost, smoothing)
    m = plan.shape[1]
    write = plan / plan.sum(1, keepdim=True)
    read = (plan / plan.sum(0, keepdim=True)).T.contiguous()
    return Edit(other.name, "soft", m, write.argmax(1), write=write, read=read)


def _comparable(
    own: dict[str, Tensor], now: nn.Module, mine: ChannelGroup, other: ChannelGroup
) -> tuple[Tensor, Tensor]:
    """Rows of both models' channels, from tensors that agree in all other dimensions, shapes (n, F) and (m, F)."""
    ones, twos = [], []
    for axis, theirs in zip(mine.axes, other.axes, strict=True):
        if axis.tensor not in own:
            continue
        value = find_tensor(now, theirs.tensor)[2].detach()
        rest = [s for d, s in enumerate(own[axis.tensor].shape) if d != axis.dim]
        if rest == [s for d, s in enumerate(value.shape) if d != theirs.dim]:
            x = rows_float(own, Slot(axis.tensor, axis.dim, axis.slabs, axis.index))
            y = rows_float({theirs.tensor: value}, Slot(theirs.tensor, theirs.dim, theirs.slabs, theirs.index))
            if x.shape[1] == y.shape[1]:
                ones.append(x)
                twos.append(y)
    if not ones:
        raise GraphError(f"Nothing of group '{mine.name}' can be compared: all its neighbours differ in width.")
    return torch.cat(ones, 1), torch.cat(twos, 1)
