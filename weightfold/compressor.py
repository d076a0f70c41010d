"""The only mutator of a user's model: checks what methods propose, applies it, gates it, records it or takes it back.

The user keeps the training loop::

    c = Compressor(model, example, [Fold(max_accuracy_loss=0.2)], loss=loss_fn, probe=batches, total_steps=1000)
    c.prepare(optimizer)
    for x, y in data:
        loss = loss_fn(c.network(x), y) + c.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        c.step()
    net = c.convert()

`c.network` is the model as it was passed, compiled or wrapped for several processes; an event wraps it anew.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.blueprint import remember
from weightfold.engine.book import Book
from weightfold.engine.checks import GO_BACK, check_finite, check_sized, checked_methods, checked_steps
from weightfold.engine.clock import Clock
from weightfold.engine.trials import Gate, Trials
from weightfold.errors import ConfigError, EditError, WeightfoldError
from weightfold.fingerprint import fingerprint
from weightfold.gate import Batch, Loss, check_enough, check_probe, compare
from weightfold.graph import optim
from weightfold.graph.apply import Companion
from weightfold.graph.group import ChannelGraph
from weightfold.graph.proof import prepared
from weightfold.graph.trace import Example, trace
from weightfold.graph.twin import modes_that_run
from weightfold.history import Event, in_words, network_record
from weightfold.ledger import Ledger
from weightfold.methods.base import Method, Moment, Proposal, Refused, touched_groups
from weightfold.ranks import Ranks, check_whole, rewrapped, uncompiled, unwrapped
from weightfold.size import parameters
from weightfold.surgeon import Surgeon, check_shapes, fits
from weightfold.watching import Statistics, Updates, Watch, Watcher


class Compressor:
    """Runs methods on a network in training, or once on a trained one.

    Args:
        model: any module, also compiled or wrapped in DistributedDataParallel; its parameters stay the same objects.
        example: what `trace` takes.
        methods: they propose; the compressor decides.
        loss: ``loss(outputs, targets)``, a mean over samples; needed with a probe.
        probe: fixed batches (inputs, targets) from the training split; without them every edit is accepted unmeasured.
        ledger: where everything is recorded; None keeps no record. In a distributed run, of the first rank alone.
        total_steps: length of the run in optimiser steps; needed for `step`, not for `once`.
        seed: seeds the only generator that methods may use.
        max_increase: how much one event may raise the probe loss (its upper 95 % bound), in the loss's unit.
        max_total_increase: the same for all events together: the mean rises of those that stand, and the bound of the
            next; by default four times `max_increase`.
        keep_undo: store what each edit replaces in the ledger, so that it can be undone later.
        ranks: the processes that decide as one; by default those of a DistributedDataParallel model.
        check: looks at the network after edits that the gate lets pass, and says why it may not be so; empty if it may.

    Attributes:
        network: what to call in the loop; an event wraps it anew.
        frozen: groups that an undone event has closed.

    Raises:
        WeightfoldError: in `prepare`, whatever can be found wrong before the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        methods: Sequence[Method],
        *,
        loss: Loss | None = None,
        probe: Sequence[Batch] = (),
        ledger: Ledger | None = None,
        total_steps: int = 0,
        seed: int = 0,
        max_increase: float = 0.1,
        max_total_increase: float | None = None,
        keep_undo: bool = True,
        ranks: Ranks | None = None,
        check: Callable[[nn.Module], str] | None = None,
    ) -> None:
        if probe and loss is None:
            raise ConfigError("A probe needs a loss to be measured by.", remedy="Pass loss=your_loss_function.")
        self.network = model
        self.model = unwrapped(model)
        self.example = example
        self.methods = checked_methods(methods)
        self.loss = loss
        self.probe = list(probe)
        self.ledger = ledger
        self.total_steps = checked_steps(total_steps)
        self.max_increase = max_increase
        self.max_total_increase = max_total_increase
        self.keep_undo = keep_undo
        self.check = check
        self.generator = torch.Generator().manual_seed(seed)
        self.events: list[Event] = []
        self.frozen: set[str] = set()
        self._refused: list[Event] = []
        self._clock = Clock()
        self._ranks = Ranks.of(model) if ranks is None else ranks
        self._step = 0
        self._surgeon: Surgeon | None = None
        self._modes: tuple[bool, ...] = ()
        self._watcher = Watcher(model)
        self._watch: Watch | None = None
        self._updates = Updates(self.model)

    @property
    def graph(self) -> ChannelGraph:
        """The channel graph of the network as it is now."""
        return self._hands.graph

    @property
    def _hands(self) -> Surgeon:
        if self._surgeon is None:
            raise ConfigError("The compressor is not prepared.", remedy="Call prepare() first.")
        return self._surgeon

    def _check_prepared(self) -> None:
        _ = self._hands

    @property
    def seconds(self) -> dict[str, float]:
        """What all of this has cost so far: "prepare", "statistics", "planning", "surgery", "gate"."""
        return {**self._clock.seconds, "statistics": self._watcher.spent}

    # before the first batch -----------------------------------------------------------------------------------------

    def prepare(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        averaged: Iterable[Companion] = (),
    ) -> ChannelGraph:
        """Trace the model and find everything that can be found wrong now.

        Args:
            optimizer: the optimiser(s) whose state must follow every edit; also to name a new one in mid-run.
            averaged: moving averages of the model (`AveragedModel`, or a dict of tensors) that must follow as well.
        Raises:
            ConfigError: modules without sizes, settings of a method that this network cannot follow.
            EditError: weights that are not finite, an optimiser that holds other parameters or cannot follow an edit.
            TraceError: a forward that fails on the example or branches on data.
            DataError: probe batches that the model does not take, or that are all of one class.
        """
        with self._clock.on("prepare"), uncompiled(self.network):
            optimizers = () if optimizer is None else optim.plain(_as_tuple(optimizer))
            if self._surgeon is None:
                self._prepare_first(optimizers, averaged)
            else:
                self._surgeon.attach(optimizers, averaged)
            self._updates.follow(self._hands.optimizers, self._step)
        self._observe()
        return self.graph

    def _prepare_first(self, optimizers: Sequence[torch.optim.Optimizer], averaged: Iterable[Companion]) -> None:
        try:
            self._first_look(optimizers, averaged)
        except BaseException:
            self._surgeon = None
            raise

    def _first_look(self, optimizers: Sequence[torch.optim.Optimizer], averaged: Iterable[Companion]) -> None:
        check_whole(self.model)
        check_sized(self.model)
        check_finite(self.model)
        optim.assert_live(self.model, optimizers)
        traced = trace(self.model, self.example)
        remember(self.model, self.example, (inputs for inputs, _ in self.probe))
        touched = touched_groups(traced, self.methods)
        graph = prepared(self.model, self.example, graph=traced, names=touched)
        self._modes = graph.proved.flags or modes_that_run(self.model, self.example)
        self._surgeon = surgeon = Surgeon(self.model, graph)
        surgeon.attach(optimizers, averaged)
        if self.loss is not None and self.probe:
            check_probe(self.model, self.probe, self.loss)
        for method in self.methods:
            method.prepare(self._moment(self.total_steps))
        settings = {
            "total_steps": self.total_steps,
            "max_increase": self.max_increase,
            "max_total_increase": self._budget,
            "probe_batches": len(self.probe),
        }
        body = {**network_record(self.model, surgeon.graph, traced, surgeon.optimizers, self.methods), **settings}
        self._record("prepare", body)

    # in training ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """What the methods add to the loss; 0 when none does."""
        terms = [term for method in self.methods if (term := method.penalty()) is not None]
        if terms:
            return torch.stack([t.reshape(()) for t in terms]).sum()
        first = next(self.model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)

    def step(self) -> list[Event]:
        """Call once after every optimiser step. Most of the time nothing happens.

        Raises:
            ConfigError: the compressor was built without `total_steps`, or is not prepared; nothing has changed then.
        """
        if not self.total_steps:
            raise ConfigError(
                "This compressor was built without 'total_steps': step() cannot tell when to act.",
                remedy="Pass total_steps= (optimiser steps of the run); a trained network is compressed by once().",
            )
        self._check_prepared()
        self._step += 1
        self._updates.step = self._step
        self._update_methods()
        events: list[Event] = []
        if self._may_act():
            self._watcher.rest()
            events = self._decided(lambda: [*self._look_back(), *self._run_methods(self.total_steps)])
            self.events += events
        self._observe()
        return events

    def _update_methods(self) -> None:
        """Let methods train what they hold beside the network; new holdings take part in edits from now on."""
        for method in self.methods:
            if method.updates(self._step, self.total_steps):
                method.update(self._moment(self.total_steps))
                self._follow(method)

    def _follow(self, method: Method) -> None:
        followers = method.followers()
        if followers.keys() - self.graph.followers:
            self._hands.follow(followers, method.optimizers())

    def _may_act(self) -> bool:
        due = self._watch is not None and self._step >= self._watch.due
        return due or any(m.acts(self._step, self.total_steps) for m in self.methods)

    def _decided(self, decide: Callable[[], list[Event]]) -> list[Event]:
        """Act: in a distributed run the first rank does, and the others do as it did."""
        self._hands.journal, self._hands.touched = [], False
        try:
            with uncompiled(self.network), self._updates.apart():
                events = self._ranks.agreed(decide, self._told, self._obey)
        except BaseException:
            if self._hands.touched and self._ranks.group is None:
                self._wrap_anew()
            raise
        if self._hands.touched:
            self._wrap_anew()
        return events

    def _wrap_anew(self) -> None:
        self.network = rewrapped(self.network)
        self._watcher.follow(self.network)

    def _told(self, events: Sequence[Event]) -> dict[str, Any]:
        """What the first rank has done, for the others."""
        return {
            "journal": self._hands.journal,
            "touched": self._hands.touched,
            "rises": [applied.rise for applied in self._hands.applied],
            "held": sum(applied.undo is not None for applied in self._hands.applied),
            "events": [asdict(event) for event in events],
            "watch": self._watch,
            "frozen": self.frozen,
            "methods": [method.shared_state() for method in self.methods],
            "generator": self.generator.get_state(),
        }

    def _obey(self, told: Any) -> list[Event]:
        """Do what the first rank did."""
        self._hands.obey(told["journal"])
        self._hands.forget(told["held"])
        self._hands.take_rises(told["rises"])
        self._hands.touched, self._watch, self.frozen = told["touched"], told["watch"], told["frozen"]
        self.generator.set_state(told["generator"])
        for method, state in zip(self.methods, told["methods"], strict=True):
            method.load_state_dict(state)
        return [Event.from_state(event) for event in told["events"]]

    def once(self, batches: Iterable[Any] = ()) -> list[Event]:
        """Compress a trained network at once.

        Args:
            batches: input batches for the statistics, as a data loader gives them; targets behind the inputs are left
                out. In a distributed run those of the first rank count.
        """
        self._check_prepared()

        def decide() -> list[Event]:
            self._watcher.statistics = self._watcher.observed(self.graph, batches, self.example)
            return self._run_methods(0)

        try:
            events = self._decided(decide)
            self.events += events
            return events
        finally:
            self._watcher.clear()

    def convert(self) -> nn.Module:
        """Finish: the plain module, without anything of ours in it. Warns of methods that never came to act.

        Raises:
            EditError: weights are not finite; names the tensor. Nothing has changed then.
        """
        self._check_prepared()
        check_finite(self.model, GO_BACK)
        self._watcher.rest()
        if self._watch is not None:
            self.events += self._decided(lambda: self._look_back(last=True))
        self._tell_of_idle_methods()
        self._updates.rest()
        for method in self.methods:
            method.convert(self._moment(self.total_steps))
        self._hands.unfollow()
        self._record(
            "convert",
            {"fingerprint": fingerprint(self.model), "parameters": parameters(self.model)},
            {"seconds": self.seconds},
        )
        return self.model

    def _tell_of_idle_methods(self) -> None:
        """Warn of methods whose time has not come, as with a `total_steps` that is too large."""
        for method in self.methods if self.total_steps else ():
            due = method.due(self.total_steps)
            if due is not None and self._step < due:
                what = f"'{method.name}' never acted: it does at step {due}, and the run ended at step {self._step}"
                remedy = f"of 'total_steps' = {self.total_steps}. Train on, or pass the steps that the run takes."
                warnings.warn(f"{what} {remedy}", stacklevel=3)
                self._record("warning", {"step": self._step, "method": method.name, "what": f"{what}."})

    def undo(self) -> None:
        """Take the latest accepted edit back: bit for bit when nothing was trained since.

        Raises:
            EditError: there is nothing to undo, or what the edit replaced is not in memory any more.
        """
        edit = self._hands.undo()
        self._watch = None
        self._wrap_anew()
        body = {"group": edit.group, "step": self._step, "fingerprint": fingerprint(self.model)}
        self._record("undo", {**body, "how": "as it was"})

    # statistics -----------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        """Put hooks on for the next forward when a method wants statistics of it, off otherwise."""
        wanted = self._ranks.leads and any(m.observes(self._step, self.total_steps) for m in self.methods)
        if self.total_steps > 0 and wanted and fits(self.model, self.graph):
            self._watcher.watch(self.graph)
        else:
            self._watcher.rest()

    # proposals ------------------------------------------------------------------------------------------------------

    def _moment(self, total_steps: int, statistics: Statistics | None = None) -> Moment:
        return Moment(
            self.model,
            self.graph,
            self._step,
            total_steps,
            statistics or {},
            self.example,
            self.generator,
            self.probe,
            self.loss,
            self._hands.optimizers,
            frozenset(self.frozen),
            self._watcher.autocast,
            self._record,
            self._ranks,
            self._refuse,
            self.ledger is not None,
        )

    def _refuse(self, group: str, why: str) -> None:
        """A method leaves one group out, and goes on with the others."""
        n = self.graph[group].n_channels
        self._refused.append(Event(self._step, group, "refusal", n, n, False, why))
        self._record("refusal", {"step": self._step, "groups": [group], "why": why})

    def _run_methods(self, total_steps: int) -> list[Event]:
        """Let the methods whose time it is propose, and try that; in a one-shot (0 steps) all of them."""
        events: list[Event] = []
        for method in self.methods:
            if total_steps and not method.acts(self._step, total_steps):
                continue
            self._refused = []
            try:
                check_shapes(self.model, self.graph)
                check_finite(self.model, GO_BACK)
                if total_steps:
                    self._fill_statistics(method)
                with self._clock.on("planning"):
                    proposals = method.step(self._moment(total_steps, self._watcher.statistics))
                events += self._refused
                if proposals:
                    self._check_still_ours()
                    back = self._look_back(last=True)
                    events += back
                    if back:
                        raise EditError("The event before was taken back: what was proposed on top of it is void.")
            except WeightfoldError as error:
                weighed = (error.body, error.aside) if isinstance(error, Refused) else ({}, {})
                body = {"method": method.name, "step": self._step, "why": str(error)}
                self._record("refusal", {**weighed[0], **body}, weighed[1])
                events.append(Event(self._step, "", method.name, 0, 0, False, str(error)))
                continue
            events += self._try_all(method, proposals, total_steps)
            if proposals:
                self._watcher.clear()
        return events

    def _fill_statistics(self, method: Method) -> None:
        """Where hooks see nothing, take the probe instead."""
        silent = self._watcher.blind or not self._watcher.statistics
        if silent and self.probe and method.observes(self._step - 1, self.total_steps):
            self._watcher.statistics = self._watcher.observed(self.graph, [inputs for inputs, _ in self.probe])

    def _check_still_ours(self) -> None:
        """Refuse an event whose basis is gone.

        Raises:
            EditError: the known optimisers no longer step, or hold dead parameters.
            DataError: the probe is smaller than a training batch.
        """
        optim.assert_live(self.model, self._hands.optimizers)
        self._updates.check()
        check_enough(self.probe, self._watcher.batch_size)

    def _try_all(self, method: Method, proposals: Sequence[Proposal], total_steps: int) -> list[Event]:
        """Try what a method proposes, and watch what stays where the method asks for it."""
        n_before = len(self._hands.applied)
        events, before = Trials(self._hands, self._gate, self._book, self._step).run(method.name, proposals)
        n_edits, steps = len(self._hands.applied) - n_before, method.watch(total_steps)
        if n_edits:
            self._hands.forget(n_edits)
        if n_edits and steps and before:
            self._watch = Watch(self._step + steps, tuple(before), n_edits)
        return events

    @property
    def _gate(self) -> Gate:
        return Gate(
            self.probe,
            self.loss,
            self.max_increase,
            self._budget,
            self.example,
            self._modes,
            self.check,
            self._watcher.autocast,
            self._clock,
        )

    @property
    def _budget(self) -> float:
        return 4 * self.max_increase if self.max_total_increase is None else self.max_total_increase

    @property
    def _book(self) -> Book:
        return Book(self.ledger if self._ranks.leads else None, self.keep_undo, self.example, len(self.probe))

    def _record(self, kind: str, body: Mapping[str, Any], aside: Mapping[str, Any] | None = None) -> None:
        self._book.record(kind, body, aside)

    # looking back ---------------------------------------------------------------------------------------------------

    def unfold(self, n_edits: int = 1, *, at: int | None = None) -> None:
        """Take the latest accepted edits back, keeping what was trained since.

        Args:
            at: step that is recorded; by default the present one.
        Raises:
            EditError: fewer stand, or what they replaced is not in memory any more.
        """
        self._hands.check_held(n_edits)
        with self._clock.on("surgery"):
            undone = self._hands.unfold(n_edits)
        self._watch = None
        self._wrap_anew()
        body = {"step": self._step if at is None else at, "groups": [edit.group for edit in undone]}
        self._record("undo", {**body, "how": "unfolded by hand, with what was trained since"})

    def _look_back(self, *, last: bool = False) -> list[Event]:
        """When an event's time is up: unfold it and close its groups if the loss is still above where it was."""
        watch = self._watch
        if watch is None or (self._step < watch.due and not last):
            return []
        reading = compare(watch.before, self._gate.losses(self.model))
        self._watch = None
        back = reading.lower <= 0
        groups = [applied.edit.group for applied in self._hands.applied[-watch.n_edits :]]
        body = {"step": self._step, "groups": groups, "before": reading.before, "after": reading.after}
        body = in_words(body)
        self._record("watch", in_words({**body, "lower": reading.lower, "recovered": back}))
        if back or not math.isfinite(reading.mean):
            self._hands.forget(1)
            return []
        started = time.perf_counter()
        with self._clock.on("surgery"):
            undone = self._hands.unfold(watch.n_edits)
        self.frozen.update(groups)
        seconds = (time.perf_counter() - started) / len(undone)
        self._record("undo", {**body, "how": "unfolded, with what was trained since", "closed": groups})
        why = f"the probe loss is still {reading.mean:.4g} above where it was before the event"
        span = reading.lower, reading.upper
        return [
            Event(self._step, e.group, "unfold", e.n_after, e.n_channels, True, why, None, reading.mean, span, seconds)
            for e in undone
        ]

    # resuming -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, as plain data and tensors: the edits so far, counters, statistics, methods' state.

        While an event is watched, what it replaced is part of it.
        """
        watch = self._watch
        return {
            **self._hands.state(0 if watch is None else watch.n_edits),
            "step": self._step,
            "generator": self.generator.get_state(),
            "statistics": self._watcher.to_state(),
            "methods": [method.state_dict() for method in self.methods],
            "events": [vars(event) for event in self.events],
            "frozen": sorted(self.frozen),
            "watch": None if watch is None else [watch.due, list(watch.before)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a freshly prepared network of the original structure to the structure of an interrupted run.

        Load the model's and the optimiser's own state dicts afterwards: their shapes fit then.

        Raises:
            EditError: the network is not the one that the run started with.
        """
        self._hands.load(state)
        self._step = int(state["step"])
        self._updates.follow(self._hands.optimizers, self._step)
        self.generator.set_state(state["generator"])
        self._watcher.load_state(self.graph, state["statistics"])
        for method, value in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(value)
            method.take_up(self._moment(self.total_steps))
            self._follow(method)
        self._hands.load_undo(state)
        self.events = [Event.from_state(event) for event in state["events"]]
        self.frozen = set(state["frozen"])
        if state["watch"] is not None:
            self._watch = Watch(int(state["watch"][0]), tuple(state["watch"][1]), len(state["undo"]))
        self._wrap_anew()
        self._observe()


def _as_tuple(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    return tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
