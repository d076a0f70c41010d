"""What is seen of a training run while it goes on: second moments at readers, batch size, precision, time a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.errors import DataError
from weightfold.graph.group import ChannelGraph
from weightfold.graph.observe import Key, Observer, SecondMoment

Statistics = dict[Key, SecondMoment]


class Watcher:
    """Hooks that stand only while a method wants statistics.

    Only forward passes in training mode count.

    Args:
        model: the user's module.

    Attributes:
        batch_size: samples in the latest watched batch; 0 before any.
        autocast: the mixed precision that the user's loop works in.
        seconds: spent on statistics so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.batch_size = 0
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.seconds = 0.0
        self._observer: Observer | None = None
        self._statistics: Statistics | None = {}
        self._root: Any = None
        self._ticks: deque[float] = deque(maxlen=21)

    def tick(self) -> None:
        """Note that a training step has ended."""
        self._ticks.append(time.perf_counter())

    def pause(self) -> None:
        """Leave what comes now out of the time a step."""
        self._ticks.clear()

    @property
    def seconds_per_step(self) -> float | None:
        """Median of the latest steps, all of the user's loop included."""
        gaps = [later - earlier for earlier, later in pairwise(self._ticks)]
        return median(gaps) if gaps else None

    def watch(self, graph: ChannelGraph) -> None:
        """Put hooks on for the next forward passes."""
        if self._root is None:
            self._observer = self._observer or Observer(self.model, graph)
            self._observer.__enter__()
            self._root = self.model.register_forward_pre_hook(self._look_at_call)
            self._statistics = None

    def rest(self) -> None:
        """Take the hooks off; what they have seen stays."""
        if self._root is not None and self._observer is not None:
            self._observer.__exit__(None, None, None)
            self._root.remove()
            self._root = None

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
        """The running sums, for a checkpoint."""
        return {} if self._observer is None else self._observer.to_state()

    def load_state(self, graph: ChannelGraph, state: dict[str, Any]) -> None:
        """Go on from what `to_state` gave."""
        self.clear()
        if state:
            self._observer, self._statistics = Observer(self.model, graph), None
            self._observer.load_state(state)

    def observed(self, graph: ChannelGraph, batches: Iterable[Any]) -> Statistics:
        """Statistics of whole batches in eval mode, apart from those of the run."""
        start = time.perf_counter()
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        with Observer(self.model, graph, max_samples_per_batch=None) as observer, torch.no_grad():
            for batch in batches:
                self.model(*batch) if isinstance(batch, tuple) else self.model(batch)
        for module, training in modes.items():
            module.training = training
        self.seconds += time.perf_counter() - start
        return observer.statistics()

    def _look_at_call(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._observer is not None:
            self._observer.enabled = module.training
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if first is None:
            return
        self.batch_size = len(first)
        kind = first.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            self.autocast = lambda: torch.autocast(kind, dtype)
        else:
            self.autocast = nullcontext
