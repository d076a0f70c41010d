"""Read arithmetic on names as polynomials: + - * / ^ ( ), division by numbers only."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from weightfold.errors import DataError
from weightfold.ode.system import Monomial

Terms = dict[Monomial, float]

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|(\*\*|[-+*/^(),]))")
MAX_POWER = 64
"""The largest power of a sum, which is multiplied out."""
MAX_DEGREE = 4096
"""The largest power of a variable in a monomial."""
_FREE_TERMS, _TERMS_A_CHARACTER = 1 << 14, 64
"""Monomials that an expression may be multiplied out to, and more for each of its characters."""


def parse(text: str, values: Mapping[str, float], where: str) -> Terms:
    """Read an expression as a polynomial in the names that have no value.

    Args:
        values: numbers that stand behind names.
        where: what the expression is, for errors.
    Raises:
        DataError: the expression is not polynomial (names the term), or cannot be read.
    Example:
        >>> parse("k * x^2 - x*(1 - y)/2", {"k": 3.0}, "d(x)")
        {(('x', 2),): 3.0, (('x', 1),): -0.5, (('x', 1), ('y', 1)): 0.5}
    """
    reader = _Reader(text, values, where)
    try:
        found = reader.sum()
    except RecursionError:
        raise DataError(f"{where}: its brackets are nested too deeply.", remedy="Multiply some of them out.") from None
    if reader.at < len(reader.tokens):
        raise reader.unreadable()
    return {monomial: c for monomial, c in found.items() if c != 0}


def number(text: str, values: Mapping[str, float], where: str) -> float:
    """Read an expression that stands for a number.

    Raises:
        DataError: it holds a name without a value.
    """
    found = parse(text, values, where)
    if any(found.keys() - {()}):
        unknown = next(m for m in found if m)[0][0]
        raise DataError(f"{where} = {text.strip()} names '{unknown}', which has no value.", remedy="Define it before.")
    return found.get((), 0.0)


class _Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str, values: Mapping[str, float], where: str) -> None:
        self.text, self.values, self.where = text, values, where
        self.tokens: list[tuple[str, int, int]] = []
        at = 0
        while at < len(text.rstrip()):
            match = _TOKEN.match(text, at)
            if match is None:
                raise DataError(f"{where}: '{text[at:].strip()[:20]}' cannot be read in '{text.strip()[:80]}'.")
            kind = match.lastindex or 0
            self.tokens.append((match.group(kind), kind, match.start(kind)))
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self) -> tuple[str, int, int]:
        if self.at >= len(self.tokens):
            raise DataError(f"{self.where}: '{self.text.strip()[:80]}' ends in the middle.")
        self.at += 1
        return self.tokens[self.at - 1]

    def unreadable(self) -> DataError:
        rest = self.text[self.tokens[self.at][2] :]
        return DataError(f"{self.where}: '{rest.strip()[:20]}' cannot be read in '{self.text.strip()[:80]}'.")

    def not_polynomial(self, start: int, why: str) -> DataError:
        end = self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text)
        term = self.text[self.tokens[start][2] : end].strip()
        return DataError(
            f"{self.where} is not polynomial: the term '{term}' {why}.",
            remedy="Add a variable for that term with an equation of its own, by the chain rule, or make it a number.",
        )

    def not_finite(self, start: int) -> DataError:
        end = self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text)
        term = self.text[self.tokens[start][2] : end].strip()
        return DataError(f"{self.where}: '{term[:80]}' is no finite number.", remedy="Correct that number.")

    def sum(self) -> Terms:
        out: Terms = {}
        sign = 1.0
        while self.peek() in ("+", "-"):
            sign *= -1.0 if self.take()[0] == "-" else 1.0
        while True:
            for monomial, c in self.product().items():
                out[monomial] = out.get(monomial, 0.0) + sign * c
            if self.peek() not in ("+", "-"):
                return out
            sign = 1.0
            while self.peek() in ("+", "-"):
                sign *= -1.0 if self.take()[0] == "-" else 1.0

    def product(self) -> Terms:
        start = self.at
        out = self.power()
        while self.peek() in ("*", "/"):
            operator = self.take()[0]
            right = self.power()
            if operator == "*":
                out = self.multiplied(start, out, right)
                continue
            if any(monomial for monomial, c in right.items() if c != 0):
                raise self.not_polynomial(start, "divides by a variable")
            divisor = right.get((), 0.0)
            if divisor == 0:
                raise self.not_polynomial(start, "divides by zero")
            out = {monomial: c / divisor for monomial, c in out.items()}
        return out

    def power(self) -> Terms:
        start = self.at
        base = self.atom()
        if self.peek() not in ("^", "**"):
            return base
        self.take()
        exponent = self.signed()
        value = exponent.get((), 0.0)
        if any(exponent) or ((not value.is_integer() or value < 0) and any(base)):
            raise self.not_polynomial(start, "has a power that is not a whole number from 0 on")
        if not any(base):
            return {(): self.finite_power(start, base.get((), 0.0), value)}
        if len(base) == 1 and value:
            ((monomial, c),) = base.items()
            if max((p for _, p in monomial), default=0) * value > MAX_DEGREE:
                raise self.not_polynomial(start, f"has a power above {MAX_DEGREE}")
            powers = tuple((name, p * int(value)) for name, p in monomial)
            return {powers: self.finite_power(start, c, value)}
        if value > MAX_POWER:
            raise self.not_polynomial(start, f"has a sum of a power above {MAX_POWER}")
        out: Terms = {(): 1.0}
        for _ in range(int(value)):
            out = self.multiplied(start, out, base)
        return out

    def multiplied(self, start: int, a: Terms, b: Terms) -> Terms:
        """The product of two polynomials, unless the text is too short for so many terms."""
        most = _FREE_TERMS + _TERMS_A_CHARACTER * len(self.text)
        if len(a) * len(b) > 4 * most:
            raise self.not_polynomial(start, f"has more than {most:,} terms")
        out: Terms = {}
        for left, c in a.items():
            for right, d in b.items():
                powers = dict(left)
                for name, power in right:
                    powers[name] = powers.get(name, 0) + power
                    if powers[name] > MAX_DEGREE:
                        raise self.not_polynomial(start, f"has a power above {MAX_DEGREE}")
                monomial = tuple(sorted(powers.items()))
                out[monomial] = out.get(monomial, 0.0) + c * d
        if len(out) > most:
            raise self.not_polynomial(start, f"has more than {most:,} terms")
        return out

    def finite_power(self, start: int, base: float, exponent: float) -> float:
        try:
            value = base**exponent
        except (OverflowError, ZeroDivisionError):
            value = math.inf
        if isinstance(value, complex) or not math.isfinite(value):
            raise self.not_finite(start)
        return value

    def signed(self) -> Terms:
        if self.peek() in ("+", "-"):
            sign = -1.0 if self.take()[0] == "-" else 1.0
            return {monomial: sign * c for monomial, c in self.signed().items()}
        return self.power()

    def atom(self) -> Terms:
        start = self.at
        token, kind, _ = self.take()
        if kind == 1:
            value = float(token)
            if not math.isfinite(value):
                raise self.not_finite(start)
            return {(): value}
        if kind == 2 and self.peek() == "(":
            depth = 0
            while True:
                inner = self.take()[0]
                depth += (inner == "(") - (inner == ")")
                if depth == 0:
                    break
            raise self.not_polynomial(start, f"calls the function '{token}'")
        if kind == 2:
            return {(): self.values[token]} if token in self.values else {((token, 1),): 1.0}
        if token == "(":
            found = self.sum()
            if self.peek() != ")":
                raise DataError(f"{self.where}: a bracket is not closed in '{self.text.strip()[:80]}'.")
            self.take()
            return found
        if token in ("+", "-"):
            self.at -= 1
            return self.signed()
        self.at -= 1
        raise self.unreadable()
