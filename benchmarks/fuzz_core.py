"""What the pieces of random networks are made of: shapes as data, random picks, blocks, the table of pieces.

A piece is a function of random picks and the shape that comes in; it returns a module and the shape that goes out:

    @piece(IMAGE)
    def dilated(p: Pick, s: Shape) -> Made:
        c = p.width()
        return block(lambda m, x: m.conv(x), conv=nn.Conv2d(s.c, c, 3, padding=2, dilation=2)), s.wide(c)

Pieces of `VECTOR` take (B, C), of `SEQUENCE` (B, T, C), of `IMAGE` (B, C, H, W), of `ANY` whatever comes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, SEQUENCE, VECTOR, ANY = "image", "sequence", "vector", "any"
WIDTHS = (4, 6, 8, 12)


@dataclass(frozen=True)
class Shape:
    """Shape of a feature map without its batch: ``c`` channels, and ``size`` (T,) or (H, W)."""

    kind: str
    c: int
    size: tuple[int, ...] = ()

    @property
    def dim(self) -> int:
        """The dimension of the channels."""
        return -1 if self.kind == SEQUENCE else 1

    @property
    def places(self) -> tuple[int, ...]:
        """The dimensions of time or space."""
        return {IMAGE: (2, 3), SEQUENCE: (1,), VECTOR: ()}[self.kind]

    def wide(self, c: int) -> Shape:
        return replace(self, c=c)

    def along(self, vector: Tensor) -> Tensor:
        """A vector of one number per channel, shaped to meet a feature map."""
        return vector[:, None, None] if self.kind == IMAGE else vector

    def linear(self, c: int, *, bias: bool = True) -> nn.Module:
        """The plain layer that mixes the channels of this kind of feature map."""
        return nn.Conv2d(self.c, c, 1, bias=bias) if self.kind == IMAGE else nn.Linear(self.c, c, bias=bias)


class Pick:
    """Random choices of one piece, from a seed of its own."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def width(self, *, even: bool = False, multiple: int = 1) -> int:
        return self.of([n for n in WIDTHS if n % (2 if even else 1) == 0 and n % multiple == 0])

    def of(self, options: Sequence[Any]) -> Any:
        return self.random.choice(list(options))

    def chance(self, share: float = 0.5) -> bool:
        return self.random.random() < share


@dataclass
class Forward:
    """What one forward carries beside the feature map: further inputs, and what else it returns."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)


class Block(nn.Module):
    """A forward written on the spot, with its layers, parameters, buffers and plain attributes."""

    def __init__(self, run: Callable[..., Any], parts: dict[str, Any], *, wide: bool) -> None:
        super().__init__()
        for name, part in parts.items():
            plain_tensor = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if plain_tensor else setattr(self, name, part)
        self.run, self.wide = run, wide

    def forward(self, x: Tensor, io: Forward) -> Tensor:
        return self.run(self, x, io) if self.wide else self.run(self, x)


def block(run: Callable[[Any, Tensor], Any], **parts: Any) -> nn.Module:
    """A module whose forward is ``run(module, x)``."""
    return Block(run, parts, wide=False)


def io_block(run: Callable[[Any, Tensor, Forward], Any], **parts: Any) -> nn.Module:
    """A module whose forward is ``run(module, x, io)``: it takes further inputs, returns further outputs, or holds
    other blocks."""
    return Block(run, parts, wide=True)


Made = tuple[nn.Module, Shape]


@dataclass(frozen=True)
class Piece:
    """An entry of the table.

    Args:
        bodies: how many chains of further pieces it holds.
        needs: further inputs of the network that it takes.
        weight: how often it is drawn, 1 is usual.
        multiple: what divides the number of channels.
        least: the smallest length, height or width.
    """

    name: str
    kind: str
    make: Callable[..., Made]
    bodies: int = 0
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    multiple: int = 1
    least: int = 1

    def fits(self, s: Shape) -> bool:
        """Whether a feature map of this shape can go in: else the piece is left out."""
        fine = s.c % self.multiple == 0 and s.c > self.multiple and all(n >= self.least for n in s.size)
        return fine and self.kind in (ANY, s.kind)


PIECES: dict[str, Piece] = {}


def piece(kind: str, **settings: Any) -> Callable[[Any], Any]:
    """Enter a function in the table under its own name, with the settings of `Piece`."""

    def register(make: Callable[..., Made]) -> Callable[..., Made]:
        PIECES[make.__name__] = Piece(make.__name__, kind, make, **settings)
        return make

    return register


def weight(*shape: int) -> nn.Parameter:
    """A parameter without a module."""
    return nn.Parameter(torch.randn(*shape) / max(shape[-1], 1) ** 0.5)
