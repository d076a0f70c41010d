"""How two runs differ: where the chains part, settings, structure by original numbers, decisions, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from weightfold.audit.compare import compare, differing
from weightfold.errors import LedgerError
from weightfold.graph import edit as edits
from weightfold.ledger import Ledger

from .scripted import record


def keeping(*channels: int) -> Any:
    return lambda group: edits.remove(group, torch.tensor(channels))


def runs(tmp_path: Path, first: dict, second: dict) -> dict[str, Any]:
    for name, script in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        record(tmp_path / name, script, 8)
    return compare(tmp_path / "a", tmp_path / "b")


def test_the_same_run_twice_is_equal(tmp_path: Path) -> None:
    facts = runs(tmp_path, {3: keeping(0, 1, 5)}, {3: keeping(0, 1, 5)})
    assert facts["equal"]
    assert facts["parting"] is None
    assert facts["settings"] == []
    assert facts["same_structure"]
    assert facts["decisions"]["first_difference"] is None


def test_the_chains_part_at_the_first_decision_that_differs(tmp_path: Path) -> None:
    facts = runs(tmp_path, {3: keeping(0, 1, 5), 5: keeping(0, 1)}, {3: keeping(0, 1, 5), 5: keeping(0, 2)})
    assert not facts["equal"]
    assert (facts["parting"]["seq"], facts["parting"]["kinds"]) == (3, ["edit", "edit"])
    assert "what.edit.carry" in [path for path, *_ in facts["parting"]["differs"]]
    difference = facts["decisions"]["first_difference"]
    assert difference["number"] == 1
    assert [row["kept"] for row in difference["runs"]] == [[0, 1], [0, 5]]


def test_kept_sets_are_compared_in_original_numbers(tmp_path: Path) -> None:
    facts = runs(tmp_path, {3: keeping(0, 2, 4, 6), 5: keeping(1, 3)}, {3: keeping(2, 6, 7)})
    (row,) = facts["structure"]
    assert row["start"] == [8, 8]
    assert row["widths"] == [2, 3]
    assert row["only"] == [[], [7]]
    assert (row["common"], row["jaccard"]) == (2, pytest.approx(2 / 3)), "2 and 6 of 2, 6, 7"
    assert not row["same"]
    assert not facts["same_structure"]


def test_other_steps_are_another_decision_but_the_same_structure(tmp_path: Path) -> None:
    facts = runs(tmp_path, {3: keeping(0, 1)}, {4: keeping(0, 1)})
    assert facts["same_structure"]
    assert facts["decisions"]["first_difference"]["number"] == 0


def test_a_chain_that_ends_earlier_is_said_to_end(tmp_path: Path) -> None:
    runs(tmp_path, {}, {})
    with Ledger.open(tmp_path / "b" / "ledger.db") as ledger:
        ledger.append("note", {"text": "more"})
    facts = compare(tmp_path / "a", tmp_path / "b")
    assert facts["parting"]["kinds"] == [None, "note"]


def test_ledgers_without_any_network_are_compared(tmp_path: Path) -> None:
    for name, seed in (("a.db", 0), ("b.db", 1)):
        Ledger.create(tmp_path / name, run={"seed": seed}).close()
    facts = compare(tmp_path / "a.db", tmp_path / "b.db")
    assert facts["settings"] == [["seed", 0, 1]]
    assert facts["parting"]["differs"] == [["seed", 0, 1]]
    with pytest.raises(LedgerError):
        compare(tmp_path / "a.db", tmp_path / "c.db")


def test_types_and_nests_are_told_apart() -> None:
    assert list(differing({"a": 1}, {"a": 1.0})) == [("a", 1, 1.0)]
    assert list(differing({"a": [{"b": 1}, 2]}, {"a": [{"b": 3}, 2]})) == [("a[0].b", 1, 3)]
    assert list(differing({"a": [1, 2]}, {"a": [1]})) == [("a", [1, 2], [1])]
    assert list(differing(None, {"a": 1})) == [("", None, {"a": 1})]
