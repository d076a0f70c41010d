"""What became of a channel, through several edits. The network's biases carry the original numbers: an own account."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.audit import explain, read_history
from weightfold.errors import ConfigError, LedgerError
from weightfold.graph import edit as edits
from weightfold.graph.group import ChannelGroup
from weightfold.ledger import Ledger

from .scripted import record

MAPS = torch.tensor(
    [[0.5, 0.0, 0.25, 0.0, 0.0], [0.0, -2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.1, 0.0]], dtype=torch.float64
)


def first_fold(group: ChannelGroup) -> edits.Edit:
    """8 -> 5: channels 2, 5 and 7 go; column k of the map belongs to the k-th of 0, 1, 3, 4, 6."""
    return edits.fold(group, torch.tensor([0, 1, 3, 4, 6]), {("2.weight", 1): MAPS})


def second_fold(group: ChannelGroup) -> edits.Edit:
    """5 -> 3: the second and the last of those that are left go, which are 1 and 6."""
    maps = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.75, 0.0]]).double()
    return edits.fold(group, torch.tensor([0, 2, 3]), {("2.weight", 1): maps})


WHY = {
    "metric": "error",
    "value": 0.125,
    "threshold": 0.2,
    "dropped": [
        {"channel": 5, "cost": 0.01, "partner": 1, "correlation": -0.9, "coefficient": -1.5},
        {"channel": 2, "cost": 0.02, "partner": 0, "correlation": 0.8, "coefficient": 0.6},
        {"channel": 7, "cost": 0.05, "partner": 4, "correlation": 0.3, "coefficient": 0.1},
    ],
    "rejected": [{"choice": "magnitude", "value": 0.4, "reason": "larger predicted error"}],
}
WHY_2 = {"dropped": [{"channel": 1, "partner": 3, "correlation": 0.7, "coefficient": 0.5}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two-folds")
    record(path, {3: (first_fold, WHY), 6: (second_fold, WHY_2)}, 10)
    return path


def told(folder: Path, channel: int, layer: str = "0") -> dict:
    history = read_history(folder)
    with Ledger.open(folder / "ledger.db", readonly=True) as ledger:
        facts = explain(history, layer, channel, ledger.get_blob)
    return json.loads(json.dumps(facts, allow_nan=False))


def test_a_removed_channel_is_told_with_its_place_reason_partners_and_way_back(folder: Path) -> None:
    facts = told(folder, 5)
    assert facts["state"] == "removed"
    assert facts["place_now"] is None
    gone = facts["removed"]
    history = read_history(folder)
    change = history.changes[0]
    assert (gone["seq"], gone["hash"], gone["step"], gone["epoch"]) == (change.seq, change.entry.hash, 3, 1)
    assert (gone["rank"], gone["of"], gone["cost"]) == (1, 3, 0.01)
    assert gone["partner"] == {"channel": 1, "correlation": -0.9, "coefficient": -1.5}
    assert gone["why"] == {"metric": "error", "value": 0.125, "threshold": 0.2}
    assert gone["rejected"] == WHY["rejected"]
    assert gone["price"]["predicted"] == 0.5
    assert gone["undo"] == change.body["proof"]["undo"]
    assert gone["gain"]["parameters"] == {"before": 8 * 4 + 8 + 2 * 8 + 2, "after": 5 * 4 + 5 + 2 * 5 + 2}


def test_coefficients_come_from_the_stored_map_the_largest_first_in_original_numbers(folder: Path) -> None:
    (reader,) = told(folder, 5)["removed"]["coefficients"]
    assert reader["reader"] == "2.weight[1]"
    assert [(p["channel"], p["coefficient"]) for p in reader["partners"]] == [(1, -2.0), (6, 1.0)]
    (reader,) = told(folder, 7)["removed"]["coefficients"]
    assert [(p["channel"], p["coefficient"]) for p in reader["partners"]] == [(4, 0.1)]


def test_a_channel_is_followed_into_a_partner_that_was_removed_later(folder: Path) -> None:
    way = told(folder, 5)["way"]
    assert [(hop["from"], hop["into"], hop["step"]) for hop in way] == [(5, 1, 3), (1, 4, 6)]


def test_a_later_edit_counts_in_original_numbers_too(folder: Path) -> None:
    facts = told(folder, 6)
    assert facts["removed"]["step"] == 6
    assert [event["channel"] for event in facts["events"]] == ["kept", "removed"]
    (reader,) = facts["removed"]["coefficients"]
    assert [(p["channel"], p["coefficient"]) for p in reader["partners"]] == [(3, 0.75)]
    assert facts["removed"]["partner"] is None, "its entry names none"
    assert facts["removed"]["epoch"] == 2


def test_a_kept_channel_tells_who_was_folded_into_it(folder: Path) -> None:
    facts = told(folder, 4)
    assert (facts["state"], facts["place_now"], facts["channels_now"]) == ("kept", 2, 3)
    taken = [(item["channel"], item["nearest"], item["coefficient"], item["step"]) for item in facts["takes"]]
    assert taken == [(7, True, 0.1, 3), (1, True, 0.5, 6)]
    assert [item["correlation"] for item in facts["takes"]] == [0.3, 0.7]
    assert [item["channel"] for item in told(folder, 1)["takes"]] == [5], "before it went itself"
    assert [(item["channel"], item["nearest"]) for item in told(folder, 6)["takes"]] == [(5, False)]


def test_survivors_are_the_rows_that_the_network_holds(tmp_path: Path) -> None:
    net = record(tmp_path, {3: first_fold, 6: second_fold}, 10)
    assert list(read_history(tmp_path).survivors("0")) == net[0].bias.tolist() == [0, 3, 4]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_numbers_stay_true_through_any_edits(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def make(kind: str, seed: int) -> object:
        def build(group: ChannelGroup) -> edits.Edit:
            n, generator = group.n_channels, torch.Generator().manual_seed(seed)
            order = torch.randperm(n, generator=generator)
            if kind == "permute":
                return edits.permute(group, order)
            if kind == "split":
                return edits.split(group, torch.where(order == 0, 2, 1))
            return edits.remove(group, order[: max(1, n - 1 - seed % 3)])

        return build

    kinds = st.sampled_from(["permute", "remove", "split"])
    plan = data.draw(st.lists(st.tuples(kinds, st.integers(0, 99)), min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("any")
    net = record(path, {at: make(*item) for at, item in enumerate(plan, 1)}, len(plan))
    history = read_history(path)
    found = [int(value) for value in net[0].bias.tolist()]
    assert list(history.survivors("0")) == found
    for channel in range(8):
        facts = told(path, channel)
        assert facts["state"] == ("kept" if channel in found else "removed")
        assert facts["place_now"] == (found.index(channel) if channel in found else None)


@pytest.mark.parametrize("layer", ["0", "0.weight", "0.bias", "0.weight[0]", "2.weight[1]"])
def test_every_name_of_a_group_means_the_same(folder: Path, layer: str) -> None:
    facts = told(folder, 5, layer)
    assert facts["group"] == "0"
    assert facts["numbering"] == "0.weight[0]"
    assert facts["removed"]["step"] == 3


def test_a_frozen_layer_says_why(folder: Path) -> None:
    facts = told(folder, 1, "2")
    assert facts["state"] == "frozen"
    assert facts["reason"] == "reaches the model's output"
    with pytest.raises(ConfigError, match="its 2 channels are numbered 0 to 1"):
        told(folder, 2, "2")


def test_unknown_layers_and_channels_are_refused_with_what_is_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"knows no layer '22'") as error:
        told(folder, 0, "22")
    assert "Did you mean '2'" in str(error.value)
    for channel in (8, -1):
        with pytest.raises(ConfigError, match=rf"no channel {channel}: its 8 channels are numbered 0 to 7"):
            told(folder, channel)


def test_a_ledger_without_groups_says_so(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger.db", run={}).close()
    with pytest.raises(ConfigError, match="knows no layer") as error:
        told(tmp_path, 0)
    assert "not prepared" in str(error.value)


def test_an_edit_that_was_undone_no_longer_removes(tmp_path: Path) -> None:
    record(tmp_path, {3: first_fold, 6: second_fold}, 10)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.append("undo", {"group": "0"})
    facts = told(tmp_path, 6)
    assert (facts["state"], facts["removed"], facts["place_now"]) == ("kept", None, 4)
    assert [event["undone_by"] for event in facts["events"]] == [None, 5]
    assert told(tmp_path, 5)["state"] == "removed"
    assert [hop["into"] for hop in told(tmp_path, 5)["way"]] == [1]


@pytest.mark.parametrize("body", [{"undoes": [2, 3]}, {"undoes": [3, 2]}, {"groups": ["0"]}, {"group": "0"}, {}])
def test_what_an_undo_takes_back(tmp_path: Path, body: dict) -> None:
    record(tmp_path, {3: first_fold, 6: second_fold}, 10)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.append("undo", body)
    standing = [change.seq for change in read_history(tmp_path).standing]
    assert standing == ([] if "undoes" in body else [2])


def test_entries_of_unknown_kinds_and_broken_edits_do_no_harm(tmp_path: Path) -> None:
    record(tmp_path, {3: first_fold}, 10)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.append("tie", {"step": 9, "places": [["a", 0], ["b", 1]], "group": "0"})
        ledger.append("edit", {"group": "added"})
        ledger.append("edit", {"what": {"edit": {"carry": "?"}}})
        ledger.append("plan", {"step": 1, "candidates": {"0": [8, 4]}})
    assert told(tmp_path, 5)["state"] == "removed"
    assert read_history(tmp_path).widths() == {"0": 5}


def test_a_map_that_is_gone_is_named(tmp_path: Path, folder: Path) -> None:
    history = read_history(folder)

    def lost(digest: str) -> bytes:
        raise LedgerError(f"no blob {digest}")

    with pytest.raises(LedgerError, match="no blob"):
        explain(history, "0", 5, lost)
    with pytest.raises(LedgerError, match="maps of entry 2"):
        explain(history, "0", 5, lambda _: b"nothing")
    assert explain(history, "0", 5)["removed"]["coefficients"] == []
