"""Alignment: planted disguises are taken off; assignment is checked by brute force, transport by its masses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from weightfold.errors import ConfigError, DataError, GraphError
from weightfold.models import build
from weightfold.weights.align import align, exact_error
from weightfold.weights.compare import differences
from weightfold.weights.disguise import disguise
from weightfold.weights.soft import sinkhorn, soft
from weightfold.weights.symmetry import symmetries
from weightfold.weights.work import assign

from .conftest import IMAGES, TEXT, Made, lively


def mlp(seed: int, *widths: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


def test_weight_matching_takes_a_disguise_off(made: Made) -> None:
    model, example = made
    found = symmetries(model, example)
    other = disguise(model, example, torch.Generator().manual_seed(1), found=found, spread=0)
    turned = align(model, other, example, found=found)
    assert turned.cosine_after > 0.9999
    assert exact_error(other, turned.model, example) < 1e-4


def test_activation_matching_takes_a_disguise_off() -> None:
    model = mlp(0, 6, 20, 16, 3)
    example = torch.randn(64, 6, generator=torch.Generator().manual_seed(5))
    other = disguise(model, example, torch.Generator().manual_seed(1), spread=0)
    turned = align(model, other, example, method="activations", data=[example, -example])
    assert turned.cosine_after > 0.9999
    assert exact_error(other, turned.model, example) < 1e-5


def test_an_aligned_model_still_computes_the_same_and_is_nearer(made: Made) -> None:
    model, example = made
    other = disguise(lively(copy.deepcopy(model), 7), example, torch.Generator().manual_seed(2), spread=0.2)
    turned = align(model, other, example)
    assert turned.cosine_after >= turned.cosine_before - 1e-9
    assert exact_error(other, turned.model, example) < 1e-4


def test_assignment_is_the_best_of_all() -> None:
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    best = max(sum(float(scores[i, p[i]]) for i in range(5)) for p in itertools.permutations(range(5)))
    order = assign(scores)
    assert float(scores[torch.arange(5), order].sum()) == pytest.approx(best)
    within = assign(scores, torch.tensor([0, 0, 1, 1, 1]))
    assert set(within[:2].tolist()) == {0, 1}


@pytest.mark.parametrize("name", ["vit-tiny", "char-gpt"])
def test_a_residual_stream_is_rotated_exactly(name: str) -> None:
    settings = {"depth": 1, "width": 16, "num_heads": 2}
    task, more = (IMAGES, {}) if name == "vit-tiny" else (TEXT, {"tied": False})
    a, b = (lively(build(name, task, seed=s, **settings, **more), s) for s in (0, 1))
    example = torch.randn(2, 3, 16, 16) if name == "vit-tiny" else torch.randint(0, 20, (2, 8))
    plain, rotated = align(a, b, example), align(a, b, example, rotate=True)
    assert rotated.cosine_after > plain.cosine_after + 0.01
    assert exact_error(b, rotated.model, example) < 1e-4
    assert not rotated.notes


def test_a_stream_that_a_tied_head_reads_is_not_rotated_and_says_so() -> None:
    a, b = (lively(build("char-gpt", TEXT, seed=s, depth=1, width=16, num_heads=2), s) for s in (0, 1))
    example = torch.randint(0, 20, (2, 8))
    turned = align(a, b, example, rotate=True)
    assert exact_error(b, turned.model, example) < 1e-4
    assert any("tied head" in note for note in turned.notes)


def test_transport_has_the_right_masses_and_finds_a_permutation() -> None:
    cost = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost, 0.1)
    assert torch.allclose(plan.sum(0), torch.full((4,), 0.25, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(plan.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-6)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    cost = 1 - torch.eye(7)[order]
    assert torch.equal(sinkhorn(cost).argmax(1), order)


def test_soft_matching_takes_a_permutation_and_a_split_off() -> None:
    model = mlp(0, 6, 8, 3)
    example = torch.randn(5, 6)
    other = disguise(model, example, torch.Generator().manual_seed(1), spread=0)
    for (name, a), b in zip(model.named_parameters(), soft(model, other, example).parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
    wide = mlp(0, 6, 16, 3)
    with torch.no_grad():
        wide[0].weight.copy_(model[0].weight.repeat_interleave(2, 0))
        wide[0].bias.copy_(model[0].bias.repeat_interleave(2, 0))
        wide[2].weight.copy_(model[2].weight.repeat_interleave(2, 1) / 2)
        wide[2].bias.copy_(model[2].bias)
    narrow = soft(model, wide, example)
    assert narrow[0].weight.shape == (8, 6)
    assert exact_error(model, narrow, example) < 1e-3


def test_soft_matching_of_convolutions_of_other_widths_keeps_shapes() -> None:
    a, b = (lively(build("resnet20", IMAGES, depth=8, width=w), w) for w in (4, 4))
    example = torch.randn(2, 3, 16, 16)
    assert not differences(a.state_dict(), soft(a, b, example, sweeps=0).state_dict())


def test_what_differs_is_said() -> None:
    a, b, c = mlp(0, 6, 8, 3), mlp(0, 6, 9, 3), mlp(0, 6, 8, 8, 3)
    example = torch.randn(1, 6)
    with pytest.raises(GraphError, match=r"'0.weight' has shape \(8, 6\) in the first and \(9, 6\) in the second"):
        align(a, b, example)
    with pytest.raises(GraphError, match=r"the first lacks '4.weight'"):
        align(a, c, example)
    with pytest.raises(GraphError, match="differ in their layers"):
        soft(a, c, example)
    with pytest.raises(DataError, match="needs data"):
        align(a, a, example, method="activations")
    with pytest.raises(ConfigError, match="'weights' or 'activations'"):
        align(a, a, example, method="weight")  # type: ignore[arg-type]


def test_free_signs_of_a_part_of_each_channel_are_found() -> None:
    """In silu(gate) * up only the sign of `up` is free."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    model, example = Gated(), torch.randn(3, 6)
    other = disguise(model, example, torch.Generator().manual_seed(0), spread=0)
    turned = align(model, other, example)
    assert turned.cosine_before < 0.9
    assert turned.cosine_after > 0.9999
    assert exact_error(other, turned.model, example) < 1e-5
