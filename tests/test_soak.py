"""A short run of the soak: edits upon edits, undo and training, beside independent references.

The seeds are those that once ended in wrong sizes, freedoms or optimiser state.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from soak import Soak, sizes  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize(
    ("name", "seed", "n"),
    [("transformer", 3, 40), ("convolutions", 7, 15), ("convolutions", 1, 25), ("recurrent", 11, 15)],
)
def test_edits_upon_edits_and_back(name: str, seed: int, n: int) -> None:
    soak = Soak(name, torch.Generator().manual_seed(seed))
    for _ in range(n):
        soak.act()
    while soak.standing:
        soak.take_back()
    assert soak.wrong == []
    assert soak.counts["edits"] > 3
    assert sizes(soak.model) == soak.told


def test_a_wrong_edit_is_seen() -> None:
    """What is compared can differ: the soak sees a weight that was moved behind its back."""
    soak = Soak("recurrent", torch.Generator().manual_seed(0))
    expected = soak.outputs(soak.model)
    with torch.no_grad():
        soak.model.head.bias[0] += 1e-4
    soak.compare("nothing", soak.model, expected)
    assert len(soak.wrong) == 1
