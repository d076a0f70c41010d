"""The expressions of sizes in an exported program: parsed here, because PyTorch's loader evaluates them as Python.

    expression = integer | symbol | -e | e + e | e - e | e * e | e // e | e % e | e ** n | e < e ... | Name(e, ...)

Names are those of arithmetic on whole numbers, comparisons and logic; a symbol is a letter or two and a number (`s0`,
`u12`), or `Symbol('s0', integer=True, positive=True)`. Numbers are bounded, so that evaluating what passes is quick.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache

LONGEST = 4000
"""Characters of one expression."""
MAX_DEPTH = 40
MAX_BITS = 256
"""Binary digits that a number made of constants may have."""
MAX_POWER = 16
SYMBOL = re.compile(r"[a-z]{1,4}\d{1,5}")
_NUMBERS = frozenset({"Integer", "Rational", "Float"})
_WORDS = """Add Mul Max Min FloorDiv Mod PythonMod ModularIndexing CleanDiv CeilDiv CeilToInt FloorToInt TruncToInt
    TruncToFloat RoundToInt IntTrueDiv FloatTrueDiv ToFloat Identity Where Abs floor ceiling
    IsNonOverlappingAndDenseIndicator Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan StrictGreaterThan LessThan
    GreaterThan And Or Not"""
_ARITHMETIC = frozenset(_WORDS.split())
_POWERS = frozenset({"Pow", "PowByNatural"})
_CONSTANTS = frozenset({"true", "false", "True", "False"})
_ASSUMPTIONS = frozenset({"integer", "positive", "nonnegative", "real", "zero", "negative", "nonzero", "finite"})
_CHARACTERS = re.compile(r"[\w\s.,+*/%()<>=!'~&|-]*", re.ASCII)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.BitOr)


@lru_cache(maxsize=4096)
def refusal(text: str) -> str | None:
    """Why an expression is refused, or None if it is one of sizes.

    Example:
        >>> refusal("Add(Mul(Integer(2), Symbol('s0', integer=True, positive=True)), Integer(-1))") is None
        True
        >>> refusal("s0//2 + 1") is None
        True
        >>> refusal("__import__('os')")
        "it calls '__import__'"
        >>> refusal("9**9**9")
        'a power is no whole number up to 16'
    """
    if len(text) > LONGEST:
        return f"it has {len(text)} characters"
    if not _CHARACTERS.fullmatch(text):
        return "it holds characters that no size needs"
    try:
        _bits(ast.parse(text.strip(), mode="eval").body, 0)
    except _RefusedError as error:
        return str(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "it is no expression"
    return None


class _RefusedError(Exception):
    """An expression has a part that no size needs."""


def _bits(node: ast.expr, depth: int) -> int:
    """Check an expression; how many binary digits its constants make at most."""
    if depth > MAX_DEPTH:
        raise _RefusedError("it is nested too deeply")
    bits = _inner_bits(node, depth + 1)
    if bits > MAX_BITS:
        raise _RefusedError(f"its numbers have more than {MAX_BITS} binary digits")
    return bits


def _inner_bits(node: ast.expr, depth: int) -> int:
    match node:
        case ast.Constant(value=bool()):
            return 1
        case ast.Constant(value=int() | float() as value):
            return _number_bits(value)
        case ast.Name(id=name):
            if name not in _CONSTANTS and not SYMBOL.fullmatch(name):
                raise _RefusedError(f"it names '{name}'")
            return 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Invert(), operand=inner):
            return _bits(inner, depth)
        case ast.BinOp(left=base, op=ast.Pow(), right=power):
            return _bits(base, depth) * _power(power)
        case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _OPERATORS):
            return _bits(left, depth) + _bits(right, depth)
        case ast.Compare(left=left, comparators=[right]):
            return max(_bits(left, depth), _bits(right, depth))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _call_bits(name, args, keywords, depth)
    raise _RefusedError(f"it holds a {type(node).__name__}")


def _call_bits(name: str, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> int:
    if name == "Symbol":
        return _check_symbol(args, keywords)
    if name == "Float":
        return _check_float(args, keywords)
    if keywords:
        raise _RefusedError(f"'{name}' takes no keywords")
    if name in _POWERS and len(args) == 2:
        return _bits(args[0], depth) * _power(args[1])
    if name in _NUMBERS:
        return sum(_number_bits(_literal(arg)) for arg in args)
    if name not in _ARITHMETIC:
        raise _RefusedError(f"it calls '{name}'")
    return 1 + sum(_bits(arg, depth) for arg in args)


def _check_symbol(args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    match args:
        case [ast.Constant(value=str() as name)] if SYMBOL.fullmatch(name):
            pass
        case _:
            raise _RefusedError("a symbol is not named by a letter and a number")
    for keyword in keywords:
        if keyword.arg not in _ASSUMPTIONS or not isinstance(keyword.value, ast.Constant):
            raise _RefusedError(f"a symbol has the property '{keyword.arg}'")
        if type(keyword.value.value) is not bool:
            raise _RefusedError(f"the property '{keyword.arg}' of a symbol is neither True nor False")
    return 1


def _check_float(args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    """`Float('0.5', precision=53)`: a decimal number as text."""
    for arg in args:
        text = arg.value if isinstance(arg, ast.Constant) else None
        if not (isinstance(text, str) and re.fullmatch(r"-?\d{1,40}(\.\d{1,40})?(e[+-]?\d{1,3})?", text)):
            raise _RefusedError("a number is not written in decimal digits")
    for keyword in keywords:
        if keyword.arg not in ("precision", "dps") or _literal(keyword.value) not in range(1, 129):
            raise _RefusedError(f"a number has the property '{keyword.arg}'")
    return 64


def _literal(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if type(value) is not bool:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_literal(inner)
    raise _RefusedError("a number is not written in digits")


def _number_bits(value: int | float) -> int:
    bits = value.bit_length() if isinstance(value, int) else 64
    if bits > MAX_BITS:
        raise _RefusedError(f"its numbers have more than {MAX_BITS} binary digits")
    return bits + 1


def _power(node: ast.expr) -> int:
    """How many factors a power has at most: -1 divides, anything but a small whole number is refused."""
    match node:
        case ast.Call(func=ast.Name(id="Integer"), args=[inner], keywords=[]):
            return _power(inner)
    try:
        power = _literal(node)
    except _RefusedError:
        power = 0.5
    if not isinstance(power, int) or abs(power) > MAX_POWER:
        raise _RefusedError(f"a power is no whole number up to {MAX_POWER}")
    return max(1, abs(power))
