"""What is seen of a training run while it goes on: second moments at readers, batch size, precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from weightfold.errors import DataError, EditError
from weightfold.graph.group import ChannelGraph
from weightfold.graph.observe import Key, Observer, SecondMoment
from weightfold.ranks import compiled, unwrapped
from weightfold.stats.running import call, evaluating

Statistics = dict[Key, SecondMoment]

STALE = 2
"""Steps without one of a known optimiser after which, where the weights move all the same, it counts as swapped."""


@dataclass(frozen=True, eq=False)
class Watch:
    """An event that still has to prove itself.

    Args:
        due: step of the second look.
        before: probe losses before the event.
        n_edits: edits that the event consists of, the latest of those applied.
    """

    due: int
    before: tuple[float, ...]
    n_edits: int


class Updates:
    """Notices whether the known optimisers are those that train the network.

    Args:
        model: the user's module.

    Attributes:
        step: training steps done so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = self._latest = self._version = 0
        self._handles: list[Any] = []

    def follow(self, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
        """Notice each step of these optimisers from now on."""
        self.rest()
        self.step = self._latest = step
        self._version = self._now()

        def note(*_: Any) -> None:
            self._latest, self._version = self.step + 1, self._now()

        self._handles = [optimizer.register_step_post_hook(note) for optimizer in optimizers]

    def rest(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave what is written meanwhile out of account: it is our own doing."""
        before = self._now()
        try:
            yield
        finally:
            self._version += self._now() - before

    def check(self) -> None:
        """Refuse to go on with optimisers that train nothing any more.

        Steps that a gradient scaler skips, or micro-batches between two steps, write no weight and count for nothing.

        Raises:
            EditError: the weights have moved for some steps, and not by a known optimiser.
        """
        if self._handles and self.step - self._latest > STALE and self._version != self._now():
            raise EditError(
                f"No known optimiser has stepped since step {self._latest}: it was swapped.",
                remedy="Call prepare(new_optimizer) after building it.",
            )

    def _now(self) -> int:
        """Grows whenever a weight is written."""
        return sum(p._version for p in self.model.parameters())


class Watcher:
    """Hooks that stand only while a method wants statistics.

    Only forward passes in training mode count. Compiled code skips hooks, or takes them in for good: where a network is
    compiled, only its calls are watched.

    Args:
        network: what the user calls: the module, or what wraps it.

    Attributes:
        batch_size: samples in the latest watched batch; 0 before any.
        precision: device and type of the mixed precision that the user's loop works in; None for none.
        seconds: spent on statistics so far.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.model = unwrapped(network)
        self.batch_size = 0
        self.precision: tuple[str, torch.dtype] | None = None
        self.seconds = 0.0
        self._observer: Observer | None = None
        self._statistics: Statistics | None = {}
        self._stop: Callable[[], None] | None = None

    def watch(self, graph: ChannelGraph) -> None:
        """Put hooks on for the next forward passes."""
        if self._stop is None:
            self._stop = _before_calls(self.network, self._look_at_call)
            if not self.blind:
                self._observer = self._observer or Observer(self.model, graph)
                self._observer.__enter__()
                self._statistics = None

    def rest(self) -> None:
        """Take the hooks off; what they have seen stays."""
        if self._stop is not None:
            self._stop()
            self._stop = None
            if self._observer is not None:
                self._observer.__exit__(None, None, None)

    def follow(self, network: nn.Module) -> None:
        """The user calls another wrapper from now on."""
        self.rest()
        self.network = network

    @property
    def blind(self) -> bool:
        """Whether hooks inside the network would see nothing."""
        return compiled(self.network)

    def clear(self) -> None:
        """Forget what was seen: the network has changed."""
        self.rest()
        self.seconds += 0.0 if self._observer is None else self._observer.seconds
        self._observer, self._statistics = None, {}

    @property
    def statistics(self) -> Statistics:
        """Second moments since they were last cleared.

        Raises:
            DataError: an input was not finite; what was seen is forgotten.
        """
        if self._statistics is None:
            assert self._observer is not None
            start = time.perf_counter()
            try:
                self._statistics = self._observer.statistics()
            except DataError:
                self.clear()
                raise
            finally:
                self.seconds += time.perf_counter() - start
        return self._statistics

    @statistics.setter
    def statistics(self, value: Statistics) -> None:
        self.clear()
        self._statistics = value

    @property
    def spent(self) -> float:
        """Seconds spent on statistics, those of the present hooks included."""
        return self.seconds + (0.0 if self._observer is None else self._observer.seconds)

    def to_state(self) -> dict[str, Any]:
        """The running sums and the precision, for a checkpoint."""
        precision = (
            None if self.precision is None else [self.precision[0], str(self.precision[1]).removeprefix("torch.")]
        )
        return {"sums": {} if self._observer is None else self._observer.to_state(), "precision": precision}

    def load_state(self, graph: ChannelGraph, state: dict[str, Any]) -> None:
        """Go on from what `to_state` gave."""
        self.clear()
        if state["precision"] is not None:
            self.precision = state["precision"][0], getattr(torch, state["precision"][1])
        if state["sums"]:
            self._observer, self._statistics = Observer(self.model, graph), None
            self._observer.load_state(state["sums"])

    def observed(self, graph: ChannelGraph, batches: Iterable[Any], example: Any = None) -> Statistics:
        """Statistics of whole batches in eval mode, apart from those of the run."""
        start = time.perf_counter()
        try:
            observer = Observer(self.model, graph, max_samples_per_batch=None)
            with evaluating(self.model), torch.no_grad(), observer:
                for batch in batches:
                    call(self.model, batch, example)
            return observer.statistics()
        finally:
            self.seconds += time.perf_counter() - start

    def _look_at_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self._observer is not None:
            self._observer.enabled = self.model.training
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        self.precision = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        first = next((a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)), None)
        if first is not None and first.ndim:
            self.batch_size = len(first)

    def autocast(self) -> AbstractContextManager[Any]:
        """The mixed precision that the user's loop works in."""
        return nullcontext() if self.precision is None else torch.autocast(*self.precision)


def _before_calls(network: nn.Module, look: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Callable[[], None]:
    """See a module's arguments before every call, outside of compiled code; returns what ends that."""
    inner = network._compiled_call_impl
    if inner is None:
        return network.register_forward_pre_hook(lambda _, *given: look(*given), with_kwargs=True).remove

    def looked(*args: Any, **kwargs: Any) -> Any:
        look(args, kwargs)
        return inner(*args, **kwargs)

    def stop() -> None:
        network._compiled_call_impl = inner

    network._compiled_call_impl = looked
    return stop
