"""Promise B: original and ledger give the same structure anywhere, or the first difference; edits can be taken back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weightfold.artifact import read_structure
from weightfold.audit import History, read_history
from weightfold.audit.compare import compare
from weightfold.audit.folder import verify_folder
from weightfold.compressor import Compressor
from weightfold.errors import ArtifactError, ConfigError, EditError, LedgerError
from weightfold.export import load
from weightfold.fingerprint import fingerprint
from weightfold.graph import edit as edits
from weightfold.graph.trace import trace
from weightfold.ledger import Ledger
from weightfold.replay import Replay, rebuild, stored_tensors, take_back
from weightfold.report import write_report
from weightfold.training import TrainConfig, resume, train
from weightfold.training.again import rebuild_run, train_again, undo_run
from weightfold.training.oneshot import OneShotConfig, fold_trained

from .audit.scripted import EXAMPLE, Scripted, network, record
from .training.conftest import TINY

CONV = {**TINY, "model": "vgg-small", "overrides": {"width": 4}, "epochs": 2, "limit": 200}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    train(TrainConfig(**TINY), out)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def folded(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-shot fold of a network that was folded in training before."""
    out = tmp_path_factory.mktemp("runs") / "folded"
    fold_trained(OneShotConfig(model=str(trained), data="digits", keep=0.5, samples=256), out)
    return out


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# structure ------------------------------------------------------------------------------------------------------------


def test_the_structure_of_a_training_run_follows_from_original_and_ledger(trained: Path) -> None:
    facts = rebuild_run(trained)
    assert facts == {
        "edits": 2, "undone": 0, "same_structure": True, "same_weights": None, "same_start": True,
        "first_difference": None, "unknown": [],
    }  # fmt: skip


def test_a_network_that_was_folded_at_once_is_replayed_to_the_bit(folded: Path) -> None:
    facts = rebuild_run(folded)
    assert (facts["same_structure"], facts["same_weights"], facts["same_start"]) == (True, True, True)


def halve(group: Any) -> edits.Edit:
    return edits.remove(group, torch.arange(0, group.n_channels, 2))


def rebuilt(folder: Path, model: nn.Module) -> Any:
    with Ledger.open(folder / "ledger.db", readonly=True) as ledger:
        return rebuild(model, EXAMPLE, read_history(folder), ledger.get_blob, weights=True)


def test_the_first_difference_is_named_with_its_entry(tmp_path: Path) -> None:
    record(tmp_path, {3: halve, 6: halve}, 8)
    assert rebuilt(tmp_path, network()).difference is None
    other = rebuilt(tmp_path, network(channels=9)).difference
    assert (other.seq, other.what, other.recorded, other.found) == (1, "the group '0'", 8, 9)
    deeper = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = rebuilt(tmp_path, deeper).difference
    assert (found.seq, found.what) == (2, "the number of parameters")
    assert str(found).startswith("Entry 2: the number of parameters is 35 now")
    weights = rebuilt(tmp_path, network(seed=5)).difference
    assert weights.seq == 2
    assert "digest of the weights" in weights.what


def test_an_edit_that_does_not_fit_is_the_first_difference(tmp_path: Path) -> None:
    record(tmp_path / "a", {3: halve}, 4) if (tmp_path / "a").mkdir() is None else None
    with Ledger.open(tmp_path / "a" / "ledger.db", readonly=True) as ledger:
        bodies = [(entry.kind, json.loads(json.dumps(entry.body))) for entry in ledger.entries()]
    bodies[2][1]["what"]["edit"]["channels"] = 7
    with Ledger.create(tmp_path / "ledger.db", run=bodies[0][1]) as ledger:
        for kind, body in bodies[1:]:
            ledger.append(kind, body)
    difference = rebuilt(tmp_path, network()).difference
    assert difference.seq == 2
    assert "7 channels" in difference.found


def test_a_saved_model_of_another_structure_is_noticed(trained: Path, folded: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    shutil.copyfile(folded / "model.safetensors", out / "model.safetensors")
    facts = rebuild_run(out)
    assert not facts["same_structure"]
    assert facts["first_difference"]["seq"] == read_history(trained).of_group("body.0")[0].seq
    assert "body.0.weight" in facts["first_difference"]["text"]


def test_entries_that_cannot_be_replayed_are_named(tmp_path: Path) -> None:
    record(tmp_path, {3: halve}, 4)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.append("tie", {"places": ["a", "b"]})
        ledger.append("watch", {"step": 4})
    assert rebuilt(tmp_path, network()).unknown == ((4, "tie"),)


# forced decisions -----------------------------------------------------------------------------------------------------


def test_the_same_settings_have_the_same_head(trained: Path, tmp_path: Path) -> None:
    """Promise A."""
    train(TrainConfig(**TINY), tmp_path / "again")
    facts = compare(trained, tmp_path / "again")
    assert facts["equal"]
    assert facts["parting"] is None


def test_forced_decisions_give_the_same_weights_on_the_same_machine(trained: Path, tmp_path: Path) -> None:
    facts = train_again(trained, tmp_path / "again")
    assert (facts["same_structure"], facts["same_weights"], facts["same_start"]) == (True, True, True)
    assert facts["first_difference"] is None
    verify_folder(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "run.json").read_text())["replays"] == facts["heads"][0]
    write_report(tmp_path / "again")


def test_forced_decisions_give_the_same_structure_with_other_threads(tmp_path: Path) -> None:
    train(TrainConfig(**CONV), tmp_path / "one")
    facts = train_again(tmp_path / "one", tmp_path / "two", threads=2)
    assert facts["threads"] == [1, 2]
    assert facts["same_structure"]
    assert facts["same_weights"] or "differs first at step" in facts["first_difference"]


def survivors(history: History) -> dict[str, tuple[int, ...]]:
    return {name: history.survivors(name) for name in history.groups}


def test_forced_decisions_hold_where_the_method_would_decide_otherwise(trained: Path, tmp_path: Path) -> None:
    """Other initial weights stand for whatever another machine does differently."""
    history = read_history(trained)
    other = TrainConfig(**{**TINY, "seed": 9, "dense": False})
    train(other, tmp_path / "free")
    with Ledger.open(trained / "ledger.db", readonly=True) as ledger:
        train(other, tmp_path / "forced", forced=Replay(history, ledger.get_blob))
    assert survivors(read_history(tmp_path / "free")) != survivors(history), "the test would show nothing"
    assert survivors(read_history(tmp_path / "forced")) == survivors(history)
    assert read_history(tmp_path / "forced").widths() == history.widths()


def test_a_run_with_an_edit_undone_afterwards_is_still_replayed(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    undo_run(out, force=True)
    facts = train_again(out, tmp_path / "again")
    assert (facts["same_structure"], facts["same_weights"]) == (True, True), "compared with the network as trained"


def test_the_first_step_that_differs_is_named(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    shutil.copytree(trained, out)
    facts = json.loads((out / "run.json").read_text())
    facts["config"]["lr"] = 0.04
    (out / "run.json").write_text(json.dumps(facts))
    found = train_again(out, tmp_path / "again")
    assert found["same_structure"]
    assert not found["same_weights"]
    assert "The loss differs first at step 2" in found["first_difference"]


def test_what_holds_no_decisions_is_refused(folded: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to force"):
        train_again(folded, tmp_path / "again")
    with pytest.raises(ConfigError, match="is the run that is replayed"):
        train_again(trained, trained, force=True)
    with pytest.raises(ArtifactError, match="holds no run"):
        rebuild_run(tmp_path)


def test_an_interrupted_replay_is_not_resumed_as_another_run(trained: Path, tmp_path: Path) -> None:
    train_again(trained, tmp_path / "again")
    path = tmp_path / "again" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))
    with pytest.raises(ConfigError, match="replays another one"):
        resume(tmp_path / "again")


def test_a_network_of_the_users_own_is_made_only_by_their_word(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "own"
    shutil.copytree(trained, out)
    facts = json.loads((out / "run.json").read_text())
    facts["config"]["model"] = "torch.nn:Identity"
    (out / "run.json").write_text(json.dumps(facts))
    for action in (rebuild_run, lambda folder: train_again(folder, tmp_path / "again")):
        with pytest.raises(ConfigError, match="code that is not run") as error:
            action(out)
        assert "--model torch.nn:Identity" in str(error.value)


def loop(folder: Path, methods: list[Any], script: dict[int, str], forced: Replay | None = None) -> nn.Module:
    """A training of 20 steps in which the user, or a look back, takes an edit back."""
    net = network(seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 2, (64,), generator=generator)
    loss = nn.CrossEntropyLoss()
    with Ledger.create(folder / "ledger.db", run={"total_steps": 20}) as ledger:
        probe = [] if forced else [(x, y), (x[:32], y[:32]), (x[32:], y[32:])]
        compressor = Compressor(
            net, EXAMPLE, methods, loss=loss, probe=probe, ledger=ledger, total_steps=20, max_increase=1e9
        )
        compressor.prepare(optimizer)
        for step in range(1, 21):
            loss(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if forced:
                forced.before_step(compressor, step)
            compressor.step()
            if forced:
                forced.after_step(compressor, step)
            if script.get(step) == "undo":
                compressor.undo()
        return compressor.convert()


def worst(group: Any) -> edits.Edit:
    """Keep the two channels with the largest biases alone: one step does not make up for that."""
    return edits.remove(group, torch.arange(6, 8))


@pytest.mark.parametrize(("watch", "script"), [(0, {12: "undo"}), (1, {})])
def test_what_was_taken_back_in_training_is_taken_back_again(watch: int, script: dict, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = loop(tmp_path / "a", [Scripted({5: worst}, watch), Scripted({15: halve})], script)
    history = read_history(tmp_path / "a")
    assert [change.undone is not None for change in history.changes] == [True, False], "the test would show nothing"
    with Ledger.open(tmp_path / "a" / "ledger.db", readonly=True) as ledger:
        forced = Replay(history, ledger.get_blob)
    second = loop(tmp_path / "b", [forced], {}, forced)
    assert fingerprint(second) == fingerprint(first)
    assert survivors(read_history(tmp_path / "b")) == survivors(history)


# undo -----------------------------------------------------------------------------------------------------------------


def test_an_edit_of_a_one_shot_is_taken_back_to_the_bit(folded: Path, tmp_path: Path) -> None:
    first = read_history(folded).changes[0].seq
    facts = undo_run(folded, seq=first, out=tmp_path / "wide.safetensors")
    assert facts["exact"]
    assert [item["seq"] for item in facts["undone"]] == [first + 1, first]
    assert states_equal(load(tmp_path / "wide.safetensors"), load(folded / "dense.safetensors"))
    verify_folder(folded)


def test_only_the_latest_edit_is_taken_back_by_default(folded: Path, tmp_path: Path) -> None:
    facts = undo_run(folded, out=tmp_path / "wide.safetensors")
    (item,) = facts["undone"]
    group, change = item["group"], read_history(folded).changes[-1]
    assert (item["seq"], group, item["exact"]) == (change.seq, change.group, True)
    module = load(tmp_path / "wide.safetensors").get_submodule(group)
    assert module.weight.shape[0] == len(change.original) == item["channels"][1]


def test_what_was_trained_since_stays_and_what_was_removed_returns(trained: Path, tmp_path: Path) -> None:
    facts = undo_run(trained, out=tmp_path / "wide.safetensors")
    assert not facts["exact"]
    change = read_history(trained).changes[-1]
    assert change.group == "body.0"
    wide, narrow = load(tmp_path / "wide.safetensors").body[0], load(trained).body[0]
    kept, removed = list(change.after), list(change.removed)
    with Ledger.open(trained / "ledger.db", readonly=True) as ledger:
        old = stored_tensors(change, ledger.get_blob)
    factor = narrow.weight.norm(dim=1) / wide.weight[kept].norm(dim=1)  # balanced in training, back at the old scale
    for name in ("weight", "bias"):
        now, then = getattr(wide, name), getattr(narrow, name)
        assert torch.allclose(now[kept] * (factor if name == "bias" else factor[:, None]), then, atol=1e-5)
        assert torch.equal(now[removed], old[f"body.0.{name}"][removed])


def test_a_model_in_place_is_recorded_and_the_folder_stays_whole(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    facts = undo_run(out, force=True)
    assert verify_folder(out)["head"] == facts["head"]
    with Ledger.open(out / "ledger.db", readonly=True) as ledger:
        entry = list(ledger.entries())[-1]
    assert (entry.kind, entry.body["undoes"], entry.hash) == ("undo", [3], facts["head"])
    assert entry.body["fingerprint"] == fingerprint(load(out))
    assert read_structure(out / "model.safetensors")[0].ledger_head == entry.hash
    last = read_history(out).changes[-1].group
    assert read_history(out).widths() == {"body.0": 12, "body.2": 12, last: 24}
    assert rebuild_run(out)["same_structure"]
    assert "Undone after the run: entry 3" in write_report(out).read_text()
    undo_run(out, force=True)
    verify_folder(out)
    assert read_history(out).widths() == {"body.0": 24, "body.2": 24}
    with pytest.raises(ConfigError, match="no edit that could be taken back"):
        undo_run(out, force=True)


def test_nothing_is_written_over_without_a_word(trained: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.suffix != ".db-shm"}
    with pytest.raises(ConfigError, match=r"model\.safetensors' exists"):
        undo_run(trained)
    with pytest.raises(ConfigError, match="belongs to the run"):
        undo_run(trained, out=trained / "dense.safetensors", force=True)
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        undo_run(trained, out=tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"Entry 1 .* is no edit that stands") as error:
        undo_run(trained, seq=1, out=tmp_path / "a.safetensors")
    assert "Edits that stand: 2, 3." in str(error.value)
    assert all((trained / name).read_bytes() == data for name, data in before.items())


def test_a_record_that_cannot_be_written_leaves_the_model_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)

    def fail(*_: Any, **__: Any) -> None:
        raise LedgerError("The disk is full.")

    monkeypatch.setattr(Ledger, "append", fail)
    with pytest.raises(LedgerError, match="full"):
        undo_run(out, force=True)
    monkeypatch.undo()
    verify_folder(out)
    assert {path.name for path in out.iterdir() if path.suffix == ".safetensors"} == {
        "model.safetensors", "dense.safetensors",
    }  # fmt: skip


def test_without_what_an_edit_replaced_there_is_no_way_back(tmp_path: Path) -> None:
    net = network()
    with Ledger.create(tmp_path / "ledger.db", run={}) as ledger:
        compressor = Compressor(net, EXAMPLE, [Scripted({1: halve})], ledger=ledger, total_steps=2, keep_undo=False)
        compressor.prepare()
        compressor.step()
        twin = network()
        made = rebuild(twin, EXAMPLE, read_history(tmp_path), ledger.get_blob)
        with pytest.raises(LedgerError, match="Entry 2 stored nothing to go back by"):
            take_back(net, made, ledger.get_blob)
        with pytest.raises(EditError, match="Entry 7 is no edit that stands"):
            take_back(net, made, ledger.get_blob, seq=7)


def test_a_network_taken_back_can_be_traced_and_computes_what_it_did(tmp_path: Path) -> None:
    net = record(tmp_path, {3: halve, 6: halve}, 8)
    x, original = torch.randn(16, 4), network()
    with Ledger.open(tmp_path / "ledger.db", readonly=True) as ledger:
        made = rebuild(network(), EXAMPLE, read_history(tmp_path), ledger.get_blob)
        done = take_back(net, made, ledger.get_blob, seq=2)
    assert [exact for _, exact in done] == [True, True]
    assert torch.equal(net(x), original(x))
    assert trace(net, EXAMPLE)["0"].n_channels == 8
