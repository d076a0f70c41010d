"""Attract: pull planned near-duplicates together until they are equal, then merge them.

At `start` the channels of every group are clustered by what writes them. From then on the loss has a pull,

    ½ s Σ_clusters Σ_i ‖w_i - w̄‖²,    w̄ the cluster's mean,    s rising in a straight line from 0 to `strength`

over writing weights (and a tenth of it over biases and norm scales), so that at `at` each cluster is nearly one channel
and merging it (writers averaged, readers added up) changes the loss little. The pull makes equal what the plan wants
equal; it does not look whether the network can afford that: the gate does, and takes too much back.

Cost: one pass over the writing weights a step. Nothing is saved before `at`: folding early is cheaper where it is
within the loss that was allowed.
Reference: Ding et al., CVPR 2019, arXiv 1904.03837 (centripetal SGD); differs in: the pull is part of the loss,
gradients are not averaged over clusters, clusters come from Ward's method without a random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.graph.apply import find_tensor
from weightfold.graph.edit import merge
from weightfold.graph.group import ChannelGroup
from weightfold.graph.layout import to_front
from weightfold.graph.observe import gather
from weightfold.methods.base import Method, Moment, Proposal, named_groups
from weightfold.widths import Grid, uniform

LESSER = 0.1
"""Share of the pull that biases and norm scales feel."""


class AttractConfig(Config):
    """Settings of `attract`."""

    keep: float = Field(default=0.7, gt=0, le=1)
    """share of channels that every group keeps: clusters over channels"""
    widths: dict[str, int] | None = None
    """channels that each group keeps, by name, in place of `keep`"""
    start: float = Field(default=0.05, ge=0, lt=1)
    """when clusters are chosen and the pull begins, as a share of the run's steps"""
    at: float = Field(default=0.15, gt=0, lt=1)
    """when clusters are merged, as a share of the run's steps; a one-shot merges at once"""
    strength: float = Field(default=0.1, ge=0)
    """s of the pull at the end, in units of the loss per squared weight"""
    align: int = Field(default=0, ge=0)
    """widths are multiples of this; 0 for any"""
    groups: str | None = None
    """pattern of the names of groups; all by default"""

    @model_validator(mode="after")
    def _in_order(self) -> AttractConfig:
        if self.start >= self.at:
            raise ConfigError("AttractConfig has 'start' not before 'at'.", remedy="Leave steps for the pull to act.")
        return self


class Attract(Method):
    """Pulls near-duplicates together in training, then merges them.

    Example:
        >>> import weightfold as wf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> moment = Moment(net, wf.trace(net, torch.zeros(1, 4)), 0, 0, {}, torch.zeros(1, 4), torch.Generator())
        >>> [proposal] = Attract(keep=0.5).step(moment)
        >>> proposal.edit.kind, proposal.edit.n_after
        ('merge', 4)
    """

    name: ClassVar[str] = "attract"
    Config: ClassVar[type[Config]] = AttractConfig

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._moment: Moment | None = None
        self._labels: dict[str, list[int]] = {}
        self._done = False
        self._pull = 0.0

    def prepare(self, moment: Moment) -> None:
        """Check that some group can be merged.

        Raises:
            ConfigError: none can, or a name is unknown.
        """
        self._moment = moment
        self._groups(moment)

    def step(self, moment: Moment) -> list[Proposal]:
        """Choose clusters at the start, raise the pull, propose the merges at the end."""
        self._moment = moment
        total = moment.total_steps
        start, at = round(self.config.start * total), max(1, round(self.config.at * total))
        if self._done or (total and moment.step < start):
            return []
        if not self._labels:
            self._labels = {g.name: labels for g in self._groups(moment) if (labels := self._clusters(moment, g))}
        if total and moment.step < at:
            self._pull = self.config.strength * (moment.step - start + 1) / max(at - start, 1)
            return []
        self._done, self._pull = True, 0.0
        labels, self._labels = self._labels, {}
        found = [self._proposal(moment, g, labels[g.name]) for g in self._groups(moment) if g.name in labels]
        return [proposal for proposal in found if proposal is not None]

    def penalty(self) -> Tensor | None:
        """The pull; None outside its time."""
        if self._pull == 0.0 or self._moment is None or self._done:
            return None
        terms = [self._pull_of(self._moment.graph[name], torch.tensor(labels)) for name, labels in self._labels.items()]
        return torch.stack(terms).sum() * (self._pull / 2)

    def _pull_of(self, group: ChannelGroup, labels_C: Tensor) -> Tensor:
        """Σ ‖w_i - w̄‖² over a group's clusters, differentiable."""
        assert self._moment is not None
        total: list[Tensor] = []
        for axis in group.axes:
            tensor = find_tensor(self._moment.model, axis.tensor)[2]
            if axis.role == "read" or not isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point():
                continue
            front = to_front(tensor, axis.dim, axis.slabs)
            weight = 1.0 if axis.role == "write" and tensor.ndim > 1 else LESSER
            for m in range(axis.index.shape[1]):
                have = axis.index[:, m] >= 0
                rows = front[axis.index[have, m].to(front.device)].reshape(int(have.sum()), -1)
                total.append(weight * _spread(rows, labels_C[have].to(front.device)))
        return torch.stack(total).sum()

    def _groups(self, moment: Moment) -> list[ChannelGroup]:
        found = named_groups(moment.graph, self.config.groups, self.config.widths or ())
        usable = [g for g in found if g.kind == "channels" and "merge" in g.admits and g.role("write")]
        if not usable:
            raise ConfigError("No group of this network can be merged: none admits 'merge' for single channels.")
        return [g for g in usable if g.name not in moment.frozen]

    def _clusters(self, moment: Moment, group: ChannelGroup) -> list[int]:
        """Labels by Ward's method on the writing weights, equally many clusters in every block; [] for no change."""
        grid = Grid(self.config.align)
        if self.config.widths is not None:
            width = grid.given(group, self.config.widths.get(group.name, group.n_channels))
        else:
            width = uniform([group], self.config.keep, grid)[group.name]
        if width >= group.n_channels:
            return []
        rows = gather(moment.model, group, ("write", "pointwise")).numpy()
        blocks = np.zeros(len(rows), np.int64) if group.block is None else group.block.numpy()
        n_blocks = int(blocks.max()) + 1
        labels = np.zeros(len(rows), np.int64)
        for b in range(n_blocks):
            mine = np.flatnonzero(blocks == b)
            tree = linkage(rows[mine], "ward")
            labels[mine] = b * width + _exactly(fcluster(tree, width // n_blocks, "maxclust"), width // n_blocks)
        return labels.tolist()

    def _proposal(self, moment: Moment, group: ChannelGroup, labels: list[int]) -> Proposal | None:
        """Merge a group's clusters; half of the cut merges every second one."""
        sizes = np.bincount(labels)
        several = [int(k) for k in np.flatnonzero(sizes > 1)]
        if not several:
            return None
        spread = float(_spread(gather(moment.model, group, ("write",)), torch.tensor(labels)))
        whole = float(gather(moment.model, group, ("write",)).square().sum())
        why = {
            "metric": "spread of the writing weights inside clusters",
            "unit": "share of their squared norm",
            "value": spread / max(whole, 1e-300),
            "clusters": [np.flatnonzero(np.array(labels) == k).tolist() for k in several],
            "rejected": [],
        }
        less = partial(self._proposal, moment, group, _without(labels, several[1::2] or several))
        return Proposal(merge(group, torch.tensor(labels)), why, None, less)

    def due(self, total_steps: int) -> int | None:
        return None if self._done else max(1, round(self.config.at * total_steps))

    def acts(self, step: int, total_steps: int) -> bool:
        """From the start of the pull until the merge."""
        return not self._done and (not total_steps or step >= round(self.config.start * total_steps))

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "pull": self._pull, "labels": dict(self._labels)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done, self._pull = bool(state["done"]), float(state["pull"])
        self._labels = {name: list(labels) for name, labels in state["labels"].items()}


def _spread(rows_CF: Tensor, labels_C: Tensor) -> Tensor:
    """Σ ‖w_i - w̄‖² over clusters."""
    _, number = torch.unique(labels_C, return_inverse=True)
    n = int(number.max()) + 1
    sums = rows_CF.new_zeros(n, rows_CF.shape[1]).index_add(0, number, rows_CF)
    sizes = torch.bincount(number, minlength=n).to(rows_CF.dtype)
    return (rows_CF - (sums / sizes[:, None])[number]).square().sum()


def _exactly(labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """Cluster numbers from 0; equal rows can leave fewer clusters than were asked for: then large ones are divided."""
    _, labels = np.unique(labels, return_inverse=True)
    while labels.max() + 1 < n_clusters:
        members = np.flatnonzero(labels == np.bincount(labels).argmax())
        labels[members[len(members) // 2 :]] = labels.max() + 1
    return labels


def _without(labels: list[int], clusters: list[int]) -> list[int]:
    """The same with some clusters taken apart into single channels."""
    out, fresh = list(labels), max(labels) + 1
    for i, label in enumerate(labels):
        if label in clusters:
            out[i], fresh = fresh, fresh + 1
    return out
