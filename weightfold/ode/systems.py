"""Systems with known equivalences, and systems to learn from: circuits, phosphorylation, polymers, glycolysis.

The equations are those of the sources named at each function; where the original model is not public, the function says
what stands in for it.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.sparse import coo_array

from weightfold.errors import ConfigError
from weightfold.ode.expression import Terms
from weightfold.ode.system import Array, PolynomialSystem

RESISTANCE = (3.19, 6.37, 12.75, 25.50, 50.0, 100.0, 200.0, 400.0)
CAPACITANCE = (0.280, 0.300, 0.130, 0.140, 0.070, 0.070, 0.035, 0.035)
GLYCOLYSIS_START = (0.50144272, 1.95478666, 0.19788759, 0.14769148, 0.16059078, 0.16127341, 0.06404702)
GLYCOLYSIS_RANGES = ((0.15, 1.60), (0.19, 2.16), (0.04, 0.20), (0.10, 0.35), (0.08, 0.30), (0.14, 2.67), (0.05, 0.10))
"""Usual ranges of the initial values of the seven states."""


def h_tree(
    n_levels: int, *, spread: float = 0.0, generator: np.random.Generator | None = None, source: float = 2.0
) -> PolynomialSystem:
    """An RC circuit in the form of a binary tree, all nodes at 0 V: 2^N - 1 variables, N blocks of equal voltage.

    Args:
        n_levels: N >= 1; resistances and capacitances beyond the eighth level repeat the eighth's pattern (R doubles).
        spread: each node's resistance and capacitance deviate by up to this share, independently.
        generator: needed for a spread.
    Example:
        >>> h_tree(3).n_variables
        7

    Reference: HTreeCircuit of the ERODE tool; Cardelli et al., QEST 2018, arXiv 1807.06888.
    """
    _require(n_levels >= 1, "n_levels", "at least 1", n_levels)
    _require(spread == 0 or generator is not None, "spread", "0 without a generator", spread)
    level = np.repeat(np.arange(n_levels), 2 ** np.arange(n_levels))
    n = len(level)
    beyond = np.maximum(level - 7, 0)
    resistance = np.array(RESISTANCE)[np.minimum(level, 7)] * 2.0**beyond
    capacitance = np.array(CAPACITANCE)[np.minimum(level, 7)] * 0.5 ** (beyond // 2)
    if spread and generator is not None:
        resistance = resistance * (1 + spread * generator.uniform(-1, 1, n))
        capacitance = capacitance * (1 + spread * generator.uniform(-1, 1, n))
    rate = 1 / (resistance * capacitance)
    back = 1 / (resistance[1:3] * capacitance[0])
    node = np.arange(1, n)
    parent = (node - 1) // 2
    rows = [node, node, np.zeros(1, np.int64), np.zeros(1 + len(back), np.int64), np.zeros(len(back), np.int64)]
    columns = [parent, node, np.full(1, -1), np.zeros(1 + len(back), np.int64), node[: len(back)]]
    values = [rate[1:], -rate[1:], rate[:1] * source, -np.concatenate([rate[:1], back]), back]
    equation, column, value = (np.concatenate(part) for part in (rows, columns, values))
    has = np.flatnonzero(column >= 0)
    powers = coo_array((np.ones(len(has), np.int32), (has, column[has])), shape=(len(equation), n))
    names = [f"v{i + 1}_{k + 1}" for i in range(n_levels) for k in range(2**i)]
    return PolynomialSystem.of_arrays(names, equation, value, powers, name=f"h_tree_{n_levels}")


def phosphorylation(n_sites: int, *, substrate: float = 3000.0, enzyme: float = 300.0) -> PolynomialSystem:
    """A protein with independent sites, each phosphorylated by a kinase E and set back by a phosphatase F.

    A site is free, bound to E, phosphorylated, or that and bound to F: 4^n + 2 species, and C(n + 3, 3) + 2 forward
    blocks, for only the numbers of sites in each state matter. The model e_n of the ERODE and CLUE papers.

    Args:
        n_sites: n >= 1.
        substrate: start of the protein without anything bound.
        enzyme: start of E and of F.
    Example:
        >>> phosphorylation(2).n_variables
        18

    Reference: Sneddon, Faeder, Emonet, Nature Methods 2011; rates as in CLUE's ProteinPhosphorylation models.
    """
    _require(n_sites >= 1, "n_sites", "at least 1", n_sites)
    on_e, off_e, cat_e, on_f, off_f, cat_f = 0.7, 3.0, 5.0, 0.7, 3.0, 5.1
    state = np.arange(4**n_sites)
    e, f, first = 0, 1, 2
    parts: list[tuple[Array, Array, Array | None, float]] = []
    for site in range(n_sites):
        digit, unit = state // 4**site % 4, 4**site
        free, bound, done, held = (first + state[digit == d] for d in range(4))
        for base, complex_, enzyme_at, on in ((free, free + unit, e, on_e), (done, done + unit, f, on_f)):
            parts += [
                (eq, base, np.full_like(base, enzyme_at), sign * on) for eq, sign in _rows(base, enzyme_at, complex_)
            ]
        for complex_, product, enzyme_at, off in (
            (bound, bound - unit, e, off_e),
            (bound, bound + unit, e, cat_e),
            (held, held - unit, f, off_f),
            (held, held - 3 * unit, f, cat_f),
        ):
            parts += [(eq, complex_, None, -sign * off) for eq, sign in _rows(product, enzyme_at, complex_)]
    sizes = [len(part[0]) for part in parts]
    offset = np.concatenate([[0], np.cumsum(sizes)])
    rows, columns = [], []
    for at, (_, one, other, _) in zip(offset, parts, strict=False):
        for column in (one,) if other is None else (one, other):
            rows.append(at + np.arange(len(one)))
            columns.append(column)
    row, column = np.concatenate(rows), np.concatenate(columns)
    n = 4**n_sites + first
    powers = coo_array((np.ones(len(row), np.int32), (row, column)), shape=(int(offset[-1]), n))
    start = np.zeros(n)
    start[[e, f, first]] = enzyme, enzyme, substrate
    equation = np.concatenate([part[0] for part in parts])
    rate = np.repeat([part[3] for part in parts], sizes)
    names = ["E", "F", *(f"S{i}" for i in range(4**n_sites))]
    return PolynomialSystem.of_arrays(names, equation, rate, powers, start, f"e{n_sites}")


def _rows(part: Array, enzyme: int, complex_: Array) -> list[tuple[Array, float]]:
    """Whose derivatives a binding (part + enzyme -> complex) enters, with what sign."""
    return [(part, -1.0), (np.full_like(part, enzyme), -1.0), (complex_, 1.0)]


def reaction_network(
    n_species: int, n_reactions: int, generator: np.random.Generator, *, copies: int = 1
) -> PolynomialSystem:
    """Random mass-action reactions A + B -> C + D, with every species present in several indistinguishable copies.

    Copies of one species take part in the same reactions at the same rates, so that the blocks of copies are a forward
    equivalence. Mass is conserved: solutions stay bounded.

    Args:
        n_species: species before copying, >= 2.
        n_reactions: reactions before copying.
        copies: of each species.
    Example:
        >>> reaction_network(3, 4, np.random.default_rng(0), copies=2).n_variables
        6
    """
    _require(n_species >= 2, "n_species", "at least 2", n_species)
    terms: dict[str, Terms] = {f"x{i}_{k}": {} for i in range(n_species) for k in range(copies)}
    for _ in range(n_reactions):
        a, b, c, d = (int(i) for i in generator.integers(0, n_species, 4))
        rate = float(generator.uniform(0.1, 1.0))
        for i, j in itertools.product(range(copies), repeat=2):
            left: dict[str, int] = {}
            for name in (f"x{a}_{i}", f"x{b}_{j}"):
                left[name] = left.get(name, 0) + 1
            monomial = tuple(sorted(left.items()))
            for name in (f"x{a}_{i}", f"x{b}_{j}"):
                terms[name][monomial] = terms[name].get(monomial, 0.0) - rate
            for species, k in itertools.product((c, d), range(copies)):
                name = f"x{species}_{k}"
                terms[name][monomial] = terms[name].get(monomial, 0.0) + rate / copies
    start = {name: float(generator.uniform(0, 1)) for name in terms}
    return PolynomialSystem.of_terms(terms, start, "reaction_network")


def polymerisation(
    n_lengths: int, *, spread: float = 0.0, generator: np.random.Generator | None = None
) -> PolynomialSystem:
    """Chains that grow by one monomer and lose one: R_i + M <-> R_{i+1}; a stand-in for unpublished polymer models.

    Args:
        n_lengths: n >= 2, lengths of chains.
        spread: share by which each rate deviates from 2 (growth) and 1.3 (loss), independently.
        generator: needed for a spread.
    Example:
        >>> polymerisation(4).start()["M"]
        10.0
    """
    _require(n_lengths >= 2, "n_lengths", "at least 2", n_lengths)
    _require(spread == 0 or generator is not None, "spread", "0 without a generator", spread)
    terms: dict[str, Terms] = {"M": {}, **{f"R{i}": {} for i in range(1, n_lengths + 1)}}
    for i in range(1, n_lengths):
        grow, lose = (
            rate * (1 + (spread * float(generator.uniform(-1, 1)) if spread and generator is not None else 0.0))
            for rate in (2.0, 1.3)
        )
        meeting, longer = (("M", 1), (f"R{i}", 1)), ((f"R{i + 1}", 1),)
        for name, sign in (("M", -1), (f"R{i}", -1), (f"R{i + 1}", 1)):
            for monomial, rate in ((meeting, sign * grow), (longer, -sign * lose)):
                terms[name][monomial] = terms[name].get(monomial, 0.0) + rate
    return PolynomialSystem.of_terms(terms, {"M": 10.0, "R1": 0.01}, f"polymerisation_{n_lengths}")


def glycolysis(start: tuple[float, ...] = GLYCOLYSIS_START) -> PolynomialSystem:
    """Oscillating glycolysis in yeast: seven states, made polynomial by r = 1 / (1 + (S6 / 0.52)⁴).

    With r' = -4 S6³ S6' r² / 0.52⁴; r is the eighth variable and starts where S6 says.

    Args:
        start: the seven initial values.
    Example:
        >>> glycolysis().names[-1]
        'r'

    Reference: Ruoff et al., Biophys. Chem. 2003; rates as in Daniels & Nemenman, PLOS ONE 2015.
    """
    _require(len(start) == 7, "start", "seven values", len(start))
    from weightfold.ode.expression import parse

    j0, k1, k2, k3, k4, k5, k6, k, kappa, psi, n, a, K = 2.5, 100, 6, 16, 100, 1.28, 12, 1.8, 13, 0.1, 1, 4, 0.52
    v1, v2, v3 = f"{k1}*S1*S6*r", f"{k2}*S2*({n} - S5)", f"{k3}*S3*({a} - S6)"
    v4, v5, v6, v7, j = f"{k4}*S4*S5", f"{k5}*S6", f"{k6}*S2*S5", f"{k}*S7", f"{kappa}*(S4 - S7)"
    s6 = f"-2*{v1} + 2*{v3} - {v5}"
    texts = {
        "S1": f"{j0} - {v1}",
        "S2": f"2*{v1} - {v2} - {v6}",
        "S3": f"{v2} - {v3}",
        "S4": f"{v3} - {v4} - {j}",
        "S5": f"{v2} - {v4} - {v6}",
        "S6": s6,
        "S7": f"{psi}*{j} - {v7}",
        "r": f"-4/{K}^4 * S6^3 * r^2 * ({s6})",
    }
    values = dict(zip(texts, [*start, 1 / (1 + (start[5] / K) ** 4)], strict=True))
    return PolynomialSystem.of_terms({x: parse(t, {}, f"d({x})") for x, t in texts.items()}, values, "glycolysis")


def _require(holds: bool, name: str, wanted: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"'{name}' must be {wanted}. Got {found!r} instead.")
