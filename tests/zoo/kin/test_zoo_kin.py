"""Embeddings, duplicates and family trees: the truth is how the networks were made."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.errors import ArtifactError, ConfigError
from weightfold.weights.canon import hash_of
from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import Symmetries, symmetries
from weightfold.zoo.find.embed import described, embedding, is_raw
from weightfold.zoo.kin.dedupe import LEVELS, dedupe
from weightfold.zoo.kin.families import Item, families
from weightfold.zoo.kin.tree import arborescence, tree

EXAMPLE = torch.zeros(1, 8)


def make(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))


FOUND = symmetries(make(0), EXAMPLE)


def hidden(net: nn.Module, seed: int, spread: float = 0.7) -> nn.Module:
    return disguise(net, EXAMPLE, torch.Generator().manual_seed(seed), spread=spread, found=FOUND)


def trained(net: nn.Module, seed: int, steps: int) -> nn.Module:
    """The same network after further steps on a task that all share: a random teacher's classes."""
    torch.manual_seed(77)
    teacher = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    x = torch.randn(300, 8, generator=generator)
    y = teacher(x).argmax(1)
    for _ in range(steps):
        mine = torch.randint(300, (32,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(net(x[mine]), y[mine]).backward()
        optimiser.step()
    return net


def items(nets: list[nn.Module], found: Symmetries | None = FOUND) -> list[Item]:
    out = []
    for i, net in enumerate(nets):
        state = {n: t.detach().clone() for n, t in net.state_dict().items()}
        text = None if found is None else hash_of(found, state)
        digest = f"{i}" if i == 0 or not any(same(state, o.load()) for o in out) else "0"
        out.append(Item(f"m{i}", digest, "k", embedding(state, found), text, lambda s=state: s, found))
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def test_embeddings_see_through_disguises_and_tell_strangers_apart() -> None:
    nets = [make(s) for s in range(4)]
    other = [hidden(net, 9) for net in nets]
    _, _, one = described(FOUND, [n.state_dict() for n in nets])
    _, _, two = described(FOUND, [n.state_dict() for n in other])
    assert one.dtype == np.float32
    assert one.shape == (4, 256)
    apart = np.linalg.norm(one[:, None] - two[None], axis=2)
    assert np.diag(apart).max() < 1e-3
    assert (apart + 10 * np.eye(4)).min() > 0.3
    assert np.allclose(one[2], embedding(nets[2].state_dict(), FOUND), atol=1e-5)


def test_embeddings_without_an_architecture_ignore_order_alone() -> None:
    state = make(0).state_dict()
    order = torch.randperm(24)
    turned = {**state, "0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order]}
    turned["2.weight"] = state["2.weight"][:, order]
    assert np.abs(embedding(state) - embedding(turned)).max() < 1e-4
    assert is_raw(embedding(state))
    assert not is_raw(embedding(state, FOUND))
    scaled = {**state, "0.weight": 3 * state["0.weight"]}
    assert np.abs(embedding(state) - embedding(scaled)).max() > 0.1


def test_one_broken_model_of_a_batch_does_not_hide_the_others() -> None:
    states = [make(s).state_dict() for s in range(3)]
    states[1]["0.weight"][0, 0] = float("nan")
    hashes, reasons, vectors = described(FOUND, states)
    assert hashes[0] == hash_of(FOUND, states[0])
    assert hashes[1] is None
    assert "NaN" in (reasons[1] or "")
    assert hashes[2] is not None
    assert np.isfinite(vectors).all()
    assert is_raw(vectors[1])


def test_odd_tensors_are_embedded() -> None:
    state = {"a": torch.zeros(0, 3), "b": torch.tensor(2), "c": torch.ones(2, 3, dtype=torch.bfloat16)}
    state |= {"d": torch.full((4,), float("inf")), "e": torch.zeros(3, 3), "f": torch.ones(2, dtype=torch.bool)}
    assert np.isfinite(embedding(state)).all()
    assert np.isfinite(embedding({})).all()


def test_every_level_of_duplicate_is_told() -> None:
    net = make(1)
    permuted = hidden(net, 4, spread=0.0)
    with torch.no_grad():  # a disguise flips signs of tanh units: undo by order alone
        permuted = copy.deepcopy(net)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        permuted[0].weight.copy_(net[0].weight[order]), permuted[0].bias.copy_(net[0].bias[order])
        permuted[2].weight.copy_(net[2].weight[:, order])
        half = copy.deepcopy(permuted).to(torch.bfloat16).float()
        grid = copy.deepcopy(net)
        for p in grid.parameters():
            if p.ndim > 1:
                step = p.abs().max() / 127
                p.copy_((p / step).round() * step)
        noisy = hidden(net, 6)
        for p in noisy.parameters():
            p.mul_(1 + 3e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    nets = [net, copy.deepcopy(net), permuted, hidden(net, 5), half, grid, noisy, make(2), trained(net, 3, 30)]
    groups = dedupe(items(nets))
    assert len(groups) == 1
    assert groups[0].keeper == "m0"
    told = {c.name: c.level for c in groups[0].copies}
    assert told == dict(zip(("m1", "m2", "m3", "m4", "m5", "m6"), (*LEVELS[:4], "quantised", "noisy"), strict=True))
    evidence = {c.name: c.evidence for c in groups[0].copies}
    assert "bfloat16" in evidence["m4"]
    assert "grid" in evidence["m5"]
    for reach, level in enumerate(LEVELS):
        kept = {c.level for g in dedupe(items(nets), level=level) for c in g.copies}
        assert kept <= set(LEVELS[: reach + 1])


def test_many_copies_of_one_model_are_listed_at_once() -> None:
    """Work in proportion to the copies: with all pairs of copies and links these would take minutes."""
    copies = [Item(f"n{i}", "same", "raw 1", None, None, dict, None) for i in range(3000)]
    start = time.perf_counter()
    (group,) = dedupe(copies, level="identical")
    assert time.perf_counter() - start < 10
    assert [copy.name for copy in group.copies] == [f"n{i}" for i in range(1, 3000)]
    assert {copy.of for copy in group.copies} == {"n0"}


def test_a_level_that_is_none_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="rescaled"):
        dedupe([], level="rescale")


def test_duplicates_without_an_architecture() -> None:
    net = make(1)
    nets = [net, copy.deepcopy(net), copy.deepcopy(net).to(torch.float16).float(), make(3)]
    told = {c.name: c.level for g in dedupe(items(nets, None)) for c in g.copies}
    assert told == {"m1": "identical", "m2": "quantised"}


@pytest.fixture(scope="module")
def kin() -> tuple[list[nn.Module], list[int | None]]:
    """Two families of a root, two children and a grandchild each, all disguised."""
    nets: list[nn.Module] = []
    parents: list[int | None] = []
    for seed in (10, 20):
        base = len(nets)
        nets.append(trained(make(seed), seed, 400))
        parents.append(None)
        for child in (1, 2):
            nets.append(trained(nets[base], seed + child, 60))
            parents.append(base)
        nets.append(trained(nets[base + 1], seed + 5, 60))
        parents.append(base + 1)
    return [hidden(net, i) for i, net in enumerate(nets)], parents


def test_families_and_parents_are_told_of_disguised_networks(kin: tuple[list[nn.Module], list[int | None]]) -> None:
    nets, parents = kin
    assert families(items(nets)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    found = tree(items(nets))
    said = {edge.child: edge.parent for family in found for edge in family.edges}
    right = sum(said[f"m{i}"] == (None if p is None else f"m{p}") for i, p in enumerate(parents))
    assert right >= 6, said  # grandchildren of 60 steps are at the edge of what can be told
    assert all(0 < edge.confidence <= 1 for family in found for edge in family.edges)
    assert [family.root for family in found] == ["m0", "m4"]


def test_a_tree_does_not_depend_on_the_order_of_models(kin: tuple[list[nn.Module], list[int | None]]) -> None:
    listed = items(kin[0])
    one = {e.child: e.parent for f in tree(listed) for e in f.edges}
    two = {e.child: e.parent for f in tree(listed[::-1]) for e in f.edges}
    assert one == two


def test_copies_have_no_parent_between_them(kin: tuple[list[nn.Module], list[int | None]]) -> None:
    nets = kin[0][:3]
    found = tree(items([*nets, hidden(nets[1], 50), make(99)]))
    assert [len(f.names) for f in found] == [4, 1]
    assert {e.child: e.copies for e in found[0].edges}["m1"] == ("m3",)


def test_a_pair_and_a_single_model() -> None:
    root = trained(make(5), 5, 400)
    found = tree(items([trained(root, 6, 80), root]))
    assert [(e.child, e.parent) for e in found[0].edges] == [("m1", None), ("m0", "m1")]
    assert tree(items([root]))[0].root == "m0"
    assert tree([]) == []


def test_other_tensors_of_the_same_number_are_strangers() -> None:
    one = {"a": torch.randn(4, 6), "b": torch.randn(4)}
    two = {"a": one["a"].reshape(6, 4), "b": one["b"]}
    listed = [
        Item(f"m{i}", f"{i}", "raw 28", embedding(s), None, lambda s=s: s, None) for i, s in enumerate((one, two))
    ]
    assert families(listed) == [[0], [1]]
    assert dedupe(listed) == []


def test_a_model_that_cannot_be_read_is_named() -> None:
    listed = items([make(1), make(2)])

    def broken() -> dict[str, Tensor]:
        raise ArtifactError("The blob of 'm1' is damaged.")

    listed[1] = Item(**{**vars(listed[1]), "load": broken})
    with pytest.raises(ArtifactError, match="m1"):
        tree(listed)


def test_the_heaviest_tree_is_found() -> None:
    """Against all trees, tried one by one."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        n = 5
        scores = generator.normal(size=(n, n))
        np.fill_diagonal(scores, -np.inf)
        best = -np.inf
        for code in range(n ** (n - 1)):
            parents = [None] + [code // n**i % n for i in range(n - 1)]
            if any(parents[x] == x for x in range(1, n)) or not _rooted(parents):
                continue
            best = max(best, sum(scores[x, parents[x]] for x in range(1, n)))
        found = arborescence(scores, 0)
        assert _rooted(found)
        assert sum(scores[x, found[x]] for x in range(1, n)) == pytest.approx(best)


def _rooted(parents: list[int | None]) -> bool:
    for x in range(len(parents)):
        seen = 0
        while parents[x] is not None and seen <= len(parents):
            x, seen = parents[x], seen + 1
        if seen > len(parents):
            return False
    return True
