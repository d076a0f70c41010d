"""The running statistics of batch norms, measured anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.stats.running import call, keeping_modes


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm of one process, for inputs of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Measure the running statistics of all batch norms anew, in place; how many there are.

    Plain means over all batches, all else in evaluation mode. A SyncBatchNorm takes those of this process alone: the
    others need not call this, and are not waited for. Where a batch fails, the statistics are those of before.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(2))
        >>> recalibrate_(net, [torch.tensor([[1.0, 2.0], [3.0, 2.0]])]), net[0].running_mean
        (1, tensor([2., 2.]))
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    kept = [(m, m.momentum, m.__class__, {n: b.clone() for n, b in m._buffers.items() if b is not None}) for m in norms]
    n_batches = 0
    with keeping_modes(model):
        try:
            model.eval()
            for batch in batches if norms else ():
                if n_batches == 0:
                    _reset_(norms)
                call(model, batch)
                n_batches += 1
        except BaseException:
            for norm, _, _, buffers in kept:
                for name, value in buffers.items():
                    norm._buffers[name].copy_(value)  # pyright: ignore[reportOptionalMemberAccess]
            raise
        finally:
            for norm, momentum, kind, _ in kept:
                norm.momentum, norm.__class__ = momentum, kind
    return len(norms) if n_batches else 0


def _reset_(norms: list[nn.modules.batchnorm._BatchNorm]) -> None:
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
        if isinstance(norm, nn.SyncBatchNorm):
            norm.__class__ = _AnyBatchNorm  # pyright: ignore[reportAttributeAccessIssue]
