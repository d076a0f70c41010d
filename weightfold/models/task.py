"""What a network is asked to do: the kind and size of one input, the kind and size of the answer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from weightfold.config import Config
from weightfold.errors import ConfigError


class ImageInput(Config):
    """Images of shape (B, channels, height, width), float32."""

    kind: Literal["image"] = "image"
    channels: PositiveInt
    height: PositiveInt
    width: PositiveInt

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.channels, self.height, self.width)


class TableInput(Config):
    """Rows of numbers of shape (B, n_features), float32."""

    kind: Literal["table"] = "table"
    n_features: PositiveInt

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.n_features,)


class TextInput(Config):
    """Token numbers below `vocab` of shape (B, context), int64."""

    kind: Literal["text"] = "text"
    vocab: int = Field(ge=2)
    context: PositiveInt

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.context,)


class Classes(Config):
    """One of `n` classes; outputs are logits of shape (B, n), targets class numbers of shape (B,), int64."""

    kind: Literal["classes"] = "classes"
    n: int = Field(ge=2)

    @property
    def width(self) -> int:
        """Numbers in one answer."""
        return self.n

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(outputs, targets)


class Regression(Config):
    """`n_targets` real numbers; outputs and targets of shape (B, n_targets), float32."""

    kind: Literal["regression"] = "regression"
    n_targets: PositiveInt = 1

    @property
    def width(self) -> int:
        """Numbers in one answer."""
        return self.n_targets

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs, targets)


class NextToken(Config):
    """The next token at each place; outputs are logits of shape (B, N, vocab), targets of shape (B, N), int64."""

    kind: Literal["next-token"] = "next-token"
    vocab: int = Field(ge=2)

    @property
    def width(self) -> int:
        """Numbers in one answer."""
        return self.vocab

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy per token in nats."""
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


Input = Annotated[ImageInput | TableInput | TextInput, Field(discriminator="kind")]
Output = Annotated[Classes | Regression | NextToken, Field(discriminator="kind")]


class TaskSpec(Config):
    """An input kind and an output kind: all that a built-in network must know of a data set.

    Raises:
        ConfigError: a size is out of range, or next-token output is asked of anything but text of the same vocabulary.
    Example:
        >>> task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
        >>> task.input.shape, task.output.width
        ((1, 8, 8), 10)
        >>> TaskSpec.from_json(task.to_json()) == task
        True
    """

    input: Input
    output: Output

    @model_validator(mode="after")
    def _next_token_is_of_the_same_text(self) -> Self:
        if isinstance(self.output, NextToken) and not (
            isinstance(self.input, TextInput) and self.input.vocab == self.output.vocab
        ):
            raise ConfigError(
                f"Next-token output over {self.output.vocab} tokens needs text input of the same vocabulary. "
                f"Got {self.input!r} instead."
            )
        return self

    def example(self, batch: int = 2) -> Tensor:
        """Make an all-zero batch of the right shape and type, to trace a network with.

        Args:
            batch: number of inputs, > 0.
        Returns:
            inputs: shape (batch, *input.shape), float32, or int64 for text.
        Example:
            >>> TaskSpec(input=TableInput(n_features=3), output=Regression()).example(4).shape
            torch.Size([4, 3])
        """
        dtype = torch.int64 if self.input.kind == "text" else torch.float32
        return torch.zeros(batch, *self.input.shape, dtype=dtype)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the task's own training loss: cross-entropy in nats, or mean squared error.

        Args:
            outputs: the network's answer, shape (B, width), or (B, N, vocab) for next-token.
            targets: class numbers (B,), real numbers (B, n_targets), or tokens (B, N).
        Returns:
            loss: shape (), the mean over the batch.
        Example:
            >>> task = TaskSpec(input=TableInput(n_features=3), output=Classes(n=4))
            >>> round(task.loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
            1.3863
        """
        return self.output.loss(outputs, targets)
