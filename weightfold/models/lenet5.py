"""`lenet5`: two convolutions, three linear layers (LeCun et al. 1998)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, TaskSpec

_KERNEL = 5


class LeNet5Config(Config):
    """Settings of `lenet5`."""

    channels: tuple[PositiveInt, PositiveInt] = (6, 16)
    """channels of the two convolutions"""
    hidden: tuple[PositiveInt, PositiveInt] = (120, 84)
    """units of the two hidden linear layers"""
    activation: Literal["tanh", "relu"] = "tanh"
    """function after each layer; tanh is the published one"""


class LeNet5(nn.Module):
    """Convolution and average pooling twice, then three linear layers.

    The paddings fit the image: 28×28 and 32×32 give the published 5×5 map, smaller images keep at least one pixel.

    Reference: LeCun, Bottou, Bengio, Haffner 1998; differs in: full connection between the convolutions, softmax head.
    """

    def __init__(self, task: TaskSpec, config: LeNet5Config) -> None:
        super().__init__()
        assert isinstance(task.input, ImageInput)
        rows, columns = _Side(task.input.height), _Side(task.input.width)
        first, second = config.channels
        self.conv1 = nn.Conv2d(task.input.channels, first, _KERNEL, padding=(rows.pad1, columns.pad1))
        self.conv2 = nn.Conv2d(first, second, _KERNEL, padding=(rows.pad2, columns.pad2))
        self.fc1 = nn.Linear(second * rows.left * columns.left, config.hidden[0])
        self.fc2 = nn.Linear(*config.hidden)
        self.head = nn.Linear(config.hidden[1], task.output.width)
        self.activation = nn.Tanh() if config.activation == "tanh" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs)."""
        x = F.avg_pool2d(self.activation(self.conv1(x)), 2)
        x = F.avg_pool2d(self.activation(self.conv2(x)), 2)
        x = self.activation(self.fc1(x.flatten(1)))
        return self.head(self.activation(self.fc2(x)))


class _Side:
    """Paddings along one side of the image, and the pixels left of it after both poolings."""

    def __init__(self, pixels: int) -> None:
        self.pad1 = 2 if pixels <= 28 else 0
        pooled = (pixels + 2 * self.pad1 - _KERNEL + 1) // 2
        self.pad2 = 2 if pooled < 10 else 0
        self.left = (pooled + 2 * self.pad2 - _KERNEL + 1) // 2


FAMILY = Family("lenet5", frozenset({"image"}), LeNet5Config, LeNet5, min_side=8)
