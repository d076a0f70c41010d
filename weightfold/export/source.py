"""What an export starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from weightfold.artifact import Builder, Input
from weightfold.export.blueprint import Blueprint


@dataclass(frozen=True, eq=False)
class Source:
    """A module and all that a file of any target must know of it.

    Args:
        model: in evaluation mode, on the CPU.
        inputs: an example of what it takes.
        before: its blueprint before any edit.
        builder: how it is made.
        ledger_head: hash of the last entry of its run's ledger.
        fresh: makes the module as it was before any edit, where the builder alone cannot.
    """

    model: nn.Module
    inputs: tuple[Input, ...]
    before: Blueprint
    builder: Builder
    ledger_head: str | None = None
    fresh: Callable[[], nn.Module] | None = None
