"""Self-compression that is interrupted, shared with a fold, given bad input, or stands still."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightfold.compressor import Compressor
from weightfold.errors import ConfigError, DataError
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.fold import Fold
from weightfold.methods.self_compress import SelfCompress
from weightfold.quant.attached import attached
from weightfold.quant.learner import PATIENCE

from .test_self_compress import STEPS, STRONG, adam, compressor, method, perceptron, quadrants, run, train, written

TABLE = {"0.5": 0.6, "0.1": 0.3}


def half(at: float, **settings: Any) -> Fold:
    return Fold(**{"keep": 0.5, "at": at, "stats_batches": 3} | settings)


def watched(at: float) -> Fold:
    """A fold at about a share of the run that is looked at again later."""
    return Fold(max_accuracy_loss=90.0, latency=TABLE, stats_batches=3, earliest=at / 2, latest=at, align=1)


# interrupted ----------------------------------------------------------------------------------------------------------


class Interrupted:
    """A run with a ledger, which may be taken up at any step."""

    def __init__(self, folder: Path, methods: list[Any], *, rising: bool = False, **settings: Any) -> None:
        fresh = not (folder / "run.ledger").exists()
        folder.mkdir(exist_ok=True)
        self.model, self.methods = perceptron(), methods
        self.ledger = (Ledger.create if fresh else Ledger.open)(folder / "run.ledger", **({"run": {}} if fresh else {}))
        model: Any = self.model
        loss = (lambda o, t: F.cross_entropy(o, t) + 24 - model[0].out_features) if rising else F.cross_entropy
        self.c = compressor(self.model, *methods, ledger=self.ledger if fresh else None, loss=loss, **settings)
        self.optimizer = adam(self.model)
        self.c.prepare(self.optimizer)

    def save(self) -> bytes:
        stored = io.BytesIO()
        torch.save([part.state_dict() for part in (self.c, self.model, self.optimizer)], stored)
        self.ledger.close()
        return stored.getvalue()

    def load(self, checkpoint: bytes) -> None:
        states = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for part, state in zip((self.c, self.model, self.optimizer), states, strict=True):
            part.load_state_dict(state)
        self.c.ledger = self.ledger

    def finish(self, path: Path) -> tuple[Any, ...]:
        net = self.c.convert()
        [chosen] = [m for m in self.methods if isinstance(m, SelfCompress)]
        written(net, chosen, perceptron(), path, head=self.ledger.head)
        front = [(p.n_bytes, p.loss, p.step, fingerprint(p.network)) for p in chosen.front]
        assert bool(front) == bool(chosen.config.pareto)
        with self.ledger:
            self.ledger.verify()
            return self.ledger.head, fingerprint(net), path.read_bytes(), front


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {
        "strength": (lambda: [method(strength=STRONG)], {}),
        "target": (lambda: [method(target=300)], {}),
        "front": (lambda: [method(target=300, pareto=4, check=0.05)], {}),
        "accuracy": (lambda: [method(max_accuracy_loss=5.0)], {}),
        "fold before": (lambda: [half(0.2), method(strength=STRONG, at=0.35)], {}),
        "fold in the middle": (lambda: [half(0.5), method(strength=STRONG)], {}),
        "fold that is taken back": (lambda: [watched(0.4), method(strength=3e-4, check=0.3)], {"rising": True}),
    }


@pytest.mark.parametrize("case", cases())
def test_a_run_that_is_taken_up_ends_where_a_whole_one_does(case: str, tmp_path: Path) -> None:
    """The same bytes, the same network and the same head of the ledger, wherever it was interrupted."""
    make, settings = cases()[case]
    whole = Interrupted(tmp_path / "whole", make(), **settings)
    train(whole.c, whole.optimizer)
    events = [(e.step, e.kind) for e in whole.c.events]
    expected = whole.finish(tmp_path / "whole.wfp")
    undone = [step for step, kind in events if kind == "unfold"]
    assert bool(undone) == (case == "fold that is taken back"), events
    stops = {undone[0] - 1, undone[0] + 1} if undone else {3, 31}
    for stop in sorted(stops):
        first = Interrupted(tmp_path / f"{stop}", make(), **settings)
        train(first.c, first.optimizer, range(stop))
        checkpoint = first.save()
        second = Interrupted(tmp_path / f"{stop}", make(), **settings)
        second.load(checkpoint)
        train(second.c, second.optimizer, range(stop, STEPS))
        assert second.finish(tmp_path / f"{stop}.wfp") == expected, f"interrupted after step {stop}"


# together with a fold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("at", [0.08, 0.5])
def test_a_fold_in_the_same_run(first: bool, at: float, tmp_path: Path) -> None:
    """Before quantisation begins and while it is under way; named before and after."""
    chosen = method(strength=3e-4)
    methods = [half(at, stats_batches=2), chosen] if first else [chosen, half(at, stats_batches=2)]
    model: Any = perceptron()
    c = compressor(model, *methods)
    c.prepare(optimizer := adam(model))
    train(c, optimizer)
    folds = [e for e in c.events if e.step == round(at * STEPS) and e.kind != "remove"]
    assert [e.accepted for e in folds] == [True, True], [(e.step, e.kind, e.reason) for e in c.events]
    assert model[0].out_features <= 12
    assert written(c.convert(), chosen, perceptron(), tmp_path / "net.wfp") < 600


def begun(at: float = 0.5) -> tuple[Any, Compressor, torch.optim.Optimizer, int]:
    """A run right after a fold that took place while weights were quantised."""
    model: Any = perceptron()
    c = compressor(model, half(at), method(strength=1e-6, check=0.9))
    c.prepare(optimizer := adam(model))
    stop = round(at * STEPS)
    train(c, optimizer, range(stop - 1))
    return model, c, optimizer, stop


def test_a_fold_is_taken_back_to_the_bit_while_weights_are_quantised() -> None:
    """Biases that took something over from quantised weights as well."""
    for way in ("undo", "unfold"):
        model, c, optimizer, stop = begun()
        x, y = quadrants(STEPS)[stop - 1]
        (F.cross_entropy(model(x), y) + c.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        steps = {name: getattr(module, f"{leaf}_exponent").detach().clone() for name, module, leaf in held(model)}
        events = c.step()
        assert [e.accepted for e in events] == [True, True]
        after = {name: getattr(module, f"{leaf}_exponent").detach() for name, module, leaf in held(model)}
        assert len(after["0.weight"]) == 12
        if way == "undo":
            for _ in range(2):
                c.undo()
        else:
            c.unfold(2)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)
        for name, module, leaf in held(model):
            own = getattr(module, f"{leaf}_exponent")
            assert own.shape == steps[name].shape
        train(c, optimizer, range(stop, STEPS))
        c.convert()


def held(model: nn.Module) -> list[tuple[str, Any, str]]:
    """Names, owners and leaves of quantised parameters."""
    paths = {module: path for path, module in model.named_modules()}
    return [(f"{paths[module]}.{leaf}", module, leaf) for module, leaf in attached(model)]


@pytest.mark.parametrize("way", ["undo", "unfold"])
def test_a_fold_from_before_is_taken_back_after_quantisation_has_begun(way: str) -> None:
    model: Any = perceptron()
    c = compressor(model, half(0.1), method(strength=1e-6, at=0.3, check=0.9))
    c.prepare(optimizer := adam(model))
    train(c, optimizer, range(30))
    assert model[0].out_features == 12
    if way == "undo":
        c.undo()
        c.undo()
    else:
        c.unfold(2)
    assert model[0].out_features == 24
    for name, module, leaf in held(model):
        for what in ("exponent", "bits"):
            assert len(getattr(module, f"{leaf}_{what}")) == len(module._parameters[leaf]), name
    train(c, optimizer, range(30, STEPS))
    assert bool(torch.isfinite(c.convert()(torch.zeros(1, 6))).all())


# bad input ------------------------------------------------------------------------------------------------------------


def test_a_target_below_the_smallest_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"A file of 40 bytes is not possible: without any weight it still takes \d+"):
        compressor(perceptron(), method(target=40)).prepare()
    chosen = method(target=230)
    _, net = run(chosen)
    assert written(net, chosen, perceptron(), tmp_path / "net.wfp") <= 230, "what is not refused is met"


def test_a_layer_of_one_channel_is_kept() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 4))
    with pytest.warns(UserWarning, match="Every weight of"):
        _, out = run(method(strength=0.05), model=net)
    assert out[2].out_features == 1
    assert out[0].out_features >= 1
    assert out(torch.zeros(3, 6)).shape == (3, 4)


def test_a_method_that_is_given_twice() -> None:
    with pytest.raises(ConfigError, match="'self_compress' is given twice"):
        compressor(perceptron(), method(), method(tensors="0*"))


def test_a_second_run_on_a_network_that_is_being_quantised() -> None:
    model = perceptron()
    c = compressor(model, method())
    c.prepare(optimizer := adam(model))
    train(c, optimizer, range(10))
    with pytest.raises(ConfigError, match=r"'0\.weight' is being quantised by another run"):
        compressor(model, method()).prepare()
    c.convert()


def test_frozen_parameters_stay_float_and_say_why(tmp_path: Path) -> None:
    model: Any = perceptron()
    model[2].weight.requires_grad_(False)
    chosen = method(target=None, strength=1e-6)
    c = compressor(model, chosen)
    c.prepare(optimizer := torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    assert list(chosen.refused) == ["2.weight"]
    assert "frozen" in chosen.refused["2.weight"]
    train(c, optimizer)
    written(c.convert(), chosen, perceptron(), tmp_path / "net.wfp")
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'0\.weight': it is frozen"):
        compressor(model, method()).prepare()


def test_a_penalty_that_is_forgotten() -> None:
    model = perceptron()
    c = compressor(model, method())
    c.prepare(optimizer := adam(model))
    train(c, optimizer, range(6))
    x, y = quadrants(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="penalty is not in the loss"):
        c.step()


@pytest.mark.parametrize("start", [0, 20])
def test_a_loss_that_is_not_finite(start: int) -> None:
    """Before quantisation begins, and in the middle: an error that names the step; no edit was made of it."""
    model: Any = perceptron()
    factor = 1.0

    def break_it(step: int) -> None:
        nonlocal factor
        factor = float("nan") if step >= start else 1.0

    c = compressor(model, method(strength=1e-5), loss=lambda o, t: F.cross_entropy(o, t) * factor)
    c.prepare(optimizer := adam(model))
    late = f"not been finite for {PATIENCE} steps, up to step {start + PATIENCE}"
    with pytest.raises(DataError, match=late if start else r"'0\.weight' is not finite at step 6"):
        train(c, optimizer, each=break_it)
    assert all(e.step <= start for e in c.events if e.accepted)
    assert model[0].out_features == model[2].in_features
    assert bool(list(attached(model))) == bool(start)


def test_targets_that_are_no_classes() -> None:
    probe = [(x, torch.randn(len(x), 4)) for x, _ in quadrants(2)]
    with pytest.raises(ConfigError, match="no classes"):
        compressor(perceptron(), method(max_accuracy_loss=1.0), probe=probe, loss=F.mse_loss).prepare()
    with pytest.raises(ConfigError, match="needs a probe"):
        compressor(perceptron(), method(max_accuracy_loss=1.0), probe=(), loss=None).prepare()
    with pytest.raises(ConfigError, match="exclude each other"):
        SelfCompress(target="1%", max_accuracy_loss=1.0)
    with pytest.raises(ConfigError, match="cannot be done at once"):
        compressor(perceptron(), method(), total_steps=0).prepare()


# failures that make no noise ------------------------------------------------------------------------------------------


def test_weights_and_steps_that_stand_still(tmp_path: Path) -> None:
    """A learning rate of zero, and an optimiser that lacks a layer: each tensor is named once, and it is on record."""
    for still, expected in (("all", ["0.weight", "2.weight", "4.weight"]), ("none", [])):
        model: Any = perceptron()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0 if still == "all" else 1e-2)
        with Ledger.create(tmp_path / f"{still}.ledger", run={}) as ledger:
            c = compressor(model, method(strength=1e-6), ledger=ledger, total_steps=230)
            c.prepare(optimizer)
            if expected:
                with pytest.warns(UserWarning, match=r"No code of '.\.weight' has changed in the 115 steps") as caught:
                    train(c, optimizer, range(230))
                assert len(caught) == 3
                assert "learning rate above 0" in str(caught[0].message)
            else:
                train(c, optimizer, range(230))
            found = [e.body["tensor"] for e in ledger.entries() if e.kind == "warning"]
        assert found == expected


def test_a_run_that_ends_before_anything_was_compressed() -> None:
    model = perceptron()
    c = compressor(model, method(at=0.5))
    c.prepare(optimizer := adam(model))
    train(c, optimizer, range(20))
    before = fingerprint(model)
    with pytest.warns(UserWarning, match="never acted: it does at step 30, and the run ended at step 20"):
        c.convert()
    assert fingerprint(model) == before
