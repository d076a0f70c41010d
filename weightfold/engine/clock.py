"""What compression costs: seconds, by what they were spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Work = Literal["prepare", "planning", "surgery", "gate"]


class Clock:
    """Adds up the seconds of each kind of work.

    Example:
        >>> clock = Clock()
        >>> with clock.on("gate"):
        ...     pass
        >>> sorted(clock.seconds), clock.seconds["gate"] > 0
        (['gate', 'planning', 'prepare', 'surgery'], True)
    """

    def __init__(self) -> None:
        self.seconds: dict[Work, float] = {"prepare": 0.0, "planning": 0.0, "surgery": 0.0, "gate": 0.0}

    @contextmanager
    def on(self, work: Work) -> Iterator[None]:
        """Count what passes in the block, also where it fails."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[work] += time.perf_counter() - start
