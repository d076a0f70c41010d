"""Equivalences against a naive reference, known partitions, and trajectories."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.errors import ConfigError, DataError
from weightfold.ode.approximate import approximate, distances
from weightfold.ode.equivalence import backward, blocks_of, forward, initial_labels, is_exact, numbered, quotient
from weightfold.ode.system import PolynomialSystem
from weightfold.ode.systems import h_tree, phosphorylation, polymerisation, reaction_network

NAMES = tuple("abcdef")
POWERS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 2), max_size=2)
MONOMIALS = POWERS.map(lambda powers: tuple(sorted(powers.items())))
POLYNOMIALS = st.dictionaries(MONOMIALS, st.sampled_from([1.0, -1.0, 2.0]), max_size=3)
TERMS = st.tuples(*[POLYNOMIALS] * len(NAMES)).map(lambda found: dict(zip(NAMES, found, strict=True)))
MIXES = st.sampled_from([0.3, 0.5, 1.0])
KINDS = st.sampled_from(["forward", "backward"])


def naive(terms: dict, kind: str) -> np.ndarray:
    """Refine by comparing whole polynomials with rational coefficients, round after round."""
    names = list(terms)
    labels = dict.fromkeys(names, 0)
    while True:
        if kind == "backward":
            seen = {i: _through_blocks(terms[i], labels) for i in names}
        else:
            seen = {i: _slopes(terms, labels, i) for i in names}
        key = {i: (labels[i], frozenset(seen[i].items())) for i in names}
        number = {k: n for n, k in enumerate(dict.fromkeys(key.values()))}
        new = {i: number[key[i]] for i in names}
        if new == labels:
            return np.array(list(labels.values()))
        labels = new


def _through_blocks(polynomial: dict, labels: dict) -> dict:
    out: dict = {}
    for monomial, c in polynomial.items():
        powers: dict = {}
        for name, p in monomial:
            powers[labels[name]] = powers.get(labels[name], 0) + p
        key = tuple(sorted(powers.items()))
        out[key] = out.get(key, Fraction(0)) + Fraction(c)
    return {key: c for key, c in out.items() if c}


def _slopes(terms: dict, labels: dict, i: str) -> dict:
    out: dict = {}
    for k, polynomial in terms.items():
        for monomial, c in polynomial.items():
            powers = dict(monomial)
            p = powers.get(i, 0)
            if p:
                powers[i] = p - 1
                key = labels[k], tuple(sorted((n, q) for n, q in powers.items() if q))
                out[key] = out.get(key, Fraction(0)) + Fraction(c) * p
    return {key: c for key, c in out.items() if c}


def symmetric(terms: dict, copies: dict[str, str]) -> dict:
    """The same equation for a variable and its copy, up to their own names: equivalences worth finding."""
    out = dict(terms)
    for name, original in copies.items():
        swap = {name: original, original: name}
        polynomial: dict = {}
        for monomial, c in terms[original].items():
            powers: dict = {}
            for n, p in monomial:
                powers[swap.get(n, n)] = powers.get(swap.get(n, n), 0) + p
            polynomial[tuple(sorted(powers.items()))] = c
        out[name] = polynomial
    return out


@given(TERMS, KINDS, st.booleans())
@settings(max_examples=250, deadline=None)
def test_refinement_is_that_of_whole_polynomials(terms: dict, kind: str, planted: bool) -> None:
    if planted:
        terms = symmetric(terms, {"b": "a", "d": "c"})
    system = PolynomialSystem.of_terms(terms)
    found = backward(system) if kind == "backward" else forward(system)
    assert found.tolist() == naive(terms, kind).tolist()
    assert is_exact(system, found, kind)


@given(TERMS, KINDS)
@settings(max_examples=100, deadline=None)
def test_a_quotient_of_the_quotient_is_the_quotient(terms: dict, kind: str) -> None:
    system = PolynomialSystem.of_terms(symmetric(terms, {"b": "a", "d": "c"}))
    labels = backward(system) if kind == "backward" else forward(system)
    small = quotient(system, labels, kind)
    assert small.n_variables == labels.max() + 1
    again = backward(small) if kind == "backward" else forward(small)
    whole = quotient(small, again, kind)
    direct = quotient(system, numbered(again[labels]), kind)
    assert whole.names == direct.names
    x = np.linspace(0.5, 1.5, whole.n_variables)
    assert np.allclose(whole.rhs(x), direct.rhs(x))


@pytest.mark.parametrize("n_levels", range(1, 9))
def test_a_tree_of_equal_branches_has_one_block_a_level(n_levels: int) -> None:
    system = h_tree(n_levels)
    labels = backward(system)
    assert system.n_variables == 2**n_levels - 1
    assert blocks_of(system.names, labels) == [[f"v{i + 1}_{k + 1}" for k in range(2**i)] for i in range(n_levels)]


@pytest.mark.parametrize("n_sites", range(2, 7))
def test_only_the_numbers_of_sites_in_each_state_matter(n_sites: int) -> None:
    """ERODE's forward reductions of e2, e3 and e4 have 12, 22 and 37 species."""
    system = phosphorylation(n_sites)
    labels = forward(system)
    assert system.n_variables == 4**n_sites + 2
    assert labels.max() + 1 == comb(n_sites + 3, 3) + 2
    counts = [tuple(sorted(i // 4**site % 4 for site in range(n_sites))) for i in range(4**n_sites)]
    number = {c: k for k, c in enumerate(dict.fromkeys(counts))}
    assert labels[2:].tolist() == [2 + number[c] for c in counts]


@pytest.mark.parametrize("n_sites", [2, 3])
def test_forward_blocks_follow_the_quotient_from_any_start(n_sites: int) -> None:
    system = phosphorylation(n_sites, substrate=30.0, enzyme=3.0)
    start = np.random.default_rng(0).uniform(0, 2, system.n_variables)
    system = PolynomialSystem(system.names, system.equation_M, system.coefficient_M, system.powers_MN, start, "e")
    labels = forward(system)
    times = np.linspace(0, 1, 5)
    sums = system.simulate(times) @ np.eye(labels.max() + 1)[labels]
    assert np.allclose(quotient(system, labels, "forward").simulate(times), sums, rtol=1e-7)


def test_backward_blocks_stay_equal_and_follow_the_quotient() -> None:
    system = h_tree(5)
    labels, times = backward(system), np.linspace(0, 10, 5)
    assert np.allclose(system.simulate(times), quotient(system, labels, "backward").simulate(times)[:, labels])


def test_indistinguishable_species_are_a_forward_block() -> None:
    system = reaction_network(5, 12, np.random.default_rng(3), copies=3)
    species = np.repeat(np.arange(5), 3)
    assert is_exact(system, species, "forward")
    labels = forward(system, species)
    assert labels.tolist() == species.tolist()
    sums = system.simulate([0.0, 1.0]) @ np.eye(5)[labels]
    assert np.allclose(quotient(system, labels, "forward").simulate([0.0, 1.0]), sums)


def test_a_wrong_partition_is_not_exact() -> None:
    assert not is_exact(h_tree(3), np.array([0, 0, 1, 2, 2, 2, 2]), "backward")
    assert not is_exact(phosphorylation(2), np.zeros(18, np.int64), "backward")


@given(TERMS, KINDS, st.permutations(range(6)))
@settings(max_examples=60, deadline=None)
def test_the_order_of_variables_does_not_matter(terms: dict, kind: str, order: list[int]) -> None:
    find = backward if kind == "backward" else forward
    system = PolynomialSystem.of_terms(terms)
    shuffled = PolynomialSystem.of_terms({NAMES[i]: terms[NAMES[i]] for i in order})
    assert find(shuffled).tolist() == numbered(find(system)[order]).tolist()


def test_unequal_starts_are_kept_apart_or_refused() -> None:
    system = h_tree(3)
    start = system.initial_N.copy()
    start[3] = 0.25
    system = PolynomialSystem(system.names, system.equation_M, system.coefficient_M, system.powers_MN, start, "h")
    assert backward(system).tolist() == [0, 1, 1, 2, 3, 3, 3]
    asked = backward(system, equal_start=False)
    assert asked.max() + 1 == 3
    with pytest.raises(DataError, match=r"'v3_1' and 'v3_2' are one block .* start from 0.25 and 0"):
        quotient(system, asked, "backward")


def test_start_partitions_are_refined_or_refused() -> None:
    system = h_tree(3)
    assert backward(system, [["v3_1", "v3_2"]]).tolist() == [0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(DataError, match="'v9_9', which is no variable"):
        backward(system, [["v9_9"]])
    with pytest.raises(DataError, match="'v1_1' in two blocks"):
        backward(system, [["v1_1"], ["v1_1"]])
    with pytest.raises(DataError, match="cannot have shape"):
        initial_labels(system, np.zeros(3))
    with pytest.raises(DataError, match="'forward' or 'backward'"):
        quotient(system, backward(system), "sideways")


# approximate ----------------------------------------------------------------------------------------------------------


@given(TERMS, KINDS, st.sampled_from(["single", "complete"]))
@settings(max_examples=80, deadline=None)
def test_a_tolerance_of_nothing_is_exact(terms: dict, kind: str, how: str) -> None:
    system = PolynomialSystem.of_terms(symmetric(terms, {"b": "a", "d": "c"}))
    exact = backward(system) if kind == "backward" else forward(system)
    assert approximate(system, 0.0, kind, how).tolist() == exact.tolist()
    assert approximate(system, 1e-7, kind, how).tolist() == exact.tolist()


@given(TERMS, KINDS, st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=80, deadline=None)
def test_complete_linkage_bounds_every_diameter(terms: dict, kind: str, eps: float) -> None:
    system = PolynomialSystem.of_terms(terms)
    labels = approximate(system, eps, kind, "complete")
    for block in range(labels.max() + 1):
        members = np.flatnonzero(labels == block)
        if len(members) > 1:
            assert distances(system, labels, kind, members).max() <= eps + 1e-9


def test_single_linkage_chains() -> None:
    system = PolynomialSystem.of_terms({f"x{i}": {(): 1 + 0.1 * i} for i in range(10)})
    assert approximate(system, 0.11, "backward", "single").max() == 0
    complete = approximate(system, 0.11, "backward", "complete")
    assert np.bincount(complete).max() == 2


@pytest.mark.parametrize(("a", "b"), [(1.0, 3.5), (-2.0, 0.25)])
def test_the_forward_distance_of_linear_systems_is_three_times_that_of_columns(a: float, b: float) -> None:
    terms = {"x": {}, "y": {}, "z": {(("x", 1),): a, (("y", 1),): b}}
    system = PolynomialSystem.of_terms(terms)
    labels = np.array([0, 0, 1])
    assert distances(system, labels, "forward", np.array([0, 1])) == pytest.approx(3 * abs(a - b))


def test_the_forward_distance_of_squares_is_that_of_the_definition() -> None:
    """x² + y² against s²(x + y)² + (1 - s)²(x + y)²: |1 - 1| + |1 - 1| + 2 + (2 + 4 + 2) + (2 + 4 + 2), by hand."""
    system = PolynomialSystem.of_terms({"x": {(("x", 2),): 1.0, (("y", 2),): 1.0}, "y": {}})
    assert distances(system, np.array([0, 0]), "forward", np.array([0, 1])) == pytest.approx(18.0)


def test_a_nearly_symmetric_tree_lumps_at_its_spread() -> None:
    system = h_tree(6, spread=1e-4, generator=np.random.default_rng(0))
    assert backward(system).max() + 1 == 63
    for how in ("single", "complete"):
        assert approximate(system, 1e-2, "backward", how).max() + 1 == 6
    labels = approximate(system, 1e-2, "backward")
    times = np.linspace(0, 10, 5)
    apart = np.abs(system.simulate(times) - quotient(system, labels, "backward").simulate(times)[:, labels])
    assert 0 < apart.max() < 1e-3


def test_more_tolerance_never_leaves_more_blocks_under_single_linkage() -> None:
    system = polymerisation(8, spread=0.2, generator=np.random.default_rng(1))
    sizes = [approximate(system, eps, "forward", "single").max() + 1 for eps in np.linspace(0, 60, 7)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ConfigError, match="finite number from 0 on"):
        approximate(h_tree(2), eps, "backward")


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="'kind' must be one of forward, backward"):
        approximate(h_tree(2), 0.1, "sideways")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'how' must be one of single, complete"):
        approximate(h_tree(2), 0.1, "backward", "ward")  # type: ignore[arg-type]
