"""Codebooks against brute force, closed forms and finite differences."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from weightfold.errors import ConfigError, DataError
from weightfold.quant import codebook
from weightfold.quant.codebook import attend, dkm, kmeans, kmeans_vectors, nearest, snap, spacing

ROOT = Path(__file__).parents[2]
numbers = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=9)


def least(values: Tensor, weight: Tensor, k: int) -> float:
    """Weighted sum of squared distances from the parts' means: brute force over every labelling, not only intervals."""
    x_N, w_N = values.double().numpy(), weight.double().numpy()
    parts = np.array(list(itertools.product(range(k), repeat=len(values)))) == np.arange(k)[:, None, None]
    mean = (parts * w_N * x_N).sum(-1) / np.maximum((parts * w_N).sum(-1), 1e-300)
    return float((parts * w_N * (x_N - mean[..., None]) ** 2).sum((0, 2)).min())


@given(numbers, st.integers(1, 3))
def test_kmeans_on_a_line_is_optimal(values: list[float], k: int) -> None:
    x = torch.tensor(values)
    k = min(k, len(values))
    centroids, labels = kmeans(x, k)
    found = float((x.double() - centroids[labels]).square().sum())
    assert found == pytest.approx(least(x, torch.ones(len(x)), k), rel=1e-9, abs=1e-9)
    assert (centroids.diff() > 0).all()
    assert torch.equal(labels, (x.double()[:, None] - centroids).abs().argmin(1))


@given(st.lists(st.tuples(st.floats(-5, 5, width=32), st.integers(1, 9)), min_size=2, max_size=7))
def test_weighted_kmeans_is_optimal(pairs: list[tuple[float, int]]) -> None:
    x, weight = torch.tensor([p[0] for p in pairs]), torch.tensor([float(p[1]) for p in pairs])
    centroids, labels = kmeans(x, 2, weight)
    found = float((weight.double() * (x.double() - centroids[labels]).square()).sum())
    assert found == pytest.approx(least(x, weight, 2), rel=1e-4, abs=1e-6)


def test_no_start_of_lloyds_steps_gets_below_the_exact_cost() -> None:
    x = torch.randn(700, generator=torch.Generator().manual_seed(0))
    for k in (2, 5, 16, 64):
        centroids, labels = kmeans(x, k)
        exact = float((x.double() - centroids[labels]).square().sum())
        for seed in range(5):
            other, own = kmeans_vectors(x[:, None], k, torch.Generator().manual_seed(seed))
            assert float((x.double() - other[own, 0]).square().sum()) >= exact - 1e-9


def test_beyond_the_exact_size_the_cost_stays_within_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    for k in (4, 16, 64):
        exact = _cost(x, k)
        with monkeypatch.context() as patch:
            patch.setattr(codebook, "MAX_EXACT", 2048)
            assert exact <= _cost(x, k) <= 1.001 * exact


def _cost(x: Tensor, k: int) -> float:
    centroids, labels = kmeans(x, k)
    return float((x.double() - centroids[labels]).square().sum())


def test_distinct_values_bound_the_centroids() -> None:
    centroids, labels = kmeans(torch.tensor([3.0, 1.0, 3.0, 1.0, 1.0]), 4)
    assert centroids.tolist() == [1.0, 3.0]
    assert labels.tolist() == [1, 0, 1, 0, 0]


def test_vectors_of_one_number_agree_with_the_line() -> None:
    """Well separated clusters: any seeding finds them."""
    x = torch.tensor([0.0, 0.1, 5.0, 5.2, 9.0, 9.3])
    line, _ = kmeans(x, 3)
    plane, labels = kmeans_vectors(x[:, None], 3, torch.Generator().manual_seed(4))
    torch.testing.assert_close(plane[:, 0].sort().values, line)
    assert labels.tolist() == nearest(x[:, None].double(), plane).tolist()


@pytest.mark.parametrize(("k", "n"), [(0, 4), (5, 4), (1, 0)])
def test_a_k_out_of_range_is_refused(k: int, n: int) -> None:
    with pytest.raises(ConfigError, match="'k'"):
        kmeans(torch.zeros(n), k)
    with pytest.raises(ConfigError, match="'k'"):
        kmeans_vectors(torch.zeros(n, 2), k, torch.Generator())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="finite"):
        kmeans(torch.tensor([0.0, bad]), 1)
    with pytest.raises(DataError, match="finite"):
        kmeans(torch.zeros(2), 1, torch.tensor([1.0, bad]))


def test_weights_must_fit() -> None:
    with pytest.raises(ConfigError, match="weights for 3"):
        kmeans(torch.zeros(2), 1, torch.ones(3))
    with pytest.raises(DataError, match="negative"):
        kmeans(torch.zeros(2), 1, torch.tensor([1.0, -1.0]))


def test_dkm_has_the_gradient_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 1, dtype=torch.float64, generator=generator).requires_grad_()
    start = torch.tensor([[-1.0], [0.0], [1.5]], dtype=torch.float64)
    for iterations in (1, 3):
        assert torch.autograd.gradcheck(lambda w, i=iterations: dkm(w, start, 0.4, i)[0], (w,))


def test_a_cold_dkm_is_a_step_of_lloyd() -> None:
    w = torch.tensor([[0.0], [0.3], [2.0], [2.2]])
    mixed, centroids = dkm(w, torch.tensor([[0.0], [2.0]]), 1e-4)
    torch.testing.assert_close(centroids.flatten(), torch.tensor([0.15, 2.1]))
    torch.testing.assert_close(mixed.flatten(), torch.tensor([0.15, 0.15, 2.1, 2.1]))


def test_a_centroid_that_no_point_wants_stays_where_it_is() -> None:
    _, centroids = dkm(torch.zeros(4, 1), torch.tensor([[0.0], [100.0]]), 1e-3)
    assert centroids.flatten().tolist() == [0.0, 100.0]


def test_the_temperature_is_free_of_scale() -> None:
    w, c = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(attend(w, c, 0.3), attend(1000 * w, 1000 * c, 0.3))
    assert float(spacing(c)) == 2.0


def test_a_plain_step_moves_a_snapped_codebook_as_it_moves_the_means() -> None:
    w = torch.randn(30, 1, generator=torch.Generator().manual_seed(0))
    centroids, labels = kmeans(w[:, 0], 4)
    c = centroids.float()[:, None].requires_grad_()
    w.requires_grad_()
    out, again = snap(w, c)
    assert torch.equal(again, labels)
    (out * torch.randn(30, 1, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert w.grad is not None
    assert c.grad is not None
    step = (w - 0.01 * w.grad).detach()
    means = torch.stack([step[labels == k].mean(0) for k in range(4)])
    torch.testing.assert_close((c - 0.01 * c.grad).detach(), means, atol=1e-6, rtol=1e-5)


SNIPPET = """
import torch
from weightfold.quant.codebook import kmeans, kmeans_vectors
x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
print(kmeans(x, 16)[0].tolist() + kmeans_vectors(x.view(-1, 2), 8, torch.Generator().manual_seed(0))[0].tolist())
"""


def test_the_hash_seed_does_not_matter() -> None:
    found = []
    for seed in ("0", "99"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SNIPPET], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]
    assert len(json.loads(found[0])) == 24
