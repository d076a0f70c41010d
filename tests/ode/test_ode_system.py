"""Polynomial systems: arithmetic, model files, simulation, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.errors import ConfigError, DataError
from weightfold.ode.expression import parse
from weightfold.ode.files import dumps, loads, read, write
from weightfold.ode.system import PolynomialSystem
from weightfold.ode.systems import glycolysis, h_tree, phosphorylation, polymerisation

NAMES = ("a", "b", "c", "d")
POWERS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=3)
MONOMIALS = POWERS.map(lambda powers: tuple(sorted(powers.items())))
POLYNOMIALS = st.dictionaries(MONOMIALS, st.integers(-4, 4).filter(bool).map(float), max_size=5)
TERMS = st.tuples(*[POLYNOMIALS] * len(NAMES)).map(lambda found: dict(zip(NAMES, found, strict=True)))
POINTS = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4)

MIXED = """
// two species that turn into each other, and what they make
begin model pair
 begin parameters
  k = 0.5   /* a rate */
  twice = 2*k
 end parameters
 begin init
  A = 1.0
  B
  C = k + 1
 end init
 begin partition
  {A,B},
  {C}
 end partition
 begin reactions
  A + B -> C , k
  C -> 2*A , twice
  2 A -> A , 1e-1
 end reactions
 begin views
  total = A + B
 end views
 reduceBDE(reducedFile="x.ode")
end model
"""


@given(TERMS, POINTS)
@settings(max_examples=60, deadline=None)
def test_rhs_and_jacobian_are_those_of_the_polynomials(terms: dict, point: list[float]) -> None:
    system, x = PolynomialSystem.of_terms(terms), dict(zip(NAMES, point, strict=True))

    def value(polynomial: dict) -> float:
        return sum(c * np.prod([x[n] ** p for n, p in monomial]) for monomial, c in polynomial.items())

    def slope(polynomial: dict, name: str) -> float:
        total = 0.0
        for monomial, c in polynomial.items():
            powers = dict(monomial)
            p = powers.pop(name, 0)
            total += c * p * x[name] ** (p - 1) * np.prod([x[n] ** q for n, q in powers.items()]) if p else 0.0
        return total

    assert np.allclose(system.rhs(np.array(point)), [value(terms[n]) for n in NAMES])
    expected = [[slope(terms[n], m) for m in NAMES] for n in NAMES]
    assert np.allclose(system.jacobian(np.array(point)).toarray(), expected)


@given(TERMS, POINTS)
@settings(max_examples=60, deadline=None)
def test_a_model_file_gives_the_system_back(terms: dict, start: list[float]) -> None:
    system = PolynomialSystem.of_terms(terms, dict(zip(NAMES, start, strict=True)), "m")
    again = loads(dumps(system)).system
    assert again.names == system.names
    assert again.terms() == system.terms()
    assert again.start() == system.start()


def test_reactions_parameters_and_partition_are_read() -> None:
    model = loads(MIXED)
    a, b, c = (("A", 1),), (("B", 1),), (("C", 1),)
    assert model.system.terms() == {
        "A": {(*a, *b): -0.5, c: 2.0, (("A", 2),): -0.1},
        "B": {(*a, *b): -0.5},
        "C": {(*a, *b): 0.5, c: -1.0},
    }
    assert model.system.start() == {"A": 1.0, "B": 0.0, "C": 1.5}
    assert model.partition == (("A", "B"), ("C",))
    assert model.views == {"total": "A + B"}


def test_parameters_as_variables_never_change() -> None:
    system = loads(MIXED, "variables").system
    assert system.names == ("A", "B", "C", "k", "twice")
    assert system.terms()["k"] == {}
    assert system.start()["twice"] == 1.0
    assert system.terms()["B"] == {(("A", 1), ("B", 1), ("k", 1)): -1.0}


def test_a_file_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "m.ode", phosphorylation(2))
    assert read(tmp_path / "m.ode").system.terms() == phosphorylation(2).terms()
    assert [p.name for p in tmp_path.iterdir()] == ["m.ode"]
    with pytest.raises(DataError, match="could not be read as a model"):
        read(tmp_path / "none.ode")
    (tmp_path / "bytes.ode").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="could not be read as a model"):
        read(tmp_path / "bytes.ode")


@pytest.mark.parametrize(
    ("text", "term", "why"),
    [
        ("x/(1 + y)", "x/(1 + y)", "divides by a variable"),
        ("1 - exp(-x*(y+1))", "exp(-x*(y+1))", "calls the function 'exp'"),
        ("2*x^0.5", "x^0.5", "has a power that is not a whole number"),
        ("x^-1", "x^-1", "has a power that is not a whole number"),
        ("y + x**y", "x**y", "has a power that is not a whole number"),
        ("x/(2 - 2)", "x/(2 - 2)", "divides by zero"),
    ],
)
def test_a_right_hand_side_that_is_not_polynomial_is_refused_by_its_term(text: str, term: str, why: str) -> None:
    with pytest.raises(DataError) as error:
        parse(text, {}, "d(x)")
    assert str(error.value).startswith(f"d(x) is not polynomial: the term '{term}' {why}")
    assert "->" in str(error.value)


@pytest.mark.parametrize("text", ["x +", "(x", "x $ y", "x y", "", "2 ^", "*x"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse(text, {}, "d(x)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("begin model m end model", "not a model"),
        ("begin model m begin ODE d(x) = y end ODE end model", "'y' stands in the derivative of 'x'"),
        ("begin model m begin ODE d(x) = 1 d(x) = 2 end ODE end model", "given twice"),
        ("begin model m\nbegin init\nx\nx\nend init\nbegin ODE d(x) = 1 end ODE end model", "defined twice"),
        ("begin model m begin parameters k = q end parameters begin ODE d(x) = k end ODE end model", "'q', which has"),
        ("begin model m\nbegin reactions\nA B\nend reactions\nend model", "cannot be read"),
        ("begin model m\nbegin reactions\nA + 1 -> B, 2\nend reactions\nend model", "is no species"),
    ],
)
def test_a_broken_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        loads(text)


def test_an_unknown_treatment_of_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="'values' or 'variables'"):
        loads(MIXED, "constants")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="coefficient of 'x' is"):
        PolynomialSystem.of_terms({"x": {(): value}})
    with pytest.raises(DataError, match="initial value of 'x' is"):
        PolynomialSystem.of_terms({"x": {}}, {"x": value})


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="powers of shape"):
        PolynomialSystem.of_arrays(["x"], np.zeros(2, int), np.ones(2), np.ones((1, 1)))
    with pytest.raises(DataError, match="power of 'x' is -1"):
        PolynomialSystem.of_arrays(["x"], np.zeros(1, int), np.ones(1), -np.ones((1, 1)))
    with pytest.raises(DataError, match="names equation 3 of 1"):
        PolynomialSystem.of_arrays(["x"], np.array([3]), np.ones(1), np.ones((1, 1)))
    with pytest.raises(DataError, match="defined twice"):
        PolynomialSystem.of_arrays(["x", "x"], np.zeros(1, int), np.ones(1), np.ones((1, 2)))


def test_an_unstable_system_is_refused_by_variable_and_time() -> None:
    square = PolynomialSystem.of_terms({"calm": {}, "x": {(("x", 2),): 1.0}}, {"x": 1.0}, "blow_up")
    with pytest.raises(DataError, match=r"'blow_up' is unstable: 'x' grows beyond .* by t = (1|0\.99)"):
        square.simulate([0.0, 2.0])


def test_the_circuit_has_the_published_voltages() -> None:
    """Values of a fourth-order Runge-Kutta reference with a small step."""
    found = h_tree(2).simulate([0.0, 1.0, 5.0, 10.0])
    assert np.allclose(found[1:, 0], [0.964173, 1.613648, 1.878460], atol=1e-6)
    assert np.allclose(found[1:, 1], [0.269474, 1.307600, 1.782181], atol=1e-6)


def test_glycolysis_oscillates_as_published() -> None:
    """Values of a fourth-order Runge-Kutta reference with step 1e-4; the auxiliary variable keeps its meaning."""
    found = glycolysis().simulate([0.0, 5.0, 10.0])
    five = [0.768622, 0.345931, 0.104681, 0.170194, 0.096518, 2.649991, 0.092684]
    ten = [1.416573, 0.221493, 0.041552, 0.098335, 0.086202, 2.187135, 0.065631]
    assert np.allclose(found[1, :7], five, atol=2e-6)
    assert np.allclose(found[2, :7], ten, atol=2e-6)
    assert np.allclose(found[:, 7], 1 / (1 + (found[:, 5] / 0.52) ** 4), atol=1e-8)


def test_polymers_keep_their_monomers() -> None:
    system = polymerisation(6)
    found = system.simulate([0.0, 1.0, 5.0])
    units = np.array([1.0, *range(1, 7)])
    assert np.allclose(found @ units, found[0] @ units, rtol=1e-8)


@pytest.mark.parametrize("make", [lambda: h_tree(0), lambda: phosphorylation(0), lambda: polymerisation(1)])
def test_systems_of_no_size_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        make()  # type: ignore[operator]


def test_a_spread_needs_a_generator() -> None:
    with pytest.raises(ConfigError, match="generator"):
        h_tree(3, spread=0.1)
