"""Merging: closed forms in float64, parents recovered, barriers of known functions; trained digits where data count."""

from __future__ import annotations

import copy
import statistics
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError, GraphError
from weightfold.weights.align import align
from weightfold.weights.disguise import disguise
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
from weightfold.weights.path import Path, between, path, plot, repair

from .test_align import mlp


def linear(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer


def numbers(model: nn.Module) -> list[float]:
    return [round(v, 5) for v in model.weight.flatten().tolist()]  # type: ignore[union-attr,operator]


def test_averages_and_task_vectors_in_closed_form() -> None:
    base, a, b = linear(0, 0, 0, 0), linear(4, 1, -2, 0), linear(2, -3, -2, 1)
    assert numbers(average([a, b])) == [3, -1, -2, 0.5]
    assert numbers(average([a, b], [0.75, 0.25])) == [3.5, 0, -2, 0.25]
    assert numbers(task_arithmetic(base, [a, b], 0.5)) == [3, -1, -2, 0.5]
    # trimmed to half: (4, 0, -2, 0) and (2, -3, 0, 0) or (0, -3, -2, 0) with ties kept: |2| is at the limit
    assert numbers(ties(base, [a, b], keep=0.5)) == [3, -3, -2, 0]
    assert numbers(dare(base, [a, b], torch.Generator().manual_seed(0), drop=0.0)) == [6, -2, -4, 1]


def test_dare_is_right_on_average() -> None:
    base, a = linear(*[0.0] * 8), linear(*[1.0] * 8)
    drawn = [dare(base, [a], torch.Generator().manual_seed(s), drop=0.5).weight for s in range(400)]
    assert set(torch.stack(drawn).unique().tolist()) == {0.0, 2.0}
    assert torch.stack(drawn).mean().item() == pytest.approx(1, abs=0.06)


def test_fisher_weights_by_the_squared_gradient() -> None:
    a, b = linear(1, 5), linear(3, 7)
    merged = fisher([a, b], [{"weight": torch.tensor([[3.0, 0.0]])}, {"weight": torch.tensor([[1.0, 0.0]])}])
    assert numbers(merged)[0] == pytest.approx((3 * 1 + 1 * 3) / 4, abs=1e-4)
    assert numbers(merged)[1] == pytest.approx(6, abs=1e-4)  # no information: the mean
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    information = fisher_of(a, lambda m, row: m(row).sum(), [x[:1], x[1:]])
    assert torch.allclose(information["weight"], torch.tensor([[5.0, 2.5]], dtype=torch.float64))


def test_regmean_is_the_least_squares_solution() -> None:
    """On the inputs of both tasks the merged layer is the closest linear map to each model on its own inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator) for _ in range(2)]
    models = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    merged = regmean(models, [grams_of(m, [x]) for m, x in zip(models, inputs, strict=True)], shrink=1.0)
    with torch.no_grad():
        X = torch.cat(inputs).double().numpy()
        Y = torch.cat([m(x) for m, x in zip(models, inputs, strict=True)]).double().numpy()
    import numpy as np

    expected = np.linalg.lstsq(X, Y, rcond=None)[0].T
    assert np.allclose(merged.weight.detach().numpy(), expected, atol=1e-4)


def test_barrier_of_a_known_function_and_its_plot() -> None:
    found = path(linear(-1), linear(1), lambda m: 1 - m.weight.item() ** 2, points=5)
    assert found.values == pytest.approx((0, 0.75, 1, 0.75, 0))
    assert found.barrier == pytest.approx(1)
    svg = plot({"naive <1>": found, "flat": Path((0.0, 1.0), (float("nan"), 0.0))})
    assert svg.startswith("<svg")
    assert "naive &lt;1&gt;" in svg
    import xml.etree.ElementTree as tree

    assert len(tree.fromstring(svg)) > 5


def test_repair_gives_the_parents_moments() -> None:
    a, b = mlp(0, 6, 16, 16, 3), mlp(1, 6, 16, 16, 3)
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    fixed = repair(between(a, b), [a, b], [x[:256], x[256:]])
    for layer in (0, 2):
        outs = [m[: layer + 1](x).detach() for m in (a, b, fixed)]
        wanted = (outs[0].std(0, correction=0) + outs[1].std(0, correction=0)) / 2
        assert torch.allclose(outs[2].std(0, correction=0), wanted, rtol=1e-3)
        assert torch.allclose(outs[2].mean(0), (outs[0].mean(0) + outs[1].mean(0)) / 2, atol=1e-4)


def test_repair_estimates_batch_norms_anew() -> None:
    def net(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    a, b, x = net(0), net(1), torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    half = between(a, b)
    fixed = repair(half, [a, b], [x])
    raw = half[0](x)
    assert torch.allclose(fixed[1].running_mean, raw.mean((0, 2, 3)), atol=1e-5)
    assert fixed[1].momentum == half[1].momentum
    assert fixed[1].training == half[1].training


def test_many_models_come_into_one_basis() -> None:
    model = mlp(0, 6, 12, 12, 3)
    x = torch.randn(4, 6)
    group = [model, *(disguise(model, x, torch.Generator().manual_seed(s), spread=0) for s in range(3))]
    merged = average(align_all(group, x))
    assert torch.allclose(merged(x), model(x), atol=1e-5)
    assert not torch.allclose(average(group)(x), model(x), atol=1e-2)


def test_the_gate_says_whether_and_why() -> None:
    a, x = mlp(0, 16, 24, 24, 3), torch.randn(2, 16)
    near = copy.deepcopy(a)
    with torch.no_grad():
        for p in near.parameters():
            p.add_(0.05 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert gate(a, near, x).verdict == "as they are"
    hidden = gate(a, disguise(near, x, torch.Generator().manual_seed(1), spread=0), x)
    assert hidden.verdict == "after alignment"
    assert "raises the cosine" in hidden.reasons[0]
    assert "byte for byte" in gate(a, copy.deepcopy(a), x).reasons[0]
    assert gate(a, mlp(5, 16, 24, 24, 3), x).verdict == "no"  # untrained: nothing in common
    assert gate(a, mlp(0, 16, 20, 24, 3), x).verdict == "softly"
    other = gate(a, mlp(0, 16, 24, 3), x)
    assert other.verdict == "no"
    assert "other layers" in other.reasons[0]
    broken = copy.deepcopy(a)
    with torch.no_grad():
        broken[0].bias[0] = float("nan")
    assert "'0.bias' of the second model holds NaN" in gate(a, broken, x).reasons[0]


def test_bad_settings_are_refused() -> None:
    a, b = linear(1.0), linear(1.0, 2.0)
    with pytest.raises(GraphError, match="differ in architecture"):
        average([a, b])
    with pytest.raises(ConfigError, match=r"keep.*\(0, 1\]"):
        ties(a, [a], keep=0)
    with pytest.raises(ConfigError, match=r"\[0, 1\)"):
        dare(a, [a], torch.Generator(), drop=1.0)
    with pytest.raises(ConfigError, match="no models"):
        average([])
    with pytest.raises(ConfigError, match="2 models and 1 shares"):
        average([a, a], [1.0])
    with pytest.raises(DataError, match="few inputs"):
        repair(a, [a], [])


@lru_cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from weightfold.data import load

    data = load("digits")
    train = next(iter(data.batches("train", 2000, generator=torch.Generator().manual_seed(0))))
    test = next(iter(data.batches("test", 2000)))
    return train[0].flatten(1), train[1], test[0].flatten(1), test[1]


def trained(seed: int, width: int = 32) -> nn.Module:
    x, y, _, _ = digits()
    model = mlp(seed, 64, width, width, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(15):
        for idx in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(x[idx]), y[idx]).backward()
            optimizer.step()
    return model.eval()


def test_matching_and_repair_bring_trained_networks_together() -> None:
    pytest.importorskip("sklearn")
    x, _, tx, ty = digits()
    score: Any = lambda m: float((m(tx).argmax(1) == ty).float().mean())  # noqa: E731
    rows = []
    for k in range(3):
        a, b = trained(2 * k), trained(2 * k + 1)
        other = align(a, b, x[:1]).model
        half = between(a, other)
        rows.append([score(m) for m in (between(a, b), half, repair(half, [a, other], [x[:512]]))])
    naive, matched, repaired = (statistics.mean(r[i] for r in rows) for i in range(3))
    assert matched > naive + 0.15
    assert repaired > matched - 0.02
    assert repaired > 0.85
