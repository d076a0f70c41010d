"""One family of networks: its name, the inputs it can read, its settings, its constructor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.models.task import ImageInput, TaskSpec


@dataclass(frozen=True)
class Family:
    """A built-in network as the registry knows it.

    Args:
        name: what the user writes.
        inputs: kinds of input that the network can read.
        config: settings that the user may override.
        make: builds the network from the task and the settings.
        min_side: smallest image height and width, in pixels.
    """

    name: str
    inputs: frozenset[str]
    config: type[Config]
    make: Callable[[TaskSpec, Any], nn.Module]
    min_side: int = 1

    def serves(self, task: TaskSpec) -> bool:
        """Tell whether the network can do the task."""
        if task.input.kind not in self.inputs:
            return False
        return not isinstance(task.input, ImageInput) or min(task.input.height, task.input.width) >= self.min_side


def head_dim(width: int, num_heads: int) -> int:
    """Divide a transformer's width among its heads.

    Raises:
        ConfigError: the width is no multiple of the number of heads.
    Example:
        >>> head_dim(128, 4)
        32
    """
    if width % num_heads:
        raise ConfigError(
            f"The 'width' must be a multiple of 'num_heads'. Got width={width}, num_heads={num_heads} instead.",
            remedy=f"For {num_heads} heads, take width={(width // num_heads + 1) * num_heads}.",
        )
    return width // num_heads
