"""How large a file may be, and the controller that makes it so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from weightfold.errors import ConfigError
from weightfold.gate import Batch
from weightfold.stats.running import call, probing

UNITS = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}
_EXAMPLES = "For example: '48 kB', '1.5%', or a number of bytes."


def target_bytes(text: str | int, full_bytes: int) -> int:
    """Read a target.

    Args:
        text: bytes as a number, with a unit (kB: 1,000, KiB: 1,024), or a share of the float file.
        full_bytes: of the float file.
    Raises:
        ConfigError: it is none of these, or not positive.
    Example:
        >>> target_bytes("48 kB", 10**6), target_bytes("1.5%", 10**6), target_bytes(7000, 10**6)
        (48000, 15000, 7000)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)\s*", str(text))
    if match is None:
        raise ConfigError(f"The target '{text}' is no size.", remedy=_EXAMPLES)
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        found = number / 100 * full_bytes
    elif unit in ("", *UNITS):
        found = number * UNITS.get(unit, 1)
    else:
        raise ConfigError(f"The target '{text}' has the unknown unit '{match[2]}'.", remedy=_EXAMPLES)
    if found < 1 or not math.isfinite(found):
        raise ConfigError(f"The target '{text}' is less than one byte.", remedy=_EXAMPLES)
    return round(found)


EARLIEST, LATEST = 0.1, 0.4
"""Between these shares of a run quantisation begins."""
SMALL, LARGE = 0.01, 0.08
"""Targets, as shares of the float file, at which it begins earliest and latest."""
SPAN = 0.3
"""Share of the run from the beginning until the target is met."""


def schedule(at: float | None, reach: float | None, target: float | None = None) -> tuple[float, float]:
    """When to begin and when to be done, as shares of a run, where that is left open.

    A file of less than a hundredth is found by networks that grow up under pressure; one of some per cent by networks
    that have grown first, for weights still grow early on, and grids made for small ones are too fine for them later.

    Args:
        target: share of the float file; None without a target.
    Example:
        >>> schedule(None, None), schedule(None, None, 0.1), schedule(None, None, 0.0283), schedule(0.2, 0.9, 0.1)
        ((0.1, 0.4), (0.4, 0.7), (0.25, 0.55), (0.2, 0.9))
    """
    if at is None:
        mild = 0.0 if target is None else math.log(target / SMALL) / math.log(LARGE / SMALL)
        at = round(EARLIEST + (LATEST - EARLIEST) * min(max(mild, 0.0), 1.0), 3)
        at = at if reach is None else min(at, reach / 2)
    return at, min(1.0, round(at + SPAN, 3)) if reach is None else reach


@dataclass
class Budget:
    """Finds λ, nats of loss per bit, by which the file meets a size at the end of a run.

    The size is to fall geometrically from what it is at the start to the target at ``reach``. λ moves in proportion to
    the logarithm by which the file will be too large a little later, if it goes on falling as it does now: the network
    answers to λ with a delay, and what it has given up it does not take back at once.

    Args:
        target: bytes.
        start: share of the run at which compression begins.
        reach: share of the run at which the target is met.
        gain: factors of e by which λ moves in a whole run, for a file e times too large.
        ahead: how far ahead the size is foreseen, as a share of the run.
    """

    target: float
    start: float
    reach: float
    gain: float = 40.0
    ahead: float = 0.1
    log_price: float = math.log(2e-7)
    first: float | None = None
    seen: list[tuple[float, float]] = field(default_factory=list)

    @property
    def price(self) -> float:
        """λ."""
        return math.exp(self.log_price)

    def wanted(self, share: float) -> float:
        """Bytes that the file should have at a share of the run."""
        assert self.first is not None
        if self.first <= self.target:
            return self.target
        done = min(max((share - self.start) / max(self.reach - self.start, 1e-9), 0.0), 1.0)
        return math.exp(math.log(self.first) * (1 - done) + math.log(self.target) * done)

    def update(self, share: float, n_bytes: float) -> None:
        """Take a measurement of the file into account."""
        if self.first is None:
            self.first = n_bytes
        then = self.seen[0] if self.seen else (share, n_bytes)
        before = self.seen[-1][0] if self.seen else share
        self.seen = [*(x for x in self.seen if x[0] >= share - self.ahead / 2), (share, n_bytes)]
        fall = math.log(n_bytes / then[1]) / (share - then[0]) if share > then[0] else 0.0
        later = math.log(n_bytes) + self.ahead * min(fall, 0.0)
        excess = max(-1.0, min(1.0, later - math.log(self.wanted(share + self.ahead))))
        self.log_price += self.gain * (share - before) * excess
        self.log_price = min(max(self.log_price, math.log(1e-10)), 0.0)

    def to_state(self) -> list[Any]:
        """What a restart needs."""
        return [self.log_price, self.first, [list(pair) for pair in self.seen]]

    def load_state(self, state: list[Any]) -> None:
        """Read back what `to_state` gave."""
        self.log_price, self.first = state[0], state[1]
        self.seen = [(float(share), float(size)) for share, size in state[2]]


@dataclass
class Ramp:
    """A fixed λ that grows from nothing over two thirds of the way to ``reach``."""

    strength: float
    start: float
    reach: float
    price: float = 0.0

    def update(self, share: float) -> None:
        """Move on to a share of the run."""
        span = max(self.reach - self.start, 1e-9)
        self.price = self.strength * min(1.0, max(0.0, 1.5 * (share - self.start) / span))

    def to_state(self) -> list[Any]:
        """What a restart needs."""
        return [self.price]

    def load_state(self, state: list[Any]) -> None:
        """Read back what `to_state` gave."""
        (self.price,) = state


@dataclass
class Caution:
    """λ as large as accuracy allows.

    Args:
        max_loss: points by which accuracy may fall behind the best so far.
        pace: factors of e by which λ moves at a look.
    """

    max_loss: float
    pace: float = 0.35
    best: float = -math.inf
    log_price: float = math.log(1e-7)

    @property
    def price(self) -> float:
        """λ."""
        return math.exp(self.log_price)

    def update(self, accuracy: float) -> None:
        """Take a look at the probe into account: more pressure while half of the room is left, less beyond it."""
        self.best = max(self.best, accuracy)
        lost = (self.best - accuracy) / self.max_loss
        self.log_price += self.pace * (1 if lost < 0.5 else -1 if lost > 1 else 0)
        self.log_price = min(max(self.log_price, math.log(1e-10)), 0.0)

    def to_state(self) -> list[Any]:
        """What a restart needs."""
        return [self.best, self.log_price]

    def load_state(self, state: list[Any]) -> None:
        """Read back what `to_state` gave."""
        self.best, self.log_price = state


def expected_accuracy(
    model: nn.Module,
    probe: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Mean probability of the right class on the probe, in points: smoother than the share of right answers.

    Raises:
        ConfigError: the targets are no classes.
    Example:
        >>> import torch
        >>> net = nn.Identity()
        >>> scores, classes = torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1])
        >>> expected_accuracy(net, [(scores, classes)])
        75.0
    """
    total, n = 0.0, 0
    with probing(model), autocast():
        for inputs, targets in probe:
            answer = call(model, inputs)
            scores = getattr(answer, "logits", answer)
            if not isinstance(scores, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
                raise ConfigError(
                    "max_accuracy_loss counts right answers; these targets are no classes.",
                    remedy="Give a target in bytes instead.",
                )
            chance = scores.float().flatten(0, -2).softmax(-1).gather(1, targets.reshape(-1, 1))
            total, n = total + float(chance.sum()), n + chance.numel()
    return 100 * total / max(n, 1)
