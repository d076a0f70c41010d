"""Divide samples into training, validation and test, every class in each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weightfold.data.options import LoadOptions
from weightfold.errors import DataError


class Plan(NamedTuple):
    """Which samples go where, as sorted indices; those of `test` count in the source's own test set if it has one."""

    train: Tensor
    val: Tensor
    test: Tensor


def plan_splits(
    labels: Tensor, test_labels: Tensor | None, *, classes: tuple[str, ...], options: LoadOptions, source: str
) -> Plan:
    """Choose the samples of each split, class by class, with the seed alone.

    Args:
        labels: class of each sample, shape (S,), int64; all zero for a regression.
        test_labels: the same of the source's own test set, shape (T,), or None to hold samples out.
        classes: name of each class; empty for a regression.
        options: seed, limit and shares.
        source: name for errors.
    Returns:
        plan: indices of each split, none of them empty.
    Raises:
        DataError: no samples, one class only, a class too rare for the splits, a class that only the test set has.
    Example:
        >>> labels = torch.tensor([0, 1] * 10)
        >>> plan = plan_splits(labels, None, classes=("cat", "dog"), options=LoadOptions(), source="pets")
        >>> [len(idx) for idx in plan]
        [14, 2, 4]
    """
    _check_classes(labels, test_labels, classes, source)
    generator = torch.Generator().manual_seed(options.seed)
    pool = balanced_order(labels, generator)[: options.limit]
    _check_counts(labels, pool, classes, 3 if test_labels is None else 2, source)
    if test_labels is None:
        pool, test = hold_out(pool, labels, options.held_out(0.2))
    else:
        test = balanced_order(test_labels, generator)[: options.limit]
    train, val = hold_out(pool, labels, options.val_share)
    return Plan(train.sort().values, val.sort().values, test.sort().values)


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle samples so that every beginning of the order holds the classes in their proportions.

    Args:
        labels: shape (S,), int64, >= 0.
        generator: draws the order.
    Returns:
        order: a permutation of the samples, shape (S,), int64.
    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[balanced_order(labels, torch.Generator().manual_seed(0))[:3]].sort().values
        tensor([0, 0, 1])
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    labels = labels[shuffled]
    place = (_rank_in_class(labels) + 0.5).double() / torch.bincount(labels)[labels]
    return shuffled[place.argsort(stable=True)]


def hold_out(order: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Take a share of each class, the first in the order and at least one.

    Args:
        order: indices of samples, shape (S,).
        labels: class of every sample, also of those not in the order.
        share: between 0 and 0.5.
    Returns:
        kept, held: indices, in the order given.
    """
    labels = labels[order]
    quota = (torch.bincount(labels) * share).round().clamp(min=1)
    held = _rank_in_class(labels) < quota[labels]
    return order[~held], order[held]


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many samples of the same class come before each one."""
    order = labels.argsort(stable=True)
    counts = torch.bincount(labels)
    first = counts.cumsum(0) - counts
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - first[labels[order]]
    return ranks


def _check_classes(labels: Tensor, test_labels: Tensor | None, classes: tuple[str, ...], source: str) -> None:
    if not len(labels) or (test_labels is not None and not len(test_labels)):
        which = "test set of '" if len(labels) else "data set '"
        raise DataError(f"The {which}{source}' is empty.", remedy="Pass a source with at least a few samples.")
    found = labels.unique()
    if classes and len(found) == 1:
        raise DataError(
            f"'{source}' has one class only: '{classes[int(found)]}'.",
            remedy="Classification needs samples of at least two classes.",
        )
    strange = set() if test_labels is None else set(test_labels.tolist()) - set(found.tolist())
    if strange:
        raise DataError(
            f"The test set of '{source}' has the class '{classes[min(strange)]}', which no training sample has.",
            remedy="Add samples of it to the training set, or take it out of the test set.",
        )


def _check_counts(labels: Tensor, pool: Tensor, classes: tuple[str, ...], needed: int, source: str) -> None:
    counts = torch.bincount(labels[pool], minlength=int(labels.max()) + 1)
    rare = [label for label in labels.unique().tolist() if counts[label] < needed]
    if not rare:
        return
    whose = f"Class '{classes[rare[0]]}' of '{source}'" if classes else f"'{source}'"
    raise DataError(
        f"{whose} has {int(counts[rare[0]])} of the samples read; the splits need {needed}, one each.",
        remedy="Add samples, raise 'limit' if one was given, or leave the class out.",
    )
