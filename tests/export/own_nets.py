"""Networks of a user's own, of the kinds that people fold: widths in tensors, in layers, in own attributes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm = nn.BatchNorm2d(4 * width)
        self.depth = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.back = nn.Conv2d(4 * width, width, 1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.depth(torch.relu(self.norm(self.wide(x)))))
        return torch.relu(x + self.grouped(self.back(h)))


class ResidualCNN(nn.Module):
    """Batch norm, depthwise and grouped convolutions, a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(ResidualBlock(16, 4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """Heads that are counted by attributes."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        h = torch.softmax(q @ k.mT / self.head_dim**0.5, -1) @ v
        return self.out(h.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Tied embeddings, pre-norm, heads and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.attention = Attention(16, 4)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.attention(self.norms[0](h))
        h = h + self.down(nn.functional.gelu(self.up(self.norms[1](h))))
        return self.head(h)


class Recurrent(nn.Module):
    """A stacked LSTM behind a linear layer, read at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 24)
        self.rnn = nn.LSTM(24, 20, num_layers=2, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(torch.tanh(self.inward(x)))[0][:, -1])


class Counted(nn.Module):
    """Widths in attributes that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.parts = 24, 3
        self.first = nn.Linear(8, self.parts * self.width)
        self.second = nn.Linear(self.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).view(x.shape[0], self.parts, self.width).sum(1))


class Plain(nn.Module):
    """Layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 16, 3)
        self.depth = nn.Conv1d(16, 16, 3, groups=16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.depth(self.conv(x)))).mean(2))


NETS: dict[type[nn.Module], Callable[[torch.Generator, int], Tensor]] = {
    ResidualCNN: lambda g, n: torch.randn(n, 3, 8, 8, generator=g),
    Transformer: lambda g, n: torch.randint(0, 20, (n, 7), generator=g),
    Recurrent: lambda g, n: torch.randn(n, 5, 6, generator=g),
    Counted: lambda g, n: torch.randn(n, 8, generator=g),
    Plain: lambda g, n: torch.randn(n, 2, 9, generator=g),
}
"""Each network and its inputs."""
