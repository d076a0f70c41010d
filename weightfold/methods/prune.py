"""Prune: the controls. Remove whole channels by a simple criterion, without compensation.

Three criteria score each channel; the lowest scores go:

    magnitude  |w_i|, the norm of the weights that write the channel; ``norm_scale``: times |γ_i|/σ_i of its norm
    wanda      Σ over readers of Σ_o |V_oi| sqrt(E a_i²): weights times the norm of what they multiply
    random     uniform numbers from the moment's generator

Cost: one pass over the weights; wanda takes the observed second moments.
Reference: Li et al., ICLR 2017, arXiv 1608.08710 (magnitude); Sun et al., ICLR 2024, arXiv 2306.11695 (wanda); differs
in: scores of single weights are added up over the channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import find_tensor
from weightfold.graph.edit import remove
from weightfold.graph.group import ChannelGroup
from weightfold.graph.observe import axis_rows, gather
from weightfold.methods.base import NO_STATISTICS, Method, Moment, Proposal, check_liked, leaving_out, named_groups
from weightfold.size import MacModel
from weightfold.widths import Grid, Widths, by_cost, uniform, uniform_for_macs


class PruneConfig(Config):
    """Settings of `prune`."""

    criterion: str = "magnitude"
    """"magnitude", "wanda" or "random\""""
    keep: float = Field(default=0.7, gt=0, le=1)
    """share of channels that every group keeps"""
    macs: float | None = Field(default=None, gt=0, le=1)
    """share of multiply-accumulates to keep, in place of `keep`"""
    allocation: str = "uniform"
    """how `macs` is met: "uniform" (one share for all groups) or "cost" (lowest scores per MAC saved)"""
    widths: dict[str, int] | None = None
    """channels that each group keeps, by name, in place of `keep` and `macs`: the same widths as another plan"""
    norm_scale: bool = False
    """whether magnitude includes the scale of the batch norm behind the channel"""
    at: float = Field(default=0.1, ge=0, lt=1)
    """when to prune, as a share of the run's steps; a one-shot prunes at once"""
    stats_batches: int = Field(default=16, ge=1)
    """batches before the event during which statistics are taken (wanda)"""
    align: int = Field(default=0, ge=0)
    """widths are multiples of this; 0 for any"""
    liked: dict[str, list[int]] | None = None
    """widths that the target's kernels like, by group, in place of `align`: what `weightfold tune` measured"""
    groups: str | None = None
    """pattern of the names of groups to prune; all by default"""
    min_channels: int = Field(default=1, ge=1)
    """channels that every group keeps at least"""

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, word: str) -> str:
        return _known("criterion", word, CRITERIA)

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, word: str) -> str:
        return _known("allocation", word, ("uniform", "cost"))


def _known(setting: str, word: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    if word not in valid:
        raise ConfigError(f"PruneConfig has no {setting} '{word}'.", remedy=nearest(word, valid))
    return word


def _magnitude(moment: Moment, group: ChannelGroup, norm_scale: bool) -> Tensor:
    """Norm of the weights that write each channel, shape (C,)."""
    norm = gather(moment.model, group, ("write",)).norm(dim=1)
    return norm * _norm_scale(moment, group) if norm_scale else norm


def _norm_scale(moment: Moment, group: ChannelGroup) -> Tensor:
    """|γ|/σ of the batch norms behind each channel, multiplied together, shape (C,)."""
    scale = torch.ones(group.n_channels, dtype=torch.float64)
    for axis in group.role("pointwise"):
        [rows_C1] = axis_rows(moment.model, axis)[:1]
        if axis.tensor.endswith("running_var"):
            eps = float(getattr(find_tensor(moment.model, axis.tensor)[0], "eps", 0.0))
            scale /= (rows_C1[:, 0] + eps).sqrt()
        elif axis.tensor.endswith("weight"):
            scale *= rows_C1[:, 0].abs()
    return scale


def _wanda(moment: Moment, group: ChannelGroup, _: bool) -> Tensor:
    """Sum over readers of |V| sqrt(E a²), shape (C,)."""
    score = torch.zeros(group.n_channels, dtype=torch.float64)
    for axis in group.role("read"):
        if axis.key not in moment.statistics:
            raise DataError(f"'{axis.tensor}' has no statistics, which 'wanda' needs.", remedy=NO_STATISTICS)
        root = moment.statistics[axis.key].of(axis).second().diagonal().clamp_min(0).sqrt()
        score += sum((rows.abs().sum(1) * root for rows in axis_rows(moment.model, axis)), torch.zeros(()))
    return score


def _random(moment: Moment, group: ChannelGroup, _: bool) -> Tensor:
    return torch.rand(group.n_channels, generator=moment.generator, dtype=torch.float64)


CRITERIA: dict[str, Callable[[Moment, ChannelGroup, bool], Tensor]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "random": _random,
}


def drop_order(score_C: Tensor, block: Tensor | None) -> Tensor:
    """Channels from the lowest score up, one of every block in turn, the first of equal ones first, shape (C,).

    Example:
        >>> drop_order(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1]))
        tensor([1, 3, 0, 2])
    """
    score_C = score_C.double()
    blocks = torch.zeros(len(score_C), dtype=torch.long) if block is None else block
    mine = [(blocks == b).nonzero().flatten() for b in range(int(blocks.max()) + 1)]
    return torch.stack([m[torch.argsort(score_C[m], stable=True)] for m in mine], 1).flatten()


class Prune(Method):
    """Removes channels once: after a share of the run's steps, or at once on a trained network.

    Example:
        >>> import weightfold as wf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> moment = Moment(net, wf.trace(net, torch.zeros(1, 4)), 0, 0, {}, torch.zeros(1, 4), torch.Generator())
        >>> [proposal] = Prune(criterion="random", keep=0.5).step(moment)
        >>> proposal.edit.kind, proposal.edit.n_after
        ('remove', 4)
    """

    name: ClassVar[str] = "prune"
    Config: ClassVar[type[Config]] = PruneConfig

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._done = False

    def event(self, total_steps: int) -> int:
        """The step at which channels are removed."""
        return max(1, round(self.config.at * total_steps)) if total_steps else 0

    def prepare(self, moment: Moment) -> None:
        """Check that some group can be pruned.

        Raises:
            ConfigError: none can, or a name in `groups` or `widths` is unknown.
        """
        check_liked(moment.graph, self.config.liked or ())
        self._groups(moment)

    def observes(self, step: int, total_steps: int) -> bool:
        """As long as wanda needs statistics."""
        if self.config.criterion != "wanda" or (total_steps and self._done):
            return False
        event = self.event(total_steps)
        return total_steps == 0 or event - self.config.stats_batches <= step < event

    def acts(self, step: int, total_steps: int) -> bool:
        """At its event; always in a one-shot."""
        return not total_steps or (not self._done and step >= self.event(total_steps))

    def due(self, total_steps: int) -> int | None:
        return None if self._done else self.event(total_steps)

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose one removal per group when the time has come."""
        if moment.total_steps and (self._done or moment.step < self.event(moment.total_steps)):
            return []
        self._done = True
        groups = self._groups(moment)
        criterion = CRITERIA[self.config.criterion]
        scores: dict[str, Tensor] = {}
        for group in groups:
            with leaving_out(moment, group.name):
                scores[group.name] = criterion(moment, group, self.config.norm_scale)
        groups = [g for g in groups if g.name in scores]
        if not groups:
            return []
        widths = self._widths(moment, groups, scores)
        found = [self._proposal(g, scores[g.name], widths.get(g.name, g.n_channels)) for g in groups]
        return [proposal for proposal in found if proposal is not None]

    def _groups(self, moment: Moment) -> list[ChannelGroup]:
        found = named_groups(moment.graph, self.config.groups, self.config.widths or ())
        usable = [g for g in found if g.kind == "channels" and "remove" in g.admits and g.role("write")]
        if self.config.criterion == "wanda":
            usable = [g for g in usable if g.role("read") and all(a.tap is not None for a in g.role("read"))]
        if not usable:
            raise ConfigError("No group of this network can be pruned: none admits 'remove' for single channels.")
        return usable

    def _grid(self) -> Grid:
        return Grid(self.config.align, self.config.min_channels, liked=self.config.liked or {})

    def _widths(self, moment: Moment, groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor]) -> Widths:
        config, grid = self.config, self._grid()
        if config.widths is not None:
            return {g.name: grid.given(g, config.widths[g.name]) for g in groups if g.name in config.widths}
        if config.macs is None:
            return uniform(groups, config.keep, grid)
        macs = MacModel.of(moment.model, moment.graph, moment.example)
        if config.allocation == "uniform":
            return uniform_for_macs(macs, groups, config.macs, grid)
        cost = {g.name: partial(_lost_share, g, scores[g.name]) for g in groups}
        return by_cost(macs, groups, cost, config.macs, grid)

    def _proposal(self, group: ChannelGroup, score_C: Tensor, width: int) -> Proposal | None:
        n = group.n_channels
        if width >= n:
            return None
        order = drop_order(score_C, group.block)
        halfway = self._grid().nearest(group, (n + width + 1) // 2)
        why = {
            "metric": self.config.criterion,
            "unit": "score; the lowest are removed",
            "value": _lost_share(group, score_C, width),
            "dropped": [{"channel": int(i), "cost": float(score_C[i])} for i in order[: n - width]],
            "rejected": [],
        }
        less = partial(self._proposal, group, score_C, halfway if halfway > width else n)
        return Proposal(remove(group, order[n - width :]), why, None, less)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = bool(state["done"])


def _lost_share(group: ChannelGroup, score_C: Tensor, width: int) -> float:
    """Squared scores that go at a width, as a share of all."""
    order = drop_order(score_C, group.block)[: group.n_channels - width]
    return float((score_C[order] ** 2).sum() / (score_C**2).sum().clamp_min(1e-300))
