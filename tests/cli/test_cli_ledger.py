"""The verbs of `weightfold ledger`: what they say to people, to programs, and when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from weightfold.audit import read_history
from weightfold.cli.ledger.common import summary
from weightfold.ledger import Ledger

from .conftest import TINY, Result, Run

Finished = tuple[Path, Result]


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    return out


@pytest.fixture(scope="module")
def other(cli: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with another seed."""
    out = tmp_path_factory.mktemp("runs") / "other"
    cli("train", *TINY, "--seed", 4, "--out", out)
    return out


def refused(done: Result, *parts: str) -> None:
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.output
    for part in parts:
        assert part in done.stderr, done.stderr


def test_explain_tells_a_removed_channel_to_people(finished: Finished, cli: Run) -> None:
    out = finished[0]
    change = read_history(out).changes[0]
    channel = change.removed[0]
    done = cli("ledger", "explain", out, change.group, channel)
    assert done.exit_code == 0, done.output
    assert f"channel {channel} of {change.group}: removed by entry {change.seq}" in done.stdout
    for word in ("into", "why", "rejected", "price", "gain", "way back", "most like it", "90 % interval", "epoch 2"):
        assert word in done.stdout, done.stdout
    assert f"weightfold ledger undo {out} --seq {change.seq}" in done.stdout
    kept = cli("ledger", "explain", out, change.group, change.after[0]).stdout
    assert "kept, now channel 0 of 12" in kept


def test_explain_tells_programs(finished: Finished, cli: Run) -> None:
    change = read_history(finished[0]).changes[0]
    channel = change.removed[0]
    facts = json.loads(cli("ledger", "explain", finished[0], f"{change.group}.bias", channel, "--json").stdout)
    assert (facts["state"], facts["removed"]["hash"]) == ("removed", change.entry.hash)
    frozen = json.loads(cli("ledger", "explain", finished[0], "head", 0, "--json").stdout)
    assert frozen["state"] == "frozen"
    assert "No edit may touch head.weight[0]" in cli("ledger", "explain", finished[0], "head", 0).stdout


def test_explain_names_what_is_near(finished: Finished, cli: Run) -> None:
    refused(cli("ledger", "explain", finished[0], "bdy.0", 1), "knows no layer 'bdy.0'", "Did you mean 'body.0'?")
    refused(cli("ledger", "explain", finished[0], "body.0", 24), "no channel 24", "numbered 0 to 23")


def test_diff_is_like_diff(finished: Finished, other: Path, cli: Run) -> None:
    same = cli("ledger", "diff", finished[0], finished[0])
    assert (same.exit_code, "equal" in same.stdout) == (0, True)
    done = cli("ledger", "diff", finished[0], other)
    assert done.exit_code == 1
    assert "Error" not in done.output
    for word in ("config.seed", "initial_weights", "Jaccard", "body.0", "folded score", "Decision 1 is the first"):
        assert word in done.stdout, done.stdout
    facts = json.loads(cli("ledger", "diff", finished[0], other, "--json").stdout)
    assert ["config.seed", 3, 4] in facts["settings"]
    refused(cli("ledger", "diff", finished[0], finished[0] / "none"), "no ledger")


def test_timeline_draws_in_the_terminal_and_in_a_file(finished: Finished, cli: Run, tmp_path: Path) -> None:
    text = cli("ledger", "timeline", finished[0]).stdout
    assert "mlp on digits" in text
    assert "24 → 12" in text
    assert "▄" in text
    assert "folded loss" in text
    file = tmp_path / "run.svg"
    assert cli("ledger", "timeline", finished[0], "--out", file).exit_code == 0
    assert file.read_text().startswith("<svg xmlns=")
    refused(cli("ledger", "timeline", finished[0], "--out", file), "exists", "--force")
    assert json.loads(cli("ledger", "timeline", finished[0], "--json").stdout)["unit"] == "steps"


def test_replay_says_whether_it_is_the_same(finished: Finished, cli: Run, tmp_path: Path) -> None:
    done = cli("ledger", "replay", finished[0])
    assert done.exit_code == 0, done.output
    assert "same  structure, after 2 recorded edits applied to the original" in done.stdout
    out = tmp_path / "again"
    done = cli("ledger", "replay", finished[0], "--train", "--out", out)
    assert done.exit_code == 0, done.output
    assert "same  weights" in done.stdout
    assert cli("ledger", "verify", out).exit_code == 0
    facts = json.loads(cli("ledger", "replay", finished[0], "--train", "--json").stdout)
    assert facts["same_weights"]
    refused(cli("ledger", "replay", finished[0], "--threads", 2), "--threads means something with --train only")
    refused(cli("ledger", "replay", finished[0], "--train", "--out", out), "not empty")


def test_replay_of_another_structure_exits_with_1(copy: Path, cli: Run) -> None:
    shutil.copyfile(copy / "dense.safetensors", copy / "model.safetensors")
    done = cli("ledger", "replay", copy)
    assert done.exit_code == 1
    assert "other  structure" in done.stdout
    assert "First difference: Entry" in done.stdout


def test_undo_writes_a_file_or_replaces_the_model(copy: Path, cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "wide.safetensors"
    done = cli("ledger", "undo", copy, "--out", file)
    assert done.exit_code == 0, done.output
    assert "12 → 24, with what was trained since" in done.stdout
    assert cli("trace", file).exit_code == 0
    refused(cli("ledger", "undo", copy), "exists", "--out FILE, or --force")
    facts = json.loads(cli("ledger", "undo", copy, "--force", "--json").stdout)
    verified = json.loads(cli("ledger", "verify", copy, "--json").stdout)
    assert verified["head"] == facts["head"]
    assert "takes back entry 3" in cli("ledger", "show", copy, "--kind", "undo").stdout
    refused(cli("ledger", "undo", copy, "--seq", 3, "--force"), "Entry 3", "Edits that stand: 2.")


def test_entries_of_unknown_kinds_are_shown_by_every_verb(copy: Path, cli: Run) -> None:
    with Ledger.open(copy / "ledger.db") as ledger:
        ledger.append("plan", {"step": 3, "candidates": {"body.0": [24, 12]}, "price": 0.25, "table": [1, 2]})
        ledger.append("watch", {"step": 5, "groups": ["body.0"], "recovered": True})
        ledger.append("tie", {"places": [["a", 0]], "values": 12})
        ledger.append("edit", {"group": "added", "what": 7})
        ledger.append("rollback", {"step": 9, "group": "body.0"})
    text = cli("ledger", "show", copy).stdout
    for words in ("step 3: price 0.25", "step 5: recovered True", "values 12"):
        assert words in text, text
    for command in (("explain", copy, "body.0", 1), ("timeline", copy), ("replay", copy)):
        done = cli("ledger", *command)
        assert done.exit_code == 0, done.output
    assert "entry 8 of kind tie" in cli("ledger", "replay", copy).stdout
    assert cli("ledger", "diff", copy, copy).exit_code == 0
    assert cli("ledger", "diff", copy, copy / "ledger.db", "--json").exit_code == 0
    refused(cli("ledger", "show", copy, "--kind", "ties"), "Did you mean 'tie'?")


@pytest.mark.parametrize("kind", ["edit", "rollback", "refusal", "prepare", "run", "convert", "result", "undo", "new"])
def test_an_entry_of_any_shape_has_a_line(kind: str) -> None:
    for body in ({}, {"step": "?"}, {"what": None, "attempts": [], "arms": 3}, {"config": 1, "group": None}):
        facts = summary(kind, body)
        assert facts["predicted"] is None
        assert isinstance(facts["remark"], str)
    assert summary("new", {"digest": "a" * 64})["remark"] == "digest aaaaaaaaaaaa…"


def test_plans_looks_back_and_refusals_have_words_of_their_own() -> None:
    chosen = {"share": 0.5, "macs": 0.31, "predicted": 0.2}
    plan = summary("plan", {"step": 9, "candidates": [chosen, chosen], "chosen": chosen})
    assert plan["remark"] == "step 9: 50 % of the channels, 31 % of the MACs, of 2 candidates"
    assert plan["predicted"] == 0.2
    watch = {"step": 9, "groups": ["a", "b"], "before": 1.0, "after": 1.5, "recovered": False}
    assert summary("watch", watch)["remark"] == "step 9: the loss is still above where it was"
    assert (summary("watch", watch)["group"], summary("watch", watch)["measured"]) == ("2 groups", 0.5)
    refusal = {"step": 9, "why": "as the measured times allow"}
    assert summary("refusal", refusal, {"why": "it would not repay"})["remark"] == "step 9: it would not repay"


def test_explain_tells_the_plan_that_an_edit_carries_out(tmp_path: Path, cli: Run) -> None:
    chosen = {"share": 0.5, "macs": 0.3, "forecast_points": 0.25}
    plan = {"step": 4, "candidates": [chosen], "chosen": chosen, "trigger": "the kept set has settled", "why": "cheap"}
    edit = {"kind": "remove", "channels": 4, "carry": [0, 1]}
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        ledger.append("prepare", {"groups": [["fc1", "channels", 4, []]]})
        ledger.append("plan", plan)
        ledger.append("edit", {"step": 4, "what": {"group": "fc1", "edit": edit}})
    text = cli("ledger", "explain", tmp_path, "fc1", 3).stdout
    for words in (
        "entry 2, 50 % of the channels",
        "forecast cost 0.25 points",
        "1 candidates weighed",
        "settled",
        "cheap",
    ):
        assert words in text, text
    assert "without a replacement" in text
    assert "way back     none" in text


def test_foreign_text_is_not_read_as_colours(tmp_path: Path, cli: Run) -> None:
    with Ledger.create(tmp_path / "ledger.db", run={"config": {"model": "[red]x[/]"}}) as ledger:
        ledger.append("prepare", {"groups": [["a[/b]", "channels", 4, []]], "frozen": []})
        ledger.append("[/new]", {"step": 1, "group": "a[/b]", "text": "[/bold]"})
    for command in (("show",), ("timeline",), ("explain", "a[/b]", 1), ("verify",)):
        done = cli("ledger", command[0], tmp_path, *command[1:])
        assert done.exit_code == 0, done.output
    assert "[/bold]" in cli("ledger", "show", tmp_path).stdout
