"""What happened to a network in training: events, the numbering of its first structure, and the ledger's bodies."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from weightfold.fingerprint import fingerprint
from weightfold.gate import Reading
from weightfold.graph.apply import Undo
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.layout import layout
from weightfold.methods.base import Key, Method, Proposal
from weightfold.size import parameters


@dataclass(frozen=True)
class Event:
    """One consolidation, accepted or not.

    Args:
        predicted: what the method expected, in its own unit.
        measured: mean change of the probe loss; ``interval`` is its two-sided 90 % interval. Groups that were folded
            at once share it.
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

    @classmethod
    def of(cls, step: int, proposal: Proposal, reading: Reading | None, reason: str, seconds: float) -> Event:
        """The event that a proposal came to; an empty reason means that it was accepted."""
        edit, accepted = proposal.edit, reason == ""
        return cls(
            step,
            edit.group,
            edit.kind,
            edit.n_channels,
            edit.n_after if accepted else edit.n_channels,
            accepted,
            reason or "accepted",
            proposal.predicted,
            None if reading is None else reading.mean,
            None if reading is None else (reading.lower, reading.upper),
            seconds,
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Event:
        """Read back what a checkpoint holds."""
        interval = state["interval"]
        return cls(**{**state, "interval": None if interval is None else (float(interval[0]), float(interval[1]))})


class Origin:
    """The place of every index of every tensor in the network as it was before any edit."""

    def __init__(self, graph: ChannelGraph) -> None:
        self._of: dict[Key, Tensor] = {
            (name, dim): torch.arange(n) for name, shape in graph.shapes.items() for dim, n in enumerate(shape)
        }

    def copy(self) -> Origin:
        """The same numbering, to come back to."""
        other = object.__new__(Origin)
        other._of = dict(self._of)
        return other

    def follow(self, group: ChannelGroup, edit: Edit) -> None:
        """Take an edit into account."""
        for axis in group.axes:
            if axis.slabs == 1 and axis.key in self._of:
                self._of[axis.key] = self._of[axis.key][layout(group, axis, edit).source]

    def members(self, group: ChannelGroup, edit: Edit) -> dict[str, Any]:
        """Who is kept and who goes."""
        axis = next((a for a in group.axes if a.role == "write"), group.axes[0])
        first = axis.index[:, 0]
        number = self._of[axis.key][first] if axis.slabs == 1 else first
        kept = torch.unique(edit.carry)
        gone = torch.ones(group.n_channels, dtype=torch.bool)
        gone[kept] = False
        return {
            "group": group.name,
            "numbering": f"{axis.tensor}[{axis.dim}]",
            "kept": number[kept].tolist(),
            "removed": number[gone].tolist(),
            "members": [[a.tensor, a.dim, a.role] for a in group.axes if a.key in self._of],
        }


def graph_record(graph: ChannelGraph, traced: ChannelGraph) -> dict[str, Any]:
    """Groups with what they admit, what the trial of sizes has taken from them, and what is frozen, as plain data."""
    refused = {g.name: dict(g.reasons) for g, old in zip(graph, traced, strict=True) if g.admits != old.admits}
    return {
        "groups": [[g.name, g.kind, g.n_channels, sorted(g.admits)] for g in graph],
        "refused": refused,
        "proved": str(graph.proved),
        "frozen": [[f.tensor, f.dim, f.n, f.reason] for f in graph.frozen],
    }


def network_record(
    model: nn.Module,
    graph: ChannelGraph,
    traced: ChannelGraph,
    optimizers: Sequence[torch.optim.Optimizer],
    methods: Sequence[Method],
) -> dict[str, Any]:
    """What is prepared: the network, who trains it, and what may change it."""
    return {
        **graph_record(graph, traced),
        "fingerprint": fingerprint(model),
        "methods": [{"name": m.name, "config": m.config.model_dump(mode="json")} for m in methods],
        "parameters": parameters(model),
        "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
    }


def attempt_record(proposal: Proposal, reading: Reading | None, reason: str, together: Sequence[str] = ()) -> Any:
    """One attempt as plain data; numbers that are not finite as words.

    Args:
        together: the other groups that were changed in the same attempt.
    """
    record: dict[str, Any] = {"kept": proposal.edit.n_after, "predicted": proposal.predicted, "reason": reason}
    if reading is not None:
        record |= {"mean": reading.mean, "upper": reading.upper, "before": reading.before, "after": reading.after}
    if together:
        record["together_with"] = list(together)
    return in_words(record)


def in_words(record: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that are not finite as words: a ledger takes no others.

    Example:
        >>> in_words({"loss": float("nan"), "step": 3})
        {'loss': 'nan', 'step': 3}
    """
    return {
        key: value if not isinstance(value, float) or math.isfinite(value) else str(value)
        for key, value in record.items()
    }


def undo_bytes(undo: Undo, followers: Collection[str] = ()) -> bytes:
    """What an edit replaced in the model, as one safetensors blob: "tensor:NAME", and optimisers' "state:NAME:KEY".

    Args:
        followers: tensors that stand beside the model, left out.
    """
    model, replaced = undo.by_module()[0]
    own = {name: old for name, old in replaced.items() if name not in followers}
    tensors = {f"tensor:{name}": old.detach().cpu().contiguous() for name, old in own.items()}
    for _, owner, name, state in undo.optimizer:
        for key, value in state.items():
            if isinstance(value, Tensor) and owner is model and name in own:
                tensors[f"state:{name}:{key}"] = value.detach().cpu().contiguous()
    return save(tensors)
