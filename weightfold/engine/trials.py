"""Edits on trial: applied, measured on the probe, and kept, made smaller or taken back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from weightfold.engine.book import Book
from weightfold.engine.clock import Clock
from weightfold.errors import EditError
from weightfold.gate import Batch, Loss, Reading, compare, losses
from weightfold.graph.failures import said, user_line
from weightfold.graph.twin import why_not
from weightfold.history import Event, attempt_record
from weightfold.methods.base import Proposal
from weightfold.surgeon import Surgeon, Trial


@dataclass(frozen=True, eq=False)
class Gate:
    """What an edit has to pass.

    Args:
        probe: fixed batches (inputs, targets); without them nothing is measured.
        loss: what is measured on them.
        max_increase: how much one event may raise the probe loss (its upper 95 % bound).
        budget: how much all events together may: the mean rises of those that stand, and the bound of the next.
        example: what the network was traced with; its forward is tried on it after an edit.
        modes: modes in which its forward ran before: False for evaluation, True for training.
        check: looks at the network after edits that the probe lets pass, and says why it may not be so.
        autocast: the mixed precision that training uses.
    """

    probe: Sequence[Batch]
    loss: Loss | None
    max_increase: float
    budget: float
    example: Any
    modes: Sequence[bool]
    check: Callable[[nn.Module], str] | None
    autocast: Callable[[], AbstractContextManager[Any]]
    clock: Clock

    def losses(self, model: nn.Module) -> list[float]:
        """The loss on every batch of the probe."""
        assert self.loss is not None
        with self.clock.on("gate"):
            return losses(model, self.probe, self.loss, self.autocast)

    def broken(self, model: nn.Module) -> str:
        """Why the network does not run as it is now; empty where it does."""
        with self.clock.on("gate"):
            return why_not(model, self.example, self.modes)

    def losses_after(self, model: nn.Module) -> tuple[list[float], str]:
        """The loss on every batch of the probe after an edit, or why it cannot be measured any more."""
        try:
            return self.losses(model), ""
        except Exception as error:
            return [], f"the loss on the probe fails after the edit{user_line(error)}: {said(error)}"

    def refusal(self, model: nn.Module, reading: Reading | None, spent: float) -> str:
        """Why the network may not be as it is now; empty where it may.

        Args:
            spent: by how much the events that stand have raised the probe loss.
        """
        if reading is not None and not (reading.upper <= self.max_increase and math.isfinite(reading.upper)):
            return f"the probe loss may rise by {reading.upper:.4g}, more than {self.max_increase:.4g}"
        if reading is not None and spent + max(reading.upper, 0.0) > self.budget:
            return (
                f"the probe loss may rise by {reading.upper:.4g} and has risen by {spent:.4g} in the events before, "
                f"together more than {self.budget:.4g}"
            )
        if self.check is None:
            return ""
        with self.clock.on("gate"):
            return self.check(model)


@dataclass(frozen=True, eq=False)
class Trials:
    """The trials of one step.

    Args:
        step: optimiser steps done so far.
    """

    hands: Surgeon
    gate: Gate
    book: Book
    step: int

    def run(self, method: str, proposals: Sequence[Proposal]) -> tuple[list[Event], list[float]]:
        """All groups at once under one measurement; one by one if that is too much.

        Returns:
            The events, and the probe's losses before any of them.
        """
        before = self._losses() if proposals else []
        events = self._together(method, proposals, before) if len(proposals) > 1 and before else []
        return events or [self._alone(method, proposal) for proposal in proposals], before

    def _losses(self) -> list[float]:
        return self.gate.losses(self.hands.model) if self.gate.probe else []

    def _together(self, method: str, proposals: Sequence[Proposal], before: list[float]) -> list[Event]:
        """Apply every proposal and measure once; nothing where the gate says no."""
        started = time.perf_counter()
        reading, done, reason = self._attempt(proposals, before)
        groups = [p.edit.group for p in proposals]
        if reason:
            if reading is not None:
                self.book.record("refusal", {"method": method, "step": self.step, "groups": groups, "why": reason})
            return []
        seconds = (time.perf_counter() - started) / len(proposals)
        attempts = []
        for trial in done:
            others = [name for name in groups if name != trial.proposal.edit.group]
            attempts.append([attempt_record(trial.proposal, reading, "", others)])
        self._keep(method, done, reading, attempts, seconds)
        return [Event.of(self.step, proposal, reading, "", seconds) for proposal in proposals]

    def _alone(self, method: str, proposal: Proposal) -> Event:
        """Apply, measure, and keep, halve or take back."""
        started = time.perf_counter()
        before = self._losses()
        attempts: list[dict[str, Any]] = []
        current: Proposal | None = proposal
        reading: Reading | None = None
        while current is not None:
            reading, done, reason = self._attempt([current], before)
            attempts.append(attempt_record(current, reading, reason))
            if reason == "":
                self._keep(method, done, reading, [attempts] * len(done), time.perf_counter() - started)
                return Event.of(self.step, current, reading, "", time.perf_counter() - started)
            current = current.less()
        self.book.record(
            "rollback",
            {"method": method, "step": self.step, "group": proposal.edit.group, "attempts": attempts},
            {"seconds": time.perf_counter() - started},
        )
        return Event.of(self.step, proposal, reading, attempts[-1]["reason"], time.perf_counter() - started)

    def _attempt(self, proposals: Sequence[Proposal], before: list[float]) -> tuple[Reading | None, list[Trial], str]:
        """Apply proposals and measure; everything is as it was where the reason is not empty."""
        done: list[Trial] = []
        graph = self.hands.graph
        try:
            with self.gate.clock.on("surgery"):
                for proposal in proposals:
                    for edit in proposal.edits:
                        after, undo = self.hands.attempt(edit, graph)
                        done.append(Trial(proposal, edit, graph, after, undo))
                        graph = after
            reading, broken = None, self.gate.broken(self.hands.model)
            after_losses, reason = self.gate.losses_after(self.hands.model) if before and not broken else ([], broken)
            if not reason:
                reading = compare(before, after_losses) if before else None
                reason = self.gate.refusal(self.hands.model, reading, self.hands.spent)
        except EditError as error:
            self.hands.restore([trial.undo for trial in done])
            return None, [], str(error)
        except BaseException:
            self.hands.restore([trial.undo for trial in done])
            raise
        if reason:
            self.hands.restore([trial.undo for trial in done])
            still = broken and self.gate.broken(self.hands.model)
            return reading, [], f"{reason}; without the edit it fails as well" if still else reason
        return reading, done, ""

    def _keep(
        self,
        method: str,
        trials: Sequence[Trial],
        reading: Reading | None,
        attempts: Sequence[Sequence[Mapping[str, Any]]],
        seconds: float,
    ) -> None:
        """Take accepted edits into the network for good, and into the record; those that it fails on, back.

        Args:
            attempts: what was tried for each of them.
        """
        rise = 0.0 if reading is None else max(reading.mean, 0.0) / len(trials)
        members = []
        for trial in trials:
            members.append(self.hands.origin.members(self.hands.graph[trial.edit.group], trial.edit))
            self.hands.keep(trial.edit, trial.after, trial.undo, rise)
        recorded = 0
        try:
            for trial, what, tried in zip(trials, members, attempts, strict=True):
                self.book.edit(self.hands, trial, what, tried, {"method": method, "step": self.step}, seconds)
                recorded += 1
        except BaseException:
            self.hands.drop(len(trials) - recorded)
            raise
