"""Example inputs: written as text, described as data, made as tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weightfold.artifact import Input
from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.models import TaskSpec

Arguments = tuple[tuple[Tensor, ...], dict[str, Tensor]]
"""Positional and keyword arguments of a forward."""

DTYPES = {
    "float": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int": torch.int64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
_FORM = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:[x×,]\d+)*)(?::(?P<dtype>\w+)(?:<(?P<high>\d+))?)?")
_HELP = "Write sizes with x between them, the batch first: 1x3x32x32, 1x128:int64<5000, mask=1x128:bool."


def parse_input(text: str) -> Input:
    """Read one input from text: `[NAME=]SIZExSIZE[:DTYPE[<HIGH]]`.

    Raises:
        ConfigError: it has another form, a size of 0, or an unknown type.
    Example:
        >>> parse_input("2x3x8x8").shape, parse_input("ids=1x16:int<50").high
        ((2, 3, 8, 8), 50)
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is no example input.", remedy=_HELP)
    shape = tuple(int(size) for size in re.split("[x×,]", match["shape"]))
    if 0 in shape:
        raise ConfigError(f"The example input '{text}' has a size of 0.", remedy=_HELP)
    word = match["dtype"] or "float32"
    if word not in DTYPES:
        raise ConfigError(f"'{word}' is no type of the example input '{text}'.", remedy=nearest(word, DTYPES))
    high = int(match["high"]) if match["high"] else None
    return Input(name=match["name"], shape=shape, dtype=str(DTYPES[word]).removeprefix("torch."), high=high)


def task_input(task: TaskSpec, batch: int = 2) -> Input:
    """Describe one input of a task."""
    if task.input.kind == "text":
        return Input(shape=(batch, *task.input.shape), dtype="int64", high=task.input.vocab)
    return Input(shape=(batch, *task.input.shape))


def zeros(inputs: Sequence[Input]) -> Any:
    """Make all-zero inputs, in the form that `weightfold.trace` takes.

    Example:
        >>> zeros([Input(shape=(1, 2))])
        tensor([[0., 0.]])
    """
    args = tuple(torch.zeros(item.shape, dtype=DTYPES[item.dtype]) for item in inputs if item.name is None)
    named = {item.name: torch.zeros(item.shape, dtype=DTYPES[item.dtype]) for item in inputs if item.name}
    if named:
        return (args, named) if args else named
    return args[0] if len(args) == 1 else args


def draw(inputs: Sequence[Input], *, seed: int = 0, batch: int | None = None) -> Arguments:
    """Draw random inputs: normal numbers, or whole numbers below `high` (2 if there is none).

    Args:
        inputs: what to draw.
        seed: of the numbers.
        batch: first size of every input instead of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    named: dict[str, Tensor] = {}
    for item in inputs:
        value = _random(item, (batch or item.shape[0], *item.shape[1:]), generator)
        if item.name:
            named[item.name] = value
        else:
            args.append(value)
    return tuple(args), named


def _random(item: Input, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = DTYPES[item.dtype]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(item.high or 2, shape, generator=generator).to(dtype)


def as_taken(item: Input, value: Tensor) -> Tensor:
    """Data in the type of floats that a model takes.

    Example:
        >>> as_taken(Input(shape=(1, 2), dtype="bfloat16"), torch.ones(3, 2)).dtype
        torch.bfloat16
    """
    dtype = DTYPES[item.dtype]
    return value.to(dtype) if dtype.is_floating_point and value.is_floating_point() else value
