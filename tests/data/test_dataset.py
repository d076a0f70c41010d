"""Batches, scalings, augmentation and the fingerprint of a data set in memory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightfold.data import Dataset, Scaling, Split
from weightfold.data.dataset import shift_images, shift_windows, windows
from weightfold.errors import ConfigError
from weightfold.models import Classes, ImageInput, NextToken, Regression, TableInput, TaskSpec, TextInput


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 9, channels: int = 1) -> Dataset:
    pixels = torch.randint(256, (n, channels, 8, 8), dtype=torch.uint8, generator=seeded())
    split = Split(pixels, torch.arange(n) % 2)
    task = TaskSpec(input=ImageInput(channels=channels, height=8, width=8), output=Classes(n=2))
    return Dataset("noise", task, split, split, split, ("a", "b"), input_scaling=Scaling.of_images(pixels))


def table() -> Dataset:
    split = Split(torch.randn(7, 3, generator=seeded()), 5 + 2 * torch.randn(7, 1, generator=seeded(1)))
    task = TaskSpec(input=TableInput(n_features=3), output=Regression())
    return Dataset(
        "t",
        task,
        split,
        split,
        split,
        (),
        input_scaling=Scaling.of(split.inputs),
        target_scaling=Scaling.of(split.targets),
    )


def text(length: int = 41) -> Dataset:
    split = windows(torch.arange(length, dtype=torch.int32), 5)
    task = TaskSpec(input=TextInput(vocab=length, context=5), output=NextToken(vocab=length))
    return Dataset("t", task, split, split, split)


def test_image_scaling_is_the_mean_and_deviation_of_each_channel() -> None:
    data = images(50, channels=3)
    pixels = data.train.inputs.numpy().astype(np.float64) / 255  # reference: float64 numpy
    assert data.input_scaling is not None
    np.testing.assert_allclose(data.input_scaling.mean.flatten(), pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(data.input_scaling.std.flatten(), pixels.std((0, 2, 3)), rtol=1e-6)
    inputs, _ = next(data.batches("train", 50))
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_a_black_image_is_scaled_without_dividing_by_zero() -> None:
    scaling = Scaling.of_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert scaling.std.item() == 1


def test_columns_of_zeros_and_ones_stay_as_they_are() -> None:
    values = torch.tensor([[0.0, 4.0, 3.0], [1.0, 8.0, 3.0], [0.0, 6.0, 3.0]])
    scaling = Scaling.of(values)
    assert scaling.apply(values)[:, 0].tolist() == [0, 1, 0]
    assert scaling.apply(values)[:, 2].tolist() == [0, 0, 0]
    np.testing.assert_allclose(scaling.std[1], np.std([4, 8, 6]), rtol=1e-6)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=20))
def test_undo_takes_apply_back(values: list[float]) -> None:
    column = torch.tensor(values)[:, None]
    scaling = Scaling.of(column)
    torch.testing.assert_close(scaling.undo(scaling.apply(column)), column, atol=1e-2, rtol=1e-4)


def test_regression_targets_are_scaled_and_can_be_put_back() -> None:
    data = table()
    _, targets = next(data.batches("train", 7))
    assert abs(targets.mean().item()) < 1e-6
    assert data.target_scaling is not None
    torch.testing.assert_close(data.target_scaling.undo(targets), data.train.targets)


@pytest.mark.parametrize("data", [images(), table(), text()])
def test_without_a_generator_every_sample_comes_once_in_order(data: Dataset) -> None:
    batches = list(data.batches("test", 4))
    whole, targets = next(data.batches("test", 1000))
    torch.testing.assert_close(torch.cat([inputs for inputs, _ in batches]), whole)
    torch.testing.assert_close(torch.cat([y for _, y in batches]), targets)
    assert len(whole) == len(data.test)


def test_shuffling_is_decided_by_the_generator_and_leaves_no_single_sample() -> None:
    data = images(9)
    first, second, other = ([y for _, y in data.batches("train", 4, generator=seeded(s))] for s in (1, 1, 2))
    assert [len(y) for y in first] == [4, 4]
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert [len(y) for _, y in data.batches("train", 1, generator=seeded())] == [1] * 9


def test_batches_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    for data in (images(), text()):
        list(data.batches("train", 4, generator=seeded(), augment=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kinds_of_tensors() -> None:
    kinds = {
        (images, torch.float32, torch.int64),
        (table, torch.float32, torch.float32),
        (text, torch.int64, torch.int64),
    }
    for make, of_inputs, of_targets in kinds:
        inputs, targets = next(make().batches("val", 2))
        assert (inputs.dtype, targets.dtype) == (of_inputs, of_targets)


@given(seed=st.integers(0, 1000), mirror=st.booleans())
def test_a_shifted_image_is_a_window_of_the_padded_one(seed: int, mirror: bool) -> None:
    image = torch.randint(1, 256, (1, 2, 16, 24), dtype=torch.uint8, generator=seeded(seed))
    moved = shift_images(image, seeded(seed), mirror=mirror)
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2))
    candidates = [padded[:, :, row : row + 16, column : column + 24] for row in range(5) for column in range(7)]
    candidates += [candidate.flip(3) for candidate in candidates] if mirror else []
    assert any(torch.equal(moved, candidate) for candidate in candidates)


def test_windows_follow_each_other() -> None:
    split = windows(torch.arange(12, dtype=torch.int32), 5)
    assert split.inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert split.targets.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


@given(length=st.integers(6, 60), seed=st.integers(0, 100))
def test_shifted_windows_are_of_the_same_text(length: int, seed: int) -> None:
    moved = shift_windows(windows(torch.arange(length, dtype=torch.int32), 5), seeded(seed))
    assert len(moved) >= 1
    assert torch.equal(moved.targets, moved.inputs + 1)
    assert torch.equal(moved.inputs.flatten().diff(), torch.ones(moved.inputs.numel() - 1, dtype=torch.int32))


def test_colour_images_are_mirrored_and_grey_ones_are_not() -> None:
    # Eight pixels a side leave a shift of one; a gradient from left to right tells the direction.
    gradient = torch.arange(8, dtype=torch.uint8).mul(30).expand(40, 1, 8, 8)
    for channels, directions in ((1, {True}), (3, {True, False})):
        base = images(40, channels)
        data = dataclasses.replace(base, train=Split(gradient.expand(40, channels, 8, 8), base.train.targets))
        moved, _ = next(data.batches("train", 40, generator=seeded(), augment=True))
        assert {bool(image[0, 4, 5] > image[0, 4, 2]) for image in moved} == directions


def test_the_fingerprint_sees_every_change() -> None:
    data = images()
    assert data.fingerprint == images().fingerprint
    assert len(data.fingerprint) == 64
    other = data.train.inputs.clone()
    other[0, 0, 0, 0] += 1
    changes = [
        dataclasses.replace(data, train=Split(other, data.train.targets)),
        dataclasses.replace(data, val=Split(data.val.inputs, 1 - data.val.targets)),
        dataclasses.replace(data, classes=("a", "c")),
        dataclasses.replace(data, input_scaling=Scaling(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))),
    ]
    assert len({data.fingerprint, *(changed.fingerprint for changed in changes)}) == 5


def test_the_fingerprint_does_not_depend_on_the_hash_seed() -> None:
    pytest.importorskip("sklearn")
    code = "from weightfold.data import load; print(load('digits', seed=3).fingerprint)"
    root = str(Path(__file__).parents[2])
    prints = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda data: data.batches("tset", 4), "no split 'tset'.\n.*Did you mean 'test'"),
        (lambda data: data.batches("test", 0), "'batch_size' of batches must be at least 1. Got 0"),
        (lambda data: data.batches("train", 4, augment=True), "Augmentation draws random numbers"),
    ],
)
def test_wrong_calls_fail_at_once(call, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        call(images())
