"""Ties: one parameter in several places, chosen, gated, watched, taken back."""

from __future__ import annotations

import copy
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

import weightfold as wf
from weightfold.errors import ConfigError, DataError, EditError
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Ledger
from weightfold.methods.tie import Tie, TieConfig
from weightfold.sharing.heads import TiedHeads, like_heads
from weightfold.sharing.pairs import align_, pairs
from weightfold.sharing.ties import Ties
from weightfold.size import parameters

ROOT = Path(__file__).parents[2]


class Parallel(nn.Module):
    """Two layers that get equal gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Deep(nn.Module):
    """Residual blocks of an MLP, a norm and a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(depth)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def deep(seed: int = 0, depth: int = 3) -> Deep:
    torch.manual_seed(seed)
    return Deep(depth)


def data(n: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 8, generator=g), torch.randint(0, 4, (32,), generator=g)) for _ in range(n)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> str:
    """All of an optimiser's state as text, in order of parameter."""
    state = optimizer.state_dict()
    return str((sorted(state["state"].items(), key=lambda item: item[0]), state["param_groups"]))


def inputs(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(16, 4, generator=g) for _ in range(n)]


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=0.0),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, eps=0.0, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=0.0),
}


@pytest.mark.parametrize("name", ["adam", "amsgrad", "rmsprop"])
def test_duplicates_tied_under_way_go_on_as_a_net_that_was_tied_from_the_start(name: str) -> None:
    """These optimisers do not see the gradient's scale, so the tied net walks the same way; state: c and c² times."""
    model, tied = Parallel().double(), Parallel().double()
    model.b.load_state_dict(model.a.state_dict())
    tied.load_state_dict(model.state_dict())
    tied.b.weight = tied.a.weight
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (model, tied)]
    for x in inputs(3):
        for m, o in zip((model, tied), optimizers, strict=True):
            step(m, o, x.double())
    Ties(model, optimizers[:1], "sum").tie("a.weight", "b.weight")
    for key, value in optimizers[1].state[tied.a.weight].items():
        torch.testing.assert_close(optimizers[0].state[model.a.weight][key], value)
    for x in inputs(5):
        for m, o in zip((model, tied), optimizers, strict=True):
            step(m, o, x.double())
    torch.testing.assert_close(model.a.weight, tied.a.weight)


def test_a_step_of_unlike_layers_after_the_tie_is_that_of_the_sum_of_their_gradients() -> None:
    """SGD with momentum, the reference by hand: w - lr (mu (m_a + m_b) + g_a + g_b)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for x in inputs(3):
        step(model, optimizer, x)
    a, b = model[0].weight, model[2].weight
    moments = [optimizer.state[p]["momentum_buffer"].clone() for p in (a, b)]
    Ties(model, [optimizer], "sum").tie("0.weight", "2.weight")
    shared, x = model[0].weight.detach().clone(), inputs(4)[-1]
    torch.testing.assert_close(shared, (shared + shared) / 2)
    u, v = shared.clone().requires_grad_(), shared.clone().requires_grad_()
    grads = torch.autograd.grad(F.linear(torch.tanh(F.linear(x, u)), v).square().mean(), [u, v])
    step(model, optimizer, x)
    expected = shared - 0.05 * (0.9 * (moments[0] + moments[1]) + grads[0] + grads[1])
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert model[2].weight is model[0].weight


def test_with_mean_gradients_tied_duplicates_walk_as_they_would_have_untied() -> None:
    model, untied = Parallel(), Parallel()
    model.b.load_state_dict(model.a.state_dict())
    untied.load_state_dict(model.state_dict())
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, untied)]
    ties: Ties | None = None
    for t, x in enumerate(inputs(6)):
        if t == 3:
            ties = Ties(model, optimizers[:1], "mean")
            ties.tie("a.weight", "b.weight")
        for m, o in zip((model, untied), optimizers, strict=True):
            step(m, o, x)
    torch.testing.assert_close(model.a.weight, untied.a.weight)
    assert ties is not None
    ties.close()
    assert not model.a.weight._backward_hooks


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("gradient", ["mean", "sum"])
def test_undo_is_exact_and_untie_gives_each_its_own_again(name: str, gradient: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = OPTIMIZERS[name](model.parameters())
    for x in inputs(2):
        step(model, optimizer, x)
    before = fingerprint(model), state_of(optimizer)
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    ties = Ties(model, [optimizer], gradient)
    links = [ties.tie("0.weight", "1.weight"), ties.tie("0.weight", "2.weight")]
    assert ties.uses(model[0].weight) == 3
    assert parameters(model) == 16 + 3 * 4
    with pytest.raises(EditError, match="not the latest"):
        ties.undo(links[0])
    for link in reversed(links):
        ties.undo(link)
    assert (fingerprint(model), state_of(optimizer)) == before
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    links = [ties.tie("0.weight", "1.weight"), ties.tie("0.weight", "2.weight")]
    tied = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    step(model, optimizer, inputs(3)[-1])
    for link in links:
        ties.untie(link)
    assert parameters(model) == 3 * 20
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held
    for layer in model:
        assert torch.equal(layer.weight, model[0].weight)
        assert optimizer.state[layer.weight].keys() == tied.keys()
        assert not layer.weight._backward_hooks
    assert len({id(layer.weight) for layer in model}) == 3
    step(model, optimizer, inputs(4)[-1])
    assert not torch.equal(model[1].weight, model[0].weight)


def test_untied_shares_of_the_state_add_up_to_the_tied_state() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer, inputs(1)[0])
    ties = Ties(model, [optimizer], "sum")
    links = [ties.tie("0.weight", "1.weight"), ties.tie("0.weight", "2.weight")]
    whole = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    for link in links:
        ties.untie(link)
    found = [optimizer.state[layer.weight] for layer in model]
    torch.testing.assert_close(sum(s["exp_avg"] for s in found), whole["exp_avg"])
    torch.testing.assert_close(sum(s["exp_avg_sq"].sqrt() for s in found).square(), whole["exp_avg_sq"])


def test_layers_of_two_optimisers_can_be_tied() -> None:
    model = Parallel()
    optimizers = [OPTIMIZERS["adam"](model.a.parameters()), OPTIMIZERS["sgd"](model.b.parameters())]
    for o in optimizers:
        step(model, o, inputs(1)[0])
    ties = Ties(model, optimizers)
    link = ties.tie("a.weight", "b.weight")
    assert optimizers[1].param_groups[0]["params"] == []
    step(model, optimizers[0], inputs(1)[0])
    for o in optimizers:
        o.state_dict()
    ties.untie(link)
    assert optimizers[1].param_groups[0]["params"] == [model.b.weight]
    for o in optimizers:
        step(model, o, inputs(1)[0])
        o.state_dict()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: setattr(m, "b", nn.Linear(4, 5, bias=False)), "shape"),
        (lambda m: m.b.double(), "type"),
        (lambda m: m.b.requires_grad_(False), "requires_grad"),
        (lambda m: setattr(m.b, "weight", m.a.weight), "one parameter already"),
    ],
)
def test_what_does_not_fit_is_not_tied(change: Any, what: str) -> None:
    model = Parallel()
    change(model)
    with pytest.raises(ConfigError, match=what):
        Ties(model).tie("a.weight", "b.weight")
    with pytest.raises(EditError, match="nothing"):
        Ties(model).tie("a.weight", "nothing")


def test_frozen_layers_can_be_tied_with_each_other_and_recurrent_ones_follow() -> None:
    model = Parallel().requires_grad_(False)
    Ties(model).tie("a.weight", "b.weight", "first")
    assert model.a.weight is model.b.weight
    gru = nn.GRU(4, 4, num_layers=2)
    x = torch.randn(3, 2, 4)
    Ties(gru).tie("weight_hh_l0", "weight_hh_l1", "first")
    tied = gru(x)[0]
    other = nn.GRU(4, 4, num_layers=2)
    other.load_state_dict(gru.state_dict())
    torch.testing.assert_close(tied, other(x)[0])


def test_pairs_are_ranked_by_likeness_and_only_like_layers_are_pairs() -> None:
    model = deep()
    with torch.no_grad():
        model.blocks[2][1].weight.copy_(model.blocks[0][1].weight + 0.01 * torch.randn(12, 8))
    found = pairs(model)
    assert (found[0].kept, found[0].copy) == ("blocks.0.1", "blocks.2.1")
    assert len(found) == 6
    whole = pairs(model, "blocks.?")
    assert [t for t, _ in whole[0].tensors] == ["blocks.0.1.weight", "blocks.0.3.weight"]
    with pytest.raises(ConfigError, match="No module matches"):
        pairs(model, "block.?")
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"'head.weight'"):
        pairs(model)


def permuted(model: Deep) -> Deep:
    """Block 1 is block 0 with its hidden units in another order."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    a, b = model.blocks[0], model.blocks[1]
    with torch.no_grad():
        b.load_state_dict(a.state_dict())
        b[1].weight.copy_(a[1].weight[order])
        b[1].bias.copy_(a[1].bias[order])
        b[3].weight.copy_(a[3].weight[:, order])
    return model


def test_hidden_units_are_put_into_the_same_order_without_changing_the_network() -> None:
    model, x = permuted(deep()), data()[0][0]
    before = model(x)
    assert {(p.kept, p.copy): p.similarity for p in pairs(model, "blocks.?")}["blocks.0", "blocks.1"] < 0.9
    align_(model, wf.trace(model, x), "blocks.0", "blocks.1")
    torch.testing.assert_close(model(x), before)
    assert pairs(model, "blocks.?")[0].similarity == pytest.approx(1)


def test_a_permuted_copy_is_found_and_tied_at_no_cost() -> None:
    model, batches = permuted(deep()), data()
    n, before = parameters(model), model(batches[0][0])
    tie = Tie(layers="blocks.?", similarity=0.99, max_increase=1e-4)
    tie.prepare(model, loss=F.cross_entropy, probe=batches, example=batches[0][0])
    [event] = tie.once()
    assert (event.kind, event.kept, event.copy) == ("tie", "blocks.0", "blocks.1")
    assert event.parameters == parameters(model) == n - 2 * 12 * 8
    torch.testing.assert_close(model(batches[0][0]), before)
    assert tie.bonds() == [("blocks.0", "blocks.1", 0)]


def test_a_layer_with_copies_takes_in_earlier_ones_too() -> None:
    model, batches = deep(depth=4), data()
    with torch.no_grad():
        model.blocks[3].load_state_dict(model.blocks[2].state_dict())
    n = parameters(model)
    tie = Tie(layers="blocks.?", similarity=-1, max_increase=1e9)
    tie.prepare(model, loss=F.cross_entropy, probe=batches)
    tie.once()
    assert tie.bonds()[0] == ("blocks.2", "blocks.3", 0)
    assert parameters(model) <= n - 2 * 2 * 12 * 8
    again = Tie(layers="blocks.?")
    again.prepare(deep(depth=4), loss=F.cross_entropy, probe=batches)
    again.load_state_dict(tie.state_dict())
    assert again.bonds() == tie.bonds()
    assert parameters(again.model) == parameters(model)


def test_a_tie_that_costs_too_much_is_refused_bit_for_bit() -> None:
    model, batches = deep(), data()
    optimizer = torch.optim.Adam(model.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    before = fingerprint(model), state_of(optimizer)
    tie = Tie(similarity=-1, max_increase=0.0, value="first", tries=2)
    tie.prepare(model, optimizer, loss=F.cross_entropy, probe=batches, example=batches[0][0])
    events = tie._attempt()
    assert [event.kind for event in events] == ["refusal", "refusal"]
    assert "more than 0" in events[0].reason
    assert (fingerprint(model), state_of(optimizer)) == before


def near(model: Deep, rank: int = 1) -> Deep:
    """Block 1's first layer is block 0's plus something of low rank, large enough to matter."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        u, v = torch.randn(12, rank, generator=g), torch.randn(rank, 8, generator=g)
        model.blocks[1][1].weight.copy_(model.blocks[0][1].weight + u @ v)
    return model


def test_a_low_rank_correction_saves_a_tie_and_is_written_out_at_the_end() -> None:
    model, batches = near(deep()), data()
    full, before = parameters(model), model(batches[0][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = [(x, model(x).detach()) for x, _ in batches]
    for rank, kinds in ((0, {"refusal"}), (1, {"tie"})):
        tie = Tie(layers="blocks.[01].1", similarity=-1, max_increase=1e-4, rank=rank)
        tie.prepare(model, optimizer, loss=F.mse_loss, probe=probe)
        assert {event.kind for event in tie.once()} == kinds
    assert parameters(model) == full - 12 * 8 + 12 + 8
    torch.testing.assert_close(model(batches[0][0]), before)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    after = model(batches[0][0])
    tie.convert()
    torch.testing.assert_close(model(batches[0][0]), after)
    assert type(model.blocks[1][1]) is nn.Linear
    assert parameters(model) == full
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def run(steps: int, stop: int | None = None, state: Any = None, **settings: Any) -> tuple[Deep, Any, Tie]:
    model = permuted(deep())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    tie = Tie(layers="blocks.?", every=3, start=0.2, watch=4, similarity=0.5, **settings)
    batches = data(steps, seed=9)
    tie.prepare(
        model, optimizer, loss=F.cross_entropy, probe=data(), example=torch.zeros(32, 8), total_steps=len(batches)
    )
    start = 0
    if state is not None:
        start, saved = state
        tie.load_state_dict(saved[2])
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for x, y in batches[start:stop]:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        tie.step()
    return model, optimizer, tie


def test_ties_in_training_are_watched_and_undone_when_they_hurt() -> None:
    model, optimizer, tie = run(20, max_increase=0.05)
    assert [event.kind for event in tie.events][:1] == ["tie"]
    assert model.blocks[1][1].weight is model.blocks[0][1].weight
    bond = tie._bonds[0]
    bond.watched, bond.before = True, [value - 1 for value in bond.before]
    [event] = tie._watch()
    assert event.kind == "untie"
    assert "steps later" in event.reason
    assert model.blocks[1][1].weight is not model.blocks[0][1].weight
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert not [p for p in tie._candidates() if (p.kept, p.copy) == ("blocks.0", "blocks.1")]


@pytest.mark.parametrize("stop", [2, 7, 15])
def test_a_run_goes_on_after_a_restart_as_if_it_had_not_stopped(stop: int) -> None:
    whole = run(20, max_increase=0.05)
    cut = run(20, stop=stop, max_increase=0.05)
    saved = copy.deepcopy([part.state_dict() for part in cut])
    json.dumps(saved[2])
    again = run(20, state=(stop, saved), max_increase=0.05)
    assert fingerprint(again[0]) == fingerprint(whole[0])
    assert again[2].bonds() == whole[2].bonds() != []


def test_each_decision_is_in_the_ledger(tmp_path: Path) -> None:
    model = deep()
    with Ledger.create(tmp_path / "run.db", run={}) as ledger:
        tie = Tie(similarity=-1.0, max_increase=0.5)
        tie.prepare(model, loss=F.cross_entropy, probe=data(), ledger=ledger)
        events = tie.once()
        entries = list(ledger.entries())[1:]
        ledger.verify()
    assert [entry.kind for entry in entries] == [event.kind for event in events]
    assert "tie" in [entry.kind for entry in entries]
    assert entries[-1].body["fingerprint"] == fingerprint(model)
    assert entries[0].body["kept"] == events[0].kept


def test_a_network_without_like_layers_or_a_probe_is_refused() -> None:
    with pytest.raises(ConfigError, match="No two layers"):
        Tie().prepare(nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 4)), loss=F.cross_entropy, probe=data())
    with pytest.raises(ConfigError, match="probe"):
        Tie().prepare(deep(), loss=F.cross_entropy, probe=[])
    with pytest.raises(DataError, match="not finite"):
        Tie().prepare(deep(), loss=lambda out, _: out.sum() / 0, probe=data())
    with pytest.raises(ConfigError, match="gradient"):
        Tie(gradient="median")
    assert TieConfig.from_json(TieConfig(rank=2).to_json()) == TieConfig(rank=2)


def test_heads_share_their_rows_in_training_and_are_plain_afterwards() -> None:
    torch.manual_seed(0)
    keys = nn.Linear(6, 8)
    with torch.no_grad():
        keys.weight[4:6] = keys.weight[:2] * 1.1
    labels = like_heads([keys.weight], n_heads=4, n_kept=3)
    assert labels.tolist() == [0, 1, 0, 2]
    names, kept = list(dict(keys.named_parameters())), [id(p) for p in keys.parameters()]
    heads = TiedHeads(keys, ["weight", "bias"], labels)
    assert parameters(keys) == 6 * 6 + 6
    optimizer = torch.optim.Adam(keys.parameters(), lr=0.1)
    keys(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(keys.weight[4:6], keys.weight[:2])
    out = keys(torch.ones(1, 6))
    heads.convert()
    assert torch.equal(keys(torch.ones(1, 6)), out)
    assert type(keys) is nn.Linear
    assert list(dict(keys.named_parameters())) == names
    assert [id(p) for p in keys.parameters()] == kept
    for bad, match in ((torch.tensor([0, 2]), "left out"), (torch.tensor([0, 1, 2]), "divide")):
        with pytest.raises(ConfigError, match=match):
            TiedHeads(keys, ["weight"], bad)
    with pytest.raises(ConfigError, match="1 to 4"):
        like_heads([keys.weight], 4, 5)


SNIPPET = """
import json
from tests.methods.test_tie import fingerprint, run
model, _, tie = run(20, max_increase=0.05)
print(json.dumps([fingerprint(model), [vars(e) for e in tie.events]]))
"""


def test_the_hash_seed_does_not_matter() -> None:
    found = []
    for seed in ("0", "1234"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", SNIPPET], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
