"""Widths over steps and what was decided, from any ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from weightfold.audit.timeline import read_timeline
from weightfold.graph import edit as edits
from weightfold.ledger import Ledger

from .scripted import record


def keeping(n: int) -> Any:
    return lambda group: edits.remove(group, torch.arange(n))


def test_widths_follow_edits_and_undos(tmp_path: Path) -> None:
    record(tmp_path, {3: keeping(6), 6: keeping(2)}, 10)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.append("undo", {"step": 8, "groups": ["0"]})
        ledger.log_metrics(1, {"folded/loss": 2.0, "folded/val_loss": 3.0, "seconds": 1.0})
    found = read_timeline(tmp_path)
    (row,) = found.rows
    assert (row.group, row.start, row.end) == ("0", 8, 6)
    assert row.points == ((0.0, 8), (3.0, 6), (6.0, 2), (8.0, 6))
    assert [(mark.at, mark.kind, mark.groups) for mark in found.marks] == [
        (3.0, "accepted", ("0",)), (6.0, "accepted", ("0",)), (8.0, "undone", ("0",)),
    ]  # fmt: skip
    assert (found.total, found.unit) == (10.0, "steps")
    assert found.losses == {"folded": [(1.0, 2.0)]}
    assert found.summary().endswith("decisions: 2 accepted, 1 undone.")
    json.dumps(found.to_dict(), allow_nan=False)


def test_every_kind_of_decision_is_told_apart(tmp_path: Path) -> None:
    attempts = [{"kept": 2, "reason": "too much"}, {"kept": 4, "reason": ""}]
    edit = {"channels": 8, "carry": [0, 1, 2, 3], "kind": "fold"}
    with Ledger.create(tmp_path / "ledger.db", run={"total_steps": 100}) as ledger:
        ledger.append("prepare", {"groups": [["fc1", "channels", 8, []], ["fc2", "channels", 8, []]]})
        ledger.append("edit", {"step": 10, "what": {"group": "fc1", "edit": edit}, "price": {"attempts": attempts}})
        ledger.append("rollback", {"step": 10, "group": "fc2", "attempts": attempts[:1]})
        ledger.append("refusal", {"step": 20, "groups": ["fc1", "fc2"], "why": "too much\n  -> less"})
        ledger.append("freeze", {"step": 30, "group": "fc2", "reason": 7})
        ledger.append("plan", {"candidates": [4, 8]})
        ledger.append("watch", {"step": 40, "groups": ["fc1", 3]})
    found = read_timeline(tmp_path)
    assert [(mark.at, mark.kind, mark.groups, mark.text) for mark in found.marks] == [
        (10.0, "reduced", ("fc1",), "fold 8 → 4 at a smaller size than proposed"),
        (10.0, "rolled back", ("fc2",), "rollback: too much"),
        (20.0, "refused", (), "refusal: too much"),
        (30.0, "other", ("fc2",), "freeze"),
        (100.0, "other", (), "plan"),
        (40.0, "other", ("fc1",), "watch"),
    ]
    assert [row.end for row in found.rows] == [4, 8]


def test_without_steps_decisions_are_counted(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        ledger.append("prepare", {"groups": [["a10", "channels", 8, []], ["a9", "channels", 4, []]], "total_steps": 0})
        for group in ("a9", "a10"):
            edit = {"channels": 4 if group == "a9" else 8, "carry": [0]}
            ledger.append("edit", {"step": 0, "what": {"group": group, "edit": edit}})
    found = read_timeline(tmp_path)
    assert found.unit == "decisions"
    assert [row.group for row in found.rows] == ["a9", "a10"]
    assert [mark.at for mark in found.marks] == [1.0, 2.0]


def test_a_run_that_has_only_begun_is_shown(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger.db", run={}).close()
    found = read_timeline(tmp_path)
    assert (found.rows, found.marks) == ((), ())
    assert "decisions: none" in found.summary()
