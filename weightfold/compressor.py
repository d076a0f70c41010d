"""The only mutator of a user's model: checks what methods propose, applies it, gates it, records it or takes it back.

The user keeps the training loop::

    c = Compressor(model, example, [Fold(keep=0.5, at=0.1)], loss=loss_fn, probe=batches, total_steps=1000)
    c.prepare(optimizer)
    for x, y in data:
        loss = loss_fn(model(x), y) + c.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        c.step()
    net = c.convert()
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError, EditError, WeightfoldError
from weightfold.fingerprint import digest, fingerprint
from weightfold.gate import Batch, Loss, Reading, compare, losses
from weightfold.graph import optim
from weightfold.graph.apply import Companion, Undo, apply, find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph
from weightfold.graph.layout import layout
from weightfold.graph.observe import Observer, SecondMoment
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import Example, trace
from weightfold.ledger import Ledger
from weightfold.methods.base import Key, Method, Moment, Proposal
from weightfold.size import macs, parameters


@dataclass(frozen=True)
class Event:
    """One consolidation, accepted or not.

    Args:
        predicted: what the method expected, in its own unit.
        measured: mean change of the probe loss; ``interval`` is its two-sided 90 % interval.
        seconds: statistics not included; choice, surgery and gate are.
    """

    step: int
    group: str
    kind: str
    channels_before: int
    channels_after: int
    accepted: bool
    reason: str
    predicted: float | None = None
    measured: float | None = None
    interval: tuple[float, float] | None = None
    seconds: float = 0.0


class Compressor:
    """Runs methods on a network in training, or once on a trained one.

    Args:
        model: any module; it stays the same object throughout.
        example: what `trace` takes.
        methods: they propose; the compressor decides.
        loss: ``loss(outputs, targets)``; needed with a probe.
        probe: fixed batches (inputs, targets) from the training split; without them every edit is accepted unmeasured.
        ledger: where everything is recorded; None keeps no record.
        total_steps: length of the run in optimiser steps.
        seed: seeds the only generator that methods may use.
        max_increase: how much one event may raise the probe loss (its upper 95 % bound), in the loss's unit.
        keep_undo: store what each edit replaces in the ledger, so that it can be undone later.

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
    ) -> None:
        if probe and loss is None:
            raise ConfigError("A probe needs a loss to be measured by.", remedy="Pass loss=your_loss_function.")
        self.model = model
        self.example = example
        self.methods = tuple(methods)
        self.loss = loss
        self.probe = list(probe)
        self.ledger = ledger
        self.total_steps = total_steps
        self.max_increase = max_increase
        self.keep_undo = keep_undo
        self.generator = torch.Generator().manual_seed(seed)
        self.events: list[Event] = []
        self._step = 0
        self._graph: ChannelGraph | None = None
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._averaged: tuple[Companion, ...] = ()
        self._observer: Observer | None = None
        self._statistics: dict[Key, SecondMoment] = {}
        self._applied: list[Edit] = []
        self._undo: list[tuple[ChannelGraph, Undo, dict[Key, Tensor]]] = []
        self._origin: dict[Key, Tensor] = {}

    @property
    def graph(self) -> ChannelGraph:
        """The channel graph of the network as it is now."""
        if self._graph is None:
            raise ConfigError("The compressor is not prepared.", remedy="Call prepare() first.")
        return self._graph

    # before the first batch -----------------------------------------------------------------------------------------

    def prepare(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        averaged: Iterable[Companion] = (),
    ) -> ChannelGraph:
        """Trace the model and find everything that can be found wrong now.

        Args:
            optimizer: the optimiser(s) whose state must follow every edit.
            averaged: moving averages of the model (`AveragedModel`, or a dict of tensors) that must follow as well.
        Raises:
            EditError: weights that are not finite, an optimiser that holds other parameters.
            TraceError: a forward that fails on the example or branches on data.
            DataError: probe batches that the model does not take.
        """
        self._optimizers = () if optimizer is None else _as_tuple(optimizer)
        self._averaged = tuple(averaged)
        _check_finite(self.model)
        optim.assert_live(self.model, self._optimizers)
        graph = trace(self.model, self.example)
        self._graph = with_sizes(self.model, self.example, graph)
        self._origin = {
            (name, dim): torch.arange(n) for name, shape in graph.shapes.items() for dim, n in enumerate(shape)
        }
        self._check_probe()
        for method in self.methods:
            method.prepare(self._moment())
        self._record("prepare", self._preparation(graph))
        self._watch()
        return self._graph

    def _preparation(self, traced: ChannelGraph) -> dict[str, Any]:
        refused = {g.name: dict(g.reasons) for g, old in zip(self.graph, traced, strict=True) if g.admits != old.admits}
        return {
            "fingerprint": fingerprint(self.model),
            "methods": [{"name": m.name, "config": m.config.model_dump(mode="json")} for m in self.methods],
            "groups": [[g.name, g.kind, g.n_channels, sorted(g.admits)] for g in self.graph],
            "refused": refused,
            "frozen": [[f.tensor, f.dim, f.n, f.reason] for f in self.graph.frozen],
            "parameters": parameters(self.model),
            "total_steps": self.total_steps,
            "max_increase": self.max_increase,
            "optimizers": [type(o).__name__ for o in self._optimizers],
            "probe_batches": len(self.probe),
        }

    def _check_probe(self) -> None:
        if not self.probe:
            return
        try:
            values = self._losses()
        except WeightfoldError:
            raise
        except Exception as error:
            raise DataError(
                f"The model or the loss fails on the probe: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
                remedy="Pass probe=[(inputs, targets), ...] with batches from the training split.",
            ) from error
        if not all(map(_finite, values)):
            raise DataError("The loss on the probe is not finite.", remedy="Check the probe's inputs and targets.")

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
        if self._observer is not None:
            self._take_statistics()
        events = self._run_methods()
        self._watch()
        return events

    def once(self, batches: Iterable[Any] = ()) -> list[Event]:
        """Compress a trained network at once.

        Args:
            batches: unlabelled input batches for the statistics, as the model takes them (a tensor, or a tuple).
        """
        total, self.total_steps = self.total_steps, 0
        try:
            with Observer(self.model, self.graph, max_samples_per_batch=None) as observer:
                self._forward_all(batches)
                self._statistics = observer.statistics()
            return self._run_methods()
        finally:
            self.total_steps = total
            self._statistics = {}

    def _forward_all(self, batches: Iterable[Any]) -> None:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        with torch.no_grad():
            for batch in batches:
                self.model(*batch) if isinstance(batch, tuple) else self.model(batch)
        for module, training in modes.items():
            module.training = training

    def convert(self) -> nn.Module:
        """Finish: the plain module, without anything of ours in it."""
        self._close_observer()
        self._record("convert", {"fingerprint": fingerprint(self.model), "parameters": parameters(self.model)})
        return self.model

    def undo(self) -> None:
        """Take the latest accepted edit back: bit for bit when nothing was trained since.

        Raises:
            EditError: there is nothing to undo.
        """
        if not self._undo:
            raise EditError("There is no edit to undo.")
        self._graph, undo, self._origin = self._undo.pop()
        edit = self._applied.pop()
        undo.restore()
        optim.assert_live(self.model, self._optimizers)
        self._record("undo", {"group": edit.group, "step": self._step, "fingerprint": fingerprint(self.model)})

    # statistics -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Put hooks on for the next forward when a method wants statistics of it, off otherwise."""
        wanted = self.total_steps > 0 and any(m.observes(self._step, self.total_steps) for m in self.methods)
        if wanted and self._observer is None:
            self._observer = Observer(self.model, self.graph)
            self._observer.__enter__()
        elif not wanted and self._observer is not None:
            self._close_observer()

    def _close_observer(self) -> None:
        if self._observer is not None:
            self._take_statistics()

    def _take_statistics(self) -> None:
        observer, self._observer = self._observer, None
        if observer is None:
            return
        observer.__exit__(None, None, None)
        for key, moment in observer.statistics().items():
            old = self._statistics.get(key)
            self._statistics[key] = moment if old is None else old.merge(moment)

    # proposals ------------------------------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        return Moment(
            self.model, self.graph, self._step, self.total_steps, self._statistics, self.example, self.generator
        )

    def _run_methods(self) -> list[Event]:
        events: list[Event] = []
        for method in self.methods:
            try:
                proposals = method.step(self._moment())
            except WeightfoldError as error:
                self._record("refusal", {"method": method.name, "step": self._step, "why": str(error)})
                events.append(Event(self._step, "", method.name, 0, 0, False, str(error)))
                continue
            for proposal in proposals:
                events.append(self._try(method, proposal))
            if proposals:
                self._statistics = {}
        self.events += events
        return events

    def _losses(self) -> list[float]:
        assert self.loss is not None
        return losses(self.model, self.probe, self.loss)

    def _try(self, method: Method, proposal: Proposal) -> Event:
        """Apply, measure, and keep, halve or take back."""
        started = time.perf_counter()
        before = self._losses() if self.probe else []
        attempts: list[dict[str, Any]] = []
        current: Proposal | None = proposal
        reading: Reading | None = None
        while current is not None:
            reading, undo, graph, reason = self._attempt(current, before)
            attempts.append(_attempt_record(current, reading, reason))
            if reason == "":
                self._keep(method, current, graph, undo, attempts, time.perf_counter() - started)
                return self._event(current, reading, True, "accepted", started)
            current = current.less()
        self._record(
            "rollback",
            {"method": method.name, "step": self._step, "group": proposal.edit.group, "attempts": attempts},
            {"seconds": time.perf_counter() - started},
        )
        return self._event(proposal, reading, False, attempts[-1]["reason"], started)

    def _attempt(self, proposal: Proposal, before: list[float]) -> tuple[Reading | None, Undo, ChannelGraph, str]:
        try:
            graph, undo = apply(self.model, self.graph, proposal.edit, self._optimizers, self._averaged)
        except EditError as error:
            return None, Undo(), self.graph, error.message
        if not self.probe:
            return None, undo, graph, ""
        try:
            reading = compare(before, self._losses())
        except BaseException:
            undo.restore()
            raise
        if _finite(reading.upper) and reading.upper <= self.max_increase:
            return reading, undo, graph, ""
        undo.restore()
        text = f"the probe loss may rise by {reading.upper:.4g}, more than {self.max_increase:.4g}"
        return reading, undo, graph, text

    def _event(self, proposal: Proposal, reading: Reading | None, accepted: bool, reason: str, started: float) -> Event:
        edit = proposal.edit
        return Event(
            self._step,
            edit.group,
            edit.kind,
            edit.n_channels,
            edit.n_after if accepted else edit.n_channels,
            accepted,
            reason,
            proposal.predicted,
            None if reading is None else reading.mean,
            None if reading is None else (reading.lower, reading.upper),
            time.perf_counter() - started,
        )

    def _keep(
        self,
        method: Method,
        proposal: Proposal,
        graph: ChannelGraph,
        undo: Undo,
        attempts: list[dict[str, Any]],
        seconds: float,
    ) -> None:
        """Take an accepted edit into the record."""
        edit, old = proposal.edit, self.graph
        origin = dict(self._origin)
        what = self._members(edit)
        self._follow_origin(edit)
        self._graph = graph
        self._applied.append(edit)
        self._undo = [*self._undo[-1:], (old, undo, origin)]
        if self.ledger is None:
            return
        record = edit.to_record(self.ledger.put_blob)
        blob = self.ledger.put_blob(undo_bytes(undo)) if self.keep_undo else None
        names = list(dict.fromkeys(a.tensor for a in old[edit.group].axes))
        self._record(
            "edit",
            {
                "method": method.name,
                "step": self._step,
                "what": {**what, "edit": record},
                "why": proposal.why,
                "price": {"predicted": proposal.predicted, "attempts": attempts, "probe_batches": len(self.probe)},
                "gain": {"parameters": parameters(self.model), "macs": macs(self.model, self.example)},
                "proof": {"weights": digest({n: find_tensor(self.model, n)[2] for n in names}), "undo": blob},
                "reset": sorted(undo.reset),
            },
            {
                "seconds": seconds,
                "learning_rates": [
                    g["lr"] for o in self._optimizers for g in o.param_groups if isinstance(g["lr"], float)
                ],
            },
        )

    def _members(self, edit: Edit) -> dict[str, Any]:
        """Who is kept and who goes, in the numbering of the network as it was before any edit."""
        group = self.graph[edit.group]
        axis = next((a for a in group.axes if a.role == "write"), group.axes[0])
        first = axis.index[:, 0]
        origin = self._origin[axis.key]
        number = origin[first] if axis.slabs == 1 else first
        kept = torch.unique(edit.carry)
        gone = torch.ones(group.n_channels, dtype=torch.bool)
        gone[kept] = False
        return {
            "group": group.name,
            "numbering": f"{axis.tensor}[{axis.dim}]",
            "kept": number[kept].tolist(),
            "removed": number[gone].tolist(),
            "members": [[a.tensor, a.dim, a.role] for a in group.axes],
        }

    def _follow_origin(self, edit: Edit) -> None:
        group = self.graph[edit.group]
        for axis in group.axes:
            if axis.slabs == 1:
                self._origin[axis.key] = self._origin[axis.key][layout(group, axis, edit).source]

    def _record(self, kind: str, body: Mapping[str, Any], aside: Mapping[str, Any] | None = None) -> None:
        if self.ledger is not None:
            self.ledger.append(kind, dict(body), aside=dict(aside or {}))

    # resuming -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, as plain data and tensors: the edits so far, counters, statistics, methods' state."""
        if self._observer is not None:
            self._take_statistics()
            self._watch()
        maps: dict[str, bytes] = {}

        def put(data: bytes) -> str:
            maps[str(len(maps))] = data
            return str(len(maps) - 1)

        return {
            "step": self._step,
            "generator": self.generator.get_state(),
            "edits": [edit.to_record(put) for edit in self._applied],
            "maps": {key: torch.frombuffer(bytearray(data), dtype=torch.uint8) for key, data in maps.items()},
            "statistics": {f"{t}|{d}": moment.to_state() for (t, d), moment in self._statistics.items()},
            "methods": [method.state_dict() for method in self.methods],
            "events": [vars(event) for event in self.events],
            "shapes": {name: list(shape) for name, shape in self.graph.shapes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring a freshly prepared network of the original structure to the structure of an interrupted run.

        Load the model's and the optimiser's own state dicts afterwards: their shapes fit then.

        Raises:
            EditError: the network is not the one that the run started with.
        """
        if self._applied:
            raise EditError("The network was edited already.", remedy="Load into a freshly built and prepared one.")
        for record in state["edits"]:
            edit = Edit.from_record(record, lambda key: state["maps"][key].numpy().tobytes())
            self._follow_origin(edit)
            self._graph, _ = apply(self.model, self.graph, edit, self._optimizers, self._averaged)
            self._applied.append(edit)
        found = {name: list(shape) for name, shape in self.graph.shapes.items()}
        if found != {name: list(shape) for name, shape in state["shapes"].items()}:
            name = next(n for n in found if found[n] != list(state["shapes"].get(n, [])))
            raise EditError(
                f"'{name}' has shape {found[name]} after the recorded edits, "
                f"{state['shapes'].get(name)} in the checkpoint.",
                remedy="Build the model with the settings that the run started with.",
            )
        self._step = int(state["step"])
        self.generator.set_state(state["generator"])
        self._statistics = {
            (key.rpartition("|")[0], int(key.rpartition("|")[2])): SecondMoment.from_state(value)
            for key, value in state["statistics"].items()
        }
        for method, value in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(value)
        self.events = [replace(Event(**event), interval=_pair(event["interval"])) for event in state["events"]]
        self._close_observer()
        self._watch()


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (float(value[0]), float(value[1]))


def _as_tuple(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    return tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _check_finite(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise EditError(
                f"'{name}' holds values that are not finite.",
                remedy="Start from weights of a run that did not diverge.",
            )


def _attempt_record(proposal: Proposal, reading: Reading | None, reason: str) -> dict[str, Any]:
    record: dict[str, Any] = {"kept": proposal.edit.n_after, "predicted": proposal.predicted, "reason": reason}
    if reading is not None:
        record |= {"mean": reading.mean, "upper": reading.upper, "before": reading.before, "after": reading.after}
    return {
        key: value if not isinstance(value, float) or _finite(value) else str(value) for key, value in record.items()
    }


def undo_bytes(undo: Undo) -> bytes:
    """What an edit replaced in the model, as one safetensors blob: "tensor:NAME", and optimisers' "state:NAME:KEY"."""
    model, replaced = undo.by_module()[0]
    tensors = {f"tensor:{name}": old.detach().cpu().contiguous() for name, old in replaced.items()}
    for _, owner, name, state in undo.optimizer:
        for key, value in state.items():
            if isinstance(value, Tensor) and owner is model:
                tensors[f"state:{name}:{key}"] = value.detach().cpu().contiguous()
    return save(tensors)
