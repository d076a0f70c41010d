"""Folding inside the loops that people write: compiled, mixed precision, accumulation, schedules, averages, kill -9."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError, DataError, EditError
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.base import Method
from weightfold.methods.fold import Fold
from weightfold.methods.prune import Prune

HERE = Path(__file__).parent
STEPS = 24
TABLE = {"0.5": 0.6, "0.1": 0.3}


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def data(n: int = STEPS, seed: int = 0, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(size, 6, generator=g) for _ in range(n)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in xs]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def compressor(model: nn.Module, *methods: Method, **settings: Any) -> Compressor:
    settings = {"loss": F.cross_entropy, "probe": data(4, 9), "total_steps": STEPS, "max_increase": 1e9} | settings
    return Compressor(model, torch.zeros(2, 6), methods or [half()], **settings)


def half(at: float = 0.5, **settings: Any) -> Fold:
    return Fold(**{"keep": 0.5, "at": at, "stats_batches": 4} | settings)


def train(c: Compressor, *optimizers: torch.optim.Optimizer, n: int = STEPS, each: Any = lambda step: None) -> None:
    for step, (x, y) in enumerate(data(n), 1):
        F.cross_entropy(c.network(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        each(step)
        c.step()


def widths(model: Any) -> tuple[int, int]:
    return model[0].out_features, model[2].out_features


def accepted(c: Compressor) -> list[bool]:
    return [event.accepted for event in c.events]


def apart(script: str, *args: str) -> Any:
    """The JSON that a script of this folder prints, run in a process of its own with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *args], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# compiled -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled_runs() -> Any:
    return apart("compiled_probe.py", "aot_eager")


@pytest.mark.parametrize("way", ["wrapped", "in place", "a part", "the step"])
def test_a_compiled_network_folds_and_compiles_again(compiled_runs: Any, way: str) -> None:
    """Two events: three graphs are compiled, none of them for a probe, and none is broken by a hook.

    Reference: the same run that is not compiled; "in place" trains in bf16.
    """
    run, eager = compiled_runs[way], compiled_runs["eager"]
    assert run["accepted"] == [True] * 4, run["reasons"]
    assert run["widths"] == eager["widths"]
    assert run["compiles"] == 3
    assert run["breaks"] == 0
    assert run["same"]
    assert run["plain"]
    assert run["losses"][:4] == pytest.approx(eager["losses"][:4], abs=2e-2 if way == "in place" else 1e-4)
    assert run["losses"][-1] == pytest.approx(eager["losses"][-1], abs=0.1)


def test_the_precision_and_batch_of_a_compiled_network_are_seen(compiled_runs: Any) -> None:
    assert compiled_runs["in place"]["autocast"] == [True, True]
    assert compiled_runs["wrapped"]["autocast"] == [False, False]
    assert compiled_runs["wrapped"]["batch"] == compiled_runs["in place"]["batch"] == 32


# kill -9 --------------------------------------------------------------------------------------------------------------

BEFORE_THE_FIRST_LOOK, BETWEEN_LOOKS, AFTER_THE_EVENT, WATCHED = 5, 9, 31, 34


@pytest.fixture(scope="module")
def killed_runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    points = (BEFORE_THE_FIRST_LOOK, BETWEEN_LOOKS, AFTER_THE_EVENT, WATCHED)
    return apart("killed_probe.py", str(tmp_path_factory.mktemp("killed")), *map(str, points))


def test_the_points_are_what_they_are_called(killed_runs: Any) -> None:
    whole = killed_runs["whole"]
    looks, steps = whole["looks"], whole["steps"]
    assert BEFORE_THE_FIRST_LOOK < looks[0] < BETWEEN_LOOKS < looks[-1]
    assert steps["edit"] < AFTER_THE_EVENT < AFTER_THE_EVENT + 1 < WATCHED < steps["watch"]
    assert whole["kinds"] == ["run", "prepare", "plan", "edit", "edit", "watch", "undo", "convert"]


@pytest.mark.parametrize("point", [BEFORE_THE_FIRST_LOOK, BETWEEN_LOOKS, AFTER_THE_EVENT, WATCHED])
def test_a_killed_run_ends_where_a_whole_one_does(killed_runs: Any, point: int) -> None:
    assert killed_runs[str(point)] == killed_runs["whole"]


# mixed precision ------------------------------------------------------------------------------------------------------


def test_bf16_is_used_at_the_gate_and_not_for_statistics() -> None:
    kinds: list[tuple[torch.dtype, bool]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        kinds.append((outputs.dtype, torch.is_autocast_enabled("cpu")))
        return F.cross_entropy(outputs, targets)

    model = net()
    c = compressor(model, loss=loss)
    c.prepare(optimizer := adam(model))
    assert kinds[-1] == (torch.float32, False), "before the first batch nothing is known"
    seen: list[Any] = []
    for x, y in data():
        with torch.autocast("cpu", torch.bfloat16):
            value = F.cross_entropy(c.network(x), y)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if c._step == 11:
            seen = list(c._watcher.statistics.values())
        c.step()
    assert accepted(c) == [True, True]
    assert kinds[-1] == (torch.bfloat16, True)
    assert {moment.second_CC.dtype for moment in seen} == {torch.float64}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_steps_that_a_scaler_skips_are_no_swapped_optimiser() -> None:
    model = net()
    c = compressor(model)
    c.prepare(optimizer := torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    before = fingerprint(model)
    for step, (x, y) in enumerate(data(), 1):
        value = F.cross_entropy(c.network(x), y)
        scaler.scale(value * (float("inf") if step < 15 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 11:
            assert fingerprint(model) == before, "every step so far was skipped"
        c.step()
    assert accepted(c) == [True, True]
    assert widths(model) == (8, 8)
    assert optimizer.state[model[2].weight]["momentum_buffer"].shape == (8, 8)


# accumulation, schedules, averages, several optimisers ----------------------------------------------------------------


@pytest.mark.parametrize("every_batch", [False, True])
def test_gradients_are_accumulated(every_batch: bool) -> None:
    """Called after each optimiser step, or after each micro-batch: gradients that wait are not disturbed by probes."""
    k, model = 16, net()
    total = STEPS * k if every_batch else STEPS
    fold = half(at=(12 * k - 3) / total if every_batch else 0.5)
    c = compressor(model, fold, total_steps=total)
    c.prepare(optimizer := adam(model))
    for x, y in data(STEPS, size=64):
        for part, wanted in zip(x.split(4), y.split(4), strict=True):
            (F.cross_entropy(c.network(part), wanted) / k).backward()
            if every_batch:
                c.step()
        optimizer.step()
        optimizer.zero_grad()
        if not every_batch:
            c.step()
    assert accepted(c) == [True, True]
    assert widths(model) == (8, 8)


def test_gradients_that_wait_are_left_alone_by_a_dial_that_refuses() -> None:
    model = net()
    c = compressor(model, Fold(max_accuracy_loss=0.0, stats_batches=4, latest=0.5, earliest=0.5))
    c.prepare(optimizer := adam(model))
    train(c, optimizer, n=11)
    x, y = data(1)[0]
    F.cross_entropy(c.network(x), y).backward()
    waiting = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    c.step()
    assert accepted(c) == [False]
    assert len(waiting) == 6
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, waiting[name])


def test_schedules_go_on_over_an_event() -> None:
    model, twin = net(), net()
    rates: list[list[float]] = []
    for each, methods in ((model, [half()]), (twin, [half(at=0.9, keep=1.0)])):
        optimizer = adam(each)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 5)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [5])
        groups = list(map(id, optimizer.param_groups))
        c = compressor(each, *methods)
        c.prepare(optimizer)
        rates.append([])

        def note(_: int, schedule: Any = schedule, rates: Any = rates) -> None:
            schedule.step()
            rates[-1].append(schedule.get_last_lr()[0])

        train(c, optimizer, each=note)
        assert list(map(id, optimizer.param_groups)) == groups
        assert schedule.last_epoch == STEPS
    assert widths(model) == (8, 8)
    assert rates[0] == rates[1]


def test_averages_follow_an_event_of_several_groups_and_its_unfolding() -> None:
    model = net()
    optimizer = adam(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
    c = compressor(model)
    c.prepare(optimizer, [ema, shadow])

    def average(_: int) -> None:
        ema.update_parameters(model)
        weight = 1.0 if int(ema.n_averaged) == 1 else 0.1
        for name, p in model.named_parameters():
            shadow[name].lerp_(p.detach(), weight)

    train(c, optimizer, each=average)
    assert accepted(c) == [True, True]
    assert widths(model) == widths(ema.module) == (8, 8)
    c.unfold(2)
    assert widths(model) == widths(ema.module) == (16, 16)
    train(c, optimizer, n=3, each=average)
    for name, p in model.named_parameters():
        assert shadow[name].shape == p.shape
        torch.testing.assert_close(ema.module.get_parameter(name), shadow[name], atol=1e-5, rtol=1e-4)


def test_several_optimisers_and_groups_of_parameters() -> None:
    model: Any = net()
    matrices = [m.weight for m in model if isinstance(m, nn.Linear)]
    decayed = {"params": matrices[:2], "weight_decay": 0.1}
    plain = {"params": [m.bias for m in model if isinstance(m, nn.Linear)], "weight_decay": 0.0, "lr": 1e-3}
    first, second = torch.optim.AdamW([decayed, plain], lr=1e-2), torch.optim.SGD(matrices[2:], lr=0.1, momentum=0.9)
    c = compressor(model)
    c.prepare([first, second])
    train(c, first, second)
    assert accepted(c) == [True, True]
    assert [g["weight_decay"] for g in first.param_groups] == [0.1, 0.0]
    assert [len(g["params"]) for g in first.param_groups] == [2, 3]
    for optimizer, key in ((first, "exp_avg"), (second, "momentum_buffer")):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert optimizer.state[p][key].shape == p.shape


def test_state_that_came_after_an_edit_is_forgotten_when_it_is_taken_back() -> None:
    model = net()
    c = compressor(model, Fold(keep=0.5))
    c.prepare(optimizer := adam(model))
    c.once([x for x, _ in data(4)])
    train(c, optimizer, n=3)
    c.unfold(1)
    train(c, optimizer, n=3)
    assert widths(model) == (8, 16)


# bad input ------------------------------------------------------------------------------------------------------------


def refusals(c: Compressor) -> list[str]:
    return [event.reason for event in c.events if not event.accepted]


def test_frozen_parameters_fold_along() -> None:
    model: Any = net()
    model[0].requires_grad_(False)
    c = compressor(model)
    c.prepare(optimizer := torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    train(c, optimizer)
    assert accepted(c) == [True, True]
    assert widths(model) == (8, 8)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_shared_parameters_stay_shared() -> None:
    model: Any = net()
    model.insert(4, nn.Linear(16, 16))
    model.insert(5, nn.ReLU())
    model[4].weight = model[2].weight
    with pytest.raises(ConfigError, match=r"what '2.weight' reads cannot be observed"):
        compressor(model).prepare()
    c = compressor(model, Prune(keep=0.5, at=0.5))
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    assert model[4].weight is model[2].weight
    assert accepted(c) == [True]
    assert model[2].weight.shape == (8, 8)
    assert model[0].out_features == model[2].in_features == model[4].out_features == model[6].in_features == 8


def test_statistics_that_are_not_finite(tmp_path: Path) -> None:
    """One bad batch while statistics are taken: no event, a record, and training goes on dense."""
    model = net()
    with Ledger.create(tmp_path / "a.db", run={}) as ledger:
        c = compressor(model, half(), half(at=0.9), ledger=ledger)
        c.prepare(optimizer := adam(model))
        for step, (x, y) in enumerate(data(), 1):
            if step == 10:
                with torch.no_grad():
                    c.network(x * float("nan"))
            F.cross_entropy(c.network(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            c.step()
        [refusal] = [e.body for e in ledger.entries() if e.kind == "refusal"]
    assert refusal["step"] == 12
    assert "NaN" in refusal["why"] or "finite" in refusal["why"]
    assert accepted(c) == [False, True, True], "the second event takes statistics of its own"


def test_a_probe_of_one_class() -> None:
    with pytest.raises(DataError, match="one class"):
        compressor(net(), probe=[(x, torch.zeros_like(y)) for x, y in data(2)]).prepare()


def test_a_probe_smaller_than_a_batch() -> None:
    model = net()
    c = compressor(model, probe=data(1, size=8))
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    assert widths(model) == (16, 16)
    assert len(refusals(c)) == 1
    assert "fewer than one training batch of 32" in refusals(c)[0]


def test_a_group_that_would_shrink_to_nothing() -> None:
    model = net()
    c = compressor(model, half(keep=1e-6))
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    assert widths(model) == (1, 1)
    other = net()
    c = compressor(other, half(keep=1e-6, min_channels=5))
    c.prepare(optimizer := adam(other))
    train(c, optimizer)
    assert widths(other) == (5, 5)


def test_an_optimiser_that_is_swapped_in_mid_run() -> None:
    model = net()
    c = compressor(model)
    c.prepare(old := adam(model))
    train(c, old, n=5)
    new = adam(model)
    train(c, new)
    assert len(refusals(c)) == 1
    assert "prepare(new_optimizer)" in refusals(c)[0]
    assert widths(model) == (16, 16)


def test_an_optimiser_that_is_named_in_mid_run() -> None:
    model = net()
    c = compressor(model)
    c.prepare(old := adam(model))
    train(c, old, n=5)
    c.prepare(new := adam(model))
    train(c, new)
    assert accepted(c) == [True, True]
    assert new.state[model[2].weight]["exp_avg"].shape == (8, 8)


def test_a_network_that_someone_else_has_changed() -> None:
    model: Any = net()
    c = compressor(model)
    c.prepare()
    other = adam(model)
    train(c, other, n=3)
    model[0], model[2] = nn.Linear(6, 12), nn.Linear(12, 16)
    train(c, adam(model))
    assert len(refusals(c)) == 1
    assert "'0.weight' has shape (12, 6); the graph expects (16, 6)" in refusals(c)[0]
    assert widths(model) == (12, 16)


def test_a_dial_without_a_probe() -> None:
    with pytest.raises(ConfigError, match="needs a probe"):
        compressor(net(), Fold(max_accuracy_loss=1.0), probe=(), loss=None).prepare()


def test_a_dial_of_accuracy_on_targets_that_are_no_classes(tmp_path: Path) -> None:
    model = net()
    probe = [(x, torch.randn(len(x), 4)) for x, _ in data(8, 9)]
    with Ledger.create(tmp_path / "a.db", run={}) as ledger:
        c = compressor(
            model, Fold(max_accuracy_loss=1.0, stats_batches=2, latest=0.5), probe=probe, loss=F.mse_loss, ledger=ledger
        )
        c.prepare(optimizer := adam(model))
        train(c, optimizer)
        [refusal] = [e.body for e in ledger.entries() if e.kind == "refusal"]
    assert "needs class numbers as targets" in refusal["why"]
    assert widths(model) == (16, 16)


def test_a_loss_that_is_not_finite_at_the_gate(tmp_path: Path) -> None:
    broken = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * (float("nan") if broken else 1.0)

    model = net()
    with Ledger.create(tmp_path / "a.db", run={}) as ledger:
        c = compressor(model, loss=loss, ledger=ledger)
        c.prepare(optimizer := adam(model))
        train(c, optimizer, n=11)
        broken, before = True, fingerprint(model)
        c.step()
        kinds = [e.kind for e in ledger.entries()]
    assert accepted(c) == [False, False]
    assert kinds[-2:] == ["rollback", "rollback"]
    assert fingerprint(model) == before


def test_a_loss_that_is_not_finite_when_an_event_is_looked_at_again(tmp_path: Path) -> None:
    """A run that has diverged is no reason to unfold, nor to stop."""
    broken = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * (float("nan") if broken else 1.0)

    def break_it(step: int) -> None:
        nonlocal broken
        broken = bool(c.events)

    model = net()
    with Ledger.create(tmp_path / "a.db", run={}) as ledger:
        fold = Fold(max_accuracy_loss=90.0, latency=TABLE, stats_batches=4, latest=0.2, earliest=0.1, align=1)
        c = compressor(model, fold, loss=loss, ledger=ledger)
        c.prepare(optimizer := adam(model))
        train(c, optimizer, each=break_it)
        [watch] = [e.body for e in ledger.entries() if e.kind == "watch"]
    assert watch["after"] == "nan"
    assert widths(model) != (16, 16)
    with pytest.raises(EditError, match="in memory for the latest"):
        c.unfold(2)
