"""The hash of weights sees names, types, shapes and bytes, and nothing else. The reference is hashlib on raw bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from weightfold.fingerprint import digest, fingerprint

ROOT = Path(__file__).parents[1]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_it_is_sha256_of_names_types_shapes_and_bytes() -> None:
    value = torch.tensor([[1.5, -0.0]])
    expected = hashlib.sha256(b"w\0torch.float32\0(1, 2)\0" + value.numpy().tobytes()).hexdigest()
    assert digest({"w": value}) == expected


def test_layout_order_and_identity_do_not_matter() -> None:
    a, b = torch.randn(3, 4), torch.randn(2)
    assert digest({"a": a, "b": b}) == digest({"b": b.clone(), "a": a.T.contiguous().T})
    assert digest({"a": a}) == digest({"a": nn.Parameter(a)})


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.float64)},
        {"a": torch.full((2, 3), -0.0)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ],
)
def test_any_difference_shows(other: dict[str, torch.Tensor]) -> None:
    assert digest({"a": torch.zeros(2, 3)}) != digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.int64, torch.complex64])
def test_every_type_is_hashed(dtype: torch.dtype) -> None:
    zeros = digest({"a": torch.zeros(3, dtype=dtype)})
    assert zeros != digest({"a": torch.ones(3, dtype=dtype)})
    assert digest({"a": torch.zeros((), dtype=dtype)}) != zeros


def test_a_model_is_its_parameters_and_saved_buffers() -> None:
    model, twin = net(), net()
    assert fingerprint(model) == fingerprint(twin)
    assert fingerprint(model.eval()) == fingerprint(twin.train())
    twin.register_buffer("scratch", torch.ones(2), persistent=False)
    assert fingerprint(model) == fingerprint(twin)
    with torch.no_grad():
        twin[1].running_mean[0] += 1e-7  # pyright: ignore
    assert fingerprint(model) != fingerprint(twin)


def test_it_is_the_same_in_every_process() -> None:
    code = "from tests.test_fingerprint import fingerprint, net; print(fingerprint(net()))"
    for seed in ("1", "99"):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == fingerprint(net()), done.stderr
