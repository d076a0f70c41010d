"""Several processes train one network: the first decides, the others do as it did.

Every rank of data-parallel training holds the same weights, so the same edit gives the same network everywhere; only
the decision must be one. The first rank alone takes statistics, measures and records: its share of the data and its
probe decide. `DistributedDataParallel` keeps hooks on the parameters that it saw when it was built, and sizes its
buckets by them. So a network on which anything was tried is wrapped anew, with the settings it had, and the wrapper of
before refuses to run.

Reference: Li et al., VLDB 2020, arXiv 2006.15704 (the reducer of DistributedDataParallel).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from weightfold.errors import ConfigError, EditError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failed:
    """What the first rank sends in place of a decision."""

    why: str


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network, or this one alone.

    Args:
        group: their process group; None when there is one process.

    Example:
        >>> ranks = Ranks.of(nn.Linear(2, 2))
        >>> ranks.leads, ranks.agreed(lambda: "fold", str, str)
        (True, 'fold')
    """

    group: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The ranks of a `DistributedDataParallel` model.

        Without that wrapper every process decides for itself, for it may train a network of its own. Where gradients
        are averaged by hand, say so: ``Compressor(..., ranks=Ranks(torch.distributed.group.WORLD))``.

        Raises:
            ConfigError: the wrapper keeps copies of the parameters.
        """
        wrapper = _find(model)
        if wrapper is None:
            return cls()
        if wrapper.mixed_precision is not None:
            raise ConfigError(
                "DistributedDataParallel holds low-precision copies of the parameters, which would not follow an edit.",
                remedy="Leave its mixed_precision out, and train under torch.autocast.",
            )
        if dist.get_world_size(wrapper.process_group) == 1:
            return cls()
        return cls(wrapper.process_group)

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

    def agreed(self, decide: Callable[[], T], tell: Callable[[T], Any], obey: Callable[[Any], T]) -> T:
        """Let the first rank decide and tell, and the others obey.

        Raises:
            EditError: on the other ranks, when the first one fails; there its own error is raised.
        """
        if self.group is None:
            return decide()
        if not self.leads:
            told = self.shared(None)
            if isinstance(told, _Failed):
                raise EditError(f"The first rank failed: {told.why}", remedy="See that rank's own error.")
            return obey(told)
        try:
            result = decide()
            told = tell(result)
        except BaseException as error:
            self.shared(_Failed(f"{type(error).__name__}: {error}"))
            raise
        self.shared(told)
        return result


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """A module and what it wraps, outermost first."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        yield inner
        compiled = getattr(inner, "_orig_mod", None)
        inner = inner.module if compiled is None and isinstance(inner, DistributedDataParallel) else compiled


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside a compiled or a data-parallel one."""
    *_, own = _layers(model)
    return own


def _find(model: nn.Module) -> DistributedDataParallel | None:
    """The data-parallel wrapper among the layers around a module."""
    return next((layer for layer in _layers(model) if isinstance(layer, DistributedDataParallel)), None)


def rewrapped(model: nn.Module) -> nn.Module:
    """The same wrapping around a module that has changed; the module itself where it was not data-parallel.

    A compiled module needs nothing: it notices new shapes, and compiles again. All ranks must call this at once.
    """
    old = _find(model)
    if old is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        new = DistributedDataParallel(old.module, **_settings(old))
    new.training = old.training
    for hook, state in old._comm_hooks:
        new.register_comm_hook(state, hook)
    old.register_forward_pre_hook(_refuse)
    return _put_in(model, old, new)


def _settings(wrapper: DistributedDataParallel) -> dict[str, Any]:
    """What a wrapper was built with. Buffers that each rank keeps for itself are not overwritten."""
    same = ("device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "static_graph")
    newer = ("gradient_as_bucket_view", "batched_grad_copy", "skip_all_reduce_unused_params")
    return {
        **{name: getattr(wrapper, name) for name in (*same, *newer) if hasattr(wrapper, name)},
        **({} if wrapper.broadcast_buffers else {"broadcast_buffers": False}),
        "bucket_cap_mb": None if wrapper.bucket_bytes_cap_default else wrapper.bucket_bytes_cap / 2**20,
    }


def _put_in(model: Any, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace a layer, and compile again what was compiled around it."""
    if model is old:
        return new
    return type(model)(_put_in(model._orig_mod, old, new), model.dynamo_ctx)


def _refuse(*_: Any) -> NoReturn:
    raise EditError(
        "This wrapper is from before an event: it would average gradients of tensors that are gone.",
        remedy="Call the compressor's `network` in your loop, which is wrapped anew after every event.",
    )


def check_whole(model: nn.Module) -> None:
    """Refuse a network whose parameters are shards: nothing can be edited in place.

    Raises:
        ConfigError: names a parameter.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"'{name}' is sharded over several processes, and its shape is fixed.",
                remedy="Call weightfold.sharded.change_sharded, and compress the whole network there.",
            )


def compiled(model: nn.Module) -> bool:
    """Whether a module or some part of it runs as compiled code, in which hooks are skipped."""
    return any(
        isinstance(getattr(part, "_orig_mod", None), nn.Module) or part._compiled_call_impl is not None
        for layer in _layers(model)
        for part in layer.modules()
    )


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts as they were written: a probe or a trace is no reason to compile once more."""
    if not compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
