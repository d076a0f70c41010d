"""The pre-norm transformer block shared by `vit-tiny` and `char-gpt`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.models.family import head_dim


class Attention(nn.Module):
    """Self-attention with one fused projection, its rows ordered (query|key|value, head, channel of the head).

    The logits' scale is fixed when the network is built: taking channels out of a head later must not change it.

    Args:
        width: channels of the residual stream, a multiple of `num_heads`.
        num_heads: number of heads.
        causal: whether a place may look only at itself and the places before it.
    Example:
        >>> import torch
        >>> Attention(width=8, num_heads=2, causal=True)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim(width, num_heads)
        self.scale = self.head_dim**-0.5
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix places: (B, N, width) to (B, N, width)."""
        batch, n_tokens = x.shape[:2]
        qkv = self.qkv(x).view(batch, n_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, acting on each place alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to (B, N, width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention, then an MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to (B, N, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def init_transformer_(module: nn.Module) -> None:
    """Draw one module's weights from N(0, 0.02²) and set its biases to zero, as GPT-2 and ViT do."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
