"""The race that an event in training must not lose: the network as it would be against the dense one, in a runtime."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from weightfold.bench.tune import check_not_slower
from weightfold.errors import ExportError
from weightfold.export.source import Source
from weightfold.quant.attached import plain_copy
from weightfold.training.config import Race


class NotSlower:
    """Says why a network may not be as it is: it would be slower than the dense one. A `check` of `Compressor`.

    What the clock says enters the ledger only with a refusal, so that runs in which nothing is refused stay equal.

    Args:
        dense: the network before any event.
        race: runtime, batch and threads.

    Attributes:
        times: milliseconds of the dense and of the present network when it last passed.
    """

    def __init__(self, dense: Source, race: Race) -> None:
        self.race = race
        self.dense = replace(dense, model=_plain(dense.model))
        self.times: tuple[float, float] | None = None

    def __call__(self, model: nn.Module) -> str:
        """Time both, in turns.

        Returns:
            reason: with both figures; empty if the network is not slower.
        """
        race = self.race
        narrow = replace(self.dense, model=_plain(model))
        threads = torch.get_num_threads()
        try:
            self.times = check_not_slower(self.dense, narrow, race.target, batch=race.batch, threads=race.threads)
        except ExportError as error:
            return error.message
        finally:
            torch.set_num_threads(threads)
        return ""


def _plain(model: nn.Module) -> nn.Module:
    """A copy to be written: in evaluation mode, on the CPU, without quantisers."""
    return plain_copy(model).cpu().eval()
