"""The compressor: it alone changes the model, gates what it changes, records it, takes it back, and can be resumed."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from weightfold.compressor import Compressor
from weightfold.config import Config
from weightfold.errors import ConfigError, DataError, EditError
from weightfold.fingerprint import fingerprint
from weightfold.graph import edit as edits
from weightfold.ledger import Ledger
from weightfold.methods.base import Method, Moment, Proposal
from weightfold.methods.fold import Fold

STEPS = 12


class CutConfig(Config):
    """Settings of `Cut`."""

    group: str = "one"
    keep: int = 2
    at: tuple[int, ...] = (4,)
    noise: bool = False
    weight: float = 0.0


class Cut(Method):
    """Keeps the first channels of one group, whatever that costs; with `noise`, random ones."""

    name: ClassVar[str] = "cut"
    Config: ClassVar[type[Config]] = CutConfig

    def prepare(self, moment: Moment) -> None:
        self.model = moment.model
        self.count = 0

    def penalty(self) -> Tensor | None:
        if not self.config.weight:
            return None
        return self.config.weight * self.model.get_submodule(self.config.group).weight.square().sum()

    def step(self, moment: Moment) -> list[Proposal]:
        if moment.step not in self.config.at:
            return []
        self.count += 1
        n = moment.graph[self.config.group].n_channels
        order = torch.randperm(n, generator=moment.generator) if self.config.noise else torch.arange(n)
        return [self.proposal(moment, order, self.config.keep)]

    def proposal(self, moment: Moment, order: Tensor, width: int) -> Proposal:
        group = moment.graph[self.config.group]
        half = (group.n_channels + width + 1) // 2
        less = partial(self.proposal, moment, order, half) if half < group.n_channels else lambda: None
        return Proposal(edits.remove(group, order[:width]), {"metric": "none", "value": width}, 0.5, less)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


class Net(nn.Module):
    """``one`` has four live channels and four that are dead; ``two`` is all alive."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.norm(self.one(x)))))
        return self.head(self.drop(x.mean((2, 3))))


def net() -> Net:
    torch.manual_seed(7)
    model = Net()
    with torch.no_grad():
        model.two.weight[:, 4:] = 0
        model.two.weight.mul_(3)
        model.head.weight.mul_(4)
    return model


def data(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 6, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(n)
    ]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


EXAMPLE = torch.zeros(2, 3, 6, 6)


def prepared(model: nn.Module, *methods: Method, **settings: Any) -> Compressor:
    settings = {"loss": loss, "probe": data(4, seed=1), "total_steps": STEPS, "max_increase": 0.01} | settings
    compressor = Compressor(model, EXAMPLE, methods, **settings)
    compressor.prepare()
    return compressor


def train(
    compressor: Compressor,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    averaged: AveragedModel | None = None,
) -> None:
    for x, y in batches:
        value = loss(compressor.model(x), y) + compressor.penalty()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(compressor.model)
        compressor.step()


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser that changes nothing: what the gate sees is then known."""
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


def run(model: nn.Module, *methods: Method, n: int = 5, **settings: Any) -> Compressor:
    optimizer = still(model)
    settings = {"loss": loss, "probe": data(4, seed=1), "total_steps": STEPS, "max_increase": 0.01} | settings
    compressor = Compressor(model, EXAMPLE, methods, **settings)
    compressor.prepare(optimizer)
    train(compressor, optimizer, data(n))
    return compressor


# the gate -------------------------------------------------------------------------------------------------------------


def test_a_harmless_cut_is_kept() -> None:
    model = net()
    [event] = run(model, Cut(keep=4)).events
    assert (event.accepted, event.channels_before, event.channels_after, event.kind) == (True, 8, 4, "remove")
    assert (event.step, event.group, event.reason, event.predicted) == (4, "one", "accepted", 0.5)
    assert event.measured == pytest.approx(0.0, abs=1e-6)
    assert model.one.out_channels == model.two.in_channels == model.norm.num_features == 4


def test_a_check_sees_what_the_gate_lets_pass_and_has_the_last_word() -> None:
    seen: list[int] = []

    def at_least_five(model: nn.Module) -> str:
        seen.append(model.one.out_channels)
        return "" if seen[-1] >= 5 else "too narrow for this"

    model = net()
    [event] = run(model, Cut(keep=4), check=at_least_five).events
    assert (event.accepted, event.channels_after) == (True, 6)
    assert (seen, model.one.out_channels) == ([4, 6], 6)
    seen.clear()
    run(model := net(), Cut(keep=1), check=at_least_five)
    assert seen == [5], "the gate refuses one channel without asking"


@pytest.mark.parametrize("settings", [{}, {"probe": (), "loss": None}])
def test_what_a_check_refuses_is_as_it_was_and_its_time_counts(settings: dict[str, Any]) -> None:
    def never(_: nn.Module) -> str:
        time.sleep(0.05)
        return "never"

    model = net()
    compressor = run(model, Cut(keep=7), n=4, check=never, **settings)
    [event] = compressor.events
    assert (event.accepted, event.reason) == (False, "never")
    assert model.one.out_channels == 8
    assert torch.equal(model.one.weight, net().one.weight)
    assert compressor.seconds["gate"] >= 0.05


def test_a_check_that_fails_leaves_the_network_as_it_was() -> None:
    def fails(_: nn.Module) -> str:
        raise OSError("disk full")

    model = net()
    with pytest.raises(OSError, match="disk full"):
        run(model, Cut(keep=4), check=fails)
    assert model.one.out_channels == model.norm.num_features == 8


def test_a_harmful_cut_is_halved_until_it_fits(tmp_path: Path) -> None:
    model = net()
    with Ledger.create(tmp_path / "run.ledger", run={}) as ledger:
        compressor = run(model, Cut(keep=1), ledger=ledger)
        [body] = [e.body for e in ledger.entries() if e.kind == "edit"]
    [event] = compressor.events
    assert (event.accepted, event.channels_after) == (True, 5)
    assert model.one.out_channels == 5
    attempts = body["price"]["attempts"]
    assert [a["kept"] for a in attempts] == [1, 5]
    assert "probe loss" in attempts[0]["reason"]
    assert attempts[1]["reason"] == ""
    assert body["what"]["kept"] == [0, 1, 2, 3, 4]
    assert body["what"]["removed"] == [5, 6, 7]


def test_a_harmful_cut_is_rolled_back_bit_for_bit(tmp_path: Path) -> None:
    model, twin = net(), net()
    with Ledger.create(tmp_path / "run.ledger", run={}) as ledger:
        compressor = run(model, Cut(group="two", keep=1), ledger=ledger)
        kinds = [e.kind for e in ledger.entries()]
        [body] = [e.body for e in ledger.entries() if e.kind == "rollback"]
    run(twin)
    [event] = compressor.events
    assert (event.accepted, event.channels_after, event.channels_before) == (False, 6, 6)
    assert "probe loss may rise" in event.reason
    assert kinds == ["run", "prepare", "rollback"]
    assert [a["kept"] for a in body["attempts"]] == [1, 4, 5]
    assert fingerprint(model) == fingerprint(twin)
    assert model.two.out_channels == model.head.in_features == 6
    with pytest.raises(EditError, match="no edit to undo"):
        compressor.undo()


def test_without_a_probe_every_edit_is_kept_unmeasured() -> None:
    model = net()
    [event] = run(model, Cut(group="two", keep=1), probe=(), loss=None).events
    assert (event.accepted, event.channels_after, event.measured, event.interval) == (True, 1, None, None)


def test_an_edit_that_does_not_fit_is_refused_and_training_goes_on() -> None:
    class Blind(Cut):
        def proposal(self, moment: Moment, order: Tensor, width: int) -> Proposal:
            edit = edits.remove(moment.graph["one"], torch.arange(3))
            return Proposal(edits.renamed(edit, "two"))

    model = net()
    [event] = run(model, Blind()).events
    assert not event.accepted
    assert "does not fit group 'two'" in event.reason
    assert model.one.out_channels == 8


def test_a_method_that_raises_is_recorded(tmp_path: Path) -> None:
    class Broken(Cut):
        def step(self, moment: Moment) -> list[Proposal]:
            if moment.step == 2:
                raise DataError("nothing was seen")
            return []

    with Ledger.create(tmp_path / "run.ledger", run={}) as ledger:
        [event] = run(net(), Broken(), ledger=ledger).events
        assert [e.kind for e in ledger.entries()] == ["run", "prepare", "refusal"]
    assert (event.accepted, event.step, event.reason) == (False, 2, "nothing was seen")


# refused in prepare ---------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model.two.bias[3] = float("nan")
    with pytest.raises(EditError, match=r"two\.bias"):
        prepared(model, Cut())


def test_an_optimiser_of_another_model_is_refused() -> None:
    with pytest.raises(EditError, match="not in the model"):
        Compressor(net(), EXAMPLE, [Cut()]).prepare(still(net()))


@pytest.mark.parametrize(
    "probe",
    [[(torch.zeros(4, 5, 6, 6), torch.zeros(4).long())], [(torch.zeros(4, 3, 6, 6), torch.zeros(4).long() + 9)]],
)
def test_a_probe_that_does_not_fit_is_refused(probe: list[tuple[Tensor, Tensor]]) -> None:
    model = net()
    modes = [m.training for m in model.modules()]
    with pytest.raises(DataError, match="on the probe") as caught:
        prepared(model, Cut(), probe=probe)
    assert "probe=" in str(caught.value.remedy)
    assert modes == [m.training for m in model.modules()]


def test_a_probe_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        prepared(net(), Cut(), loss=lambda out, y: out.sum() * float("inf"))


def test_a_probe_without_a_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss"):
        Compressor(net(), EXAMPLE, [], probe=data(1))


def test_an_unprepared_compressor_says_so() -> None:
    with pytest.raises(ConfigError, match="not prepared"):
        _ = Compressor(net(), EXAMPLE, []).graph


# the model is left alone ----------------------------------------------------------------------------------------------


def test_probing_changes_neither_statistics_nor_random_numbers() -> None:
    """With and without a probe the same run comes out: dropout draws the same numbers, batch norms see the same."""
    with_probe, without = net(), net()
    for model, settings in ((with_probe, {}), (without, {"probe": (), "loss": None})):
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        compressor = Compressor(
            model, EXAMPLE, [Cut(keep=4)], **({"loss": loss, "probe": data(3, 1), "total_steps": STEPS} | settings)
        )
        compressor.max_increase = 1e9
        compressor.prepare(optimizer)
        train(compressor, optimizer, data(8))
        assert compressor.events[0].accepted
    assert fingerprint(with_probe) == fingerprint(without)


def test_the_penalty_is_added_up_and_has_a_gradient() -> None:
    model = net()
    compressor = prepared(model, Cut(weight=0.5), Cut(group="two", weight=2.0), Cut())
    value = compressor.penalty()
    expected = 0.5 * model.one.weight.double().square().sum() + 2 * model.two.weight.double().square().sum()
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    value.backward()
    torch.testing.assert_close(model.one.weight.grad, model.one.weight.detach())
    torch.testing.assert_close(model.two.weight.grad, 4 * model.two.weight.detach())
    assert float(prepared(net(), Cut()).penalty()) == 0.0
    (loss(model(data(1)[0][0]), data(1)[0][1]) + prepared(net(), Cut()).penalty()).backward()


def test_convert_leaves_nothing_of_ours() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    compressor = Compressor(model, EXAMPLE, [Fold(keep=0.5, at=0.5, stats_batches=3)], total_steps=STEPS)
    compressor.prepare(optimizer)
    train(compressor, optimizer, data(STEPS))
    assert any(e.accepted for e in compressor.events)
    result = compressor.convert()
    assert result is model
    for module in model.modules():
        assert type(module).__module__.startswith("torch.nn") or type(module) is Net
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            assert not getattr(module, hooks)
        for value in vars(module).values():
            assert not type(value).__module__.startswith("weightfold")
    assert all(type(p) is nn.Parameter for p in model.parameters())
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    copy.deepcopy(model)


def test_averaged_models_follow() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averaged = AveragedModel(model, use_buffers=True)
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    compressor = Compressor(model, EXAMPLE, [Cut(keep=4)], total_steps=STEPS)
    compressor.prepare(optimizer, [averaged, shadow])
    train(compressor, optimizer, data(8), averaged)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in averaged.module.state_dict().items()} == shapes
    assert {name: value.shape for name, value in shadow.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert averaged.module.one.out_channels == 4  # pyright: ignore
    averaged.eval()
    assert averaged(EXAMPLE).shape == (2, 4)


def test_undo_takes_the_last_edit_back() -> None:
    model = net()
    compressor = prepared(model, Cut(keep=4, at=(1,)))
    before = fingerprint(model)
    names = [(g.name, g.n_channels) for g in compressor.graph]
    compressor.step()
    assert model.one.out_channels == 4
    compressor.undo()
    assert fingerprint(model) == before
    assert model.one.out_channels == model.two.in_channels == 8
    assert [(g.name, g.n_channels) for g in compressor.graph] == names


# the record, and resuming ---------------------------------------------------------------------------------------------


def methods() -> list[Method]:
    return [Cut(keep=6, at=(3, 8), noise=True), Fold(keep=0.7, at=0.5, stats_batches=4, groups="two")]


def begin(path: Path, *, create: bool) -> tuple[Net, torch.optim.Optimizer, Compressor, Ledger]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ledger = Ledger.create(path, run={"seed": 1}) if create else Ledger.open(path)
    settings: dict[str, Any] = {"loss": loss, "probe": data(3, seed=1), "total_steps": STEPS, "max_increase": 5.0}
    return model, optimizer, Compressor(model, EXAMPLE, methods(), ledger=ledger, seed=1, **settings), ledger


def whole(path: Path) -> tuple[str, str, list[str]]:
    model, optimizer, compressor, ledger = begin(path, create=True)
    compressor.prepare(optimizer)
    torch.manual_seed(9)
    train(compressor, optimizer, data(STEPS))
    compressor.convert()
    with ledger:
        return ledger.head, fingerprint(model), [e.kind for e in ledger.entries()]


def test_the_same_run_twice_has_the_same_ledger_head(tmp_path: Path) -> None:
    first, second = whole(tmp_path / "a.ledger"), whole(tmp_path / "b.ledger")
    assert first == second
    assert first[2].count("edit") >= 3


@pytest.mark.parametrize("cut", [1, 3, 4, 6, 8, 11])
def test_a_resumed_run_ends_bit_for_bit_where_a_whole_one_does(tmp_path: Path, cut: int) -> None:
    expected = whole(tmp_path / "whole.ledger")
    path = tmp_path / "resumed.ledger"
    model, optimizer, compressor, ledger = begin(path, create=True)
    compressor.prepare(optimizer)
    torch.manual_seed(9)
    train(compressor, optimizer, data(STEPS)[:cut])
    stored = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "compressor": compressor.state_dict(),
            "rng": torch.get_rng_state(),
        },
        stored,
    )
    events = [(e.step, e.group, e.accepted) for e in compressor.events]
    ledger.close()
    stored.seek(0)
    state = torch.load(stored, weights_only=True)

    model, optimizer, compressor, ledger = begin(path, create=False)
    compressor.ledger = None
    compressor.prepare(optimizer)
    compressor.load_state_dict(state["compressor"])
    compressor.ledger = ledger
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    assert [(e.step, e.group, e.accepted) for e in compressor.events] == events
    train(compressor, optimizer, data(STEPS)[cut:])
    compressor.convert()
    with ledger:
        assert fingerprint(model) == expected[1]
        assert [e.kind for e in ledger.entries()] == expected[2]
        assert ledger.head == expected[0]


def test_a_checkpoint_of_another_structure_is_refused() -> None:
    compressor = prepared(net(), Cut(keep=4, at=(1,)))
    compressor.step()
    state = compressor.state_dict()
    other = Net()
    other.two, other.head = nn.Conv2d(8, 5, 3), nn.Linear(5, 4)
    with pytest.raises(EditError, match="has shape") as caught:
        prepared(other, Cut()).load_state_dict(state)
    assert caught.value.remedy
    with pytest.raises(EditError, match="edited already"):
        compressor.load_state_dict(state)


def test_recorded_edits_rebuild_the_structure_and_numbers_are_those_of_the_first_network(tmp_path: Path) -> None:
    model = net()
    with Ledger.create(tmp_path / "run.ledger", run={}) as ledger:
        run(model, Cut(keep=6, at=(2, 4), noise=True), probe=(), loss=None, ledger=ledger)
        bodies = [e.body for e in ledger.entries() if e.kind == "edit"]
        fresh = net()
        compressor = prepared(fresh)
        for body in bodies:
            edit = edits.Edit.from_record(body["what"]["edit"], ledger.get_blob)
            compressor._hands.obey([edit])
    assert len(bodies) == 2
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert torch.equal(fresh.one.weight, model.one.weight)
    gone = [set(body["what"]["removed"]) for body in bodies]
    assert not gone[0] & gone[1]
    left = sorted(set(range(8)) - gone[0] - gone[1])
    assert torch.equal(model.one.weight, net().one.weight[left])


def test_unfolding_by_hand_is_on_record(tmp_path: Path) -> None:
    with Ledger.create(tmp_path / "run.ledger", run={}) as ledger:
        compressor = run(net(), Cut(keep=4), ledger=ledger)
        compressor.unfold()
        last = list(ledger.entries())[-1]
    assert compressor.graph["one"].n_channels == 8
    assert (last.kind, last.body["groups"]) == ("undo", ["one"])
    assert last.body["how"].startswith("unfolded")
