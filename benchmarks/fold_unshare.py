"""Unsharing again: giving a folded network width back where the loss asks for it. Arms of `fold_variants.py`.

Two ways to grow, both exact at the moment of growing (the `split` edit):

    return   channels that the fold removed come back with the weights that once wrote them, read by nobody yet; those
             whose readers' columns have the largest gradient of the probe loss, as in Firefly (Wu et al., NeurIPS 2020)
    split    channels become two halves, moved apart by ±δ along the direction in which probe batches disagree most
             about their incoming weights; those with most disagreement first (a first-order stand-in for the splitting
             matrix of Wu, Wang & Liu, NeurIPS 2019, arXiv 1910.02366, which vanishes for ReLU)

Written for networks whose channels have one position an axis: the perceptron and the convolutional beds.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weightfold.compressor import Compressor
from weightfold.gate import Batch, Loss
from weightfold.graph.apply import apply, find_tensor
from weightfold.graph.edit import Edit, split
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.size import MacModel

UNIT = 8
"""Channels that come back together."""

APART = 0.2
"""Length of δ over that of a channel's incoming weights."""

Rows = dict[str, Tensor]


class Reserve:
    """What a fold removed, kept in step with the network.

    Args:
        compressor: before the fold; its model is copied.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.before = copy.deepcopy(compressor.model)
        self.graph = compressor.graph
        self.rows: dict[str, Rows] = {}

    def close(self) -> None:
        """After the fold: the removed rows, as they would stand in the narrow network."""
        edits = {applied.edit.group: applied.edit for applied in self.compressor._hands.applied}
        for name, edit in edits.items():
            gone = torch.ones(edit.n_channels, dtype=torch.bool)
            gone[edit.carry] = False
            self.rows[name] = {t: v[gone] for t, v in _written(self.before, self.graph[name]).items()}
        for edit in edits.values():
            self._follow(self.rows, self.graph, edit)
        del self.before

    def _follow(self, rows: Mapping[str, Rows], graph: ChannelGraph, edit: Edit) -> None:
        """Removed rows read another group's channels: they follow its edits as rows of the network do."""
        for axis in graph[edit.group].role("read"):
            for mine in rows.values():
                if axis.tensor in mine:
                    weight = mine[axis.tensor]
                    shift = edit.shift.get(axis.key)
                    bias = axis.tensor.replace("weight", "bias")
                    if shift is not None and bias in mine:
                        mine[bias] = mine[bias] + weight @ shift.to(weight.dtype)
                    mine[axis.tensor] = _mapped(weight, edit.B_of(axis.key))

    def scores(self, probe: list[Batch], loss: Loss) -> dict[str, Tensor]:
        """Squared gradient of the probe loss at what would read each removed channel, by group."""
        twin, graph = copy.deepcopy(self.compressor.model), self.compressor.graph
        rows = {name: dict(mine) for name, mine in self.rows.items()}
        places = {}
        for name in rows:
            n_rows = len(next(iter(rows[name].values())))
            edit, new = _opening(graph[name], n_rows)
            graph, _ = apply(twin, graph, edit)
            self._follow(rows, graph, edit)
            _fill(twin, graph[name], new, rows[name])
            places[name] = new
        twin.zero_grad()
        sum(loss(twin(x), y) for x, y in probe).backward()
        found = {}
        for name, new in places.items():
            found[name] = torch.zeros(len(new), dtype=torch.float64)
            for axis in graph[name].role("read"):
                gradient = find_tensor(twin, axis.tensor)[2].grad
                assert gradient is not None
                columns = gradient.movedim(axis.dim, 0)[axis.index[new, 0]]
                found[name] += columns.flatten(1).double().square().sum(1)
        return found

    def reopen(self, widths: Mapping[str, int], scores: Mapping[str, Tensor]) -> None:
        """Let the best channels of each group come back, up to these widths."""
        hands = self.compressor._hands
        for name, width in widths.items():
            n_new = width - hands.graph[name].n_channels
            if n_new <= 0:
                continue
            best = scores[name].argsort(descending=True)[:n_new].sort().values
            edit, new = _opening(hands.graph[name], n_new)
            self._take(edit)
            _fill(self.compressor.model, hands.graph[name], new, {t: v[best] for t, v in self.rows[name].items()})
            _forget(self.compressor, hands.graph[name], new)

    def _take(self, edit: Edit) -> None:
        hands = self.compressor._hands
        graph, undo = hands.attempt(edit)
        self._follow(self.rows, graph, edit)
        hands.keep(edit, graph, undo)


def by_need(reserve: Reserve, scores: Mapping[str, Tensor], most: float, example: Tensor) -> dict[str, int]:
    """Widths that spend multiply-accumulates where the loss falls fastest for them.

    Args:
        most: multiply-accumulates that may be used.
    """
    compressor = reserve.compressor
    macs = MacModel.of(compressor.model, compressor.graph, example)
    widths = {name: compressor.graph[name].n_channels for name in scores}
    ranked = {name: value.sort(descending=True).values for name, value in scores.items()}
    taken = dict.fromkeys(scores, 0)
    while True:
        now, options = macs.at(widths), []
        for name, value in ranked.items():
            if taken[name] + UNIT <= len(value):
                costs = macs.at({**widths, name: widths[name] + UNIT}) - now
                if now + costs <= most:
                    options.append((float(value[taken[name] : taken[name] + UNIT].sum()) / costs, name))
        if not options:
            return widths
        _, name = max(options)
        widths[name] += UNIT
        taken[name] += UNIT


def split_most(compressor: Compressor, widths: Mapping[str, int], probe: list[Batch], loss: Loss) -> None:
    """Split channels about which probe batches disagree, up to these widths."""
    hands, model = compressor._hands, compressor.model
    gradients: list[dict[str, Tensor]] = []
    for x, y in probe:
        values = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        gradients.append({name: g for (name, _), g in zip(model.named_parameters(), values, strict=True)})
    plans = []
    for name, width in widths.items():
        group = hands.graph[name]
        n_new = width - group.n_channels
        if n_new <= 0:
            continue
        weight = next(a.tensor for a in group.role("write") if a.dim == 0 and a.tensor.endswith("weight"))
        by_batch_BCF = torch.stack([g[weight].flatten(1) for g in gradients])
        apart_BCF = by_batch_BCF - by_batch_BCF.mean(0)
        most = apart_BCF.square().sum((0, 2)).argsort(descending=True)[: min(n_new, group.n_channels)]
        plans.append((name, weight, most, apart_BCF))
    for name, weight, most, apart_BCF in plans:
        group, n_new = hands.graph[name], widths[name] - hands.graph[name].n_channels
        copies = torch.ones(group.n_channels, dtype=torch.long)
        for at in range(n_new):
            copies[most[at % len(most)]] += 1
        edit = split(group, copies)
        graph, undo = hands.attempt(edit)
        hands.keep(edit, graph, undo)
        _part(find_tensor(model, weight)[2], edit.carry, apart_BCF)
        _forget(compressor, hands.graph[name], (copies[edit.carry] > 1).nonzero().flatten())


@torch.no_grad()
def _part(weight: Tensor, carry: Tensor, apart_BCF: Tensor) -> None:
    """Move copies apart, by +δ and -δ in turn."""
    seen: dict[int, int] = {}
    for at, channel in enumerate(carry.tolist()):
        number = seen[channel] = seen.get(channel, -1) + 1
        if int((carry == channel).sum()) > 1:
            direction = torch.linalg.svd(apart_BCF[:, channel], full_matrices=False).Vh[0]
            direction = direction[: weight[at].numel()] if direction.numel() >= weight[at].numel() else None
            if direction is None:
                direction = torch.randn(weight[at].numel(), generator=torch.Generator().manual_seed(channel))
            step = APART * float(weight[at].norm()) * direction / direction.norm().clamp_min(1e-12)
            weight[at] += (1 if number % 2 else -1) * step.reshape(weight[at].shape)


def _written(model: nn.Module, group: ChannelGroup) -> Rows:
    """All that belongs to a group's channels but for its readers, channels first."""
    axes = [axis for axis in group.axes if axis.role != "read"]
    assert all(axis.index.shape[1] == 1 and axis.dim == 0 for axis in axes)
    return {a.tensor: find_tensor(model, a.tensor)[2].detach()[a.index[:, 0]].clone() for a in axes}


def _mapped(weight: Tensor, B: Tensor) -> Tensor:
    """W @ B along dimension 1."""
    return torch.tensordot(weight, B.to(weight.dtype), dims=([1], [0])).movedim(-1, 1).contiguous()


def _opening(group: ChannelGroup, n_new: int) -> tuple[Edit, Tensor]:
    """The split that adds channels which nobody reads yet, and where they stand."""
    n = group.n_channels
    copies = torch.full((n,), 1 + n_new // n)
    copies[: n_new % n] += 1
    carry = torch.repeat_interleave(torch.arange(n), copies)
    first = torch.cat([torch.ones(1, dtype=torch.bool), carry[1:] != carry[:-1]])
    return split(group, copies, first.double()), (~first).nonzero().flatten()


@torch.no_grad()
def _fill(model: nn.Module, group: ChannelGroup, new: Tensor, rows: Rows) -> None:
    for axis in group.axes:
        if axis.role != "read" and axis.tensor in rows:
            find_tensor(model, axis.tensor)[2][axis.index[new, 0]] = rows[axis.tensor]


def _forget(compressor: Compressor, group: ChannelGroup, new: Tensor) -> None:
    """Momentum of new channels starts at zero."""
    for axis in group.axes:
        parameter = find_tensor(compressor.model, axis.tensor)[2]
        for optimizer in compressor._hands.optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.movedim(axis.dim, 0)[axis.index[new, 0]] = 0
