"""Frozen configurations: plain data, JSON both ways, unknown keys refused with the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from weightfold.errors import ConfigError

LONGEST_SHOWN = 200
"""Characters of a wrong value that an error shows."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Name the valid word nearest to a misspelt one, as a hint to print.

    Example:
        >>> nearest("magnitud", ["magnitude", "random"])
        "Did you mean 'magnitude'? Valid: magnitude, random."
    """
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Valid: {', '.join(names)}."


class Config(BaseModel):
    """Base of every configuration: immutable, comparable, hashable by value, strict about its keys.

    Raises:
        ConfigError: a key is unknown (with the nearest valid one) or a value is out of range.

    Example:
        >>> class Keep(Config):
        ...     share: float = 0.5
        >>> Keep.from_json(Keep(share=0.25).to_json())
        Keep(share=0.25)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._explain(error) from None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a configuration back from the text that `to_json` wrote."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise cls._explain(error) from None

    def to_json(self) -> str:
        """Write the configuration as one line of JSON."""
        return self.model_dump_json()

    @classmethod
    def _explain(cls, error: ValidationError) -> ConfigError:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "?"
        if first["type"] == "extra_forbidden":
            return ConfigError(f"{cls.__name__} has no setting '{name}'.", remedy=nearest(name, cls.model_fields))
        wrong = first["msg"].removeprefix("Value error, ")
        if not first["loc"] and first["type"] == "value_error":
            return ConfigError(f"Settings of {cls.__name__} do not go together: {wrong}.")
        got = repr(first.get("input"))
        got = got if len(got) <= LONGEST_SHOWN else f"{got[:LONGEST_SHOWN]}…"
        return ConfigError(f"The '{name}' setting of {cls.__name__} must satisfy: {wrong}. Got {got} instead.")
