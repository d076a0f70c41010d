"""Read JSON that a file holds: what was written is what is read, or an error; nothing else is let through."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 400


def parse_json(text: str | bytes) -> Any:
    """Read JSON, and refuse what JSON cannot say or what no reader takes: NaN, numbers beyond every float, a key that
    stands twice, half a character, deep nesting.

    Raises:
        ValueError: it is no such JSON; says what is wrong.
    Example:
        >>> parse_json('{"a": [1, 2.5, null]}')
        {'a': [1, 2.5, None]}
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the key 'a' stands twice
    """
    try:
        plain = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(plain, parse_constant=_refuse, parse_float=_float, parse_int=_int, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    check_plain(value)
    return value


def check_plain(value: Any) -> None:
    """Make sure that plain data is not nested too deeply, and that all its texts are whole characters.

    Raises:
        ValueError: it is, or one is not.
    """
    level, depth = [value], 0
    while level:
        if depth == MAX_DEPTH and any(isinstance(item, dict | list) for item in level):
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        level, depth = [inner for item in level for inner in _inner(item)], depth + 1


def _inner(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            _check_text(key)
        return value.values()
    if isinstance(value, str):
        _check_text(value)
    return value if isinstance(value, list) else ()


def _check_text(text: str) -> None:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"the text {text[:40]!a} holds half a character")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return table


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not a number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)
