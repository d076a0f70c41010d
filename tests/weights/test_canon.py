"""Canonical form and semantic hash: the reference is the network's own output, and hand-made symmetric weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import ArtifactError, GraphError
from weightfold.weights.balance import rows_of
from weightfold.weights.canon import (
    TOLERANCE,
    canonical,
    hash_distance,
    hash_keys,
    hash_of,
    hashes_of,
    same_hash,
    semantic_hash,
)
from weightfold.weights.disguise import disguise
from weightfold.weights.point import point
from weightfold.weights.symmetry import symmetries

from .conftest import Made


def softmax_error(a: Tensor, b: Tensor) -> float:
    """Largest difference of log-probabilities over the last dimension."""
    return float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max())


def test_canonical_form_computes_the_same(made: Made) -> None:
    model, example = made
    twin = canonical(model, example)
    with torch.no_grad():
        assert softmax_error(model(example), twin(example)) < 2e-5
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_canonical_form_and_hash_see_through_disguises(made: Made) -> None:
    model, example = made
    found = symmetries(model, example)
    text, twin = semantic_hash(model, example, found=found), canonical(model, example, found=found)
    for seed in range(3):
        other = disguise(model, example, torch.Generator().manual_seed(seed), found=found, shift_logits=True)
        with torch.no_grad():
            assert softmax_error(model(example), other(example)) < 1e-3
        theirs = semantic_hash(other, example, found=found)
        assert hash_distance(text, theirs) < TOLERANCE
        assert any(a == b for a, b in zip(hash_keys(text), hash_keys(theirs), strict=True))
        for (name, a), b in zip(
            twin.state_dict().items(), canonical(other, example, found=found).state_dict().values(), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.float().abs().max())), name


def test_many_at_once_are_hashed_as_one_by_one(made: Made) -> None:
    """Neighbours in a batch do not matter: a dead channel in one model, scales far apart in another."""
    model, example = made
    found = symmetries(model, example)
    generator = torch.Generator().manual_seed(5)
    states = []
    for spread in (0.0, 1.0, 3.0):
        other = disguise(model, example, generator, found=found, spread=spread)
        state = {name: value.clone() for name, value in other.state_dict().items()}
        if spread == 1.0:
            next(v for v in state.values() if v.ndim > 1)[0] = 0
        states.append(state)
    for text, state in zip(hashes_of(found, states), states, strict=True):
        assert hash_distance(text, hash_of(found, state)) <= 2**-25


def test_hash_tells_small_changes_apart(made: Made) -> None:
    model, example = made
    found = symmetries(model, example)
    text = semantic_hash(model, example, found=found)
    generator = torch.Generator().manual_seed(3)
    for size in (1e-2, 1e-4, 1e-5):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1 + size * torch.randn(p.shape, generator=generator))
        assert not same_hash(text, semantic_hash(other, example, found=found))


def test_ties_and_dead_units_are_stable() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    example = torch.randn(2, 4)
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1], net[2].weight[:, 1] = net[0].weight[0], net[0].bias[0], net[2].weight[:, 0]
        net[0].weight[2], net[0].bias[2] = 0, 0
        net[2].weight[:, 3] = 0
    found = symmetries(net, example)
    text, twin = semantic_hash(net, example, found=found), canonical(net, example, found=found)
    for seed in range(5):
        other = disguise(net, example, torch.Generator().manual_seed(seed), found=found)
        assert same_hash(text, semantic_hash(other, example, found=found))
        for a, b in zip(twin.parameters(), canonical(other, example, found=found).parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        net[2].weight[:, 2] *= 7  # what reads a unit that nothing writes has no influence
        net[0].weight[3] += 1  # nor has what writes a unit that nothing reads
    assert same_hash(text, semantic_hash(net, example, found=found))


def test_channels_that_only_their_partners_tell_apart_are_told_apart() -> None:
    """Two layers of two units that are mirror images: swapping one pair alone changes the function."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        net[2].weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        net[4].weight.copy_(torch.tensor([[1.0, 1.0]]))
    example = torch.randn(2, 2)
    forms = [canonical(disguise(net, example, torch.Generator().manual_seed(s)), example) for s in range(6)]
    for form in forms[1:]:
        assert torch.allclose(form[2].weight, forms[0][2].weight, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(forms[0](example), net(example) - net(example) + forms[0](example))


def test_writers_and_readers_weigh_the_same_after_balancing() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    found = symmetries(net, torch.randn(1, 5))
    where = point(found, net.state_dict())
    for freedom in found.freedoms:
        n = freedom.channel.numel()
        plus, minus = (rows_of(where.tensors, side, n).square().sum(1) for side in (freedom.plus, freedom.minus))
        assert torch.allclose(plus, minus, rtol=1e-9)


def test_attention_counts_only_through_its_products() -> None:
    """W_Q -> G W_Q, W_K -> G^-T W_K by hand, in a head of the built-in attention."""
    from weightfold.models.attention import Attention

    torch.manual_seed(2)
    net = Attention(8, 2, causal=False)
    example = torch.randn(1, 5, 8)
    text = semantic_hash(net, example, centre_logits=False)
    mixing = torch.randn(4, 4).double()
    with torch.no_grad():
        for tensor in (net.qkv.weight, net.qkv.bias):
            rows = tensor.view(3, 2, 4, -1)
            rows[0, 0] = (mixing @ rows[0, 0].double()).float()
            rows[1, 0] = (torch.linalg.inv(mixing).T @ rows[1, 0].double()).float()
    assert same_hash(text, semantic_hash(net, example, centre_logits=False))
    with torch.no_grad():
        net.qkv.weight[0] *= 1.001
    assert not same_hash(text, semantic_hash(net, example, centre_logits=False))


def test_a_gated_product_is_not_taken_for_a_linear_map() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x) * self.up(x))

    found = symmetries(Gated(), torch.randn(1, 4))
    assert "linear" not in {f.kind for f in found.freedoms}


def test_logits_are_centred_only_where_they_are_logits() -> None:
    head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert symmetries(head, torch.zeros(1, 4)).heads == (("2.weight", "2.bias"),)
    squashed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid())
    assert symmetries(squashed, torch.zeros(1, 4)).heads == ()


def test_activations_count() -> None:
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    gelu = nn.Sequential(relu[0], nn.GELU(), relu[2])
    example = torch.zeros(1, 4)
    assert hash_distance(semantic_hash(relu, example), semantic_hash(gelu, example)) == float("inf")


def test_foreign_and_broken_weights_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    found = symmetries(net, torch.zeros(1, 4))
    state = net.state_dict()
    with pytest.raises(GraphError, match=r"lack '2.weight'"):
        hash_of(found, {k: v for k, v in state.items() if k != "2.weight"})
    with pytest.raises(GraphError, match=r"'0.weight' has shape \(9, 4\)"):
        hash_of(found, {**state, "0.weight": torch.zeros(9, 4)})
    with pytest.raises(GraphError, match=r"'0.bias' holds NaN"):
        hash_of(found, {**state, "0.bias": torch.full((8,), float("nan"))})
    with pytest.raises(ArtifactError, match="no semantic hash"):
        same_hash("wf1-nonsense", semantic_hash(net, torch.zeros(1, 4)))


def test_no_pair_is_judged_wrongly() -> None:
    """Trained networks, each in disguises of wide scales, against all others and against itself one step later."""
    import torch.nn.functional as F

    def make(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(
                *(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Flatten(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5)),
            )

    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    y = x[:, :5].argmax(1)
    found, texts = symmetries(make(0), x), []
    for seed in range(8):
        model = make(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        texts.append(semantic_hash(model, x, found=found))
        for spread in (0.0, 1.0, 2.0, 3.0):
            generator = torch.Generator().manual_seed(seed)
            twin = disguise(model, x, generator, spread=spread, shift_logits=True, found=found)
            assert same_hash(texts[-1], semantic_hash(twin, x, found=found))
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert not same_hash(texts[-1], semantic_hash(model, x, found=found))
    assert not any(same_hash(a, b) for i, a in enumerate(texts) for b in texts[:i])


def test_the_hash_is_the_same_in_every_process() -> None:
    import os
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "from weightfold.models import *\n"
        "from weightfold.weights.canon import semantic_hash\n"
        "task = TaskSpec(input=TextInput(vocab=20, context=8), output=NextToken(vocab=20))\n"
        "print(semantic_hash(build('char-gpt', task, depth=1, width=16, num_heads=2), task.example()))"
    )
    root = Path(__file__).parents[2]
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert texts.pop().startswith("wf1-")
