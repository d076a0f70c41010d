"""Two processes compress one network: the same quantisers, the same cuts, the same weights on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from weightfold.ledger import Ledger

from .conftest import Pair

RUNS = ("strength", "target", "accuracy", "fold")


@pytest.fixture(scope="module")
def folder(pair: Pair) -> Path:
    """Two processes go through all cases, one after the other."""
    return pair("compress_workers.py")


@pytest.fixture
def both(folder: Path) -> Any:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_end_bit_for_bit_alike(both: Any, name: str) -> None:
    first, second = (result[name] for result in both)
    assert first["losses"] != second["losses"], "each rank trains on its own batches"
    for key in ("fingerprint", "events", "history", "size"):
        assert first[key] == second[key], key
    for tensor, values in first["quantisers"].items():
        for a, b in zip(values, second["quantisers"][tensor], strict=True):
            assert torch.equal(a, b), tensor
    assert len(first["moments"]) == 3
    assert all(torch.equal(a, b) for a, b in zip(first["moments"], second["moments"], strict=True))


def test_channels_were_cut_and_folded(both: Any) -> None:
    kinds = {name: {event[2] for event in both[1][name]["events"] if event[4]} for name in RUNS}
    assert "remove" in kinds["strength"]
    assert "fold" in kinds["fold"]


def test_gradients_of_quantisers_are_averaged_whatever_the_loss_is_multiplied_by(both: Any) -> None:
    """Reference: one process on the batches of both ranks."""
    for result in both:
        assert max(result["averaged"]) < 1e-4


def test_only_the_first_rank_keeps_a_ledger(folder: Path) -> None:
    for name in RUNS:
        with Ledger.open(folder / f"{name}.ledger", readonly=True) as ledger:
            ledger.verify()
            assert [entry.kind for entry in ledger.entries()].count("precision") == 1


def test_sharded_parameters_are_refused(both: Any) -> None:
    for result in both:
        assert "'0.weight' is sharded over several processes" in result["sharded"]
