"""`mlp`: fully connected layers over a flattened image or a table's row."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Literal, Self

from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.models.family import Family
from weightfold.models.task import TaskSpec

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MlpConfig(Config):
    """Settings of `mlp`; the default for images is wider than needed, so that there is something to find."""

    hidden: tuple[PositiveInt, ...] | None = None
    """units of each hidden layer; instead of `width` and `depth`"""
    width: PositiveInt | None = None
    """units of every hidden layer; 1024 for images, 128 for tables"""
    depth: PositiveInt | None = None
    """number of hidden layers; 2"""
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    """function after each hidden layer"""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if self.hidden is not None and (self.width is not None or self.depth is not None):
            raise ConfigError("mlp takes either 'hidden' or 'width' and 'depth'. Got both.", remedy="Leave out one.")
        return self

    def sizes(self, task: TaskSpec) -> tuple[int, ...]:
        """Units of each hidden layer for a task."""
        if self.hidden is not None:
            return self.hidden
        width = self.width or (1024 if task.input.kind == "image" else 128)
        return (width,) * (self.depth or 2)


class Mlp(nn.Module):
    """Linear layers with an activation after each, then a linear head.

    Example:
        >>> from weightfold.models import build, TaskSpec, TableInput, Regression
        >>> build("mlp", TaskSpec(input=TableInput(n_features=3), output=Regression()), hidden=(5,))
        Mlp(
          (body): Sequential(
            (0): Linear(in_features=3, out_features=5, bias=True)
            (1): ReLU()
          )
          (head): Linear(in_features=5, out_features=1, bias=True)
        )
    """

    def __init__(self, task: TaskSpec, config: MlpConfig) -> None:
        super().__init__()
        sizes = (prod(task.input.shape), *config.sizes(task))
        activation = _ACTIVATIONS[config.activation]
        layers = [(nn.Linear(n_in, n_out), activation()) for n_in, n_out in pairwise(sizes)]
        self.body = nn.Sequential(*(module for layer in layers for module in layer))
        self.head = nn.Linear(sizes[-1], task.output.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, outputs)."""
        return self.head(self.body(x.flatten(1)))


FAMILY = Family("mlp", frozenset({"image", "table"}), MlpConfig, Mlp)
