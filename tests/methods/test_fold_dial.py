"""One dial: when `Fold` looks, what it weighs, what it refuses and why, and what it leaves in the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
from weightfold.compressor import Compressor
from weightfold.errors import ConfigError
from weightfold.forecast import accuracy_price, knows_its_task, ripeness
from weightfold.latency import Latency, StepTime
from weightfold.ledger import Ledger
from weightfold.methods.fold import Fold
from weightfold.plan import Candidate, for_time, within_loss
from weightfold.price import trails

STEPS = 60
TABLE = {"0.5": 0.6, "0.1": 0.3}


def net(width: int = 64) -> nn.Module:
    """Four units would do: the classes are quadrants of the first two inputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def data(n: int, size: int = 64, seed: int = 0, noise: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        x = torch.randn(size, 6, generator=g)
        y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        wrong = torch.rand(size, generator=g) < noise
        out.append((x, torch.where(wrong, torch.randint(0, 4, (size,), generator=g), y)))
    return out


def run(path: Path | None, *, noise: float = 0.0, steps: int = STEPS, max_increase: float = 1.0, **dial: Any) -> Any:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ledger = None if path is None else Ledger.create(path, run={})
    probe = data(6, seed=9, noise=noise)
    compressor = Compressor(
        model, torch.zeros(2, 6), [Fold(**{"latency": TABLE, **dial})], loss=F.cross_entropy, probe=probe,
        ledger=ledger, total_steps=steps, max_increase=max_increase,
    )  # fmt: skip
    compressor.prepare(optimizer)
    for x, y in data(steps, noise=noise):
        F.cross_entropy(compressor.network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    compressor.convert()
    return model, compressor, ledger


def test_an_over_wide_network_folds_within_the_dial(tmp_path: Path) -> None:
    model, compressor, ledger = run(tmp_path / "a.db", max_accuracy_loss=3.0)
    kinds = [entry.kind for entry in ledger.entries()]
    [plan] = [entry for entry in ledger.entries() if entry.kind == "plan"]
    accepted = [event for event in compressor.events if event.accepted]
    assert len(accepted) == 2
    assert model[0].out_features < 64
    assert model[0].out_features == plan.body["chosen"]["widths"]["0"]
    assert plan.body["chosen"]["forecast_points"] <= 3.0
    assert plan.body["candidates"]
    assert plan.aside["ratio"] < 1
    assert "watch" in kinds
    assert kinds.index("plan") < kinds.index("edit")
    assert {event.measured for event in accepted} == {accepted[0].measured}, "measured together"


def test_a_network_that_is_not_over_wide_is_left_alone_and_told(tmp_path: Path) -> None:
    model, compressor, ledger = run(tmp_path / "a.db", max_accuracy_loss=0.0, noise=0.5)
    [refusal] = [entry for entry in ledger.entries() if entry.kind == "refusal"]
    assert model[0].out_features == 64
    assert not [event for event in compressor.events if event.accepted]
    assert "not over-wide" in refusal.body["why"]
    assert "would cost about" in refusal.body["why"]
    assert refusal.body["candidates"][0]["forecast_points"] > 0


def test_a_time_goal_takes_the_widest_that_meets_it(tmp_path: Path) -> None:
    _, compressor, ledger = run(tmp_path / "a.db", time_goal=0.3)
    [plan] = [entry.body for entry in ledger.entries() if entry.kind == "plan"]
    fold = compressor.methods[0]
    assert plan["reached"]
    done = plan["step"] / STEPS
    assert done + (1 - done) * fold.decision.ratio <= 0.7 + 0.01


def test_an_event_that_would_not_repay_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Latency((StepTime({}, 5000.0, 1e-9), StepTime({}, 10.0, 1e-10)))
    monkeypatch.setattr("weightfold.planner.measure", lambda *_: quick)
    model, _, ledger = run(tmp_path / "a.db", max_accuracy_loss=50.0, latency=None)
    [refusal] = [entry.body for entry in ledger.entries() if entry.kind == "refusal"]
    assert "not repay" in refusal["why"]
    assert model[0].out_features == 64


def test_the_same_seed_leaves_the_same_head(tmp_path: Path) -> None:
    heads = [run(tmp_path / name, max_accuracy_loss=3.0)[2].head for name in ("a.db", "b.db")]
    assert heads[0] == heads[1]


def test_it_looks_from_the_earliest_step_to_the_latest() -> None:
    fold = Fold(max_accuracy_loss=0.2, earliest=0.03, latest=0.1, stats_batches=16)
    assert fold.looks(1000) == [40, 60, 80, 100]
    assert fold.event(1000) == 100
    assert [step for step in range(1000) if fold.acts(step, 1000)] == [40, 60, 80, 100]
    assert fold.observes(32, 1000)
    assert not fold.observes(31, 1000)
    assert not fold.observes(100, 1000)
    assert Fold(time_goal=0.9).event(1000) == 50, "half of what the goal leaves"


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of 'max_accuracy_loss' and 'time_goal'"):
        Fold(max_accuracy_loss=0.1, time_goal=0.3)
    with pytest.raises(ConfigError, match="'earliest' after 'latest'"):
        Fold(max_accuracy_loss=0.1, earliest=0.5)


def test_a_dial_needs_a_probe() -> None:
    model = net()
    compressor = Compressor(model, torch.zeros(2, 6), [Fold(time_goal=0.3)], total_steps=10)
    with pytest.raises(ConfigError, match="'time_goal' needs a probe") as caught:
        compressor.prepare()
    assert caught.value.remedy


def test_regression_has_no_accuracy_and_the_run_goes_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 1))
    g = torch.Generator().manual_seed(0)
    probe = [(torch.randn(64, 3, generator=g), torch.randn(64, 1, generator=g)) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ledger = Ledger.create(tmp_path / "a.db", run={})
    compressor = Compressor(
        model, torch.zeros(1, 3), [Fold(max_accuracy_loss=0.5)], loss=F.mse_loss, probe=probe, ledger=ledger,
        total_steps=20,
    )  # fmt: skip
    compressor.prepare(optimizer)
    for _ in range(20):
        F.mse_loss(model(probe[0][0]), probe[0][1]).backward()
        optimizer.step()
        compressor.step()
    [refusal] = [entry.body for entry in ledger.entries() if entry.kind == "refusal"]
    assert "needs class numbers" in refusal["why"]
    assert model[0].out_features == 32


# the choice itself ----------------------------------------------------------------------------------------------------


def options() -> list[Candidate]:
    return [
        Candidate(share, {}, share**2, None, 0.0, price)
        for share, price in ((0.75, 0.05), (0.5, 0.15), (0.375, 0.3), (0.25, 0.8), (0.125, 2.0))
    ]


@pytest.mark.parametrize(("most", "share"), [(0.04, None), (0.05, 0.75), (0.2, 0.5), (0.5, 0.375), (5.0, 0.125)])
def test_bisection_finds_the_narrowest_within_the_loss(most: float, share: float | None) -> None:
    asked: list[float] = []

    def priced(c: Candidate) -> Candidate:
        asked.append(c.share)
        return c

    chosen = within_loss(options(), priced, most).chosen
    assert (None if chosen is None else chosen.share) == share
    assert len(asked) <= 4


def test_a_goal_out_of_reach_takes_the_narrowest_and_says_so() -> None:
    table = Latency((StepTime({}, 1.0, 1.0), StepTime({}, 0.01, 0.5)))
    steps = options()
    decision = for_time(steps, [c.macs for c in steps], lambda c: c, table, done=0.1, goal=0.6)
    assert not decision.reached
    assert decision.chosen is steps[-1]
    assert "less than 60%" in decision.reason


def test_the_forecast_grows_with_the_error_and_the_lost_energy() -> None:
    assert accuracy_price(0.0, 0.5, 0.1) == 0.0
    assert accuracy_price(20.0, 0.01, 0.1) < accuracy_price(40.0, 0.01, 0.1) < accuracy_price(40.0, 0.05, 0.1)


def test_a_network_trained_before_is_as_ripe_as_one_at_a_tenth_of_its_run() -> None:
    assert ripeness(0.04, trained_before=False) == 0.04
    assert ripeness(0.04, trained_before=True) == 0.1
    assert ripeness(0.3, trained_before=True) == 0.3


def test_a_network_that_answers_well_before_its_first_step_knows_its_task(tmp_path: Path) -> None:
    model, _, _ = run(None, max_accuracy_loss=0.0, noise=0.5)
    again, fresh = Fold(max_accuracy_loss=1.0), Fold(max_accuracy_loss=1.0)
    for method, network in ((again, model), (fresh, net())):
        compressor = Compressor(
            network, torch.zeros(2, 6), [method], loss=F.cross_entropy, probe=data(6, seed=9), total_steps=10
        )
        compressor.prepare()
    assert again.state_dict()["trained_before"]
    assert not fresh.state_dict()["trained_before"]
    assert not knows_its_task(None, 50.0), "no classes, no answer"


def test_the_plan_says_whether_the_network_was_trained_before(tmp_path: Path) -> None:
    _, compressor, ledger = run(tmp_path / "a.db", max_accuracy_loss=50.0)
    [plan] = [entry.body for entry in ledger.entries() if entry.kind == "plan"]
    assert plan["trained_before"] is False
    again = Fold(max_accuracy_loss=50.0)
    again.load_state_dict({**compressor.methods[0].state_dict(), "trained_before": True})
    assert again.state_dict()["trained_before"] is True


def test_a_step_that_is_hardly_quicker_is_not_worth_an_event(tmp_path: Path) -> None:
    model, _, ledger = run(tmp_path / "a.db", max_accuracy_loss=50.0, latency={"0.5": 0.97, "0.01": 0.95})
    [refusal] = [entry.body for entry in ledger.entries() if entry.kind == "refusal"]
    assert "less than 10% quicker" in refusal["why"]
    assert model[0].out_features == 64


def test_a_kept_set_that_has_settled_is_acted_on_before_the_latest_step(tmp_path: Path) -> None:
    _, _, ledger = run(tmp_path / "a.db", steps=200, max_accuracy_loss=50.0, earliest=0.1, latest=0.9)
    [plan] = [entry.body for entry in ledger.entries() if entry.kind == "plan"]
    assert plan["trigger"] == "the kept set has settled"
    assert plan["step"] < 180


def test_the_plan_is_what_is_done(tmp_path: Path) -> None:
    model, _, ledger = run(tmp_path / "a.db", max_accuracy_loss=50.0)
    [plan] = [entry.body for entry in ledger.entries() if entry.kind == "plan"]
    assert {"0": model[0].out_features, "2": model[2].out_features} == plan["chosen"]["widths"]


def test_what_cannot_be_priced_is_a_refusal_not_a_crash(tmp_path: Path) -> None:
    class Sam(torch.optim.SGD):
        def __init__(self, params: Any, rho: float) -> None:
            super().__init__(params, lr=0.01)

    model = net()
    optimizer = Sam(model.parameters(), 0.1)
    ledger = Ledger.create(tmp_path / "a.db", run={})
    compressor = Compressor(
        model, torch.zeros(2, 6), [Fold(max_accuracy_loss=50.0)], loss=F.cross_entropy, probe=data(6, seed=9),
        ledger=ledger, total_steps=STEPS,
    )  # fmt: skip
    compressor.prepare(optimizer)
    for x, y in data(STEPS):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        compressor.step()
    [refusal] = [entry.body for entry in ledger.entries() if entry.kind == "refusal"]
    assert "could not be timed" in refusal["why"]
    assert "latency=" in refusal["why"]
    assert model[0].out_features == 64


def test_a_second_event_waits_for_the_first_to_prove_itself(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ledger = Ledger.create(tmp_path / "a.db", run={})
    methods = [Fold(max_accuracy_loss=50.0, latency=TABLE), Fold(keep=0.5, at=0.1)]
    compressor = Compressor(
        model, torch.zeros(2, 6), methods, loss=F.cross_entropy, probe=data(6, seed=9), ledger=ledger,
        total_steps=STEPS, max_increase=10.0,
    )  # fmt: skip
    compressor.prepare(optimizer)
    for x, y in data(STEPS):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    kinds = [entry.kind for entry in ledger.entries()]
    assert kinds.index("watch") > kinds.index("edit")
    assert kinds[kinds.index("watch") + 1] in ("edit", "undo"), "settled before the second event, not after"


def test_pricing_does_not_touch_optimisers_in_the_backward_pass() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.data.add_(1.0))
    graph = wf.trace(model, torch.zeros(2, 6))
    trails(model, list(graph), data(2), F.cross_entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_reason_names_the_price_of_what_was_chosen(tmp_path: Path) -> None:
    _, _, ledger = run(tmp_path / "a.db", max_accuracy_loss=50.0, allocation="knapsack")
    [plan] = [entry.body for entry in ledger.entries() if entry.kind == "plan"]
    assert plan["chosen"] != plan["candidates"][0], "the bed must choose something narrower than the mildest"
    assert f"forecast price of {plan['chosen']['forecast_points']:.2g} points" in plan["why"]
