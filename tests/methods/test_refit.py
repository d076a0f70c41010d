"""Refit. Expected numbers: numpy's least squares on the windows of a convolution, cut by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError
from weightfold.methods.refit import refit


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(x: np.ndarray, kernel: int, stride: int, padding: int) -> np.ndarray:
    """All windows of images (B, C, H, W), as rows."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    cut = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), (2, 3))[:, :, ::stride, ::stride]
    return cut.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1] * kernel * kernel)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_least_squares_of_numpy(bias: bool) -> None:
    layer = nn.Linear(4, 3, bias=bias).double()
    x, z = draw(60, 4), draw(60, 3, seed=1)
    new = refit(layer, [(x[:20], z[:20]), (x[20:], z[20:])], ridge=0.0)
    inputs = np.concatenate([x.numpy(), np.ones((60, 1))], 1) if bias else x.numpy()
    expected = np.linalg.lstsq(inputs, z.numpy(), rcond=None)[0]
    np.testing.assert_allclose(new["weight"].numpy(), expected[:4].T, rtol=1e-9, atol=1e-12)
    if bias:
        np.testing.assert_allclose(new["bias"].numpy(), expected[4], rtol=1e-9, atol=1e-12)
    assert set(new) == ({"weight", "bias"} if bias else {"weight"})


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0)])
def test_a_convolution_is_the_least_squares_of_numpy(stride: int, padding: int) -> None:
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=padding, bias=False).double()
    x = draw(8, 2, 7, 7)
    z = draw(*layer(x).shape, seed=1)
    new = refit(layer, [(x, z)], ridge=0.0)["weight"]
    rows = windows(x.numpy(), 3, stride, padding)
    expected = np.linalg.lstsq(rows, z.numpy().transpose(0, 2, 3, 1).reshape(-1, 3), rcond=None)[0]
    np.testing.assert_allclose(new.numpy().reshape(3, -1), expected.T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
        lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        lambda: nn.Conv2d(2, 3, 3, dilation=2, stride=2),
        lambda: nn.Conv2d(2, 3, (3, 1), padding="same"),
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2),
        lambda: nn.Linear(5, 4),
    ],
)
def test_the_weights_behind_the_wished_outputs_are_found(make: Any) -> None:
    teacher, layer = make().double(), make().double()
    x = draw(30, 5) if isinstance(layer, nn.Linear) else draw(12, layer.in_channels, 9, 9)
    x = x[..., 0] if isinstance(layer, nn.Conv1d) else x
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    new = refit(layer, [(x, teacher(x).detach())], ridge=0.0)
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(new[name], value, rtol=1e-8, atol=1e-10)
        assert torch.equal(layer.state_dict()[name], before[name])


def test_a_ridge_draws_towards_the_present_weights() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    x, z = draw(60, 4), draw(60, 3, seed=1)
    a, b, w = x.T.numpy() @ x.numpy(), x.T.numpy() @ z.numpy(), layer.weight.detach().numpy().T
    ridge = 0.3 * np.trace(a) / 4
    expected = np.linalg.solve(a + ridge * np.eye(4), b + ridge * w).T
    np.testing.assert_allclose(refit(layer, [(x, z)], ridge=0.3)["weight"].numpy(), expected, rtol=1e-9)
    stiff = refit(layer, [(x, z)], ridge=1e12)["weight"]
    torch.testing.assert_close(stiff, layer.weight.detach())


def test_inputs_that_are_never_seen_keep_their_weights() -> None:
    layer = nn.Linear(4, 3, bias=False).double()
    x = draw(60, 4)
    x[:, 2] = 0
    new = refit(layer, [(x, draw(60, 3))], ridge=0.0)["weight"]
    torch.testing.assert_close(new[:, 2], layer.weight.detach()[:, 2])


def test_bad_input_is_refused() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match="LSTM cannot be refitted"):
        refit(nn.LSTM(2, 2), [])
    with pytest.raises(ConfigError, match="'ridge' of refit must be at least 0"):
        refit(layer, [], ridge=-1.0)
    with pytest.raises(DataError, match="nothing to refit"):
        refit(nn.Linear(4, 3, bias=False), [])
    with pytest.raises(DataError, match="not finite"):
        refit(layer, [(torch.full((2, 4), float("nan")), torch.zeros(2, 3))])
