"""Built-in networks by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.models import char_gpt, gru, lenet5, mlp, resnet9, resnet20, vgg_small, vit_tiny
from weightfold.models.family import Family
from weightfold.models.task import TaskSpec

_MODULES = (char_gpt, gru, lenet5, mlp, resnet20, resnet9, vgg_small, vit_tiny)
_FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}

NAMES: tuple[str, ...] = tuple(_FAMILIES)
"""Names that `build` knows, in alphabetical order."""


def build(
    name: str, task: TaskSpec, *, seed: int = 0, generator: torch.Generator | None = None, **overrides: Any
) -> nn.Module:
    """Build a built-in network for a task, with the same weights for the same seed.

    The global random state is left as it was.

    Args:
        name: one of `NAMES`.
        task: kind and size of input and output.
        seed: of the initial weights.
        generator: draws the seed instead, if given.
        **overrides: the network's own settings, such as `width=`, `depth=` or `hidden=`.
    Returns:
        model: a plain module in training mode, on the CPU.
    Raises:
        ConfigError: the name or a setting is unknown, a setting is out of range, or the network cannot do the task.
    Example:
        >>> from weightfold.models import ImageInput, Classes
        >>> task = TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
        >>> build("lenet5", task)(task.example()).shape
        torch.Size([2, 10])
    """
    family = _family(name)
    if not family.serves(task):
        raise ConfigError(_refusal(family, task), remedy=_alternatives(task))
    config = family.config(**overrides)
    if generator is not None:
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return family.make(task, config)


def serving(task: TaskSpec) -> tuple[str, ...]:
    """Name the networks that can do a task.

    Example:
        >>> from weightfold.models import TableInput, Regression
        >>> serving(TaskSpec(input=TableInput(n_features=3), output=Regression()))
        ('gru', 'mlp')
    """
    return tuple(name for name, family in _FAMILIES.items() if family.serves(task))


def _family(name: str) -> Family:
    if name not in _FAMILIES:
        raise ConfigError(f"There is no built-in model '{name}'.", remedy=nearest(name, NAMES))
    return _FAMILIES[name]


def _refusal(family: Family, task: TaskSpec) -> str:
    if task.input.kind in family.inputs:
        size = "×".join(map(str, task.input.shape[1:]))
        return (
            f"'{family.name}' needs images of at least {family.min_side}×{family.min_side} pixels. Got {size} instead."
        )
    return f"'{family.name}' reads {' or '.join(sorted(family.inputs))} input. Got {task.input.kind} input instead."


def _alternatives(task: TaskSpec) -> str:
    return f"Models that can do this task: {', '.join(serving(task))}."
