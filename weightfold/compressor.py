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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.blueprint import remember
from weightfold.engine.book import Book
from weightfold.engine.checks import check_finite
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
from weightfold.watching import Updates, Watch, Watcher


class Compressor:
    """Runs methods on a network in training, or once on a trained one.

    Args:
        model: any module, also compiled or wrapped in DistributedDataParallel; its parameters stay the same objects.
        example: what `trace` takes.
        methods: they propose; the compressor decides.
        loss: ``loss(outputs, targets)``, a mean over samples; needed with a probe.
        probe: fixed batches (inputs, targets) from the training split; without them every edit is accepted unmeasured.
        ledger: where everything is recorded; None keeps no record. In a distributed run, of the first rank alone.
        total_steps: length of the run in optimiser steps.
        seed: seeds the only generator that methods may use.
        max_increase: how much one event may raise the probe loss (its upper 95 % bound), in the loss's unit.
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
        keep_undo: bool = True,
        ranks: Ranks | None = None,
        check: Callable[[nn.Module], str] | None = None,
    ) -> None:
        if probe and loss is None:
            raise ConfigError("A probe needs a loss to be measured by.", remedy="Pass loss=your_loss_function.")
        names = [method.name for method in methods if method.alone]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"The method '{twice}' is given twice.", remedy="Give it once, with all its settings.")
        self.network = model
        self.model = unwrapped(model)
        self.example = example
        self.methods = tuple(methods)
        self.loss = loss
        self.probe = list(probe)
        self.ledger = ledger
        self.total_steps = total_steps
        self.max_increase = max_increase
        self.keep_undo = keep_undo
        self.check = check
        self.generator = torch.Generator().manual_seed(seed)
        self.events: list[Event] = []
        self.frozen: set[str] = set()
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
            EditError: weights that are not finite, an optimiser that holds other parameters.
            TraceError: a forward that fails on the example or branches on data.
            DataError: probe batches that the model does not take, or that are all of one class.
        """
        with self._clock.on("prepare"), uncompiled(self.network):
            if self._surgeon is None:
                self._surgeon = self._first_look(() if optimizer is None else _as_tuple(optimizer), averaged)
            else:
                self._surgeon.attach(() if optimizer is None else _as_tuple(optimizer), averaged)
            self._updates.follow(self._hands.optimizers, self._step)
        self._observe()
        return self.graph

    def _first_look(self, optimizers: Sequence[torch.optim.Optimizer], averaged: Iterable[Companion]) -> Surgeon:
        check_whole(self.model)
        check_finite(self.model)
        optim.assert_live(self.model, optimizers)
        traced = trace(self.model, self.example)
        remember(self.model, self.example)
        touched = touched_groups(traced, self.methods)
        graph = prepared(self.model, self.example, graph=traced, names=touched)
        self._modes = graph.proved.flags or modes_that_run(self.model, self.example)
        self._surgeon = surgeon = Surgeon(self.model, graph)
        surgeon.attach(optimizers, averaged)
        if self.loss is not None and self.probe:
            check_probe(self.model, self.probe, self.loss)
        for method in self.methods:
            method.prepare(self._moment())
        settings = {
            "total_steps": self.total_steps,
            "max_increase": self.max_increase,
            "probe_batches": len(self.probe),
        }
        body = {**network_record(self.model, surgeon.graph, traced, surgeon.optimizers, self.methods), **settings}
        self._record("prepare", body)
        return surgeon

    # in training ----------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """What the methods add to the loss; 0 when none does."""
        terms = [term for method in self.methods if (term := method.penalty()) is not None]
        if terms:
            return torch.stack([t.reshape(()) for t in terms]).sum()
        first = next(self.model.parameters(), None)
        return torch.zeros((), device=None if first is None else first.device)

    def step(self) -> list[Event]:
        """Call once after every optimiser step. Most of the time nothing happens."""
        self._step += 1
        self._updates.step = self._step
        self._update_methods()
        events: list[Event] = []
        if self._may_act():
            self._watcher.rest()
            events = self._decided(lambda: [*self._look_back(), *self._run_methods()])
            self.events += events
        self._observe()
        return events

    def _update_methods(self) -> None:
        """Let methods train what they hold beside the network; new holdings take part in edits from now on."""
        for method in self.methods:
            if method.updates(self._step, self.total_steps):
                method.update(self._moment())
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
        with uncompiled(self.network), self._updates.apart():
            events = self._ranks.agreed(decide, self._told, self._obey)
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
        self._hands.touched, self._watch, self.frozen = told["touched"], told["watch"], told["frozen"]
        self.generator.set_state(told["generator"])
        for method, state in zip(self.methods, told["methods"], strict=True):
            method.load_state_dict(state)
        return [Event.from_state(event) for event in told["events"]]

    def once(self, batches: Iterable[Any] = ()) -> list[Event]:
        """Compress a trained network at once.

        Args:
            batches: unlabelled input batches for the statistics, as the model takes them (a tensor, or a tuple); in a
                distributed run those of the first rank count.
        """
        total, self.total_steps = self.total_steps, 0

        def decide() -> list[Event]:
            self._watcher.statistics = self._watcher.observed(self.graph, batches)
            return self._run_methods()

        try:
            events = self._decided(decide)
            self.events += events
            return events
        finally:
            self.total_steps = total
            self._watcher.clear()

    def convert(self) -> nn.Module:
        """Finish: the plain module, without anything of ours in it."""
        if self._watch is not None:
            self.events += self._decided(lambda: self._look_back(last=True))
        self._watcher.rest()
        self._updates.rest()
        for method in self.methods:
            method.convert(self._moment())
        self._hands.unfollow()
        self._record(
            "convert",
            {"fingerprint": fingerprint(self.model), "parameters": parameters(self.model)},
            {"seconds": self.seconds},
        )
        return self.model

    def undo(self) -> None:
        """Take the latest accepted edit back: bit for bit when nothing was trained since.

        Raises:
            EditError: there is nothing to undo.
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

    def _moment(self) -> Moment:
        return Moment(
            self.model,
            self.graph,
            self._step,
            self.total_steps,
            self._watcher.statistics,
            self.example,
            self.generator,
            self.probe,
            self.loss,
            self._hands.optimizers,
            frozenset(self.frozen),
            self._watcher.autocast,
            self._record,
            self._ranks,
        )

    def _run_methods(self) -> list[Event]:
        events: list[Event] = []
        for method in self.methods:
            if self.total_steps and not method.acts(self._step, self.total_steps):
                continue
            try:
                check_shapes(self.model, self.graph)
                if self.total_steps:
                    self._fill_statistics(method)
                with self._clock.on("planning"):
                    proposals = method.step(self._moment())
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
            events += self._try_all(method, proposals)
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

    def _try_all(self, method: Method, proposals: Sequence[Proposal]) -> list[Event]:
        """Try what a method proposes, and watch what stays where the method asks for it."""
        n_before = len(self._hands.applied)
        events, before = Trials(self._hands, self._gate, self._book, self._step).run(method.name, proposals)
        n_edits, steps = len(self._hands.applied) - n_before, method.watch(self.total_steps)
        if n_edits:
            self._hands.forget(n_edits)
        if n_edits and steps and before:
            self._watch = Watch(self._step + steps, tuple(before), n_edits)
        return events

    @property
    def _gate(self) -> Gate:
        autocast = self._watcher.autocast
        return Gate(
            self.probe, self.loss, self.max_increase, self.example, self._modes, self.check, autocast, self._clock
        )

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
            EditError: what they replaced is not in memory any more.
        """
        latest = self._hands.applied[-n_edits:]
        if len(latest) < n_edits or any(applied.undo is None for applied in latest):
            raise EditError(
                f"The latest {n_edits} edits cannot be unfolded: what they replaced is not held any more.",
                remedy="Undo them on the saved model, from the ledger.",
            )
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
        self._watch = None
        reading = compare(watch.before, self._gate.losses(self.model))
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
            method.take_up(self._moment())
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
