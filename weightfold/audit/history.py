"""Read a ledger as a history: groups at the start, changes in order, and who is who in the original numbering.

Every entry of an edit says which channels were kept and which removed in the numbering that the network was made with,
and which of the channels *of that time* each new one takes over. Together these give the original number of every
channel at every time, through any number of edits. Entries of a kind that is not known here are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightfold.ledger import Entry, Ledger


@dataclass(frozen=True)
class Group:
    """A channel group as it was when the run began.

    Args:
        channels: how many there were.
        refused: edits that it does not admit, with the reason.
    """

    name: str
    kind: str
    channels: int
    admits: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """An accepted edit.

    Args:
        carry: which channel of that time each new channel takes over.
        original: original number of each channel of that time.
        undone: entry that took this edit back; None while it stands.
    """

    entry: Entry
    group: str
    carry: tuple[int, ...]
    original: tuple[int, ...]
    numbering: str
    members: tuple[tuple[str, int, str], ...]
    undone: Entry | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The entry's facts."""
        return self.entry.body

    @property
    def seq(self) -> int:
        """Number of the entry."""
        return self.entry.seq

    @property
    def step(self) -> int:
        """Optimiser steps done when it happened."""
        return step_of(self.entry) or 0

    @property
    def kind(self) -> str:
        """Constructor of the edit: remove, fold, merge, ..."""
        return str(self.body["what"]["edit"].get("kind", ""))

    @property
    def after(self) -> tuple[int, ...]:
        """Original number of each channel after the edit."""
        return tuple(self.original[at] for at in self.carry)

    @property
    def together(self) -> tuple[str, ...]:
        """Other groups that were changed and measured at once with this one."""
        attempts = self.body.get("price", {}).get("attempts", [])
        others = attempts[-1].get("together_with", []) if attempts and isinstance(attempts[-1], dict) else []
        return tuple(str(name) for name in others)

    @property
    def kept(self) -> tuple[int, ...]:
        """Original numbers of the channels that stay."""
        return tuple(sorted(set(self.after)))

    @property
    def removed(self) -> tuple[int, ...]:
        """Original numbers of the channels that go."""
        return tuple(sorted(set(self.original) - set(self.after)))


@dataclass(frozen=True)
class History:
    """All that a ledger tells of a run.

    Args:
        run: facts of the first entry.
        start: facts of the preparation; {} if the run did not come so far.
        groups: by name, in the order of the graph.
        frozen: [tensor, dimension, size, reason] of every axis that no edit may touch.
        changes: accepted edits in order, those that were taken back too.
        entries: everything in order.
    """

    path: Path
    head: str
    run: dict[str, Any]
    start: dict[str, Any]
    groups: Mapping[str, Group]
    frozen: tuple[tuple[str, int, int, str], ...]
    changes: tuple[Change, ...]
    entries: tuple[Entry, ...]

    @property
    def standing(self) -> tuple[Change, ...]:
        """Changes that were not taken back."""
        return tuple(change for change in self.changes if change.undone is None)

    @property
    def total_steps(self) -> int:
        """Length of the run in optimiser steps; 0 for a network that was changed at once."""
        return int(self.start.get("total_steps") or self.run.get("total_steps") or 0)

    def of_group(self, name: str) -> tuple[Change, ...]:
        """Changes of one group, those that were taken back too."""
        return tuple(change for change in self.changes if change.group == name)

    def widths(self) -> dict[str, int]:
        """Channels of every group at the end.

        Groups that lost channels with an edit of *another* group (blocks and their channels) are counted by the run's
        result, where there is one.
        """
        found = {name: group.channels for name, group in self.groups.items()}
        found |= {change.group: len(change.carry) for change in self.standing}
        result = next((entry for entry in reversed(self.entries) if entry.kind == "result"), None)
        undone_since = any(e.kind == "undo" and result is not None and e.seq > result.seq for e in self.entries)
        return found if result is None or undone_since else found | _measured_widths(result)

    def survivors(self, name: str) -> tuple[int, ...]:
        """Original numbers of the channels that a group has at the end, in their order."""
        mine = self.of_group(name)
        standing = [change for change in mine if change.undone is None]
        if standing:
            return standing[-1].after
        return mine[0].original if mine else tuple(range(self.groups[name].channels))

    def numbering(self, name: str) -> str:
        """The axis along which the channels of a group are numbered, as "tensor[dimension]"."""
        return next((change.numbering for change in self.of_group(name) if change.numbering), f"{name}, as traced")

    def epoch(self, step: int) -> int | None:
        """The pass over the training samples in which a step lies, from 1; None where that is not recorded."""
        epochs = self.run.get("config", {}).get("epochs")
        if not epochs or not self.total_steps:
            return None
        return min(int(epochs), 1 + max(0, step - 1) * int(epochs) // self.total_steps)


def read_history(source: str | Path) -> History:
    """Read the ledger of a run.

    Args:
        source: folder of a run, or a ledger file.
    Raises:
        LedgerError: the file is missing, foreign, or an entry does not fit its hash; names it.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Ledger.create(f"{folder}/ledger.db", run={"seed": 0}) as ledger:
        ...         _ = ledger.append("prepare", {"groups": [["fc1", "channels", 8, ["merge"]]]})
        ...     read_history(folder).widths()
        {'fc1': 8}
    """
    with Ledger.open(ledger_file(Path(source)), readonly=True) as ledger:
        return history_of(tuple(ledger.entries()), ledger.path, ledger.head)


def ledger_file(source: Path) -> Path:
    """Find the ledger in a run's folder, or take the file itself."""
    return source / "ledger.db" if source.is_dir() else source


def history_of(entries: tuple[Entry, ...], path: Path, head: str) -> History:
    """Make a history of entries that were read."""
    start = next((entry.body for entry in entries if entry.kind == "prepare"), {})
    refused = start.get("refused", {})
    groups = {
        str(name): Group(str(name), str(kind), int(channels), tuple(admits), dict(refused.get(name, {})))
        for name, kind, channels, admits, *_ in start.get("groups", [])
    }
    changes = _with_undos([change for entry in entries if (change := _change(entry)) is not None], entries)
    for change in changes:
        groups.setdefault(change.group, Group(change.group, "channels", len(change.original)))
    frozen = tuple((str(t), int(d), int(n), str(why)) for t, d, n, why, *_ in start.get("frozen", []))
    return History(path, head, entries[0].body if entries else {}, start, groups, frozen, changes, entries)


def _change(entry: Entry) -> Change | None:
    """Read an edit; None for another kind of entry, and for an edit that does not say what was edited."""
    what = entry.body.get("what")
    edit = what.get("edit") if entry.kind == "edit" and isinstance(what, dict) else None
    if not isinstance(what, dict) or not isinstance(edit, dict) or not {"carry", "channels"} <= edit.keys():
        return None
    carry = tuple(int(at) for at in edit["carry"])
    members = tuple((str(t), int(d), str(role)) for t, d, role, *_ in what.get("members", []))
    group = str(what.get("group", edit.get("group", "")))
    return Change(entry, group, carry, _original(carry, edit, what), str(what.get("numbering", "")), members)


def _original(carry: tuple[int, ...], edit: Mapping[str, Any], what: Mapping[str, Any]) -> tuple[int, ...]:
    """Number the channels of that time: kept and removed are listed in the order in which they stood then."""
    n = int(edit["channels"])
    kept = sorted(set(carry))
    gone = sorted(set(range(n)) - set(carry))
    numbers = dict(zip(kept, what.get("kept", kept), strict=False)) | dict(
        zip(gone, what.get("removed", gone), strict=False)
    )
    return tuple(int(numbers.get(at, at)) for at in range(n))


def _with_undos(changes: Iterable[Change], entries: Iterable[Entry]) -> tuple[Change, ...]:
    found = {change.seq: change for change in changes}
    for entry in entries:
        if entry.kind != "undo":
            continue
        for seq in undone_by(entry, found):
            found[seq] = replace(found[seq], undone=entry)
    return tuple(found.values())


def undone_by(entry: Entry, changes: Mapping[int, Change]) -> tuple[int, ...]:
    """Which edits an entry of kind "undo" takes back: those that it names, or the latest one of each of its groups."""
    named = entry.body.get("undoes", entry.body.get("seq"))
    if isinstance(named, int):
        named = [named]
    if isinstance(named, list):
        return tuple(seq for seq in named if seq in changes)
    standing = [change for change in changes.values() if change.undone is None and change.seq < entry.seq]
    groups = entry.body.get("groups")
    if not isinstance(groups, list):
        groups = [group_of(entry.body) or (standing[-1].group if standing else "")]
    latest = {change.group: change.seq for change in standing}
    return tuple(latest[group] for group in groups if group in latest)


def _measured_widths(result: Entry) -> dict[str, int]:
    folded = result.body.get("arms", {}).get("folded", {})
    return {str(name): int(after) for name, _, after in folded.get("widths", [])}


def group_of(body: Mapping[str, Any]) -> str:
    """Name the channel group that an entry is about; "" if it is about none.

    Example:
        >>> group_of({"what": {"group": "fc1"}}), group_of({"group": "fc2"}), group_of({})
        ('fc1', 'fc2', '')
    """
    what = body.get("what")
    inner = what.get("group", "") if isinstance(what, Mapping) else ""
    return str(body.get("group") or inner or "")


def step_of(entry: Entry) -> int | None:
    """The optimiser step that an entry names; None if it names none."""
    step = entry.body.get("step")
    return step if type(step) is int else None


def number(value: Any) -> float | None:
    """Take a number as such; None for text, which stands for what is not finite, and for nothing."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
