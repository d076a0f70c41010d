"""Original and ledger give the same result again, or the first difference; and edits can be taken back afterwards.

Three ways to use a record:

- `rebuild` applies the recorded edits to the original network, in order, and compares what each entry says of the
  network after it. Structure follows from the record alone: no data, no training, no gate.
- `Replay` is a method that proposes exactly the recorded edits at the recorded steps. In a training without a gate it
  gives the same structure on any machine, with any number of threads, although the weights may differ there.
- `take_back` undoes the latest edits of a trained network, by what each of them stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from weightfold.audit.history import Change, History
from weightfold.config import Config
from weightfold.errors import EditError, GraphError, LedgerError
from weightfold.fingerprint import digest
from weightfold.graph.apply import apply, find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import Example, trace
from weightfold.graph.unfold import unfold
from weightfold.ledger.entry import RESTORE
from weightfold.methods.base import Method, Moment, Proposal
from weightfold.size import macs, parameters

if TYPE_CHECKING:
    from weightfold.compressor import Compressor

Blob = Callable[[str], bytes]

SILENT = frozenset(
    {"run", "prepare", "edit", "undo", "rollback", "refusal", "convert", "result", "plan", "watch", "freeze", "warning"}
)
"""Kinds of entries that change nothing of the structure, or whose change is replayed."""


@dataclass(frozen=True)
class Difference:
    """The first thing that is not as recorded.

    Args:
        seq: the entry that says otherwise.
        what: what differs.
        recorded: as the ledger or the saved model has it.
        found: as it came out now.
    """

    seq: int
    what: str
    recorded: Any
    found: Any

    def __str__(self) -> str:
        return f"Entry {self.seq}: {self.what} is {self.found} now; recorded is {self.recorded}."


@dataclass(frozen=True, eq=False)
class Applied:
    """An edit that was applied again, and the graph from before it."""

    change: Change
    edit: Edit
    graph_before: ChannelGraph


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """What `rebuild` made of the original network.

    Args:
        graph: of the network with all recorded edits; None if a difference kept it from being made.
        applied: the edits, in order.
        difference: the first one; None if everything is as recorded.
        unknown: (seq, kind) of entries that may change a network and cannot be replayed.
    """

    graph: ChannelGraph | None
    applied: tuple[Applied, ...]
    difference: Difference | None
    unknown: tuple[tuple[int, str], ...]


def rebuild(model: nn.Module, example: Example, history: History, get_blob: Blob, *, weights: bool = False) -> Rebuilt:
    """Apply the recorded edits to the network that the run began with, in place.

    Edits that were taken back are left out: each edit knows only the channels of its own group.

    Args:
        model: as it was made; its weights matter only if `weights`.
        example: what it was traced with.
        history: of the run.
        get_blob: gives stored maps by digest.
        weights: whether to compare the weights after each edit too: nothing was trained in between.
    Raises:
        LedgerError: stored maps are missing or damaged.
        TraceError: the model fails on the example.
    Example:
        >>> import tempfile
        >>> import weightfold as wf
        >>> from weightfold.audit import read_history
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> folder = tempfile.TemporaryDirectory()
        >>> with wf.Ledger.create(f"{folder.name}/ledger.db", run={}) as ledger:
        ...     c = wf.Compressor(net, torch.zeros(1, 4), [wf.Prune(keep=0.5)], ledger=ledger)
        ...     _ = c.prepare(), c.once()
        ...     twin = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        ...     made = rebuild(twin, torch.zeros(1, 4), read_history(folder.name), ledger.get_blob)
        >>> twin[0].out_features, made.difference
        (4, None)
        >>> folder.cleanup()
    """
    graph = with_sizes(model, example, trace(model, example), {change.group for change in history.standing})
    unknown = tuple((entry.seq, entry.kind) for entry in history.entries if entry.kind not in SILENT)
    difference = _first_group(history, graph)
    applied: list[Applied] = []
    for change in history.standing:
        if difference is not None:
            return Rebuilt(None, tuple(applied), difference, unknown)
        edit = read_edit(change, get_blob)
        try:
            following, _ = apply(model, graph, edit)
        except (EditError, GraphError) as error:
            difference = Difference(change.seq, f"the edit of '{change.group}'", "applied", f"refused: {error.message}")
            continue
        applied.append(Applied(change, edit, graph))
        graph = following
        if _last_at_once(change, history.standing):
            difference = _after(model, example, applied, graph, weights=weights)
    return Rebuilt(graph if difference is None else None, tuple(applied), difference, unknown)


def read_edit(change: Change, get_blob: Blob) -> Edit:
    """Read a recorded edit back.

    Raises:
        LedgerError: its maps are missing or damaged; names the entry.
    """
    try:
        return Edit.from_record(change.body["what"]["edit"], get_blob)
    except (KeyError, ValueError, SafetensorError) as error:
        raise LedgerError(f"The edit of entry {change.seq} cannot be read: {error}.", remedy=RESTORE) from None


def _first_group(history: History, graph: ChannelGraph) -> Difference | None:
    """Compare the groups of the network with those of the preparation."""
    seq = next((entry.seq for entry in history.entries if entry.kind == "prepare"), 0)
    found = {group.name: group for group in graph}
    for name, group in history.groups.items():
        if name not in found:
            return Difference(seq, f"the group '{name}'", f"{group.channels} {group.kind}", "missing")
        if found[name].n_channels != group.channels:
            return Difference(seq, f"the group '{name}'", group.channels, found[name].n_channels)
    return None


def _last_at_once(change: Change, standing: Sequence[Change]) -> bool:
    """Whether an edit ends what was made and measured at once, all of which stands: its entry tells of all then."""
    peers = [c for c in standing if c.step == change.step and c.group in change.together]
    return len(peers) == len(change.together) and all(c.seq < change.seq for c in peers)


def _after(
    model: nn.Module, example: Example, applied: Sequence[Applied], graph: ChannelGraph, *, weights: bool
) -> Difference | None:
    """Compare a network after an edit, or several at once, with what their entries say of it."""
    change = applied[-1].change
    gain = change.body.get("gain", {})
    if "parameters" in gain and (found := parameters(model)) != gain["parameters"]:
        return Difference(change.seq, "the number of parameters", gain["parameters"], found)
    if "macs" in gain and (found := macs(model, example)) != gain["macs"]:
        return Difference(change.seq, "the number of multiply-accumulates", gain["macs"], found)
    peers = (change.group, *change.together)
    for one in applied if weights else ():
        recorded = one.change.body.get("proof", {}).get("weights")
        if recorded is None or one.change.step != change.step or one.change.group not in peers:
            continue
        if (found := group_digest(model, graph, one.change.group)) != recorded:
            return Difference(one.change.seq, f"the digest of the weights of '{one.change.group}'", recorded, found)
    return None


def group_digest(model: nn.Module, graph: ChannelGraph, group: str) -> str:
    """Hash all tensors that a group reaches."""
    return digest({axis.tensor: find_tensor(model, axis.tensor)[2] for axis in graph[group].axes})


class ReplayConfig(Config):
    """Settings of `Replay`."""

    head: str
    """hash of the last entry of the ledger whose decisions are forced"""


class Replay(Method):
    """Proposes exactly the recorded edits at the recorded steps, and takes back what was taken back.

    Pass no probe: a gate would judge the edits anew.

    Args:
        history: of the run whose decisions are forced.
        get_blob: gives stored maps by digest.
    """

    name: ClassVar[str] = "replay"
    Config: ClassVar[type[Config]] = ReplayConfig

    def __init__(self, history: History, get_blob: Blob) -> None:
        super().__init__(ReplayConfig(head=history.head))
        self.changes = history.changes
        self.edits = {change.seq: read_edit(change, get_blob) for change in history.changes}
        self.total_steps = history.total_steps

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose what was accepted at this step."""
        return [
            Proposal(self.edits[change.seq], {"metric": "replay", "entry": change.seq}, None)
            for change in self.changes
            if change.step == moment.step
        ]

    def acts(self, step: int, total_steps: int) -> bool:  # noqa: ARG002
        """Whether an edit was accepted at this step."""
        return any(change.step == step for change in self.changes)

    def before_step(self, compressor: Compressor, step: int) -> None:
        """Unfold what was unfolded when the compressor looked back at this step; call it before the compressor's step.

        Raises:
            EditError: the edit is no longer held in memory.
        """
        undone = self._undone_at(step, unfolded=True)
        if undone:
            compressor.unfold(len(undone), at=step)

    def after_step(self, compressor: Compressor, step: int) -> None:
        """Take back what the user took back after this step; call it after the compressor's step."""
        for _ in self._undone_at(step, unfolded=False):
            compressor.undo()

    def _undone_at(self, step: int, *, unfolded: bool) -> list[Change]:
        return [
            change
            for change in reversed(self.changes)
            if change.undone is not None
            and change.undone.body.get("step") == step
            and str(change.undone.body.get("how", "")).startswith("unfolded") == unfolded
        ]


def take_back(model: nn.Module, rebuilt: Rebuilt, get_blob: Blob, seq: int | None = None) -> list[tuple[Change, bool]]:
    """Take the latest edits of a trained network back, in place.

    Bit for bit where nothing was trained since; else what the edit removed returns as it was, and what was learned
    since stays at the positions that were kept.

    Args:
        model: as it is after all recorded edits.
        rebuilt: the record, from `rebuild` on a twin of the original.
        get_blob: gives stored bytes by digest.
        seq: the earliest edit to take back; None: only the latest one.
    Returns:
        undone: each edit taken back, the latest first, and whether every tensor is now as it was before it.
    Raises:
        LedgerError: an edit stored nothing to go back by, or what it stored is damaged; the model may be changed then.
        EditError: there is no such edit, or the model is not that of the record.
    """
    steps = _to_undo(rebuilt, seq)
    undone = []
    for applied in steps:
        old = stored_tensors(applied.change, get_blob)
        unfold(model, applied.graph_before, applied.edit, old)
        exact = all(torch.equal(find_tensor(model, name)[2].detach().cpu(), value) for name, value in old.items())
        undone.append((applied.change, exact))
    return undone


def _to_undo(rebuilt: Rebuilt, seq: int | None) -> Sequence[Applied]:
    """Choose the edits to take back, the latest first."""
    numbers = [applied.change.seq for applied in rebuilt.applied]
    if not numbers:
        raise EditError("There is no edit to take back.")
    if seq is not None and seq not in numbers:
        raise EditError(
            f"Entry {seq} is no edit that stands.", remedy=f"Edits that stand: {', '.join(map(str, numbers))}."
        )
    first = numbers[-1] if seq is None else seq
    return [applied for applied in reversed(rebuilt.applied) if applied.change.seq >= first]


def stored_tensors(change: Change, get_blob: Blob) -> dict[str, Tensor]:
    """Read the tensors that an edit replaced, by name, as they were before it.

    Raises:
        LedgerError: nothing was stored, or it is damaged; names the entry.
    """
    found = change.body.get("proof", {}).get("undo")
    if not found:
        raise LedgerError(
            f"Entry {change.seq} stored nothing to go back by.",
            remedy="Compressor(keep_undo=True), the default, stores what each edit replaces.",
        )
    try:
        tensors = load(get_blob(found))
    except SafetensorError as error:
        raise LedgerError(f"The undo blob of entry {change.seq} is damaged: {error}.", remedy=RESTORE) from None
    return {name.removeprefix("tensor:"): value for name, value in tensors.items() if name.startswith("tensor:")}
