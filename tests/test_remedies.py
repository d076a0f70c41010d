"""Remedies are tried: an error is provoked, then what its second line says is done, and that works."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import weightfold as wf
from weightfold.audit import read_history
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.replay import rebuild, take_back

from .remedies import Do, Table

CASES = Table()
remedy = CASES.remedy
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 3
PROBE = [(X[:32], Y[:32]), (X[32:], Y[32:])]
LOSS = F.cross_entropy


def all_accepted(events: list[Any]) -> None:
    """See that something was done and nothing refused."""
    assert [event.reason for event in events if not event.accepted] == []
    assert events


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def compressor(net: nn.Module | None = None, methods: Any = None, **given: Any) -> wf.Compressor:
    net = mlp() if net is None else net
    return wf.Compressor(net, X[:4], [wf.Prune(keep=0.5)] if methods is None else methods, **given)


def prepared(net: nn.Module | None = None, methods: Any = None, **given: Any) -> wf.Compressor:
    c = compressor(net, methods, **given)
    c.prepare()
    return c


def once(c: wf.Compressor, batches: Any = ()) -> None:
    """Compress, and see that it was done."""
    all_accepted(c.once(batches))


def trained(c: wf.Compressor, optimizer: torch.optim.Optimizer, n: int) -> list[Any]:
    """Train a prepared compressor for some steps; what happened."""
    events = []
    for _ in range(n):
        optimizer.zero_grad()
        (LOSS(c.network(X), Y) + c.penalty()).backward()
        optimizer.step()
        events += c.step()
    return events


# tracing --------------------------------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Two layers with something of the user's in between."""

    def __init__(self, between: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def traced(net: nn.Module, example: Any = X[:4]) -> None:
    assert wf.trace(net, example).groups


@remedy("Pass an example with the shapes")
def an_example_of_another_shape() -> tuple[Do, Do]:
    net = mlp()
    return lambda: traced(net, torch.zeros(2, 7)), lambda: traced(net, torch.zeros(2, 6))


@remedy("model.eval()")
def an_example_of_evaluation_alone() -> tuple[Do, Do]:
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def right() -> None:
        traced(net, X[:2])
        net.eval()
        traced(net, X[:1])

    return lambda: traced(net, X[:1]), right


@remedy("torch.where")
def a_branch_on_data() -> tuple[Do, Do]:
    branched = Forward(lambda h: h.relu() if h.sum() > 0 else h.tanh())
    return lambda: traced(branched), lambda: traced(Forward(lambda h: torch.where(h.sum() > 0, h.relu(), h.tanh())))


@remedy("by operators of torch on tensors")
def a_forward_through_numpy() -> tuple[Do, Do]:
    through = Forward(lambda h: torch.as_tensor(h.detach().numpy() ** 2))
    return lambda: traced(through), lambda: traced(Forward(lambda h: h**2))


@remedy("by operators of torch on tensors", "take it off")
def a_hook_through_numpy() -> tuple[Do, Do]:
    net = mlp()
    handle = net[0].register_forward_hook(lambda m, i, o: torch.as_tensor(o.detach().numpy() ** 2))

    def right() -> None:
        handle.remove()
        traced(net)
        net[0].register_forward_hook(lambda m, i, o: o**2)
        traced(net)

    return lambda: traced(net), right


@remedy("Call the model once")
def a_lazy_module() -> tuple[Do, Do]:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    def right() -> None:
        net(X[:4])
        traced(net)

    return lambda: traced(net), right


@remedy("Call the model once")
def a_lazy_module_in_a_compressor() -> tuple[Do, Do]:
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))

    def right() -> None:
        net(X[:4])
        once(prepared(net))

    return lambda: prepared(net), right


@remedy("Trace the module that it was made from")
def a_program_of_torchscript() -> tuple[Do, Do]:
    net = mlp()

    def program() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.trace(net, X[:4])

    script = program()
    return lambda: traced(script), lambda: (once(prepared(net)), program())


class Holding(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.net, self.held = mlp(), held

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Uncopied:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


class Copied:
    def __deepcopy__(self, memo: Any) -> Any:
        return Copied()


@remedy("Open it where it is used", "__deepcopy__")
def an_attribute_that_cannot_be_copied() -> tuple[Do, Do]:
    return lambda: traced(Holding(Uncopied())), lambda: (traced(Holding(None)), traced(Holding(Copied())))


@remedy("Did you mean '0'?")
def a_group_that_is_not_there() -> tuple[Do, Do]:
    graph = wf.trace(mlp(), X[:4])
    return lambda: graph["00"], lambda: graph["0"]


# edits ----------------------------------------------------------------------------------------------------------------


@remedy("Build the edit from the current graph.")
def an_edit_of_an_older_graph() -> tuple[Do, Do]:
    net = mlp()
    graph = wf.trace(net, X[:4])
    stale = edits.remove(graph["0"], torch.arange(8))
    now, _ = apply(net, graph, stale)
    return lambda: apply(net, now, stale), lambda: apply(net, now, edits.remove(now["0"], torch.arange(4)))


@remedy("trace it again")
def a_model_changed_after_its_trace() -> tuple[Do, Do]:
    net = mlp()
    graph = wf.trace(net, X[:4])
    net[0], net[2] = nn.Linear(6, 10), nn.Linear(10, 3)

    def cut(graph: wf.ChannelGraph) -> None:
        apply(net, graph, edits.remove(graph["0"], torch.arange(8)))

    return lambda: cut(graph), lambda: cut(wf.trace(net, X[:4]))


@remedy("Admitted: merge, permute, remove.")
def an_edit_that_is_not_admitted() -> tuple[Do, Do]:
    net = Forward(lambda h: h.sigmoid())
    group = wf.trace(net, X[:4])["a"]

    def right() -> None:
        edits.permute(group, torch.arange(8).flip(0))
        edits.merge(group, torch.arange(8) // 2)
        edits.remove(group, torch.arange(4))

    return lambda: edits.rescale(group, torch.full((8,), 2.0)), right


@remedy("Keep at least one channel.")
def nothing_left() -> tuple[Do, Do]:
    group = wf.trace(mlp(), X[:4])["0"]
    return lambda: edits.remove(group, torch.arange(0)), lambda: edits.remove(group, torch.arange(1))


@remedy("Rescale afterwards.")
def a_rescale_before_a_merge() -> tuple[Do, Do]:
    group = wf.trace(mlp(4), X[:4])["0"]
    merged = edits.merge(group, torch.tensor([0, 0, 1, 1]))
    first = edits.rescale(group, torch.full((4,), 2.0))
    small = wf.trace(mlp(2), X[:4])["0"]
    return lambda: first.then(merged), lambda: merged.then(edits.rescale(small, torch.full((2,), 2.0)))


# the compressor -------------------------------------------------------------------------------------------------------


@remedy("Pass loss=")
def a_probe_without_a_loss() -> tuple[Do, Do]:
    return lambda: compressor(probe=PROBE), lambda: once(prepared(probe=PROBE, loss=LOSS, max_increase=9.0))


@remedy("Call prepare() first.")
def a_compressor_that_is_not_prepared() -> tuple[Do, Do]:
    c = compressor()
    return c.once, lambda: (c.prepare(), once(c))


@remedy("Pass total_steps=", "once()")
def a_step_without_total_steps() -> tuple[Do, Do]:
    net = mlp()
    c = prepared(net)

    def right() -> None:
        once(c)
        other = mlp()
        optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
        timed = compressor(other, [wf.Prune(keep=0.5, at=0.5)], total_steps=4)
        timed.prepare(optimizer)
        all_accepted(trained(timed, optimizer, 4))

    return c.step, right


@remedy("number of optimiser steps")
def total_steps_that_are_no_number() -> tuple[Do, Do]:
    return lambda: compressor(total_steps="ten"), lambda: compressor(total_steps=10)


@remedy("Pass it in a list: [Prune(...)].")
def methods_that_are_no_list() -> tuple[Do, Do]:
    return lambda: compressor(methods=wf.Prune(keep=0.5)), lambda: once(prepared(methods=[wf.Prune(keep=0.5)]))


@remedy("Pass [Prune(...)].")
def a_class_for_a_method() -> tuple[Do, Do]:
    return lambda: compressor(methods=[wf.Prune]), lambda: once(prepared(methods=[wf.Prune(keep=0.5)]))


@remedy("[weightfold.Fold(keep=0.5)]")
def what_is_no_method() -> tuple[Do, Do]:
    return lambda: compressor(methods=[0.5]), lambda: once(prepared(methods=[wf.Fold(keep=0.5)]), [X])


@remedy("Give it once")
def a_method_twice() -> tuple[Do, Do]:
    def twice() -> wf.SelfCompress:
        return wf.SelfCompress(target="2 kB")

    return (
        lambda: compressor(methods=[twice(), twice()], total_steps=9),
        lambda: compressor(methods=[twice()], total_steps=9),
    )


@remedy("weights of a run that did not diverge")
def weights_that_are_not_finite() -> tuple[Do, Do]:
    net = mlp()
    good = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    return lambda: prepared(net), lambda: (net.load_state_dict(good), once(prepared(net)))


@remedy("load_state_dict")
def weights_that_diverged_later() -> tuple[Do, Do]:
    net = mlp()
    c = prepared(net)
    good = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    return c.convert, lambda: (net.load_state_dict(good), c.convert())


@remedy("build a new Compressor and prepare it")
def a_model_changed_after_prepare() -> tuple[Do, Do]:
    net = mlp()
    c = prepared(net)
    net[0], net[2] = nn.Linear(6, 10), nn.Linear(10, 3)
    return c.once, lambda: once(prepared(net))


@remedy("Ask for 1 at most.")
def more_edits_to_take_back_than_stand() -> tuple[Do, Do]:
    c = prepared()
    once(c)
    return lambda: c.unfold(2), lambda: (c.unfold(1), once(c), c.undo())


@remedy("rebuild and take_back of weightfold.replay")
def an_edit_that_is_not_in_memory(tmp_path: Path) -> tuple[Do, Do]:
    net, folder = mlp(), tmp_path
    start = copy.deepcopy(net)
    ledger = wf.Ledger.create(folder / "ledger.db", run={})
    c = prepared(net, ledger=ledger)
    once(c)
    once(c)
    c.undo()
    assert net[0].out_features == 8

    def right() -> None:
        made = rebuild(copy.deepcopy(start), X[:4], read_history(folder), ledger.get_blob)
        take_back(net, made, ledger.get_blob)
        assert torch.equal(net[0].weight, start[0].weight)
        ledger.close()

    return c.undo, right


# the probe ------------------------------------------------------------------------------------------------------------


@remedy("Pass probe=[(inputs, targets), ...]")
def a_probe_without_targets() -> tuple[Do, Do]:
    wrong = [(X[:32], X[:32, :1])]
    return lambda: prepared(probe=wrong, loss=LOSS), lambda: prepared(probe=PROBE, loss=LOSS)


@remedy("Check the probe's inputs and targets.")
def a_probe_that_is_not_finite() -> tuple[Do, Do]:
    wrong = [(X * float("nan"), Y)]
    return lambda: prepared(probe=wrong, loss=LOSS), lambda: prepared(probe=PROBE, loss=LOSS)


@remedy("Draw the probe at random from the training split.")
def a_probe_of_one_class() -> tuple[Do, Do]:
    drawn = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    return (
        lambda: prepared(probe=[(X[Y == 0], Y[Y == 0])], loss=LOSS),
        lambda: prepared(probe=[(X[drawn], Y[drawn])], loss=LOSS),
    )


def _run(probe: Any, **given: Any) -> list[Any]:
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    methods = [wf.Fold(keep=0.5, at=0.5)]
    c = compressor(net, methods, probe=probe, loss=LOSS, total_steps=6, max_increase=9.0, **given)
    c.prepare(optimizer)
    return trained(c, optimizer, 6)


@remedy("Pass a larger probe.")
def a_probe_smaller_than_a_batch() -> tuple[Do, Do]:
    def right() -> None:
        all_accepted(_run(PROBE))

    return lambda: _run([(X[:8], Y[:8])]), right


# optimisers -----------------------------------------------------------------------------------------------------------


@remedy("Pass the optimiser whose step() trains the model")
def a_scheduler_for_an_optimiser() -> tuple[Do, Do]:
    net = mlp()
    return lambda: compressor(net).prepare(net.parameters()), lambda: compressor(net).prepare(_sgd(net))


def _sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01)


@remedy("torch.optim.AdamW", "once()")
def an_optimiser_that_cannot_follow() -> tuple[Do, Do]:
    net = mlp()

    def right() -> None:
        compressor(net).prepare(torch.optim.AdamW(net.parameters()))
        once(prepared(net))

    return lambda: compressor(net).prepare(torch.optim.LBFGS(net.parameters())), right


@remedy("from model.parameters()")
def an_optimiser_of_another_model() -> tuple[Do, Do]:
    net = mlp()
    return lambda: compressor(net).prepare(_sgd(mlp())), lambda: compressor(net).prepare(_sgd(net))


@remedy("prepare(new_optimizer)")
def an_optimiser_that_was_swapped() -> tuple[Do, Do]:
    def run(*, named: bool) -> list[Any]:
        net = mlp()
        first, second = _sgd(net), _sgd(net)
        c = compressor(net, [wf.Fold(keep=0.5, at=0.5)], total_steps=60)
        c.prepare(first)
        trained(c, first, 2)
        if named:
            c.prepare(second)
        return trained(c, second, 58)

    def right() -> None:
        all_accepted(run(named=True))

    return lambda: run(named=False), right


@remedy("Key it by the model's own parameter names.")
def an_average_by_other_names() -> tuple[Do, Do]:
    net = mlp()

    def run(prefix: str) -> None:
        average = {prefix + name: value.clone() for name, value in net.state_dict().items()}
        c = compressor(net)
        c.prepare(_sgd(net), [average])
        once(c)
        assert len(average["0.weight"]) == 8

    return lambda: run("ema."), lambda: run("")


@remedy("an average of the model that is compressed")
def an_average_of_another_model() -> tuple[Do, Do]:
    net = mlp()

    def run(model: nn.Module) -> None:
        average = AveragedModel(model)
        c = compressor(net)
        c.prepare(_sgd(net), [average])
        once(c)
        assert average.module[0].out_features == 8

    return lambda: run(mlp(32)), lambda: run(net)


# resuming -------------------------------------------------------------------------------------------------------------


def _saved(**given: Any) -> dict[str, Any]:
    c = prepared(**given)
    once(c)
    return c.state_dict()


@remedy("freshly built and prepared")
def a_state_for_a_network_that_was_edited() -> tuple[Do, Do]:
    state = _saved()
    edited = prepared()
    once(edited)
    return lambda: edited.load_state_dict(state), lambda: prepared().load_state_dict(state)


@remedy("settings that the run started with")
def a_state_of_another_network() -> tuple[Do, Do]:
    state = _saved()
    other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    return lambda: prepared(other).load_state_dict(state), lambda: prepared(mlp()).load_state_dict(state)


# methods --------------------------------------------------------------------------------------------------------------


@remedy("Did you mean 'keep'?")
def a_setting_that_is_misspelt() -> tuple[Do, Do]:
    return lambda: wf.Fold(kep=0.5), lambda: wf.Fold(keep=0.5)


@remedy("Leave one out.")
def a_fold_by_two_dials() -> tuple[Do, Do]:
    def right() -> None:
        wf.Fold(max_accuracy_loss=1.0)
        wf.Fold(macs=0.5)

    return lambda: wf.Fold(max_accuracy_loss=1.0, macs=0.5), right


@remedy("Pass loss= and probe=", "'keep'")
def a_dial_without_a_probe() -> tuple[Do, Do]:
    def run(methods: Any, **given: Any) -> None:
        net = mlp()
        compressor(net, methods, total_steps=20, **given).prepare(_sgd(net))

    def right() -> None:
        run([wf.Fold(max_accuracy_loss=1.0)], loss=LOSS, probe=PROBE)
        run([wf.Fold(keep=0.5, at=0.5)])

    return lambda: run([wf.Fold(max_accuracy_loss=1.0)]), right


@remedy("once(batches)")
def a_fold_at_once_without_inputs() -> tuple[Do, Do]:
    c = prepared(methods=[wf.Fold(keep=0.5)])
    return c.once, lambda: once(c, [X])


@remedy("training mode", "probe=")
def a_fold_in_a_run_without_statistics() -> tuple[Do, Do]:
    def run(*, training: bool, **given: Any) -> list[Any]:
        net = mlp().train(training)
        optimizer = _sgd(net)
        c = compressor(net, [wf.Fold(keep=0.5, at=0.5)], total_steps=6, max_increase=9.0, **given)
        c.prepare(optimizer)
        net.train(training)
        return trained(c, optimizer, 6)

    def right() -> None:
        for found in (run(training=True), run(training=False, loss=LOSS, probe=PROBE)):
            all_accepted(found)

    return lambda: run(training=False), right


@remedy("once(batches)")
def wanda_without_inputs() -> tuple[Do, Do]:
    c = prepared(methods=[wf.Prune(keep=0.5, criterion="wanda")])
    return c.once, lambda: once(c, [X])


@remedy("Did you mean 'magnitude'?")
def a_criterion_that_is_not_there() -> tuple[Do, Do]:
    return lambda: prepared(methods=[wf.Prune(criterion="magnitud")]), lambda: wf.Prune(criterion="magnitude")


@remedy("Did you mean '0'?")
def a_pattern_without_a_group() -> tuple[Do, Do]:
    return (
        lambda: prepared(methods=[wf.Prune(keep=0.5, groups="00")]),
        lambda: once(prepared(methods=[wf.Prune(keep=0.5, groups="0")])),
    )


@remedy("Leave one out.")
def a_lump_by_two_measures() -> tuple[Do, Do]:
    return lambda: wf.Lump(eps=0.1, target=0.5), lambda: (wf.Lump(eps=0.1), wf.Lump(target=0.5))


@remedy("Raise it", "'min_channels'")
def a_lump_below_its_narrowest() -> tuple[Do, Do]:
    def lumped(**given: Any) -> list[Any]:
        return prepared(methods=[wf.Lump(**given)]).once([X])

    def right() -> None:
        for found in (lumped(target=0.8, min_channels=8), lumped(target=0.2, min_channels=1)):
            all_accepted(found)

    return lambda: lumped(target=0.2, min_channels=8), right


@remedy("weightfold trace")
def a_lump_of_what_is_frozen() -> tuple[Do, Do]:
    net = Forward(lambda h: h.cumsum(1))

    def right() -> None:
        assert wf.trace(net, X[:4]).frozen

    return lambda: prepared(net, [wf.Lump(eps=0.1)]), right


@remedy("total_steps=", "step()")
def self_compression_at_once() -> tuple[Do, Do]:
    def right() -> None:
        net = mlp(64)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        c = compressor(net, [wf.SelfCompress(target="2 kB")], loss=LOSS, probe=PROBE, total_steps=20)
        c.prepare(optimizer)
        trained(c, optimizer, 20)
        c.convert()

    c = compressor(mlp(64), [wf.SelfCompress(target="2 kB")], loss=LOSS, probe=PROBE)
    return lambda: (c.prepare(), c.once()), right


@remedy("Pass probe= and loss=.")
def self_compression_without_a_probe() -> tuple[Do, Do]:
    def run(**given: Any) -> None:
        net = mlp(64)
        methods = [wf.SelfCompress(max_accuracy_loss=1.0)]
        compressor(net, methods, total_steps=20, **given).prepare(_sgd(net))

    return run, lambda: run(probe=PROBE, loss=LOSS)


@remedy("Ask for more", "make the network itself smaller")
def a_file_smaller_than_its_header() -> tuple[Do, Do]:
    def run(target: str) -> None:
        net = mlp(64)
        c = compressor(net, [wf.SelfCompress(target=target)], loss=LOSS, probe=PROBE, total_steps=20)
        c.prepare(_sgd(net))

    return lambda: run("3 B"), lambda: run("2 kB")


@remedy("48 kB")
def a_target_that_is_no_size() -> tuple[Do, Do]:
    def run(target: str) -> None:
        net = mlp(64)
        c = compressor(net, [wf.SelfCompress(target=target)], loss=LOSS, probe=PROBE, total_steps=20)
        c.prepare(_sgd(net))

    return lambda: run("small"), lambda: run("48 kB")


@remedy("loss + compressor.penalty()")
def a_penalty_that_is_left_out() -> tuple[Do, Do]:
    def run(*, with_penalty: bool) -> list[Any]:
        net = mlp(64)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        c = compressor(net, [wf.SelfCompress(target="2 kB")], loss=LOSS, probe=PROBE, total_steps=40)
        c.prepare(optimizer)
        for _ in range(40):
            optimizer.zero_grad()
            loss = LOSS(c.network(X), Y)
            (loss + c.penalty() if with_penalty else loss).backward()
            optimizer.step()
            c.step()
        return []

    return lambda: run(with_penalty=False), lambda: run(with_penalty=True)


@remedy("Lower 'earliest'.")
def a_first_look_after_the_last() -> tuple[Do, Do]:
    def fold(earliest: float) -> wf.Fold:
        return wf.Fold(max_accuracy_loss=1.0, earliest=earliest, latest=0.1)

    return lambda: fold(0.5), lambda: fold(0.05)


@remedy("Did you mean '0'?")
def a_width_of_no_group() -> tuple[Do, Do]:
    def run(name: str) -> None:
        once(prepared(methods=[wf.Fold(widths={name: 4})]), [X])

    return lambda: run("00"), lambda: run("0")


@remedy("Leave steps for the pull to act.")
def a_pull_without_steps() -> tuple[Do, Do]:
    return lambda: wf.Attract(start=0.5, at=0.5), lambda: wf.Attract(start=0.1, at=0.5)


@remedy("Give a target in bytes instead.")
def accuracy_of_a_regression() -> tuple[Do, Do]:
    probe = [(X, torch.randn(64, 3))]

    def run(**given: Any) -> None:
        net = mlp(64)
        c = compressor(net, [wf.SelfCompress(**given)], loss=F.mse_loss, probe=probe, total_steps=20)
        c.prepare(_sgd(net))

    return lambda: run(max_accuracy_loss=1.0), lambda: run(target=2000)


@remedy("'time_goal'", "'keep' and 'at'")
def a_dial_for_a_regression() -> tuple[Do, Do]:
    probe = [(X, torch.randn(64, 3))]

    def run(**given: Any) -> Any:
        net = mlp(64)
        optimizer = _sgd(net)
        c = compressor(net, [wf.Fold(**given)], loss=F.mse_loss, probe=probe, total_steps=20, max_increase=9.0)
        c.prepare(optimizer)
        events = []
        for _ in range(20):
            optimizer.zero_grad()
            F.mse_loss(c.network(X), probe[0][1]).backward()
            optimizer.step()
            events += c.step()
        return events

    def right() -> None:
        run(time_goal=0.2)
        all_accepted(run(keep=0.5, at=0.5))

    return lambda: run(max_accuracy_loss=1.0), right


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_works(name: str, tmp_path: Path) -> None:
    CASES.follow(name, tmp_path)
