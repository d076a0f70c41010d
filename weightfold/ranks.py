"""Several processes train one network: the first decides, the others do as it did.

Every rank of data-parallel training holds the same weights, so the same edit gives the same network everywhere; only
the decision must be one. `DistributedDataParallel` keeps hooks on the parameters that it saw when it was built and
sizes its buckets by them, so a changed network is wrapped anew, with the settings it had.

Reference: Li et al., VLDB 2020, arXiv 2006.15704 (the reducer of DistributedDataParallel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network, or this one alone.

    Args:
        group: their process group; None when there is one process.

    Example:
        >>> ranks = Ranks.of(nn.Linear(2, 2))
        >>> ranks.leads, ranks.shared({"edits": []})
        (True, {'edits': []})
    """

    group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The ranks of a wrapped model's group; of all processes, where there are several."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        wrapper = _find(model)
        return cls(dist.group.WORLD if wrapper is None else wrapper.process_group)

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.group is None or dist.get_rank(self.group) == 0

    def shared(self, decision: Any) -> Any:
        """What the first rank has decided; waits until it has. Others pass anything."""
        if self.group is None:
            return decision
        box = [decision]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside a compiled or a data-parallel one."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _find(model: nn.Module) -> DistributedDataParallel | None:
    """The data-parallel wrapper among the layers around a module."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def rewrapped(model: nn.Module) -> nn.Module:
    """The same wrapping around a module that has changed; the module itself where it was not data-parallel.

    A compiled module needs nothing: it notices new shapes, and compiles again.
    """
    wrapper = _find(model)
    if wrapper is None:
        return model
    return DistributedDataParallel(
        wrapper.module,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        broadcast_buffers=wrapper.broadcast_buffers,
        process_group=wrapper.process_group,
        bucket_cap_mb=wrapper.bucket_bytes_cap / 2**20,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
