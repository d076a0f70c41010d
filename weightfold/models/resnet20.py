"""`resnet20`: the residual network for small images, with shortcuts that hold no parameters."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, TaskSpec


class ResNet20Config(Config):
    """Settings of `resnet20`."""

    width: PositiveInt = 16
    """channels of the first stage; each of the three stages doubles them"""
    depth: int = Field(default=20, ge=8)
    """layers that hold weights, 6 n + 2 with n blocks a stage"""

    def blocks(self) -> int:
        """Blocks a stage."""
        n_blocks, rest = divmod(self.depth - 2, 6)
        if rest:
            raise ConfigError(
                f"The 'depth' of resnet20 must be 6 n + 2. Got {self.depth} instead.",
                remedy=f"Take depth={6 * n_blocks + 2} or depth={6 * n_blocks + 8}.",
            )
        return n_blocks


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters ("option A").

    Args:
        n_in: channels read.
        n_out: channels written.
        stride: step of the first convolution, in pixels.
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.widens = n_in != n_out
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, n_in, H, W) to (B, n_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (option_a(x, y, self.stride) if self.widens else x))


def option_a(x: Tensor, y: Tensor, stride: int) -> Tensor:
    """Fit a block's input to its output: every stride-th pixel, and zeros for the new channels on both sides.

    Args:
        x: the block's input, shape (B, I, H, W).
        y: what the shortcut will be added to, shape (B, O, ...), O >= I.
        stride: step in pixels.
    Returns:
        shortcut: shape (B, O, H / stride, W / stride); the channels of x in the middle.
    Example:
        >>> import torch
        >>> option_a(torch.ones(1, 2, 4, 4), torch.zeros(1, 4, 2, 2), 2)[0, :, 0, 0]
        tensor([0., 1., 1., 0.])
    """
    extra = y.shape[1] - x.shape[1]
    front = extra // 2
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, front, extra - front))


class ResNet20(nn.Module):
    """A convolution, three stages of residual blocks, the mean over the image, a linear head.

    Reference: He et al. 2016, arXiv 1512.03385, section 4.2; parameters are named as in
    github.com/akamaster/pytorch_resnet_cifar10, so its checkpoints load.
    """

    def __init__(self, task: TaskSpec, config: ResNet20Config) -> None:
        super().__init__()
        assert isinstance(task.input, ImageInput)
        width, n_blocks = config.width, config.blocks()
        self.conv1 = nn.Conv2d(task.input.channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, n_blocks)
        self.layer2 = _stage(width, 2 * width, n_blocks)
        self.layer3 = _stage(2 * width, 4 * width, n_blocks)
        self.linear = nn.Linear(4 * width, task.output.width)
        self.apply(_init_)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _stage(n_in: int, n_out: int, n_blocks: int) -> nn.Sequential:
    first = Block(n_in, n_out, stride=1 if n_in == n_out else 2)
    return nn.Sequential(first, *(Block(n_out, n_out, stride=1) for _ in range(n_blocks - 1)))


def _init_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)


FAMILY = Family("resnet20", frozenset({"image"}), ResNet20Config, ResNet20, min_side=8)
