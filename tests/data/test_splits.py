"""Division into splits: a partition, balanced, decided by the seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightfold.data.options import LoadOptions
from weightfold.data.splits import balanced_order, hold_out, plan_splits
from weightfold.errors import DataError

COUNTS = st.lists(st.integers(3, 30), min_size=2, max_size=5)


def labels_of(counts: list[int]) -> torch.Tensor:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


def names(counts: list[int]) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(len(counts)))


@given(counts=COUNTS, seed=st.integers(0, 100))
def test_splits_are_a_partition_with_every_class_in_each(counts: list[int], seed: int) -> None:
    labels = labels_of(counts)
    options = LoadOptions(seed=seed)
    plan = plan_splits(labels, None, classes=names(counts), options=options, source="x")
    assert torch.cat(plan).sort().values.tolist() == list(range(len(labels)))
    for idx in plan:
        assert labels[idx].unique().tolist() == list(range(len(counts)))
    again = plan_splits(labels, None, classes=names(counts), options=options, source="x")
    assert all(torch.equal(a, b) for a, b in zip(plan, again, strict=True))


@given(counts=COUNTS, seed=st.integers(0, 100))
def test_beginnings_of_the_order_hold_the_classes_in_proportion(counts: list[int], seed: int) -> None:
    labels = labels_of(counts)
    order = balanced_order(labels, torch.Generator().manual_seed(seed))
    assert order.sort().values.tolist() == list(range(len(labels)))
    for n in range(1, len(labels) + 1):
        seen = torch.bincount(labels[order[:n]], minlength=len(counts))
        expected = torch.tensor(counts) * n / len(labels)
        assert (seen - expected).abs().max() <= len(counts) / 2 + 0.5


def test_shares_are_kept() -> None:
    labels = labels_of([100, 200])
    plan = plan_splits(labels, None, classes=("a", "b"), options=LoadOptions(), source="x")
    assert [len(idx) for idx in plan] == [216, 24, 60]
    assert torch.bincount(labels[plan.test]).tolist() == [20, 40]


def test_a_test_set_of_its_own_is_left_alone() -> None:
    labels, own = labels_of([20, 20]), labels_of([6, 7])
    plan = plan_splits(labels, own, classes=("a", "b"), options=LoadOptions(), source="x")
    assert plan.test.tolist() == list(range(13))
    assert len(plan.train) + len(plan.val) == 40


def test_the_limit_holds_for_both_files() -> None:
    labels, own = labels_of([50, 50]), labels_of([50, 50])
    plan = plan_splits(labels, own, classes=("a", "b"), options=LoadOptions(limit=30), source="x")
    assert len(plan.train) + len(plan.val) == 30
    assert len(plan.test) == 30
    assert torch.bincount(labels[torch.cat([plan.train, plan.val])]).tolist() == [15, 15]


def test_another_seed_chooses_others() -> None:
    labels = labels_of([50, 50])
    plans = [plan_splits(labels, None, classes=("a", "b"), options=LoadOptions(seed=s), source="x") for s in (0, 1)]
    assert not torch.equal(plans[0].test, plans[1].test)


def test_held_samples_come_first_in_the_order() -> None:
    kept, held = hold_out(torch.tensor([4, 0, 1, 2, 3]), torch.zeros(5, dtype=torch.int64), 0.4)
    assert (kept.tolist(), held.tolist()) == ([1, 2, 3], [4, 0])


@pytest.mark.parametrize(
    ("labels", "test", "classes", "complaint"),
    [
        ([], None, ("a", "b"), "data set 'pets' is empty"),
        ([0, 1] * 5, [], ("a", "b"), "test set of 'pets' is empty"),
        ([1] * 9, None, ("a", "b"), "one class only: 'b'"),
        ([0] * 9 + [1, 1], None, ("a", "b"), r"Class 'b' of 'pets' has 2 .* need 3"),
        ([0] * 9 + [1], [0], ("a", "b"), r"Class 'b' of 'pets' has 1 .* need 2"),
        ([0] * 5 + [1] * 5, [0, 2], ("a", "b", "c"), "has the class 'c', which no training sample has"),
        ([0, 0], None, (), "'pets' has 2 of the samples read; the splits need 3"),
    ],
)
def test_what_cannot_be_divided_is_refused(labels: list, test: list | None, classes: tuple, complaint: str) -> None:
    own = None if test is None else torch.tensor(test, dtype=torch.int64)
    with pytest.raises(DataError, match=complaint) as caught:
        plan_splits(torch.tensor(labels, dtype=torch.int64), own, classes=classes, options=LoadOptions(), source="pets")
    assert caught.value.remedy
