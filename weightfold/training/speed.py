"""The race that an event in training must not lose: the network as it would be against the dense one, in a runtime."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from weightfold.bench.tune import SLOWER, check_not_slower, check_runs
from weightfold.errors import ExportError
from weightfold.export.source import Source
from weightfold.ledger import Entry
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

    Raises:
        ConfigError: the runtime is unknown.
        ExportError: it is not installed, or cannot express the dense network.
    """

    def __init__(self, dense: Source, race: Race) -> None:
        self.race = race
        self.dense = replace(dense, model=_plain(dense.model))
        self.times: tuple[float, float] | None = None
        check_runs(self.dense, race.target)

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


def lost_races(entries: Iterable[Entry]) -> bool:
    """Whether an edit of a run was refused because the network would have been slower."""
    return any(SLOWER in str(entry.body) for entry in entries if entry.kind in ("edit", "refusal", "rollback"))


def _plain(model: nn.Module) -> nn.Module:
    """A copy to be written: in evaluation mode, on the CPU, without quantisers."""
    return plain_copy(model).cpu().eval()
