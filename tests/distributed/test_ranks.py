"""Two processes train one network: the first decides, both end up with the same weights, gradients are averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weightfold.errors import ConfigError, EditError
from weightfold.ledger import Ledger
from weightfold.ranks import Ranks, compiled, rewrapped, uncompiled, unwrapped

from .conftest import Pair

NAMES = (
    "widths_given", "dialled", "refused", "unfolded", "first_rank_fails", "each_for_itself", "at_once", "compiled",
    "sharded", "resumed",
)  # fmt: skip
DATA_PARALLEL = ("widths_given", "dialled", "refused", "unfolded")


@pytest.fixture(scope="module")
def folder(pair: Pair) -> Path:
    """Two processes go through all cases, one after the other."""
    return pair("workers.py", NAMES)


@pytest.fixture
def both(folder: Path) -> Any:
    return lambda name: [torch.load(folder / name / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_both_ranks_end_bit_for_bit_alike(both: Any, name: str) -> None:
    first, second = both(name)
    assert first["losses"] != second["losses"], "each rank trains on its own batches"
    assert first["fingerprint"] == second["fingerprint"]
    assert first["events"] == second["events"]
    assert first["frozen"] == second["frozen"]
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for key, value in first["optimizer"].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"][key])), key


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_after_an_event_gradients_are_averaged(both: Any, name: str) -> None:
    """Reference: one process that goes on from the event on the batches of both ranks, joined."""
    for result in both(name):
        assert result["off"] < 1e-5


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_the_network_is_wrapped_anew_and_the_wrapper_of_before_refuses(both: Any, name: str) -> None:
    for result in both(name):
        assert result["fresh"]
        assert result["same_settings"]
        assert "from before an event" in result["stale"]


@pytest.mark.parametrize("name", [*DATA_PARALLEL, "at_once", "compiled"])
def test_only_the_first_rank_keeps_a_ledger(folder: Path, name: str) -> None:
    assert [path.name for path in (folder / name).glob("*.ledger")] == ["0.ledger"]
    with Ledger.open(folder / name / "0.ledger", readonly=True) as ledger:
        ledger.verify()
        kinds = [entry.kind for entry in ledger.entries()]
    expected = {"refused": "rollback", "unfolded": "undo"}.get(name, "edit")
    assert expected in kinds


def test_given_widths(both: Any) -> None:
    for result in both("widths_given"):
        assert [(step, kept, good) for step, _, _, kept, good, _ in result["events"]] == [(10, 16, True)] * 2
        assert result["weights"]["2.weight"].shape == (16, 16)


def test_the_first_rank_may_decide_before_the_last_look(both: Any) -> None:
    for result in both("dialled"):
        assert result["done"]
        assert {step for step, *_ in result["events"]} < set(result["looks"][:-1])
        assert result["weights"]["0.weight"].shape[0] < 32


def test_a_refusal_on_the_first_rank_leaves_both_as_they_were(both: Any) -> None:
    for result in both("refused"):
        assert all(not event[4] for event in result["events"])
        assert all("the probe loss may rise" in reason for reason in result["reasons"])
        assert result["weights"]["2.weight"].shape == (32, 32)


def test_an_event_is_taken_back_on_both(both: Any) -> None:
    for result in both("unfolded"):
        kinds = [(kind, step) for step, _, kind, *_ in result["events"]]
        assert kinds == [("fold", 8), ("fold", 8), ("unfold", 12), ("unfold", 12)]
        assert result["weights"]["2.weight"].shape == (32, 32)
        assert result["frozen"] == ["0", "2"]


def test_an_error_on_the_first_rank_reaches_the_others(both: Any) -> None:
    first, second = both("first_rank_fails")
    assert first["error"] == "RuntimeError: out of luck"
    assert second["error"].startswith("EditError: The first rank failed: RuntimeError: out of luck")


def test_without_a_wrapper_every_process_decides_for_itself(both: Any) -> None:
    first, second = both("each_for_itself")
    assert {step for step, *_ in first["events"]} == {10}
    assert {step for step, *_ in second["events"]} == {20}
    assert first["fingerprint"] != second["fingerprint"]


def test_a_run_that_was_interrupted_while_an_event_was_watched(both: Any) -> None:
    first, second = both("resumed")
    assert first["watched"]
    assert first["again"] == first["whole"] == second["whole"] == second["again"]
    assert [event[2] for event in first["events"]] == ["fold", "fold", "unfold", "unfold"]


def test_folding_at_once_and_undoing_it(both: Any) -> None:
    first, second = both("at_once")
    for key in ("folded", "fingerprint", "undone"):
        assert first[key] == second[key]
    assert first["weights"]["2.weight"].shape == (16, 16)


def test_a_compiled_wrapper_is_compiled_again(both: Any) -> None:
    first, second = both("compiled")
    assert first["fresh"]
    assert second["fresh"]
    assert first["fingerprint"] == second["fingerprint"]
    assert [event[3:5] for event in first["events"]] == [(16, True)] * 2


def test_a_sharded_network_is_folded_in_the_middle_of_training(both: Any) -> None:
    """Reference: the same run in one process, not sharded."""
    for result in both("sharded"):
        assert "change_sharded" in result["refusal"]
        assert result["sharded"]
        assert result["moments"]
        assert result["losses"] == pytest.approx(result["expected"], abs=1e-5)
        assert result["local"][0] == (8, 6), "half of sixteen rows"
        assert (result["rates"], result["decays"]) == ([5e-3, 1e-2], [0.1, 0.0])
        for name, value in result["twin"].items():
            torch.testing.assert_close(result["weights"][name], value, rtol=0, atol=1e-5)


# without a second process ---------------------------------------------------------------------------------------------


def test_one_process_leads_itself() -> None:
    model = nn.Linear(2, 2)
    ranks = Ranks.of(model)
    assert ranks.leads
    assert ranks.shared(3) == 3
    assert rewrapped(model) is model
    with pytest.raises(EditError, match="no"):
        ranks.agreed(lambda: (_ for _ in ()).throw(EditError("no")), str, str)


def test_copies_of_low_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Module):
        mixed_precision = torch.bfloat16

    monkeypatch.setattr("weightfold.ranks.DistributedDataParallel", Wrapper)
    monkeypatch.setattr(Wrapper, "module", None, raising=False)
    with pytest.raises(ConfigError, match="low-precision") as caught:
        Ranks.of(Wrapper())
    assert "autocast" in str(caught.value.remedy)


def test_compiled_parts_are_noticed_wherever_they_are() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))

    whole, inside, part = make(), make(), make()
    inside.compile(backend="eager")
    part[1].compile(backend="eager")  # pyright: ignore
    wrapped: Any = torch.compile(whole, backend="eager")
    assert [compiled(m) for m in (make(), wrapped, inside, part)] == [False, True, True, True]
    assert unwrapped(wrapped) is whole
    with uncompiled(part):
        assert part(torch.zeros(1, 2)).shape == (1, 2)
