"""`resnet9`: a shallow, fast residual network with two residual blocks."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, TaskSpec


class ResNet9Config(Config):
    """Settings of `resnet9`."""

    width: PositiveInt = 32
    """channels of the first layer; the later ones have 2, 4 and 8 times as many. 64 is the published size"""


class ResNet9(nn.Module):
    """Four convolutions, three of them pooled, with residual blocks after the first and the last pooling.

    Reference: Page 2018, "How to train your ResNet" (DAWNBench); differs in: global instead of 4×4 max pooling.
    """

    def __init__(self, task: TaskSpec, config: ResNet9Config) -> None:
        super().__init__()
        assert isinstance(task.input, ImageInput)
        one, two, four, eight = (config.width * factor for factor in (1, 2, 4, 8))
        self.prep = _conv_bn_relu(task.input.channels, one)
        self.layer1 = _conv_bn_relu(one, two)
        self.res1 = nn.Sequential(_conv_bn_relu(two, two), _conv_bn_relu(two, two))
        self.layer2 = _conv_bn_relu(two, four)
        self.layer3 = _conv_bn_relu(four, eight)
        self.res3 = nn.Sequential(_conv_bn_relu(eight, eight), _conv_bn_relu(eight, eight))
        self.head = nn.Linear(eight, task.output.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs)."""
        x = F.max_pool2d(self.layer1(self.prep(x)), 2)
        x = x + self.res1(x)
        x = F.max_pool2d(self.layer2(x), 2)
        x = F.max_pool2d(self.layer3(x), 2)
        x = x + self.res3(x)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


def _conv_bn_relu(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


FAMILY = Family("resnet9", frozenset({"image"}), ResNet9Config, ResNet9, min_side=8)
