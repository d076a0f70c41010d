"""Fold: keep some channels of a group and express the others through them, by least squares on what their readers read.

The equations stand in `weightfold.redundancy`. Kept channels keep their own norm statistics; every reader gets its own
map; what a linear reader loses of the mean goes into its bias. Hidden units, convolution channels, residual streams and
groups with blocks fold alike.

With one dial, `max_accuracy_loss` or `time_goal`, the method finds the rest by itself. It looks at the network from
`earliest` on and folds as soon as the set that it would keep has settled, at the latest at `latest` or at the last step
at which the time goal can still be met. Then it prices candidate widths on single samples (`weightfold.price`), times
training steps at them (`weightfold.latency`), forecasts what each will cost the finished network
(`weightfold.forecast`), and takes the one that the dial asks for, or none, and says why.

Cost: O(C³) a group, once; second moments of a few batches; one forward and backward pass of some hundred samples.
Reference: Chee et al., NeurIPS 2022 (interpolative decomposition); differs in: one choice for several readers. The
trigger follows Shen et al., CVPR 2022, arXiv 2110.12007 (prune when the kept structure is stable).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from weightfold.config import Config
from weightfold.errors import ConfigError, DataError
from weightfold.folding import Job
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.observe import SecondMoment, axis_rows, gather
from weightfold.heads import HeadJob, partner_of
from weightfold.methods.base import (
    NO_STATISTICS,
    Key,
    Method,
    Moment,
    Proposal,
    Refused,
    check_liked,
    leaving_out,
    named_groups,
)
from weightfold.plan import SHARES, AnyJob, Decision
from weightfold.planner import Planner, knew_its_task
from weightfold.redundancy import MAX_EXACT, choose, leading, readers_of
from weightfold.size import MacModel
from weightfold.widths import Grid, Widths, by_cost, uniform

STRONG = 0.05
"""Ridge from which a quarter as many samples as channels will do."""

EXACT_IN_TRAINING = 256
"""Widest group whose channels are chosen by exact elimination in mid-training."""

STABLE = 0.9
"""Jaccard index of the kept sets of two looks from which they count as the same."""

SIGNATURE = 64
"""Channels of each group that a look compares."""


class FoldConfig(Config):
    """Settings of `fold`: one dial, or widths and step given outright."""

    max_accuracy_loss: float | None = Field(default=None, ge=0)
    """dial: points of accuracy that folding may cost the finished network"""
    time_goal: float | None = Field(default=None, gt=0, lt=1)
    """dial: share of the dense run's training time to save"""
    keep: float = Field(default=0.7, gt=0, le=1)
    """without a dial: share of channels that every group keeps"""
    macs: float | None = Field(default=None, gt=0, le=1)
    """share of multiply-accumulates to keep, in place of `keep`: widths are then chosen by cost"""
    widths: dict[str, int] | None = None
    """channels that each group keeps, by name, in place of `keep` and `macs`: the same widths as another plan"""
    at: float = Field(default=0.1, ge=0, lt=1)
    """without a dial: when to fold, as a share of the run's steps; a one-shot folds at once"""
    earliest: float = Field(default=0.02, ge=0, lt=1)
    """with a dial: first look, as a share of the run's steps"""
    latest: float = Field(default=0.06, gt=0, lt=1)
    """with a dial: when to fold if the kept set has not settled, as a share of the run's steps"""
    ridge: float | None = Field(default=None, ge=0)
    """λ over the mean of C's diagonal; by default 0.1 in mid-training, 0.001 in a one-shot"""
    stats_batches: int = Field(default=16, ge=1)
    """batches before the event during which statistics are taken"""
    choice: Literal["redundancy", "magnitude", "random"] = "redundancy"
    """whom to keep; the last two are controls, compensated alike"""
    allocation: Literal["auto", "uniform", "knapsack"] = "auto"
    """with a dial: the same share of every group, or fewest multiply-accumulates for the same lost energy; by default
    the first without attention heads, the second with them"""
    heads: bool = True
    """with a dial: fold whole attention heads as well"""
    align: int | None = Field(default=None, ge=0)
    """widths are multiples of this; 0 for any; by default as the hardware likes with a dial, else any"""
    liked: dict[str, list[int]] | None = None
    """widths that the target's kernels like, by group, in place of `align`: what `weightfold tune` measured"""
    groups: str | None = None
    """pattern of the names of groups to fold, such as "layer?.*.conv1"; all by default"""
    min_channels: int = Field(default=1, ge=1)
    """channels that every group keeps at least"""
    floor: float = Field(default=0.1, ge=0, le=1)
    """share of channels that every group keeps at least when `macs` is given"""
    latency: dict[str, float] | None = None
    """a training step's time over the dense one's by share of MACs ("0.25"), as recorded; measured by default"""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> FoldConfig:
        given = [n for n in ("max_accuracy_loss", "time_goal", "macs", "widths") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"FoldConfig takes one of '{given[0]}' and '{given[1]}'.", remedy="Leave one out.")
        if self.earliest > self.latest:
            raise ConfigError("FoldConfig has 'earliest' after 'latest'.", remedy="Lower 'earliest'.")
        return self

    @property
    def dialled(self) -> bool:
        """Whether a dial decides."""
        return self.max_accuracy_loss is not None or self.time_goal is not None


def eligible(graph: ChannelGraph, pattern: str | None) -> tuple[list[ChannelGroup], dict[str, str]]:
    """The groups that can be folded, and why the others cannot.

    Raises:
        ConfigError: the pattern matches no group; names the nearest.
    """
    named = named_groups(graph, pattern)
    refused = {g.name: reason for g in named if (reason := _refusal(g)) is not None}
    return [g for g in named if g.name not in refused], refused


def _refusal(group: ChannelGroup) -> str | None:
    if group.kind != "channels":
        return "it consists of whole blocks"
    if "merge" not in group.admits:
        return group.reasons.get("merge", "it does not admit 'merge'")
    blind = [axis.tensor for axis in group.role("read") if axis.tap is None]
    if blind or not group.role("read"):
        return f"what '{blind[0]}' reads cannot be observed" if blind else "nothing reads it"
    return None


class Fold(Method):
    """Folds the network once: when the time has come in training, or at once on a trained network.

    Example:
        >>> import weightfold as wf
        >>> from weightfold.graph.observe import Observer
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x, graph = torch.randn(256, 4, generator=torch.Generator().manual_seed(0)), wf.trace(net, torch.zeros(1, 4))
        >>> with Observer(net, graph) as observer:
        ...     _ = net(x)
        >>> moment = Moment(net, graph, 0, 0, observer.statistics(), torch.zeros(1, 4), torch.Generator())
        >>> [proposal] = Fold(keep=0.5).step(moment)
        >>> proposal.edit.n_channels, proposal.edit.n_after, proposal.less().edit.n_after
        (8, 4, 6)
    """

    name: ClassVar[str] = "fold"
    Config: ClassVar[type[Config]] = FoldConfig

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._done = False
        self._signature: dict[str, list[int]] = {}
        self._settled = False
        self._trained_before = False
        self._seen: list[dict[Key, SecondMoment]] = []
        self.decision: Decision | None = None

    # when -----------------------------------------------------------------------------------------------------------

    def event(self, total_steps: int) -> int:
        """The step at which the network is folded, at the latest."""
        if not total_steps:
            return 0
        if not self.config.dialled:
            return max(1, round(self.config.at * total_steps))
        latest = self.config.latest
        if self.config.time_goal is not None:
            latest = min(latest, (1 - self.config.time_goal) / 2)
        return max(1, round(latest * total_steps))

    def looks(self, total_steps: int) -> list[int]:
        """The steps at which it looks, the event's last possible step being the last."""
        last = self.event(total_steps)
        first = max(1, min(last, round(self.config.earliest * total_steps))) if self.config.dialled else last
        gap = max(self.config.stats_batches // 2, round(0.02 * total_steps), 1)
        return sorted({*range(last, first - 1, -gap)})

    def acts(self, step: int, total_steps: int) -> bool:
        """At its looks, until it has decided."""
        return not total_steps or (not self._done and step in self.looks(total_steps))

    def due(self, total_steps: int) -> int | None:
        return None if self._done else self.event(total_steps)

    def observes(self, step: int, total_steps: int) -> bool:
        """Before each look; always in a one-shot."""
        if not total_steps:
            return True
        looks = self.looks(total_steps)
        each = self.config.stats_batches if len(looks) == 1 else max(1, self.config.stats_batches // 2)
        return not self._done and any(look - each <= step < look for look in looks)

    def watch(self, total_steps: int) -> int:
        """A tenth of the run, at most 200 steps, where a dial has decided."""
        return max(1, min(200, total_steps // 10)) if self.config.dialled and total_steps else 0

    def prepare(self, moment: Moment) -> None:
        """Check that some group can be folded, and that the dial can be read.

        Raises:
            ConfigError: nothing can be folded (with the reasons), a width of no group, or a dial without what it needs.
        """
        named_groups(moment.graph, self.config.groups, self.config.widths or ())
        groups, refused = eligible(moment.graph, self.config.groups)
        check_liked(moment.graph, self.config.liked or ())
        if not groups:
            reasons = "; ".join(f"'{name}': {why}" for name, why in list(refused.items())[:4])
            raise ConfigError(f"No group of this network can be folded: {reasons or 'it has none'}.")
        if self.config.dialled and (not moment.probe or moment.loss is None):
            dial = "max_accuracy_loss" if self.config.max_accuracy_loss is not None else "time_goal"
            raise ConfigError(
                f"The dial '{dial}' needs a probe to measure by.",
                remedy="Pass loss= and probe= to the Compressor, or give 'keep' and 'at'.",
            )
        self._trained_before = self.config.dialled and knew_its_task(moment)

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose one fold per group when the time has come."""
        if moment.total_steps and not self._due(moment):
            return []
        self._done = True
        if self.config.dialled and moment.total_steps:
            return self._by_dial(moment)
        jobs = self._jobs(moment, dict(moment.statistics))
        if not jobs:
            return []
        return self._proposals(jobs, self._widths(moment, jobs), self._grid(moment))

    def _due(self, moment: Moment) -> bool:
        if self._done or moment.step not in self.looks(moment.total_steps):
            return not self._done and moment.step > self.event(moment.total_steps)
        if moment.step == self.event(moment.total_steps):
            return True
        self._look(moment)
        return self._settled

    def _look(self, moment: Moment) -> None:
        """Compare whom the network would keep now with the look before."""
        latest = self._since(moment, 1)
        found: dict[str, list[int]] = {}
        for group in self._groups(moment):
            axis = group.role("read")[0]
            if axis.key in latest:
                norm = torch.stack([rows.norm(dim=1) for rows in axis_rows(moment.model, axis)]).sum(0)
                second = latest[axis.key].of(axis).second() * torch.outer(norm, norm)
                found[group.name] = sorted(leading(second.numpy(), min(SIGNATURE, group.n_channels // 2)))
        both = [(set(found[name]), set(self._signature.get(name, ()))) for name in found]
        union = sum(len(a | b) for a, b in both)
        self._settled = union > 0 and sum(len(a & b) for a, b in both) / union >= STABLE
        self._signature = found
        self._seen = [*self._seen, dict(moment.statistics)][-2:]

    def _since(self, moment: Moment, n_looks: int) -> dict[Key, SecondMoment]:
        """Statistics without those from before the latest looks."""
        if len(self._seen) < n_looks:
            return dict(moment.statistics)
        earlier = self._seen[-n_looks]
        return {
            key: value.without(earlier[key]) if key in earlier and value.count > earlier[key].count else value
            for key, value in moment.statistics.items()
        }

    # how far --------------------------------------------------------------------------------------------------------

    def _by_dial(self, moment: Moment) -> list[Proposal]:
        """Price candidates, choose by the dial, and refuse what does not pay."""
        started = time.perf_counter()
        statistics = self._since(moment, 2)
        heads = self._head_jobs(moment, statistics)
        taken = {job.observed.name for job in heads}
        jobs: list[AnyJob] = [*(j for j in self._jobs(moment, statistics) if j.group.name not in taken), *heads]
        if not jobs:
            return []
        planner = self._planner(moment, jobs, started)
        self.decision = decision = planner.decide()
        found, aside = planner.account(decision, "the kept set has settled" if self._settled else "the latest step")
        body = {"method": self.name, **found}
        if decision.chosen is None:
            raise Refused(decision.reason, body, aside)
        moment.record("plan", body, aside)
        return self._proposals(jobs, decision.chosen.widths, self._grid(moment))

    def _planner(self, moment: Moment, jobs: Sequence[AnyJob], started: float) -> Planner:
        return Planner(moment, self.config, jobs, self._grid(moment), started, self._trained_before)

    # which ----------------------------------------------------------------------------------------------------------

    def _proposals(self, jobs: Sequence[AnyJob], widths: Mapping[str, int], grid: Grid) -> list[Proposal]:
        found = [self._proposal(job, widths[job.group.name], grid) for job in jobs]
        return [proposal for proposal in found if proposal is not None]

    def _proposal(self, job: AnyJob, width: int, grid: Grid) -> Proposal | None:
        """The fold to a width, or None where that would change nothing."""
        n = job.group.n_channels
        if width >= n:
            return None
        keep = job.kept(width)
        predicted = job.lost_energy(keep)
        halfway = grid.nearest(job.group, (n + width + 1) // 2)
        less = partial(self._proposal, job, halfway if halfway > width else n, grid)
        first = (job.repair(keep),) if isinstance(job, HeadJob) else ()
        edit = job.edit(keep)
        return Proposal(edit, job.why(keep, predicted), predicted, less, first)

    def _ridge(self, moment: Moment) -> float:
        if self.config.ridge is not None:
            return self.config.ridge
        return 0.1 if moment.total_steps else 1e-3

    def _groups(self, moment: Moment) -> list[ChannelGroup]:
        groups, _ = eligible(moment.graph, self.config.groups)
        return [g for g in groups if g.name not in moment.frozen]

    def _jobs(self, moment: Moment, statistics: Mapping[Key, SecondMoment]) -> list[Job]:
        groups = self._groups(moment)
        seen = [g for g in groups if all(axis.key in statistics for axis in g.role("read"))]
        if groups and not seen:
            raise DataError("No group has statistics to fold by.", remedy=NO_STATISTICS)
        found = []
        for group in seen:
            with leaving_out(moment, group.name):
                found.append(self._job(moment, group, statistics))
        return found

    def _job(self, moment: Moment, group: ChannelGroup, statistics: Mapping[Key, SecondMoment]) -> Job:
        ridge = self._ridge(moment)
        readers = readers_of(moment.model, group, statistics, 1.0 if ridge < STRONG else 0.25)
        exact = EXACT_IN_TRAINING if moment.total_steps else MAX_EXACT
        block = None if group.block is None else group.block.numpy()
        path = choose(readers, block, ridge, self._least(group, moment), exact)
        norms = gather(moment.model, group).norm(dim=1).numpy()
        random = torch.rand(group.n_channels, generator=moment.generator).numpy()
        balance = moment.total_steps > 0
        return Job(group, readers, path, norms, random, ridge, group.n_channels <= exact, self.config.choice, balance)

    def _head_jobs(self, moment: Moment, statistics: Mapping[Key, SecondMoment]) -> list[HeadJob]:
        """The attention layers whose heads can be folded."""
        ridge, found = self._ridge(moment), []
        for group in moment.graph if self.config.heads and self.config.groups is None else ():
            inner = partner_of(moment.graph, group)
            if inner is None or group.name in moment.frozen or inner.role("read")[0].key not in statistics:
                continue
            with leaving_out(moment, group.name):
                [reader] = readers_of(moment.model, inner, statistics, 1.0 if ridge < STRONG else 0.25)
                found.append(HeadJob.of(group, inner, reader, ridge))
        return found

    def _least(self, group: ChannelGroup, moment: Moment) -> int:
        """The narrowest width that can be asked for."""
        if self.config.dialled and moment.total_steps:
            return self._grid(moment).nearest(group, SHARES[-1] * group.n_channels)
        if self.config.widths is not None:
            return self.config.widths.get(group.name, group.n_channels)
        if self.config.macs is None:
            return self._grid(moment).nearest(group, self.config.keep * group.n_channels)
        return self._grid(moment).widths(group)[-1]

    def _grid(self, moment: Moment) -> Grid:
        floor, liked = 0.0 if self.config.macs is None else self.config.floor, self.config.liked or {}
        if self.config.align is not None or not (self.config.dialled and moment.total_steps):
            return Grid(self.config.align or 0, self.config.min_channels, floor, liked=liked)
        device = next((p.device.type for p in moment.model.parameters()), "cpu")
        return Grid(0, self.config.min_channels, floor, vector=16 if device == "cpu" else 64, liked=liked)

    def _widths(self, moment: Moment, jobs: Sequence[Job]) -> Widths:
        groups, grid = [job.group for job in jobs], self._grid(moment)
        if self.config.widths is not None:
            return {g.name: grid.given(g, self.config.widths.get(g.name, g.n_channels)) for g in groups}
        if self.config.macs is None:
            return uniform(groups, self.config.keep, grid)
        macs = MacModel.of(moment.model, moment.graph, moment.example)
        return by_cost(macs, groups, {job.group.name: job.cost for job in jobs}, self.config.macs, grid)

    # resuming -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        seen = [{f"{t}|{d}": moment.to_state() for (t, d), moment in found.items()} for found in self._seen]
        return {**self.shared_state(), "seen": seen}

    def shared_state(self) -> dict[str, Any]:
        """All but the statistics, which the first rank alone takes."""
        return {
            "done": self._done,
            "settled": self._settled,
            "trained_before": self._trained_before,
            "signature": dict(self._signature),
            "seen": [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done, self._settled = bool(state["done"]), bool(state["settled"])
        self._trained_before = bool(state.get("trained_before", False))
        self._signature = {name: list(channels) for name, channels in state["signature"].items()}
        self._seen = [
            {(k.rpartition("|")[0], int(k.rpartition("|")[2])): SecondMoment.from_state(v) for k, v in found.items()}
            for found in state["seen"]
        ]
