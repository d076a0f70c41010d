"""How one event is planned: price candidate widths, choose by the dial, empty idle branches, refuse what does not pay.

The rules of the choice stand in `weightfold.plan`; here they meet the network: its probe, its clock, its run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import nn

from weightfold.errors import ConfigError, DataError, WeightfoldError
from weightfold.forecast import knows_its_task, ripeness
from weightfold.gate import Batch, Loss
from weightfold.graph.group import ChannelGraph
from weightfold.heads import HeadJob
from weightfold.latency import Latency, measure
from weightfold.plan import (
    LEAST_SAVING,
    REPAY,
    AnyJob,
    Candidate,
    Decision,
    by_loss,
    by_time,
    candidate,
    for_time,
    knapsack,
    ladder,
    within_loss,
    without_idle,
)
from weightfold.price import Trails, answers, chance_percent, trails
from weightfold.size import MacModel
from weightfold.stats.running import n_samples
from weightfold.widths import Grid

N_PRICED = 256
"""Samples on which candidates are priced, at least."""


class Scene(Protocol):
    """What a planner sees of a training run: `methods.base.Moment`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def graph(self) -> ChannelGraph: ...
    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def example(self) -> Any: ...
    @property
    def probe(self) -> Sequence[Batch]: ...
    @property
    def loss(self) -> Loss | None: ...
    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...
    @property
    def autocast(self) -> Callable[[], AbstractContextManager[Any]]: ...


class Dial(Protocol):
    """What decides: `methods.fold.FoldConfig`, whose fields say more."""

    @property
    def max_accuracy_loss(self) -> float | None: ...
    @property
    def time_goal(self) -> float | None: ...
    @property
    def allocation(self) -> Literal["auto", "uniform", "knapsack"]: ...
    @property
    def latency(self) -> dict[str, float] | None: ...


@dataclass(eq=False)
class Planner:
    """Plans one event.

    Args:
        jobs: what can be folded.
        grid: the widths that groups may have.
        started: when planning began, by `time.perf_counter`: its cost counts.
        trained_before: whether the network knew its task before the run.

    Attributes:
        weighed: every candidate that was priced, in order.
        table: times of training steps, as far as they were measured.
    """

    scene: Scene
    dial: Dial
    jobs: Sequence[AnyJob]
    grid: Grid
    started: float
    trained_before: bool = False
    weighed: list[Candidate] = field(default_factory=list)
    table: Latency | None = None

    def decide(self) -> Decision:
        """The widths that the dial asks for, or none and why.

        Raises:
            ConfigError: the dial is an accuracy and the task has none.
            DataError: the network cannot be priced or timed.
        """
        if self.dial.max_accuracy_loss is not None and self.trails.error_percent is None:
            raise ConfigError(
                "The dial 'max_accuracy_loss' needs class numbers as targets and scores as outputs.",
                remedy="Use the dial 'time_goal', or give 'keep' and 'at'.",
            )
        decision = self._along_the_ladder()
        for narrower in (self._by_energy, self._without_idle):
            if decision.chosen is not None:
                decision = self._better(decision, narrower(decision.chosen))
        return self._if_it_pays(decision)

    @cached_property
    def trails(self) -> Trails:
        """What the readers read on the probe, and the gradients there."""
        groups = list({job.observed.name: job.observed for job in self.jobs}.values())
        assert self.scene.loss is not None
        with _planning("priced", "Give 'keep' and 'at'."):
            return trails(self.scene.model, groups, _enough(self.scene.probe), self.scene.loss, self.scene.autocast)

    @cached_property
    def macs(self) -> MacModel:
        """Multiply-accumulates as a function of the widths."""
        return MacModel.of(self.scene.model, self.scene.graph, self.scene.example)

    @property
    def _done(self) -> float:
        """Share of the run that is over."""
        return self.scene.step / self.scene.total_steps

    def _priced(self, widths: Mapping[str, int]) -> Candidate:
        ripe = ripeness(self._done, self.trained_before)
        self.weighed.append(candidate(self.jobs, self.trails, self.macs, widths, ripe))
        return self.weighed[-1]

    # the choice -----------------------------------------------------------------------------------------------------

    def _along_the_ladder(self) -> Decision:
        steps = ladder(self.jobs, self.grid)
        if self.dial.time_goal is None:
            assert self.dial.max_accuracy_loss is not None
            return within_loss(steps, self._priced, self.dial.max_accuracy_loss)
        table = self._timed([steps[-1], steps[len(steps) // 2]] if steps else [])
        macs = [self.macs.at(widths) for widths in steps]
        return for_time(steps, macs, self._priced, table, self._done, self.dial.time_goal)

    def _by_energy(self, like: Candidate) -> Mapping[str, int]:
        """Widths that differ from group to group, where that is wanted."""
        mixed = any(isinstance(job, HeadJob) for job in self.jobs)
        wanted = self.dial.allocation
        if wanted == "knapsack" or (wanted == "auto" and mixed):
            return knapsack(self.jobs, self.macs, like, self.grid)
        return like.widths

    def _without_idle(self, like: Candidate) -> Mapping[str, int]:
        """Branches that the loss does not need, emptied."""
        return without_idle(self.jobs, self.trails, like, self.grid)

    def _better(self, decision: Decision, widths: Mapping[str, int]) -> Decision:
        """The decision for other widths, where those save more and stay within the dial."""
        assert decision.chosen is not None
        if dict(widths) == dict(decision.chosen.widths):
            return decision
        found, most = self._priced(widths), self.dial.max_accuracy_loss
        if found.macs >= decision.chosen.macs:
            return decision
        if self.dial.time_goal is not None:
            ratio = round(self._timed([]).ratio(found.macs * self.macs.total), 2)
            return by_time(found, ratio, self._done, self.dial.time_goal)
        assert most is not None
        return by_loss(found, most) if found.price is not None and found.price <= most else decision

    # whether it pays ------------------------------------------------------------------------------------------------

    def _if_it_pays(self, decision: Decision) -> Decision:
        """Refuse an event that makes steps hardly quicker, or saves less than three times its cost."""
        chosen = decision.chosen
        if chosen is None:
            return decision
        spent = time.perf_counter() - self.started
        table = self._timed([chosen.widths])
        ratio = table.ratio(chosen.macs * self.macs.total)
        if 1 - ratio < LEAST_SAVING:
            reason = f"at {chosen.share:.2g} of the channels a step would be less than {LEAST_SAVING:.0%} quicker"
            return Decision(None, reason, reached=False, ratio=round(ratio, 2))
        saved = table.rows[0].seconds * (1 - ratio) * (self.scene.total_steps - self.scene.step)
        if self.dial.latency is None and saved < REPAY * 2 * spent:
            reason = "the steps that are left would not repay the event: it would save less than three times its cost"
            return Decision(None, reason, reached=False, ratio=round(ratio, 2))
        return Decision(chosen, decision.reason, decision.reached, round(ratio, 2))

    def _timed(self, plans: Sequence[Mapping[str, int]]) -> Latency:
        """Times of training steps: as recorded, or measured at these widths and at the network as it is."""
        scene, total = self.scene, self.macs.total
        if self.dial.latency is not None:
            return Latency.recorded(self.dial.latency, total)
        assert scene.loss is not None
        known = [] if self.table is None else list(self.table.rows)
        have = {round(row.macs) for row in known}
        wanted: list[tuple[dict[str, int], float]] = [({}, float(total))] if not known else []
        wanted += [(dict(widths), at) for widths in plans if round(at := self.macs.at(widths)) not in have]
        with _planning("timed", "Give the times as latency=, or 'keep' and 'at'."):
            rows = measure(
                scene.model, scene.graph, wanted, scene.probe[0], scene.loss, scene.optimizers, scene.autocast
            ).rows
        self.table = Latency((*known, *rows))
        return self.table

    # for the ledger -------------------------------------------------------------------------------------------------

    def account(self, decision: Decision, trigger: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was weighed; times stay aside, for they differ from run to run.

        Args:
            trigger: why the event was planned at this step.
        """
        chosen = decision.chosen
        body = {
            "step": self.scene.step,
            "trigger": trigger,
            "trained_before": self.trained_before,
            "error_percent": self.trails.error_percent,
            "judged_samples": self.trails.n_judged,
            "priced_samples": self.trails.n_samples,
            "candidates": [c.to_record() for c in self.weighed],
            "chosen": None if chosen is None else chosen.to_record(),
            "reached": decision.reached,
            "why": decision.reason if self.dial.time_goal is None else "as the measured times allow",
        }
        rows = () if self.table is None else self.table.rows
        aside = {
            "why": decision.reason,
            "step_times": [{"widths": dict(r.widths), "macs": r.macs, "seconds": r.seconds} for r in rows],
            "ratio": decision.ratio,
            "seconds": time.perf_counter() - self.started,
        }
        return body, aside


@contextmanager
def _planning(what: str, remedy: str) -> Iterator[None]:
    """Whatever goes wrong while planning is a reason to leave the network as it is, not to end the user's training."""
    try:
        yield
    except WeightfoldError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"The network could not be {what}: {type(error).__name__}: {first}", remedy=remedy) from error


def knew_its_task(scene: Scene) -> bool:
    """Whether the network answers the probe well as it is; asked before the first step."""
    batches = _enough(scene.probe)
    return knows_its_task(answers(scene.model, batches, scene.autocast), chance_percent(batches))


def _enough(probe: Sequence[Batch]) -> list[Any]:
    """Probe batches until there are samples enough to price by."""
    chosen: list[Any] = []
    found = 0
    for inputs, targets in probe:
        chosen.append((inputs, targets))
        found += n_samples(targets, inputs) or 1
        if found >= N_PRICED:
            break
    return chosen
