"""The order in which channels are dropped. Expected numbers: costs of whole sets, LAPACK's pivoted Cholesky."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import lapack
from torch import Tensor

from weightfold.redundancy import Reader, cholesky_path, choose, eliminate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


spd = st.integers(3, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 10_000)))


def random_reader(n: int, seed: int) -> Reader:
    a, v = draw(4 * n, n, seed=seed).numpy(), draw(n + 1, n, seed=seed + 1).numpy()
    return Reader(("w", 1), a.T @ a / len(a), v.T @ v, len(a))


@given(spd)
def test_costs_of_single_steps_add_up_to_the_cost_of_the_set(spec: tuple[int, int]) -> None:
    n, seed = spec
    readers = [random_reader(n, seed), random_reader(n, seed + 7)]
    path = eliminate(readers, np.zeros(n, np.int64), 0.0)
    for n_dropped in range(n):
        keep = path.kept(n, n - n_dropped)
        drop = np.setdiff1d(np.arange(n), keep)
        direct = sum(r.error(keep, drop, r.map(keep, drop, 0.0), 0.0) for r in readers)
        assert path.cost[n_dropped] == pytest.approx(direct, rel=1e-5, abs=1e-9)


@given(spd, st.floats(0.01, 1.0))
def test_the_error_is_that_of_the_residual_written_out(spec: tuple[int, int], ridge: float) -> None:
    n, seed = spec
    reader = random_reader(n, seed)
    keep, drop = np.arange(n // 2 + 1), np.arange(n // 2 + 1, n)
    map_SK = reader.map(keep, drop, ridge)
    residual_SC = np.concatenate([-map_SK, np.eye(len(drop))], 1)
    left_SS = residual_SC @ reader.second_CC @ residual_SC.T
    direct = float((reader.gram_CC[np.ix_(drop, drop)] * left_SS).sum()) * reader.weight
    assert reader.error(keep, drop, map_SK, ridge) == pytest.approx(direct, rel=1e-9, abs=1e-12)
    rough = reader.rough
    assert rough.error(keep, drop, rough.map(keep, drop, ridge), ridge) == pytest.approx(direct, rel=1e-3, abs=1e-5)


@given(spd)
def test_each_step_drops_the_channel_that_costs_least(spec: tuple[int, int]) -> None:
    n, seed = spec
    reader = random_reader(n, seed)
    path = eliminate([reader], np.zeros(n, np.int64), 0.0)
    first = [
        float(reader.error(k := np.delete(np.arange(n), i), d := np.array([i]), reader.map(k, d, 0.0), 0.0))
        for i in range(n)
    ]
    assert first[path.order[0]] == pytest.approx(min(first), rel=1e-6)


@given(spd)
def test_wide_groups_are_chosen_by_the_pivots_of_lapack(spec: tuple[int, int]) -> None:
    n, seed = spec
    reader = random_reader(n, seed)
    path = cholesky_path([reader], np.zeros(n, np.int64), 0.0)
    norm = np.sqrt(np.diag(reader.gram_CC))
    _, pivots, rank, _ = lapack.dpstrf(reader.weight * norm[:, None] * norm * reader.second_CC, lower=1, tol=0)
    assert rank == n
    assert path.order.tolist() == (pivots[1:][::-1] - 1).tolist()
    assert (np.diff(path.cost) >= -1e-12).all()


@pytest.mark.parametrize("choice", [eliminate, cholesky_path])
def test_blocks_keep_equal_counts(choice: Callable[..., Any]) -> None:
    block = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    path = choice([random_reader(9, 0)], block, 1e-3)
    assert len(path.order) == 6
    for n_dropped in (3, 6):
        assert np.bincount(block[path.kept(9, 9 - n_dropped)]).tolist() == [3 - n_dropped // 3] * 3


def test_equal_channels_tie_towards_the_first() -> None:
    reader = Reader(("w", 1), np.ones((4, 4)), np.eye(4), 10)
    assert choose([reader], None, 1e-6).order.tolist() == [0, 1, 2]


def test_a_large_group_is_cut_down_on_the_way_without_a_trace() -> None:
    readers = [random_reader(60, 3)]
    path = eliminate(readers, np.zeros(60, np.int64), 1e-3, least=20)
    assert len(path.order) == 40
    whole = eliminate(readers, np.zeros(60, np.int64), 1e-3)
    assert whole.order[:40].tolist() == path.order.tolist()
    keep, drop = path.kept(60, 20), np.sort(path.order)
    direct = readers[0].error(keep, drop, readers[0].map(keep, drop, 1e-3), 1e-3)
    assert path.cost[-1] == pytest.approx(direct, rel=0.02)
