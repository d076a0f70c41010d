"""The length of a run, the budget over its events, what follows an edit and what cannot; every remedy is tried."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold
from tests.contracts.test_methods import METHODS
from weightfold.compressor import Compressor
from weightfold.config import Config
from weightfold.errors import ConfigError, EditError
from weightfold.graph.edit import remove
from weightfold.ledger import Ledger
from weightfold.methods.base import Method, Moment, Proposal

X, Y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
PROBE = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(c: Compressor, optimizer: Any, n: int) -> None:
    for _ in range(n):
        (F.cross_entropy(c.network(X), Y) + c.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        c.step()


def widths(model: Any) -> tuple[int, int]:
    return model[0].out_features, model[2].out_features


# total_steps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"self_compress"}))
def test_step_needs_a_length_and_once_does_not(name: str) -> None:
    model = net()
    c = Compressor(model, X[:2], [METHODS[name]()])
    c.prepare(optimizer := adam(model))
    with pytest.raises(ConfigError, match="total_steps") as caught:
        train(c, optimizer, 1)
    assert caught.value.remedy is not None
    assert "once()" in caught.value.remedy
    assert widths(model) == (16, 16)
    assert c._step == 0
    assert any(event.accepted for event in c.once([X]))
    assert widths(model) != (16, 16) or name == "lump"
    with pytest.raises(ConfigError, match="total_steps"):
        c.step()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_run_with_a_length_acts_once(name: str) -> None:
    """The other remedy; and a method that has acted is not told of."""
    model = net()
    method = METHODS[name](**({"at": 0.5} if "at" in METHODS[name].Config.model_fields else {}))
    c = Compressor(model, X[:2], [method], total_steps=6)
    c.prepare(optimizer := adam(model))
    found = [widths(model)]
    for _ in range(6):
        train(c, optimizer, 1)
        found.append(widths(model))
    assert len(set(found)) <= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        c.convert()


def test_what_only_training_can_do_is_refused_without_a_length_and_at_once() -> None:
    with pytest.raises(ConfigError, match="learns in training") as caught:
        Compressor(net(), X[:2], [METHODS["self_compress"]()]).prepare()
    assert "total_steps=" in str(caught.value.remedy)
    c = Compressor(model := net(), X[:2], [METHODS["self_compress"]()], total_steps=6)
    c.prepare(optimizer := adam(model))
    [event] = c.once([X])
    assert not event.accepted
    assert "learns in training" in event.reason
    train(c, optimizer, 6)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_whose_time_never_came_is_told_of(name: str, tmp_path: Path) -> None:
    model = net()
    with Ledger.create(tmp_path / "a.ledger", run={}) as ledger:
        c = Compressor(model, X[:2], [METHODS[name]()], total_steps=1000, ledger=ledger)
        c.prepare(optimizer := adam(model))
        train(c, optimizer, 8)
        with pytest.warns(UserWarning, match=rf"'{name}' never acted.* step 8 of 'total_steps' = 1000"):
            c.convert()
        assert [e.body["method"] for e in ledger.entries() if e.kind == "warning"] == [name]
    assert widths(model) == (16, 16)


@pytest.mark.parametrize("length", [-1, 2.5, "10", None])
def test_a_length_that_is_none(length: Any) -> None:
    with pytest.raises(ConfigError, match="total_steps") as caught:
        Compressor(net(), X[:2], [], total_steps=length)
    assert caught.value.remedy


def test_before_it_is_prepared_nothing_can_be_done() -> None:
    c = Compressor(net(), X[:2], [], total_steps=3)
    for act in (c.step, c.once, c.convert, c.undo):
        with pytest.raises(ConfigError, match="not prepared"):
            act()


# the list of methods --------------------------------------------------------------------------------------------------


def test_a_forgotten_list_a_class_and_something_else() -> None:
    for methods, remedy in (
        (weightfold.Fold(keep=0.5), r"[Fold(...)]"),
        (weightfold.Fold, r"[Fold(...)]"),
        ([weightfold.Fold], r"[Fold(...)]"),
        ([3], "weightfold.Fold(keep=0.5)"),
        ([weightfold.Fold.Config(keep=0.5)], "weightfold.Fold(keep=0.5)"),
    ):
        with pytest.raises(ConfigError) as caught:
            Compressor(net(), X[:2], methods)  # pyright: ignore[reportArgumentType]
        assert remedy in str(caught.value.remedy)
    Compressor(net(), X[:2], (m for m in [weightfold.Fold(keep=0.5)])).prepare()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [weightfold.Tie, weightfold.Palette])
def test_what_runs_by_itself_says_how(kind: Any) -> None:
    """The remedy, word by word: convert first, then its own calls."""
    with pytest.raises(ConfigError, match="does not run inside a compressor") as caught:
        Compressor(net(), X[:2], [kind()])
    remedy = str(caught.value.remedy)
    assert remedy.startswith("Call compressor.convert() first; then ")
    compressor = Compressor(model := net(), X[:2], [weightfold.Fold(keep=0.5)])
    compressor.prepare()
    compressor.once([X])
    names = {
        "compressor": compressor,
        "net": model,
        "optimizer": adam(model),
        "loss": F.cross_entropy,
        "probe": PROBE,
        "n": 4,
        "tie": weightfold.Tie(),
        "palette": weightfold.Palette(k=4),
    }
    exec("compressor.convert()", names)
    name = kind.name
    before = "prepare" if name == "tie" else "attach"
    exec(remedy[remedy.index(f"{name}.{before}(") :].partition("),")[0] + ")", names)
    for _ in range(4):
        F.cross_entropy(model(X), Y).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        exec(f"{name}.step()", names)
    exec(f"{name}.convert()", names)
    assert f"{name}.step() after every optimiser step" in remedy
    assert f"{name}.convert()" in remedy


# the budget over events -----------------------------------------------------------------------------------------------


class RiseConfig(Config):
    """Settings of `Rise`."""


class Rise(Method):
    """Drops the last channel of the first group at every step, with a loss that rises by what is asked for."""

    name: ClassVar[str] = "rise"
    Config: ClassVar[type[Config]] = RiseConfig

    def step(self, moment: Moment) -> list[Proposal]:
        group = moment.graph["0"]
        return [Proposal(remove(group, torch.arange(group.n_channels - 1)))]


def risen(model: Any) -> Any:
    """A loss of 0.25 for every channel that is gone."""
    return lambda outputs, targets: 0 * outputs.sum() + 0.25 * (16 - model[0].out_features)


def rising(model: nn.Module, **settings: Any) -> Compressor:
    given = {"loss": risen(model), "probe": PROBE, "total_steps": 100, "max_increase": 0.3} | settings
    c = Compressor(model, X[:2], [Rise()], **given)
    c.prepare()
    return c


def test_the_sum_of_accepted_rises_is_bounded_and_recorded(tmp_path: Path) -> None:
    """Closed form: rises of 0.25 within a budget of 1.1 are four; each alone would pass for ever."""
    with Ledger.create(tmp_path / "a.ledger", run={}) as ledger:
        c = rising(model := net(), max_total_increase=1.1, ledger=ledger)
        for _ in range(7):
            c.step()
        bodies = [e.body for e in ledger.entries()]
        prices = [e.body["price"] for e in ledger.entries() if e.kind == "edit"]
    assert [event.accepted for event in c.events] == [True] * 4 + [False] * 3
    assert "has risen by 1 in the events before, together more than 1.1" in c.events[-1].reason
    assert widths(model)[0] == 12
    assert [price["risen"] for price in prices] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert next(b["max_total_increase"] for b in bodies if "max_total_increase" in b) == 1.1


def test_by_default_it_is_four_times_that_of_one_event() -> None:
    c = rising(net())
    for _ in range(7):
        c.step()
    assert sum(event.accepted for event in c.events) == 4


def test_what_is_taken_back_is_given_back_and_a_restart_knows_what_was_spent() -> None:
    c = rising(net(), max_total_increase=0.6)
    for _ in range(4):
        c.step()
    assert sum(event.accepted for event in c.events) == 2
    c.undo()
    c.step()
    assert c.events[-1].accepted
    state = c.state_dict()
    fresh = net()
    again = rising(fresh, max_total_increase=0.6)
    again.load_state_dict(state)
    again.step()
    assert not again.events[-1].accepted
    old = {key: value for key, value in state.items() if key != "rises"}
    older = rising(net(), max_total_increase=0.6)
    older.load_state_dict(old)
    older.step()
    assert older.events[-1].accepted, "a checkpoint without it counts from nothing"


# one group that cannot be changed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [weightfold.Fold(keep=0.5), weightfold.Fold(keep=0.5, groups="*")])
def test_a_group_short_of_samples_is_named_and_the_others_go_on(method: Method, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 200), nn.ReLU(), nn.Linear(200, 3))
    with Ledger.create(tmp_path / "a.ledger", run={}) as ledger:
        c = Compressor(model, X[:2], [method], ledger=ledger)
        c.prepare()
        refused, accepted = c.once([X])
        [body] = [e.body for e in ledger.entries() if e.kind == "refusal"]
    assert (refused.group, refused.accepted, refused.channels_after) == ("2", False, 200)
    assert "64 samples are too few" in refused.reason
    assert "pass more data to once()" in refused.reason
    assert (accepted.group, accepted.accepted, widths(model)) == ("0", True, (8, 200))
    assert body["groups"] == ["2"]
    again = Compressor(model, X[:2], [weightfold.Fold(keep=0.5, groups="2")])
    again.prepare()
    assert [e.accepted for e in again.once([torch.randn(256, 8)])] == [True], "the remedy"


def test_where_no_group_can_be_changed_all_are_named() -> None:
    c = Compressor(model := net(), X[:2], [weightfold.Fold(keep=0.5)])
    c.prepare()
    assert [(e.group, e.accepted) for e in c.once([X[:4]])] == [("0", False), ("2", False)]
    assert widths(model) == (16, 16)


# numbers that are not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_gradient_that_is_not_finite_never_ends_in_a_converted_network(name: str, value: float) -> None:
    model = net()
    method = METHODS[name](**({"at": 0.5} if "at" in METHODS[name].Config.model_fields else {}))
    c = Compressor(model, X[:2], [method], total_steps=8, loss=F.cross_entropy, probe=PROBE, max_increase=9.0)
    c.prepare(optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    good = {n: t.clone() for n, t in model.state_dict().items()}
    for step in range(8):
        (F.cross_entropy(c.network(X), Y) + c.penalty()).backward()
        if step == 1:
            assert model[2].bias.grad is not None
            model[2].bias.grad[3] = value
        optimizer.step()
        optimizer.zero_grad()
        if name == "self_compress" and step == 3:
            with pytest.raises(weightfold.errors.DataError, match="is not finite at step 4"):
                c.step()
            break
        c.step()
    assert not any(event.accepted for event in c.events)
    with pytest.raises(EditError, match="holds values that are not finite") as caught:
        c.convert()
    assert "load_state_dict" in str(caught.value.remedy)
    assert widths(model) == (16, 16)
    model.load_state_dict(good)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert c.convert() is model
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_infinities_of_a_mask_are_no_divergence_but_those_of_statistics_are() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.norm(self.a(x)))) + self.mask

    Compressor(model := Masked(), X[:2], [weightfold.Fold(keep=0.5)]).prepare()
    assert model.norm.running_var is not None
    model.norm.running_var[2] = torch.inf
    with pytest.raises(EditError, match=r"norm\.running_var"):
        Compressor(model, X[:2], [weightfold.Fold(keep=0.5)]).prepare()
    model.norm.running_var[2], model.mask[0] = 1.0, torch.nan
    with pytest.raises(EditError, match="'mask'"):
        Compressor(model, X[:2], [weightfold.Fold(keep=0.5)]).prepare()


# optimisers and lazy modules ------------------------------------------------------------------------------------------


class Wrapper:
    """Holds an optimiser, and is none."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def step(self) -> None:
        self.inner.step()

    def zero_grad(self) -> None:
        self.inner.zero_grad()


class Several(torch.optim.Optimizer):
    """Holds a list of optimisers, and never calls its base class."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self, closure: Any = None) -> Any:
        for optimizer in self.optimizers:
            optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def folding(model: nn.Module) -> Compressor:
    fold = weightfold.Fold(keep=0.5, at=0.4)
    return Compressor(model, X[:2], [fold], loss=F.cross_entropy, probe=PROBE, total_steps=10, max_increase=9.0)


def split(model: nn.Module) -> list[torch.optim.Optimizer]:
    first, *rest = model.parameters()
    return [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)]


@pytest.mark.parametrize("times", [1, 2])
def test_a_wrapper_s_optimiser_follows(times: int) -> None:
    model = net()
    inner = given = adam(model)
    for _ in range(times):
        given = Wrapper(given)
    c = folding(model)
    c.prepare(given)  # pyright: ignore[reportArgumentType]
    train(c, given, 10)
    assert widths(model) == (8, 8)
    assert all(inner.state[p]["exp_avg"].shape == p.shape for p in model.parameters())


def test_several_optimisers_in_one_follow() -> None:
    model = net()
    both = Several(split(model))
    c = folding(model)
    c.prepare(both)
    train(c, both, 10)
    assert widths(model) == (8, 8)
    assert [type(o).__name__ for o in c._hands.optimizers] == ["SGD", "AdamW"]


def test_a_scheduler_names_its_optimiser_and_anything_else_is_refused() -> None:
    model = net()
    schedule = torch.optim.lr_scheduler.ConstantLR(adam(model), factor=1.0)
    c = folding(model)
    c.prepare(schedule)  # pyright: ignore[reportArgumentType]
    assert c._hands.optimizers == (schedule.optimizer,)
    for given in (model, "adam", 3):
        with pytest.raises(ConfigError, match="takes torch optimisers") as caught:
            folding(net()).prepare(given)  # pyright: ignore[reportArgumentType]
        assert caught.value.remedy


def test_lbfgs_is_refused_by_name_and_both_remedies_work() -> None:
    model = net()
    with pytest.raises(EditError, match="LBFGS") as caught:
        folding(model).prepare(optimizer := torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2))
    assert "AdamW" in str(caught.value.remedy)
    assert "once()" in str(caught.value.remedy)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    optimizer.step(closure)
    c = Compressor(model, X[:2], [weightfold.Fold(keep=0.5)])
    c.prepare()
    assert [e.accepted for e in c.once([X])] == [True, True]
    c = folding(model)
    c.prepare(other := torch.optim.AdamW(model.parameters()))
    train(c, other, 10)


class Joint(torch.optim.SGD):
    """Keeps one direction for all parameters together, beside the first."""

    def step(self, closure: Any = None) -> Any:
        params = self.param_groups[0]["params"]
        flat = torch.cat([p.grad.flatten() for p in params])
        self.state[params[0]]["history"] = [flat]
        return super().step(closure)


class Lists(torch.optim.SGD):
    """Keeps a list of matrices for each parameter, made anew where there is none."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if "grams" not in state:
                state["grams"] = [torch.zeros(n, n) for n in p.shape]
            assert [len(gram) for gram in state["grams"]] == list(p.shape)
        return super().step(closure)


def test_a_joint_history_of_any_optimiser_is_refused_once_it_is_there() -> None:
    model = net()
    optimizer = Joint(model.parameters(), lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    with pytest.raises(EditError, match="Joint keeps one history"):
        folding(model).prepare(optimizer)


def test_state_in_lists_is_begun_anew() -> None:
    model = net()
    c = folding(model)
    c.prepare(optimizer := Lists(model.parameters(), lr=0.1))
    train(c, optimizer, 10)
    assert widths(model) == (8, 8)


def test_lazy_modules_are_refused_by_name_and_the_remedy_works() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Sequential(nn.LazyLinear(3)))
    optimizer = adam(model)
    with pytest.raises(ConfigError, match="'0' is a LazyLinear") as caught:
        folding(model).prepare(optimizer)
    assert "Call the model once on the example" in str(caught.value.remedy)
    model(X[:2])
    c = folding(model)
    c.prepare(optimizer)
    train(c, optimizer, 10)
    assert model[0].out_features == 8
