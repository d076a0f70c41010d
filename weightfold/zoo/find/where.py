"""Conditions on cards and facts, read by a small parser of their own: nothing is ever evaluated as code.

    accuracy > 0.9 and tags.dataset == mnist
    not (license in [mit, apache-2.0]) or n_parameters < 1e6

Names are fields of the card or paths into its facts. Comparisons: == != < <= > >=, `in` (a list of words), `has` (the
other way round: a fact that is a list or a text). What a card lacks, or cannot be compared, is false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightfold.errors import ConfigError

Facts = Mapping[str, Any]
Condition = Callable[[Facts], bool]
MOST_DEPTH, MOST_CHARACTERS = 50, 10_000
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<sign>==|!=|<=|>=|<|>|=|\(|\)|\[|\]|,)"""
    r"""|(?P<word>[^\s()\[\],<>=!"']+))"""
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
_WORDS = {"true": True, "false": False, "null": None, "none": None}
_MISSING = object()


def condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        ConfigError: it cannot be read; says where.
    Example:
        >>> small = condition("accuracy > 0.9 and tags.dataset == mnist")
        >>> small({"accuracy": 0.95, "tags": {"dataset": "mnist"}}), small({"accuracy": 0.95})
        (True, False)
        >>> condition("accuracy >")
        Traceback (most recent call last):
        weightfold.errors.ConfigError: The condition ends at 10, where a value was expected: accuracy >▸...
    """
    return _Reader(text).whole()


def absent(text: str, cards: Sequence[Facts]) -> list[str]:
    """The names in a condition that no card has.

    Raises:
        ConfigError: the condition cannot be read.
    Example:
        >>> absent("license == mit and accuracy > 0.9", [{"accuracy": 0.95}])
        ['license']
    """
    reader = _Reader(text)
    reader.whole()
    return [name for name in dict.fromkeys(reader.names) if all(_found(card, name) is _MISSING for card in cards)]


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MOST_CHARACTERS:
            raise ConfigError(f"The condition has {len(text):,} characters; {MOST_CHARACTERS:,} are allowed.")
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if match is None:
                at += len(text[at:]) - len(text[at:].lstrip())
                raise self.wrong(at, f"'{text[at]}' is not understood")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            at = match.end()
        self.names: list[str] = []
        self.at = 0
        self.depth = 0

    def wrong(self, at: int, what: str) -> ConfigError:
        shown = f"{self.text[:at]}▸{self.text[at:]}"
        end = at >= len(self.text.rstrip())
        start = f"The condition ends at {at}, where" if end else f"In the condition, at {at},"
        return ConfigError(f"{start} {what}: {shown}", remedy="Write, say: accuracy > 0.9 and tags.dataset == 'mnist'.")

    def here(self) -> tuple[str, str, int]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "", len(self.text.rstrip()))

    def take(self, *texts: str) -> bool:
        kind, text, _ = self.here()
        if kind != "text" and text.lower() in texts:
            self.at += 1
            return True
        return False

    def whole(self) -> Condition:
        out = self.either()
        kind, text, at = self.here()
        if kind != "end":
            raise self.wrong(at, f"'{text}' was not expected")
        return out

    def either(self) -> Condition:
        parts = [self.both()]
        while self.take("or"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else lambda facts: any(part(facts) for part in parts)

    def both(self) -> Condition:
        parts = [self.one()]
        while self.take("and"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else lambda facts: all(part(facts) for part in parts)

    def one(self) -> Condition:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.wrong(self.here()[2], f"conditions are nested more than {MOST_DEPTH} deep")
        try:
            if self.take("not"):
                inner = self.one()
                return lambda facts: not inner(facts)
            if self.take("("):
                inner = self.either()
                if not self.take(")"):
                    raise self.wrong(self.here()[2], "a ')' was expected")
                return inner
            return self.comparison()
        finally:
            self.depth -= 1

    def comparison(self) -> Condition:
        kind, name, at = self.here()
        if kind != "word" or name.lower() in ("and", "or", "in", "has"):
            raise self.wrong(at, "a name was expected")
        self.names.append(name)
        self.at += 1
        _, sign, at = self.here()
        sign = "==" if sign == "=" else sign.lower()
        if sign not in (*_COMPARE, "in", "has"):
            raise self.wrong(at, f"a comparison was expected: {' '.join(_COMPARE)} in has")
        self.at += 1
        value = self.value()
        return lambda facts: _holds(_found(facts, name), sign, value)

    def value(self) -> Any:
        kind, text, at = self.here()
        if self.take("["):
            return self.list()
        if kind not in ("text", "word"):
            raise self.wrong(at, "a value was expected")
        self.at += 1
        return re.sub(r"\\(.)", r"\1", text[1:-1]) if kind == "text" else _plain(text)

    def list(self) -> list[Any]:
        out: list[Any] = []
        while not self.take("]"):
            if out and not self.take(","):
                raise self.wrong(self.here()[2], "a ',' or ']' was expected")
            if self.here()[1] == "[":
                raise self.wrong(self.here()[2], "lists hold no lists")
            out.append(self.value())
        return out


def _plain(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    try:
        return float(word.replace("_", ""))
    except ValueError:
        return word


def _found(facts: Facts, name: str) -> Any:
    """The value of a dotted name: the longest part of it that is a key comes first."""
    if name in facts:
        return facts[name]
    for cut in range(len(name) - 1, 0, -1):
        if name[cut] == "." and isinstance(facts.get(name[:cut]), Mapping):
            return _found(facts[name[:cut]], name[cut + 1 :])
    return _MISSING


def _holds(held: Any, sign: str, value: Any) -> bool:
    if held is _MISSING:
        return False
    try:
        if sign in ("in", "has"):
            inner, outer = (held, value) if sign == "in" else (value, held)
            return _within(inner, outer)
        return bool(_COMPARE[sign](*_alike(held, value)))
    except TypeError:
        return False


def _within(inner: Any, outer: Any) -> bool:
    if isinstance(outer, str):
        return isinstance(inner, str) and inner in outer
    return any(a == b for a, b in (_alike(one, inner) for one in outer))


def _alike(held: Any, value: Any) -> tuple[Any, Any]:
    """A fact that is text is compared as text with what was read as a number, and the other way round."""
    number = isinstance(value, float) and not isinstance(value, bool)
    if isinstance(held, str) and number:
        return held, f"{value:g}"
    return held, value
