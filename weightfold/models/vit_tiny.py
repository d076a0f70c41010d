"""`vit-tiny`: a small vision transformer."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.models.attention import Block, init_transformer_
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, TaskSpec


class VitTinyConfig(Config):
    """Settings of `vit-tiny`."""

    width: PositiveInt = 128
    """channels of the residual stream, a multiple of `num_heads`"""
    depth: PositiveInt = 6
    """number of blocks"""
    num_heads: PositiveInt = 4
    """attention heads of a block"""
    hidden: PositiveInt | None = None
    """units of each block's MLP; 4 times the width"""
    patch: PositiveInt | None = None
    """side of a patch in pixels; such that the longer side holds at most 8 of them"""


class VitTiny(nn.Module):
    """Patches, learned positions, pre-norm blocks, the mean over the patches, a linear head.

    Images whose sides are no multiple of the patch are padded with zeros.

    Reference: Dosovitskiy et al. 2021, arXiv 2010.11929; differs in: mean pooling instead of a class token.
    """

    def __init__(self, task: TaskSpec, config: VitTinyConfig) -> None:
        super().__init__()
        assert isinstance(task.input, ImageInput)
        sides = (task.input.height, task.input.width)
        patch = config.patch or max(2, -(-max(sides) // 8))
        rows, columns = (-(-side // patch) for side in sides)
        padding = (-(-(rows * patch - sides[0]) // 2), -(-(columns * patch - sides[1]) // 2))
        self.patches = nn.Conv2d(task.input.channels, config.width, patch, stride=patch, padding=padding)
        self.position = nn.Parameter(torch.empty(1, rows * columns, config.width))
        hidden = config.hidden or 4 * config.width
        self.blocks = nn.Sequential(
            *(Block(config.width, config.num_heads, hidden, causal=False) for _ in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, task.output.width)
        self.apply(init_transformer_)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, outputs)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


FAMILY = Family("vit-tiny", frozenset({"image"}), VitTinyConfig, VitTiny, min_side=8)
