"""What an export starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from weightfold.artifact import Builder, CodedTensor, Input
from weightfold.blueprint import Blueprint
from weightfold.quant.activations import Grid


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
        coded: the codes behind quantised weights, by name of the tensor.
        grids: learned grids of what layers read, by module path.
        calibration: real inputs as positional and keyword arguments, for ranges of activations and for comparisons; or
            "drawn", for random numbers where nothing real is at hand.
        facts: what the model card says of the source: model, data, scores; plain data.
    """

    model: nn.Module
    inputs: tuple[Input, ...]
    before: Blueprint
    builder: Builder
    ledger_head: str | None = None
    fresh: Callable[[], nn.Module] | None = None
    coded: Mapping[str, CodedTensor] = field(default_factory=dict)
    grids: Mapping[str, Grid] = field(default_factory=dict)
    calibration: Sequence[tuple[tuple[Tensor, ...], dict[str, Tensor]]] | Literal["drawn"] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def real(self) -> list[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:
        """The real inputs; none where they are to be drawn."""
        return [] if isinstance(self.calibration, str) else list(self.calibration)
