"""Model cards: the facts of a file beside it, as text and as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from weightfold.errors import ArtifactError
from weightfold.export import Source, export
from weightfold.export.card import make_card, run_facts, write_card


def test_a_card_says_what_the_file_is(shrunk: Callable[[str], Source], tmp_path: Path) -> None:
    source, path = shrunk("mlp"), tmp_path / "net.safetensors"
    exported = export(source, "safetensors", path)
    text, data = write_card(make_card(source, exported, license_name="MIT"), path)
    card = json.loads(data.read_text())
    assert card["file"]["bytes"] == path.stat().st_size
    assert card["file"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["source"]["ledger_head"] == source.ledger_head
    assert card["license"] == "MIT"
    fp32 = (
        4 * sum(t.numel() for t in source.fresh().state_dict().values())
        if source.fresh
        else 4 * (64 * 12 + 12 + 130 + 110)
    )
    assert card["sizes"]["original_fp32_bytes"] == fp32
    assert card["accuracy"]["measured"] is None
    words = text.read_text()
    assert source.ledger_head is not None
    for word in ("MIT", source.ledger_head, "Not measured", "Unknown"):
        assert word in words


def test_a_licence_is_never_guessed(shrunk: Callable[[str], Source], tmp_path: Path) -> None:
    source = shrunk("mlp")
    exported = export(source, "safetensors", tmp_path / "net.safetensors")
    assert make_card(source, exported)["license"] == "unspecified"


def test_scores_of_the_run_and_of_the_file_are_told_apart(shrunk: Callable[[str], Source], tmp_path: Path) -> None:
    run = {
        "kind": "train",
        "config": {"data": "digits", "method": "fold", "limit": None},
        "data": {"name": "digits", "fingerprint": "ab", "samples": {"train": 9}},
        "results": {
            "score": "accuracy",
            "arms": {"dense": {"score": 0.9, "parameters": 10}, "folded": {"score": 0.8, "parameters": 5}},
        },
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    source = replace(shrunk("mlp"), facts=run_facts(tmp_path))
    exported = export(source, "safetensors", tmp_path / "net.safetensors")
    measured = {"data": "digits", "split": "test", "samples": 3, "score": "accuracy", "module": 0.8, "file": 0.7}
    text, _ = write_card(make_card(source, exported, measured=measured), exported.path)
    words = text.read_text()
    for part in ("before: accuracy 0.9000", "after: accuracy 0.8000", "in its runtime: accuracy 0.7000 on 3 samples"):
        assert part in words


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    assert run_facts(tmp_path) == {}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"run\.json"):
        run_facts(tmp_path)
