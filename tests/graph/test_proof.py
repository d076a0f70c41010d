"""A graph that is wrong for the model at hand is found out by running its edits, whatever the rules said.

The graphs come from a plain network; the networks on which they are proved have the same tensors and another forward.
So no rule has a say in what is tested here. What is right follows from the forward alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import weightfold as wf
import weightfold.errors
from weightfold.graph import edit, proof
from weightfold.graph.apply import apply
from weightfold.graph.group import ChannelGraph
from weightfold.graph.proof import prepared, proved, with_symmetries_proved
from weightfold.graph.trials import KINDS, _random_order, awake, kinds_of, rounds, trials_for, trials_on
from weightfold.graph.twin import Limits, copy_within, numbers, twin_of, why_not

C = 12
ALL = {"permute", "rescale", "remove", "merge"}


class Net(nn.Module):
    """Two layers; what lies between is given."""

    def __init__(self, between: Callable[[Tensor, Net], Any] | None = None) -> None:
        super().__init__()
        self.a = nn.Linear(5, C)
        self.b = nn.Linear(C, 3)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        out = h if self.between is None else self.between(h, self)
        return (self.b(out[0]), *out[1:]) if isinstance(out, tuple) else self.b(out)


def training_only(h: Tensor, net: Net) -> Tensor:
    return h * torch.arange(1, h.shape[-1] + 1).to(h) if net.training else h


def kept_loss(h: Tensor, net: Net) -> Tensor:
    net.loss = h.square().mean()
    return h


def lazily_wide(h: Tensor, net: Net) -> Tensor:
    return h * 1.5 if h.shape[-1] > C // 2 else h


PLACES: dict[str, tuple[Callable[[Tensor, Net], Any], set[str]]] = {
    "nothing": (lambda h, net: h, set()),
    "dropout": (lambda h, net: F.dropout(h, 0.5, net.training), set()),
    "dropout that never ends": (lambda h, net: F.dropout(h, 0.5, True), set()),
    "noise": (lambda h, net: h + torch.randn_like(h).relu(), set()),
    "slopes drawn at random": (lambda h, net: F.rrelu(h, 0.1, 0.3, net.training), set()),
    "mean over samples": (lambda h, net: h - h.mean(0), set()),
    "integer width": (lambda h, net: h / h.shape[-1], {"remove", "merge"}),
    "number of elements": (lambda h, net: h * h.numel(), {"remove", "merge"}),
    "mean over channels": (lambda h, net: h - h.mean(-1, keepdim=True), {"rescale", "remove", "merge"}),
    "another factor when narrow": (lazily_wide, {"remove", "merge"}),
    "square": (lambda h, net: h.square(), {"rescale"}),
    "sigmoid": (lambda h, net: torch.sigmoid(h) - 0.5, {"rescale"}),
    "sum as a second output": (lambda h, net: (h, h.sum(-1)), {"rescale", "remove", "merge"}),
    "width as a second output": (lambda h, net: (h, h.shape[-1]), {"remove", "merge"}),
    "count in a dictionary": (lambda h, net: (h, {"on": (h > 0).sum(-1)}), {"remove", "merge"}),
    "loss kept as an attribute": (kept_loss, {"rescale", "remove", "merge"}),
    "neighbours": (lambda h, net: h + h.roll(1, -1), ALL),
    "running sum": (lambda h, net: h.cumsum(-1), ALL),
    "first channel alone": (lambda h, net: h * h[:, :1], ALL),
    "in training by place": (training_only, ALL),
}


def trials_of(model: nn.Module, example: Any, **limits: Any) -> Any:
    twin = copy_within(model, example, Limits(**limits))
    assert not isinstance(twin, str), twin
    return trials_on(twin)


def plain_graph() -> ChannelGraph:
    torch.manual_seed(0)
    return wf.trace(Net(), torch.randn(4, 5))


@pytest.mark.parametrize("place", PLACES)
def test_what_the_model_refutes_is_withdrawn_and_nothing_else(place: str) -> None:
    between, lost = PLACES[place]
    torch.manual_seed(0)
    net, x = Net(between), torch.randn(4, 5)
    graph = proved(net, plain_graph(), ["a"], trials_of(net, x))
    assert ALL - graph["a"].admits == lost
    assert {name for name, _, _ in graph.proved.withdrawn} == ({"a"} if lost else set())
    for kind in lost:
        assert "tried on this model" in graph["a"].reasons[kind]
    assert bool(graph.proved)
    assert graph.proved.modes == ("evaluation", "training")


def test_the_reason_says_what_was_seen() -> None:
    net = Net(lambda h, _: (h, h.sum(-1)))
    graph = proved(net, plain_graph(), ["a"], trials_of(net, torch.randn(4, 5)))
    assert "output 1" in graph["a"].reasons["remove"]
    assert "channels of 'a'" in graph["a"].reasons["remove"]
    with pytest.raises(wf.errors.EditError, match="tried on this model"):
        edit.remove(graph["a"], torch.tensor([0, 1]))


class Two(nn.Module):
    """Two like blocks, one of which may be awkward."""

    def __init__(self, awkward: int | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, C), nn.ReLU(), nn.Linear(C, 6)) for _ in range(3))
        self.awkward = awkward

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            h = block[1](block[0](x))
            x = x + block[2](h / h.shape[-1] if k == self.awkward else h)
        return x


@pytest.mark.parametrize("large", [False, True])
def test_only_the_group_that_is_wrong_loses_its_edits(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    graph = wf.trace(Two(None), x)
    if large:
        monkeypatch.setattr(proof, "LARGE", 0)
    graph = proved(Two(1), graph, [g.name for g in graph], trials_of(Two(1), x))
    assert "remove" not in graph["blocks.1.0"].admits
    assert "permute" in graph["blocks.1.0"].admits
    assert {"remove", "merge"} <= graph["blocks.0.0"].admits & graph["blocks.2.0"].admits


def test_with_nothing_wrong_few_forwards_settle_all_groups() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8))]
    net, x = nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(6, 8)
    trials = trials_of(net, x)
    graph = proved(net, wf.trace(net, x), [g.name for g in wf.trace(net, x)], trials)
    assert len(graph) == 20
    assert not graph.proved.withdrawn
    assert trials.n_runs <= 12


def test_the_model_is_left_alone_and_the_same_graph_comes_twice() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    net[1].eval()
    x = torch.randn(2, 3, 6, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes, random = [m.training for m in net.modules()], torch.get_rng_state()
    first, second = prepared(net, x), prepared(net, x)
    assert first.summary() == second.summary()
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.get_default_dtype() == torch.float32


def test_one_sample_under_batch_norm_is_compared_in_training_mode_too() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    assert prepared(net, torch.zeros(1, 4)).proved.modes == ("evaluation", "training")


def test_zeros_that_hide_an_error_are_filled() -> None:
    """All biases and the example are zero: a factor that follows the width would go unseen on a layer of zeros."""
    net = Net(lambda h, _: h + h.shape[-1])
    with torch.no_grad():
        net.b.weight.zero_()
    assert "remove" not in proved(net, plain_graph(), ["a"], trials_of(net, torch.zeros(2, 5)))["a"].admits


def test_a_copy_is_generic_and_keeps_ties_signs_masks_and_integers() -> None:
    net = nn.Module()
    net.one, net.two = nn.Linear(4, 4), nn.Linear(4, 4)
    net.two.weight = net.one.weight
    net.norm = nn.BatchNorm1d(4)
    net.register_buffer("mask", torch.tril(torch.ones(9, 9)))
    net.register_buffer("table", torch.arange(7))
    net.forward = lambda x: net.norm(net.two(net.one(x)))
    twin = twin_of(net, torch.randn(3, 4), torch.Generator().manual_seed(0))
    assert not isinstance(twin, str)
    made = twin.model
    assert made.one.weight is made.two.weight
    assert made.one.weight.dtype == torch.float64
    assert bool((made.norm.running_var > 0).all())
    assert bool((made.norm.weight > 0).all())
    assert torch.unique(made.norm.weight).numel() == 4
    assert bool((made.norm.bias != 0).all())
    assert torch.equal(made.mask, net.mask.double())
    assert torch.equal(made.table, net.table)


@pytest.mark.parametrize(
    ("limits", "why"),
    [({"memory_bytes": 100}, "GiB"), ({"seconds": 0.0}, "forwards would take about")],
)
def test_past_a_limit_the_proof_is_left_out_and_the_graph_says_so(limits: dict[str, Any], why: str) -> None:
    graph = prepared(Net(), torch.randn(4, 5), limits=Limits(**limits))
    assert not graph.proved
    assert why in str(graph.proved)
    assert graph["a"].admits == ALL


def test_without_storage_sizes_are_still_looked_at() -> None:
    with torch.device("meta"):
        net, x = Net(lambda h, _: h / float(h.shape[-1])), torch.empty(4, 5)
    graph = prepared(net, x)
    assert "no storage" in str(graph.proved)
    assert "remove" not in graph["a"].admits


def test_a_graph_that_was_only_traced_says_that_nothing_was_run() -> None:
    assert str(plain_graph().proved).startswith("not proved: ")


def test_groups_that_nobody_touches_are_not_tried() -> None:
    x = torch.randn(4, 6)
    graph = prepared(Two(1), x, names=["blocks.0.0"])
    assert graph.proved.groups == ("blocks.0.0",)
    assert "remove" in prepared(Two(1), x, names=["blocks.0.0"])["blocks.0.0"].admits


def test_symmetries_alone() -> None:
    net = Net(lambda h, _: h / h.shape[-1])
    graph = with_symmetries_proved(net, torch.randn(4, 5))
    assert {"permute", "rescale"} <= graph["a"].admits
    assert graph.proved.modes == ("evaluation",)


@pytest.mark.parametrize("n", [2, 3, 12])
def test_every_channel_moves_in_the_trial_of_a_permutation(n: int) -> None:
    block = torch.arange(3 * n) % 3
    for seed in range(20):
        order = _random_order(3 * n, block, torch.Generator().manual_seed(seed))
        assert bool((order != torch.arange(3 * n)).all())
        assert torch.equal(order.sort().values, torch.arange(3 * n))
        assert torch.equal(block[order], block)


def test_dead_units_do_not_hide_a_wrong_edit() -> None:
    """With all biases far below zero hardly a unit is on: the weights are drawn anew until outputs depend on them."""
    torch.manual_seed(0)
    net, x = Net(lambda h, _: h.cumsum(-1)), torch.randn(2, 5)
    with torch.no_grad():
        net.a.bias.fill_(-0.9)
    graph = plain_graph()
    trials = trials_for(net, x, graph, ["a"])
    assert not isinstance(trials, str)
    assert awake(trials.twin, graph, ["a"])[0] >= awake(trials_of(net, x).twin, graph, ["a"])[0]
    assert proved(net, graph, ["a"], trials)["a"].admits == frozenset()


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["hooks", "new"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_silent_row_of_a_weight_norm_is_silenced_by_its_length(make: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(make(nn.Conv1d(3, 8, 3)), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 9)
    graph = prepared(net, x)
    assert "remove" in graph["0"].admits
    assert not any(kind == "silent" for _, kind, _ in graph.proved.withdrawn)


def test_groups_on_which_no_output_depends_are_told_of() -> None:
    torch.manual_seed(0)
    net = Net(lambda h, _: h.detach() * 0)
    graph = replace(plain_graph())
    trials = trials_for(net, torch.randn(2, 5), graph, ["a"])
    assert not isinstance(trials, str)
    assert "'a'" in str(proved(net, graph, ["a"], trials).proved)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_every_kind_gets_its_turn_whatever_the_width(n: int) -> None:
    net, x = nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, 2)), torch.randn(4, 3)
    for group in wf.trace(net, x):
        kinds = kinds_of(group)
        assert sorted(k for part in rounds(group, kinds) for k in part) == sorted(kinds)
        assert set(kinds) <= set(KINDS)
    assert not prepared(net, x).proved.withdrawn


def test_numbers_are_found_in_whatever_holds_them() -> None:
    class Bag:
        def __init__(self) -> None:
            self.inside = [torch.ones(2), {"deep": (torch.zeros(3), 2.0)}]
            self.itself = self

    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 1), torch.ones(1, 1)])
    assert [t.numel() for t in numbers(Bag())] == [2, 3, 1]
    assert numbers(packed)[0].numel() == 3
    assert numbers(None) == []


def test_a_forward_that_breaks_names_its_module() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert why_not(net, torch.zeros(1, 4)) == ""
    net[2] = nn.Linear(7, 2)
    assert "in evaluation mode fails in '2'" in why_not(net, torch.zeros(1, 4))


class OnlyWide(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.a.out_features != C:
            raise RuntimeError("the width was written down")
        return super().forward(x)


def test_an_edit_after_which_the_forward_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof would have refused it; with the proof out of the way, the forward after the edit does."""
    monkeypatch.setattr("weightfold.compressor.prepared", lambda model, example, *, graph, names: graph)
    torch.manual_seed(0)
    net, x = OnlyWide(), torch.randn(4, 5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compressor = wf.Compressor(net, x, [wf.Prune(keep=0.5)])
    compressor.prepare()
    events = compressor.once()
    assert [event.accepted for event in events] == [False]
    assert "the width was written down" in events[0].reason
    assert net.a.out_features == C
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def _unproved_once(monkeypatch: pytest.MonkeyPatch, net: nn.Module, **given: Any) -> str:
    """Compress without the proof, which would have refused; why that was refused. The network is as it was."""
    monkeypatch.setattr("weightfold.compressor.prepared", lambda model, example, *, graph, names: graph)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compressor = wf.Compressor(net, torch.ones(2, 4), [wf.Prune(keep=0.5)], **given)
    compressor.prepare()
    [event] = compressor.once()
    assert not event.accepted
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    return event.reason


def test_a_hook_that_fails_after_an_edit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def knows_its_width(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if output.shape[1] != 8:
            raise RuntimeError("the hook takes 8 channels")
        return 2 * output

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].register_forward_hook(knows_its_width)
    reason = _unproved_once(monkeypatch, net)
    assert "knows_its_width' (" in reason
    assert "on '0'" in reason
    assert reason.endswith("RuntimeError: the hook takes 8 channels")


def test_a_forward_that_fails_without_the_edit_as_well_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    compressor = wf.Compressor(net, torch.ones(2, 4), [wf.Prune(keep=0.5)])
    compressor.prepare()

    def gone(*_: Any) -> None:
        raise OSError("the file is gone")

    net[1].register_forward_pre_hook(gone)
    [event] = compressor.once()
    assert "OSError: the file is gone" in event.reason
    assert event.reason.endswith("without the edit it fails as well")


def test_a_loss_that_fails_after_an_edit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean() + {8: 0.0}[net[0].out_features]

    probe = [(torch.randn(8, 4), torch.randn(8, 2))]
    reason = _unproved_once(monkeypatch, net, loss=loss, probe=probe)
    assert "the loss on the probe fails after the edit" in reason
    assert "{8: 0.0}[net[0].out_features]" in reason
    assert "): KeyError: " in reason


def test_a_withdrawn_edit_reaches_no_method() -> None:
    torch.manual_seed(0)
    net, x = Net(lambda h, _: h / h.shape[-1]), torch.randn(4, 5)
    with pytest.raises(wf.errors.ConfigError, match="none admits 'remove'"):
        wf.Compressor(net, x, [wf.Prune(keep=0.5)]).prepare()


def test_the_same_graph_under_another_hash_seed() -> None:
    code = (
        "import torch, weightfold as wf\n"
        "from weightfold.graph.proof import prepared\n"
        "torch.manual_seed(0)\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 9), torch.nn.Softmax(-1),"
        " torch.nn.Linear(9, 2))\n"
        "print(prepared(net, torch.randn(3, 4)).summary())\n"
    )
    out = [
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert out[0] == out[1]


def test_edits_that_were_proved_are_exact_on_the_model_itself() -> None:
    torch.manual_seed(3)
    net, x = Net().double(), torch.randn(6, 5, dtype=torch.float64)
    graph = prepared(net, x)
    before = net(x)
    apply(net, graph, edit.permute(graph["a"], torch.randperm(C)))
    assert torch.allclose(net(x), before, atol=1e-12)


def test_a_group_refuted_in_its_permutation_admits_nothing() -> None:
    net = Net(lambda h, _: h.cumsum(-1))
    graph = proved(net, plain_graph(), ["a"], trials_of(net, torch.randn(4, 5)))
    assert graph["a"].admits == frozenset()
    assert graph["a"].gauges == ()
    assert replace(graph, groups=()).proved == graph.proved
