"""Adapters of low rank: merged by B A, checked against dense arithmetic in float64 on the layers' own outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import GraphError
from weightfold.weights.adapters import adapters_of, folded
from weightfold.weights.merge import (
    align_all,
    average,
    dare,
    fisher,
    fisher_of,
    gate,
    grams_of,
    regmean,
    task_arithmetic,
    ties,
)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Peft(nn.Module):
    """As peft writes it: named adapters, a scale for each."""

    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(7, 9)
        self.r, self.lora_alpha, self.scaling = {"default": rank}, {"default": alpha}, {"default": alpha / rank}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(7, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 9, bias=True)})

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.lora_A["default"], self.lora_B["default"]
        return self.base_layer(x) + up(down(x)) * self.scaling["default"]


class Loralib(nn.Linear):
    """As loralib writes it: parameters in the layer itself."""

    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__(7, 9)
        self.r, self.lora_alpha, self.scaling = rank, alpha, alpha / rank
        self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, 7)), nn.Parameter(torch.zeros(9, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


class Tune(nn.Module):
    """As torchtune writes it: alpha and rank as numbers."""

    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(9, 7))
        self.rank, self.alpha = rank, alpha
        self.lora_a, self.lora_b = nn.Linear(7, rank, bias=False), nn.Linear(rank, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.alpha / self.rank * self.lora_b(self.lora_a(x))


class Kohya(nn.Module):
    """A tensor alpha over the rank that the tensors have: the scale changes with the rank."""

    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(9, 7))
        self.register_buffer("alpha", torch.tensor(alpha))
        self.lora_down, self.lora_up = nn.Linear(7, rank, bias=False), nn.Linear(rank, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.alpha / self.lora_down.weight.shape[0]
        return x @ self.weight.T + scale * self.lora_up(self.lora_down(x))


class Conv(nn.Module):
    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base_layer = nn.Conv2d(3, 5, 3)
        self.scaling = alpha / rank
        self.lora_A, self.lora_B = nn.Conv2d(3, rank, 3, bias=False), nn.Conv2d(rank, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x)) * self.scaling


class Embedded(nn.Module):
    def __init__(self, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base_layer = nn.Embedding(11, 5)
        self.scaling = {"default": alpha / rank}
        self.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(rank, 11)})
        self.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(5, rank)})

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_embedding_A["default"], self.lora_embedding_B["default"]
        return self.base_layer(x) + a.T[x] @ b.T * self.scaling["default"]


Made = Callable[..., nn.Module]
GROW: dict[str, tuple[Made, Tensor]] = {
    "peft": (Peft, noise(20, 7)),
    "loralib": (Loralib, noise(20, 7)),
    "torchtune": (Tune, noise(20, 7)),
    "convolution": (Conv, noise(4, 3, 6, 6)),
    "embedding": (Embedded, torch.arange(11)[None]),
}


def drawn(make: Made, seed: int, *args: Any) -> nn.Module:
    model = make(*args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("kind", GROW)
def test_merges_of_other_ranks_and_scales_compute_the_mean_of_their_parents(kind: str) -> None:
    """The layers are linear in weight and product, so outputs of a mean are the mean of outputs."""
    make, x = GROW[kind]
    base, one, two = drawn(make, 0), drawn(make, 1), drawn(make, 2, 3, 1.5)
    g, h = one(x).double(), two(x).double()
    for models, wanted in (([one, two], (g + h) / 2), ([two, one], (g + h) / 2)):
        assert torch.allclose(average(models)(x).double(), wanted, atol=1e-4)
    assert torch.allclose(average([one, two], [0.25, 0.75])(x).double(), 0.25 * g + 0.75 * h, atol=1e-4)
    assert torch.allclose(task_arithmetic(base, [one, two], 0.5)(x).double(), (g + h) / 2, atol=1e-4)
    assert torch.allclose(ties(base, [two], keep=1.0)(x).double(), h, atol=1e-4)
    assert torch.allclose(dare(base, [one], torch.Generator(), drop=0.0)(x).double(), g, atol=1e-4)
    twin = folded(one) if kind != "peft" else one
    assert torch.allclose(twin(x).double(), g, atol=1e-4)


def test_a_merge_of_one_keeps_rank_and_what_modules_say() -> None:
    one = drawn(Peft, 1)
    again = average([one, copy.deepcopy(one)])
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in one.state_dict().items()}
    merged = average([one, drawn(Peft, 2, 3, 1.5)])
    assert isinstance(merged, Peft)
    rank = merged.lora_A["default"].weight.shape[0]
    assert rank == 5 == merged.r["default"] == merged.lora_A["default"].out_features
    assert merged.lora_B["default"].in_features == 5
    assert merged.scaling == one.scaling
    assert merged.lora_alpha["default"] == rank * merged.scaling["default"]
    assert one.r["default"] == 2


def test_an_untouched_adapter_stays_trainable() -> None:
    models = [drawn(Loralib, seed) for seed in range(2)]
    for model in models:
        nn.init.zeros_(model.lora_B)
    merged = average(models)
    assert not merged.lora_B.any()
    assert torch.equal(merged.lora_A, models[0].lora_A)


def test_a_scale_that_hangs_on_the_rank_is_refused_for_the_factors_and_the_remedy_works() -> None:
    one, two, x = drawn(Kohya, 1), drawn(Kohya, 2), noise(20, 7)
    with pytest.raises(GraphError, match=r"'lora_up.weight' and 'lora_down.weight' need rank 4[\s\S]*folded\(model\)"):
        average([one, two])
    merged = average([folded(one), folded(two)])
    assert torch.allclose(merged(x), (one(x) + two(x)) / 2, atol=1e-5)
    assert torch.allclose(average([one, copy.deepcopy(one)])(x), one(x), atol=1e-5)


def test_fisher_is_refused_for_the_factors_and_the_remedy_works() -> None:
    one, two, x = drawn(Tune, 1), drawn(Tune, 2), noise(20, 7)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    tables = [fisher_of(m, loss, [x]) for m in (one, two)]
    with pytest.raises(GraphError, match=r"'lora_b.weight' and 'lora_a.weight' are factors[\s\S]*folded\(model\)"):
        fisher([one, two], tables)
    dense = [folded(one), folded(two)]
    tables = [fisher_of(m, loss, [x]) for m in dense]
    f, g = (t["weight"].double() for t in tables)
    wanted = (f * dense[0].weight.double() + g * dense[1].weight.double()) / (f + g)  # type: ignore[operator]
    assert torch.allclose(fisher(dense, tables, floor=0.0)(x).double(), x.double() @ wanted.T, atol=1e-4)


def test_regmean_solves_for_the_product() -> None:
    nets = [nn.Sequential(drawn(Peft, seed)) for seed in (1, 2)]
    x, y = noise(30, 7), noise(31, 7)
    merged = regmean(nets, [grams_of(nets[0], [x]), grams_of(nets[1], [y])], shrink=1.0)

    def dense(net: nn.Module) -> Tensor:
        layer = net[0]  # type: ignore[index]
        low = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return (layer.base_layer.weight + low).detach().double()

    grams = [z.double().T @ z.double() for z in (x, y)]
    right = grams[0] @ dense(nets[0]).T + grams[1] @ dense(nets[1]).T
    assert torch.allclose(dense(merged), torch.linalg.lstsq(grams[0] + grams[1], right).solution.T, atol=1e-4)


def test_numbers_that_may_scale_are_refused_and_the_remedy_works() -> None:
    class Own(Loralib):
        def __init__(self, gain: float = 1.0) -> None:
            super().__init__()
            del self.scaling, self.lora_alpha
            self.gain = gain

        def forward(self, x: Tensor) -> Tensor:
            low = x @ self.lora_A.T @ self.lora_B.T
            return nn.Linear.forward(self, x) + low * getattr(self, "gain", getattr(self, "scaling", None))

    one, two, x = drawn(Own, 1, 1.0), drawn(Own, 2, 3.0), noise(20, 7)
    with pytest.raises(GraphError, match=r"'gain' of the layer ''[\s\S]*call it 'scaling'"):
        average([one, two])
    wanted = (one(x) + two(x)) / 2
    for model in (one, two):
        model.scaling = model.gain
        del model.gain
    assert torch.allclose(average([one, two])(x), wanted, atol=1e-5)


def test_factors_without_a_known_product_are_refused() -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(4, 7)), nn.Parameter(torch.ones(6, 2))

    with pytest.raises(GraphError, match=r"'lora_B' \(6, 2\) and 'lora_A' \(4, 7\)"):
        adapters_of(Merged())


def test_the_gate_and_alignment_see_products() -> None:
    base = nn.Sequential(drawn(Peft, 0), nn.ReLU(), nn.Linear(9, 3))
    nets = [copy.deepcopy(base) for _ in range(3)]
    for seed, net in enumerate(nets):
        for name, value in drawn(Peft, seed + 1).state_dict().items():
            if "lora" in name:
                net[0].state_dict()[name].copy_(0.3 * value)
    x = noise(5, 7)
    verdict = gate(nets[0], nets[1], x)
    assert verdict.verdict == "as they are"
    assert any("factors" in reason for reason in verdict.reasons)
    for net, turned in zip(nets, align_all(nets, x), strict=True):
        assert torch.allclose(turned(x), net(x), atol=1e-4)
    nets[1][0] = drawn(Peft, 5, 3)
    assert any("other ranks" in reason for reason in gate(nets[0], nets[1], x).reasons)
