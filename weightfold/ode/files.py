"""Model files: ERODE's `.ode`, which CLUE reads and writes as well.

A model has sections ``begin parameters``, ``init``, ``partition``, ``ODE`` (``d(x) = ...``) or ``reactions``
(``A + B -> 2*C, rate``, mass action), ``views``; ``//`` and ``/* */`` are comments, calls behind the sections are
passed over. ERODE puts the numbers of parameters in; CLUE makes those that are used
variables that never change.

Reference: ERODE (Cardelli et al., TACAS 2017); CLUE (Ovchinnikov et al., Bioinformatics 2021, arXiv 2004.11961).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from weightfold.artifact.files import write_bytes
from weightfold.errors import ConfigError, DataError
from weightfold.ode.expression import MAX_DEGREE, Terms, number, parse
from weightfold.ode.system import Monomial, PolynomialSystem

Parameters = Literal["values", "variables"]
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_SECTION = re.compile(
    r"begin\s+(parameters|init|partition|reactions|ODE|views|observables)\b(.*?)end\s+\1", re.S | re.I
)
_SPECIES = re.compile(r"\s*(?:(\d+)\s*\*?\s*)?([A-Za-z_]\w*)\s*$")


@dataclass(frozen=True)
class Model:
    """What a model file holds.

    Args:
        partition: the blocks that the file names, by variable.
        views: expressions to look at, by name.
    """

    system: PolynomialSystem
    partition: tuple[tuple[str, ...], ...] = ()
    views: Mapping[str, str] | None = None


def read(path: str | Path, parameters: Parameters = "values") -> Model:
    """Read a model file; see `loads`.

    Raises:
        DataError: the file is missing or cannot be read as a model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"'{path}' could not be read as a model: {getattr(error, 'strerror', None) or error}."
        ) from None
    return loads(text, parameters)


def loads(text: str, parameters: Parameters = "values") -> Model:
    """Read the text of a model.

    Args:
        parameters: "values" puts their numbers in (ERODE); "variables" makes those that are used variables with
            derivative 0 behind the others (CLUE).
    Raises:
        DataError: a right-hand side is not polynomial (names the term), a name is unknown, a section cannot be read.
    Example:
        >>> model = loads("begin model m begin init x = 1 end init begin ODE d(x) = -2*x end ODE end model")
        >>> model.system.terms()
        {'x': {(('x', 1),): -2.0}}
    """
    if parameters not in ("values", "variables"):
        raise ConfigError(f"'parameters' must be 'values' or 'variables'. Got {parameters!r} instead.")
    text = _COMMENT.sub("", text)
    named = re.search(r"begin\s+model\s+(\w+)", text)
    sections: dict[str, str] = {}
    for kind, body in _SECTION.findall(text):
        sections[kind.lower()] = body
    if named is None or not sections.keys() & {"ode", "reactions"}:
        raise DataError(
            "The text is not a model: it needs 'begin model NAME' and a section 'ODE' or 'reactions'.",
            remedy="See ERODE's manual for the format.",
        )
    numbers = _numbers(sections.get("parameters", ""), {}, "parameter")
    initial = _numbers(sections.get("init", ""), numbers, "initial value of")
    known: Mapping[str, float] = numbers if parameters == "values" else {}
    terms: dict[str, Terms] = {name: {} for name in initial}
    _add_equations(sections.get("ode", ""), known, terms)
    _add_reactions(sections.get("reactions", ""), known, terms)
    if parameters == "variables":
        used = {factor for polynomial in terms.values() for monomial in polynomial for factor, _ in monomial}
        for name in numbers:
            if name in used and name not in terms:
                terms[name], initial[name] = {}, numbers[name]
    blocks = [tuple(re.findall(r"\w+", b)) for b in re.findall(r"\{([^}]*)\}", sections.get("partition", ""))]
    views = sections.get("views", sections.get("observables", ""))
    return Model(PolynomialSystem.of_terms(terms, initial, named[1]), tuple(blocks), dict(_assignments(views)))


def _assignments(body: str) -> list[tuple[str, str]]:
    """``name = expression`` or a bare name, one or several on a line."""
    out: list[tuple[str, str]] = []
    for line in body.splitlines():
        first, *parts = re.split(r"\b([A-Za-z_]\w*)\s*=", line)
        out += [(name, "") for name in re.findall(r"[A-Za-z_]\w*", first)]
        out += [(name, text.strip(" \t;,")) for name, text in zip(parts[::2], parts[1::2], strict=True)]
    return out


def _numbers(body: str, known: Mapping[str, float], what: str) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, text in _assignments(body):
        if name in out:
            raise DataError(f"The {what} '{name}' is defined twice.")
        out[name] = number(text, {**known, **out}, f"The {what} '{name}'") if text else 0.0
    return out


def _add_equations(body: str, known: Mapping[str, float], terms: dict[str, Terms]) -> None:
    parts = re.split(r"d\(\s*([A-Za-z_]\w*)\s*\)\s*=", body)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        if terms.get(name):
            raise DataError(f"The derivative of '{name}' is given twice.")
        terms[name] = parse(" ".join(text.split()), known, f"d({name})")


def _add_reactions(body: str, known: Mapping[str, float], terms: dict[str, Terms]) -> None:
    for line in filter(None, map(str.strip, body.splitlines())):
        match = re.fullmatch(r"(.*?)->(.*?),(.*)", line)
        if match is None:
            raise DataError(f"The reaction '{line}' cannot be read.", remedy="Write 'A + B -> C, rate'.")
        before, after = _species(match[1], line), _species(match[2], line)
        rate = parse(match[3], known, f"The rate of '{line}'")
        powers: Monomial = tuple(sorted(before.items()))
        for name in {**before, **after}:
            change = after.get(name, 0) - before.get(name, 0)
            own = terms.setdefault(name, {})
            for monomial, c in rate.items() if change else ():
                joined = dict(powers)
                for factor, power in monomial:
                    joined[factor] = joined.get(factor, 0) + power
                key = tuple(sorted(joined.items()))
                own[key] = own.get(key, 0.0) + change * c


def _species(side: str, line: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for part in side.split("+") if side.strip() not in ("", "0") else ():
        match = _SPECIES.match(part)
        if match is None:
            raise DataError(f"'{part.strip()}' of the reaction '{line}' is no species.", remedy="Write 'A' or '2*A'.")
        count = int(match[1] or 1) if len(match[1] or "") < 6 else MAX_DEGREE + 1
        out[match[2]] = out.get(match[2], 0) + count
        if out[match[2]] > MAX_DEGREE:
            raise DataError(f"The reaction '{line[:80]}' takes more than {MAX_DEGREE} of '{match[2]}'.")
    return out


def dumps(model: Model | PolynomialSystem) -> str:
    """Write a model as text that ERODE and CLUE read; numbers are exact, so reading it back gives the same system.

    Example:
        >>> system = PolynomialSystem.of_terms({"x": {(("x", 1),): -2.0, (): 1.0}}, {"x": 1.0}, "m")
        >>> print(dumps(system))
        begin model m
         begin init
          x = 1.0
         end init
         begin ODE
          d(x) = 1.0 - 2.0*x
         end ODE
        end model
        <BLANKLINE>
    """
    model = model if isinstance(model, Model) else Model(model)
    system = model.system
    lines = [f"begin model {system.name}", " begin init"]
    lines += [f"  {name} = {value!r}" for name, value in system.start().items()]
    lines += [" end init"]
    if model.partition:
        blocks = ",\n".join(f"  {{{','.join(block)}}}" for block in model.partition)
        lines += [" begin partition", blocks, " end partition"]
    lines += [" begin ODE"]
    lines += [f"  d({name}) = {_written(polynomial)}" for name, polynomial in system.terms().items()]
    lines += [" end ODE"]
    if model.views:
        lines += [" begin views", *(f"  {name} = {text}" for name, text in model.views.items()), " end views"]
    return "\n".join([*lines, "end model", ""])


def _written(polynomial: Mapping[Monomial, float]) -> str:
    parts = []
    for monomial, c in sorted(polynomial.items()):
        factors = [repr(float(np.abs(c))), *(name if p == 1 else f"{name}^{p}" for name, p in monomial)]
        parts.append(("- " if c < 0 else "+ ") + "*".join(factors))
    return " ".join(parts).removeprefix("+ ") or "0"


def write(path: str | Path, model: Model | PolynomialSystem) -> None:
    """Write a model file at one stroke; see `dumps`."""
    write_bytes(Path(path), dumps(model).encode())
