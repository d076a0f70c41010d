"""A run over its steps: the width of every group, what was decided when, and the loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightfold.audit.history import Change, History, history_of, ledger_file, step_of
from weightfold.ledger import Entry, Ledger

KINDS = ("accepted", "reduced", "rolled back", "refused", "undone", "other")
"""What becomes of a decision: kept as proposed; kept at a smaller size; tried and taken back at once; not tried, or not
together with others; kept, and taken back later; any other entry that names a step."""

SILENT = ("run", "prepare", "convert", "result", "edit")
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """Something that happened.

    Args:
        at: the step; for a network that was changed at once, the number of the decision.
        kind: one of `KINDS`.
        groups: which it is about; none for the network as a whole.
    """

    seq: int
    at: float
    kind: str
    groups: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Row:
    """The width of one group.

    Args:
        start: channels at the beginning.
        points: (step, channels from there on), ascending.
    """

    group: str
    start: int
    points: tuple[tuple[float, int], ...]

    @property
    def end(self) -> int:
        """Channels at the end."""
        return self.points[-1][1]


@dataclass(frozen=True)
class Timeline:
    """All that a picture of a run shows.

    Args:
        rows: groups in the order of the network, those of single channels first.
        marks: in order.
        total: the last step.
        unit: what is counted along the axis: "steps", or "decisions" for a network that was changed at once.
        losses: training loss by network.
    """

    title: str
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...]
    total: float
    unit: str
    losses: Mapping[str, Points]

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self)

    def of_group(self, name: str) -> list[Mark]:
        """Marks of a group."""
        return [mark for mark in self.marks if name in mark.groups]

    def summary(self) -> str:
        """Say in one sentence what the picture shows."""
        before, after = sum(row.start for row in self.rows), sum(row.end for row in self.rows)
        counts = {kind: sum(mark.kind == kind for mark in self.marks) for kind in KINDS[:5]}
        found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"
        return (
            f"{len(self.rows)} channel groups with {before:,} channels at the start and {after:,} at the end, over "
            f"{self.total:,.0f} {self.unit}; decisions: {found}."
        )


def read_timeline(source: str | Path) -> Timeline:
    """Read the timeline of a run.

    Args:
        source: folder of a run, or a ledger file.
    Raises:
        LedgerError: the ledger is missing or damaged.
    """
    with Ledger.open(ledger_file(Path(source)), readonly=True) as ledger:
        history = history_of(tuple(ledger.entries()), ledger.path, ledger.head)
        losses = {name.rpartition("/")[0]: _points(ledger, name) for name in ledger.metric_names() if _is_loss(name)}
    return timeline_of(history, {arm or "network": points for arm, points in losses.items() if points})


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("/loss")


def _points(ledger: Ledger, name: str) -> Points:
    return [(float(step), value) for step, value in ledger.metrics(name)]


def timeline_of(history: History, losses: Mapping[str, Points]) -> Timeline:
    """Lay a history out over its steps, or over its decisions where nothing was trained."""
    decided = [entry for entry in history.entries if entry.kind not in ("run", "prepare", "convert", "result")]
    last = max([step_of(entry) or 0 for entry in decided] + [int(x) for p in losses.values() for x, _ in p[-1:]] + [0])
    total = max(history.total_steps, last)
    if total:
        at = {entry.seq: float(total if step_of(entry) is None else step_of(entry) or 0) for entry in decided}
    else:
        at = {entry.seq: float(number) for number, entry in enumerate(decided, 1)}
    unit = "steps" if total else "decisions"
    rows = tuple(_row(history, name, at) for name in _ordered(history))
    return Timeline(_title(history), rows, _marks(history, at), float(total or len(decided)), unit, dict(losses))


def _title(history: History) -> str:
    model = history.run.get("config", {}).get("model")
    data = history.run.get("data", {})
    name = data.get("name") if isinstance(data, dict) else None
    model = Path(model).name if isinstance(model, str) else model
    return f"{model} on {name}" if model and name else str(model or history.path.parent.name or history.path.name)


def _ordered(history: History) -> list[str]:
    """Groups in the order of the network where the result tells it, else as they were traced; blocks last."""
    result = next((entry.body for entry in reversed(history.entries) if entry.kind == "result"), {})
    widths = result.get("arms", {}).get("folded", {}).get("widths", [])
    names = dict.fromkeys([str(item[0]) for item in widths if str(item[0]) in history.groups])
    names |= dict.fromkeys(sorted(history.groups, key=_natural))
    return sorted(names, key=lambda name: history.groups[name].kind != "channels")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort the numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _row(history: History, name: str, at: Mapping[int, float]) -> Row:
    start = history.groups[name].channels
    points: list[tuple[float, int]] = [(0.0, start)]
    for entry in history.entries:
        change = next((c for c in history.of_group(name) if c.seq == entry.seq), None)
        if change is not None:
            points.append((at[entry.seq], len(change.carry)))
        for undone in (c for c in reversed(history.of_group(name)) if c.undone is entry):
            points.append((at[entry.seq], len(undone.original)))
    end = history.widths().get(name, points[-1][1])
    if end != points[-1][1]:
        points.append((max(at.values(), default=0.0), end))
    return Row(name, start, tuple(points))


def _marks(history: History, at: Mapping[int, float]) -> tuple[Mark, ...]:
    changes = {change.seq: change for change in history.changes}
    found = []
    for entry in history.entries:
        if entry.seq in changes:
            found.append(_change_mark(changes[entry.seq], at[entry.seq]))
        elif entry.seq in at and (entry.kind not in SILENT):
            found.append(_other_mark(history, entry, at[entry.seq]))
    return tuple(found)


def _change_mark(change: Change, at: float) -> Mark:
    reduced = len(change.body.get("price", {}).get("attempts", [])) > 1
    text = f"{change.kind or 'edit'} {len(change.original)} → {len(change.carry)}"
    text += " at a smaller size than proposed" if reduced else ""
    return Mark(change.seq, at, "reduced" if reduced else "accepted", (change.group,), text)


def _other_mark(history: History, entry: Entry, at: float) -> Mark:
    body = entry.body
    kind = {"rollback": "rolled back", "refusal": "refused", "undo": "undone"}.get(entry.kind, "other")
    groups = tuple(str(name) for name in body.get("groups", []) if isinstance(name, str)) or (
        str(body.get("group", "")),
    )
    if entry.kind == "undo":
        groups = tuple(c.group for c in history.changes if c.undone is entry) or groups
    if entry.kind == "refusal":
        groups = ()
    return Mark(entry.seq, at, kind, tuple(g for g in groups if g in history.groups), _words(entry))


def _words(entry: Entry) -> str:
    body = entry.body
    attempts = body.get("attempts")
    last = attempts[-1] if isinstance(attempts, list) and attempts and isinstance(attempts[-1], dict) else {}
    reason = entry.aside.get("why") or body.get("why", last.get("reason", body.get("how", "")))
    text = str(reason).partition("\n")[0] if isinstance(reason, str) else ""
    return f"{entry.kind}: {text}" if text else entry.kind
