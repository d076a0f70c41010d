"""`vgg-small`: three stages of 3×3 convolutions, each ended by a pooling, and one linear layer."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, TaskSpec

_N_STAGES = 3


class VggSmallConfig(Config):
    """Settings of `vgg-small`."""

    width: PositiveInt = 64
    """channels of the first stage; each stage doubles them"""
    depth: PositiveInt = 2
    """convolutions a stage"""


class VggSmall(nn.Module):
    """Stages of convolution, batch norm and ReLU; the last map is flattened into the head.

    Reference: the VGG-small of the binary-network papers (Zhang et al. 2018, arXiv 1807.10029); differs in: half width.
    """

    def __init__(self, task: TaskSpec, config: VggSmallConfig) -> None:
        super().__init__()
        assert isinstance(task.input, ImageInput)
        layers: list[nn.Module] = []
        channels = task.input.channels
        for stage in range(_N_STAGES):
            for _ in range(config.depth):
                out = config.width * 2**stage
                layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        shrink = 2**_N_STAGES
        left = (task.input.height // shrink) * (task.input.width // shrink)
        self.head = nn.Linear(channels * left, task.output.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs)."""
        return self.head(self.features(x).flatten(1))


FAMILY = Family("vgg-small", frozenset({"image"}), VggSmallConfig, VggSmall, min_side=2**_N_STAGES)
