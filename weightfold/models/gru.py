"""`gru`: a recurrent network over the rows of an image, the features of a table, or tokens."""

from __future__ import annotations

from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.models.family import Family
from weightfold.models.task import ImageInput, NextToken, TableInput, TaskSpec


class GruConfig(Config):
    """Settings of `gru`."""

    width: PositiveInt = 128
    """hidden units, and channels of the token embedding"""
    depth: PositiveInt = 1
    """number of stacked layers"""


class Rows(nn.Module):
    """Read an image from top to bottom: (B, C, H, W) to (B, H, C W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Put the rows in the place of time."""
        return x.transpose(1, 2).flatten(2)


class Scalars(nn.Module):
    """Read a table's row one number at a time: (B, F) to (B, F, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Put the features in the place of time."""
        return x.unsqueeze(-1)


class Gru(nn.Module):
    """A sequence made of the input, a GRU over it, a head at each place (next-token) or at the last one."""

    def __init__(self, task: TaskSpec, config: GruConfig) -> None:
        super().__init__()
        self.every_place = isinstance(task.output, NextToken)
        self.sequence, n_in = _sequence(task, config.width)
        self.gru = nn.GRU(n_in, config.width, num_layers=config.depth, batch_first=True)
        self.head = nn.Linear(config.width, task.output.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to (B, outputs), or (B, N) to (B, N, vocab) for next-token tasks."""
        states, _ = self.gru(self.sequence(x))
        return self.head(states if self.every_place else states[:, -1])


def _sequence(task: TaskSpec, width: int) -> tuple[nn.Module, int]:
    """The module that makes a sequence of the task's input, and the numbers in one step of it."""
    if isinstance(task.input, ImageInput):
        return Rows(), task.input.channels * task.input.width
    if isinstance(task.input, TableInput):
        return Scalars(), 1
    return nn.Embedding(task.input.vocab, width), width


FAMILY = Family("gru", frozenset({"image", "table", "text"}), GruConfig, Gru)
