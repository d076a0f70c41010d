"""One measured number: step, name, value, and a checksum over the three.

SQLite has no nan (it keeps NULL) and no -0.0 (it keeps 0.0); a row holds what SQLite gives back.
"""

from __future__ import annotations

import math
import numbers
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from weightfold.errors import LedgerError
from weightfold.ledger.entry import check_types, encode, plain

MAX_STEP = 2**63 - 1


class Metric(NamedTuple):
    """A number as it is stored; `value` None stands for nan."""

    step: int
    name: str
    value: float | None
    checksum: int

    @classmethod
    def make(cls, step: int, name: str, value: float | None) -> Self:
        """Make a row of a checked step, name and value."""
        return cls(step, name, value, _checksum(step, name, value))

    @classmethod
    def from_row(cls, values: Sequence[Any], where: str) -> Self:
        """Read a stored row and check it.

        Raises:
            LedgerError: the row was changed; names it.
        """
        row = cls(*values)
        check_types(row, (int, str, float if row.value is not None else type(None), int), where)
        if _checksum(row.step, row.name, row.value) != row.checksum:
            raise LedgerError(f"{where} was changed: its step, name or value does not fit the checksum {row.checksum}.")
        return row

    @property
    def number(self) -> float:
        """The value as it was measured."""
        return math.nan if self.value is None else self.value


def make_rows(step: int, values: Mapping[str, float]) -> list[Metric]:
    """Make one row per number.

    Raises:
        LedgerError: the step is no whole number, a name no text, or a value no number; names it.

    Example:
        >>> [(row.step, row.name, row.number) for row in make_rows(3, {"loss": 0.5, "lr": 1})]
        [(3, 'loss', 0.5), (3, 'lr', 1.0)]
    """
    whole = _whole(step)
    return [Metric.make(whole, _name(name), _value(value, name)) for name, value in values.items()]


def _whole(step: Any) -> int:
    try:
        whole = operator.index(step)
    except TypeError:
        raise LedgerError(f"The step of a metric must be an int. Got {step!r} instead.") from None
    if abs(whole) > MAX_STEP:
        raise LedgerError(f"The step of a metric must fit in 64 bits. Got {whole} instead.")
    return whole


def _name(name: Any) -> str:
    if type(name) is not str or not name:
        raise LedgerError(f"The name of a metric must be a non-empty str. Got {name!r} instead.")
    return plain(name, "metric")


def _value(value: Any, name: str) -> float | None:
    if not isinstance(value, numbers.Real):
        raise LedgerError(
            f"Metric '{name}' must be a number. Got {type(value).__qualname__} instead.",
            remedy="Pass a Python number; .item() gives it for a tensor of one element.",
        )
    try:
        number = float(value) + 0.0
    except OverflowError:
        raise LedgerError(f"Metric '{name}' must fit in a 64-bit float. It does not.") from None
    return None if math.isnan(number) else number


def _checksum(step: int, name: str, value: float | None) -> int:
    return zlib.crc32(encode(f"{step}\n{name}\n{value!r}"))
