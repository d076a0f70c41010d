"""Model files that are damaged, or whose numbers or polynomials are out of bounds, are errors of ours."""

from __future__ import annotations

import random

import pytest

from weightfold.errors import DataError
from weightfold.ode.files import dumps, loads

ODE = "begin model m\n begin init\n  A = 1\n end init\n begin ODE\n  d(A) = {}\n end ODE\nend model\n"
REACTION = "begin model m\n begin init\n  A = 1\n end init\n begin reactions\n  {}\n end reactions\nend model\n"


@pytest.mark.parametrize(
    "text",
    ["A^1e999", "A^2^2^2^2^2^2^2", "1e999*A", "(-1)^0.5*A", "0^(-1)", "A^(1e308*10)", "9" * 400 + "*A",
     "(" * 5000 + "A" + ")" * 5000, "-" * 20_000 + "(" * 3000, "((A^64)^64)^64", "+".join(["(A+1)"] * 3) + "^0.5",
     "1e308*1e308*A"],
)  # fmt: skip
def test_equations_out_of_bounds(text: str) -> None:
    with pytest.raises(DataError):
        loads(ODE.format(text))


def test_a_short_text_cannot_be_multiplied_out_to_much() -> None:
    names = [f"x{n}" for n in range(60)]
    init = "\n".join(f"  {name} = 1" for name in names)
    product = "*".join(f"({a}+{b})" for a, b in zip(names[::2], names[1::2], strict=True))
    with pytest.raises(DataError, match="terms"):
        loads(ODE.format(product).replace("  A = 1", f"  A = 1\n{init}"))


@pytest.mark.parametrize(
    "text", ["999999999999 A -> A, 1", "9" * 5000 + "*A -> A, 1", "4000 A + 4000 A -> A, 1", "A -> B C, 1", "A, 1"]
)
def test_reactions_out_of_bounds(text: str) -> None:
    with pytest.raises(DataError):
        loads(REACTION.format(text))


def test_random_damage_is_read_or_refused() -> None:
    """What is read can be written, and comes back as it was."""
    draw = random.Random(0)
    whole = ODE.format("-2*A*(1 - A)^2 + 3e-1") + "\n"
    for _ in range(400):
        text = list(whole)
        for _ in range(draw.choice((1, 3, 9))):
            text[draw.randrange(len(text))] = draw.choice("()^*/+-,.e9=\n dA\x00é")
        try:
            system = loads("".join(text)).system
        except DataError:
            continue
        assert loads(dumps(system)).system.terms() == system.terms()


def test_large_powers_come_back() -> None:
    """A reaction may take many of one species: what is written of it is read."""
    system = loads(REACTION.format("2000 A -> A, 3")).system
    assert loads(dumps(system)).system.terms() == system.terms() == {"A": {(("A", 2000),): -5997.0}}
    with pytest.raises(DataError, match="power above 64"):
        loads(ODE.format("(A + 1)^65"))
