"""`char-gpt`: a small decoder over characters or bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.errors import ConfigError
from weightfold.models.attention import Block, init_transformer_
from weightfold.models.family import Family
from weightfold.models.task import NextToken, TaskSpec, TextInput


class CharGptConfig(Config):
    """Settings of `char-gpt`."""

    width: PositiveInt = 128
    """channels of the residual stream, a multiple of `num_heads`"""
    depth: PositiveInt = 4
    """number of blocks"""
    num_heads: PositiveInt = 4
    """attention heads of a block"""
    hidden: PositiveInt | None = None
    """units of each block's MLP; 4 times the width"""
    tied: bool | None = None
    """whether the head reads the token embedding's own weights; yes for next-token tasks, impossible for others"""


class CharGpt(nn.Module):
    """Token and position embeddings, causal pre-norm blocks, a head at each place or at the last one.

    A tied head has no parameters of its own: it reads `token.weight`, which the state dict then holds once.

    Raises:
        ConfigError: a tied head was asked for a task that is not next-token.
    Reference: Radford et al. 2019 (GPT-2), in the size of Karpathy's character models.
    """

    def __init__(self, task: TaskSpec, config: CharGptConfig) -> None:
        super().__init__()
        assert isinstance(task.input, TextInput)
        self.every_place = isinstance(task.output, NextToken)
        tied = self.every_place if config.tied is None else config.tied
        if tied and not self.every_place:
            raise ConfigError(
                f"A tied head predicts tokens; the task asks for {task.output.kind}.", remedy="Leave out tied=True."
            )
        self.token = nn.Embedding(task.input.vocab, config.width)
        self.position = nn.Embedding(task.input.context, config.width)
        hidden = config.hidden or 4 * config.width
        self.blocks = nn.Sequential(
            *(Block(config.width, config.num_heads, hidden, causal=True) for _ in range(config.depth))
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = None if tied else nn.Linear(config.width, task.output.width)
        self.apply(init_transformer_)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N) to (B, N, vocab) for next-token tasks, to (B, outputs) for others; N <= context."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.blocks(self.token(tokens) + self.position(places)))
        if not self.every_place:
            x = x[:, -1]
        return F.linear(x, self.token.weight) if self.head is None else self.head(x)


FAMILY = Family("char-gpt", frozenset({"text"}), CharGptConfig, CharGpt)
