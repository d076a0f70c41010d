"""Approximate differential equivalences: blocks of variables whose derivatives agree up to a tolerance ε.

    backward  dist(i, j) = Σ |coefficients of f_i - f_j|, every variable replaced by its block
    forward   dist(i, j) = Σ_H Σ |coefficients of F_H - F_H[x_i -> s (x_i + x_j), x_j -> (1 - s)(x_i + x_j)]|,

the latter over monomials in the variables and the fresh symbol s, as ERODE defines it. Where no monomial holds both
variables or a power of one, it is three times the sum of |coefficients of ∂F_H/∂x_i - ∂F_H/∂x_j|. Every block is split
by its distances under the present partition until no block splits. Single linkage (ERODE's) takes the connected
components of dist <= ε: two variables of one block may lie (size - 1) ε apart. Complete linkage bounds every block's
diameter by ε. ε is in units of coefficients. Cost of a round: O(pairs within blocks x their monomials).

Reference: Cardelli, Tribastone, Tschaikowski, Vandin, QEST 2018, arXiv 1807.06888; differs in: complete linkage as a
choice, distances by sparse rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array, csr_array
from scipy.spatial.distance import pdist

from weightfold.errors import ConfigError, DataError
from weightfold.ode.equivalence import (
    RTOL,
    backward_entries,
    forward_entries,
    initial_labels,
    joined,
    numbered,
    refine,
)
from weightfold.ode.system import Array, PolynomialSystem, mixed, monomial_keys

Kind = Literal["forward", "backward"]
Linkage = Literal["single", "complete"]

MAX_BLOCK = 20_000
"""Variables of one block between which distances are still taken pair by pair."""
TILE = 20_000_000
"""Numbers of a block's rows that are held dense at once."""


def approximate(
    system: PolynomialSystem,
    eps: float,
    kind: Kind,
    how: Linkage = "complete",
    start: Iterable[Iterable[str]] | Array | None = None,
    *,
    equal_start: bool = True,
) -> Array:
    """Find a partition whose blocks are equivalences up to ε.

    Args:
        eps: >= 0, in units of coefficients; 0 gives the exact equivalence.
        how: "single" (as ERODE) or "complete" linkage.
        start: blocks to refine; one block by default.
        equal_start: backward only: whether variables of one block must start equal.
    Returns:
        labels_N: numbered in order of first use, shape (N,), int64.
    Raises:
        ConfigError: ε is negative or not finite, or another word than the named ones.
        DataError: a block is too large for distances of all pairs.
    Example:
        >>> terms = {"x": {(): 1.0}, "y": {(): 1.5}, "z": {(): 2.0}}
        >>> system = PolynomialSystem.of_terms(terms)
        >>> approximate(system, 0.5, "backward", "single"), approximate(system, 0.5, "backward", "complete")
        (array([0, 0, 0]), array([0, 0, 1]))
    """
    check_eps(eps)
    for name, word, valid in (("kind", kind, ("forward", "backward")), ("how", how, ("single", "complete"))):
        if word not in valid:
            raise ConfigError(f"'{name}' must be one of {', '.join(valid)}. Got {word!r} instead.")
    labels_N = initial_labels(system, start)
    if kind == "backward" and equal_start:
        labels_N = joined(labels_N, numbered(system.initial_N))
    if eps == 0:
        entries = forward_entries(system) if kind == "forward" else backward_entries(system)
        return refine(system.n_variables, entries, labels_N)
    while True:
        split = joined(labels_N, _split(system, labels_N, eps, kind, how))
        if int(split.max(initial=-1)) == int(labels_N.max(initial=-1)):
            return labels_N
        labels_N = split


def check_eps(eps: float) -> None:
    """Refuse a tolerance that is none.

    Raises:
        ConfigError: ε is negative or not finite.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ConfigError(f"The tolerance 'eps' must be a finite number from 0 on. Got {eps!r} instead.")


def distances(system: PolynomialSystem, labels_N: Array, kind: Kind, members: Array) -> Array:
    """Distances between some variables under a partition, condensed: (0, 1), (0, 2), ..., shape (B (B - 1) / 2,).

    Args:
        members: the variables, ascending, shape (B,).
    Raises:
        DataError: too many of them.
    """
    rows_NK = _rows(system, labels_N, kind)
    return _distances(system, labels_N, kind, members, rows_NK)


def _split(system: PolynomialSystem, labels_N: Array, eps: float, kind: Kind, how: Linkage) -> Array:
    rows_NK = _rows(system, labels_N, kind)
    part_N = np.zeros_like(labels_N)
    order = np.argsort(labels_N, kind="stable")
    for members in np.split(order, np.cumsum(np.bincount(labels_N))[:-1]):
        if len(members) > 1:
            found = _distances(system, labels_N, kind, members, rows_NK)
            rounding = RTOL * float(abs(rows_NK[members]).sum(1).max())
            part_N[members] = fcluster(linkage(found, how), eps + rounding, "distance")
    return part_N


def _rows(system: PolynomialSystem, labels_N: Array, kind: Kind) -> csr_array:
    """Each variable's coefficients by what its signature is a sum over, shape (N, K), sparse."""
    entries = forward_entries(system) if kind == "forward" else backward_entries(system)
    entry, variable, power = entries.seen
    seen = csr_array((power, (entry, variable)), shape=(len(entries.owner_E), system.n_variables))
    key_E = mixed(entries.fixed_E + monomial_keys(seen, labels_N))
    keys, column = np.unique(key_E, return_inverse=True)
    shape = (system.n_variables, len(keys))
    return csr_array(coo_array((entries.coefficient_E, (entries.owner_E, column)), shape=shape))


def _distances(system: PolynomialSystem, labels_N: Array, kind: Kind, members: Array, rows_NK: csr_array) -> Array:
    if len(members) > MAX_BLOCK:
        raise DataError(
            f"A block of '{system.name}' has {len(members):,} variables; distances of all pairs are taken up to "
            f"{MAX_BLOCK:,}.",
            remedy="Start from a finer partition, or lump exactly (eps = 0) first.",
        )
    own = csr_array(rows_NK[members])
    used = np.unique(own.indices)
    total = np.zeros(len(members) * (len(members) - 1) // 2)
    step = max(1, TILE // len(members))
    columns = own.tocsc()
    for at in range(0, len(used), step):
        total += pdist(columns[:, used[at : at + step]].toarray(), "cityblock")
    return total if kind == "backward" else _swapped(system, labels_N, members, 3 * total)


def _swapped(system: PolynomialSystem, labels_N: Array, members: Array, total: Array) -> Array:
    """Put in the distances of the pairs that one monomial holds together, or one of them to a power."""
    own = csr_array(system.powers_MN[:, members])
    together = (own.T @ own).toarray() > 0
    squared = np.unique(own.indices[own.data > 1])
    together[squared] = together[:, squared] = True
    np.fill_diagonal(together, False)
    b = len(members)
    if not together.any():
        return total
    monomials = _by_variable(system, labels_N)
    for i, j in zip(*np.nonzero(np.triu(together)), strict=True):
        total[b * i - i * (i + 1) // 2 + j - i - 1] = _swap_distance(monomials, int(members[i]), int(members[j]))
    return total


Summed = dict[tuple[int, tuple[tuple[int, int], ...]], float]


def _by_variable(system: PolynomialSystem, labels_N: Array) -> dict[int, Summed]:
    """The monomials of the blocks' summed derivatives, by (block, powers), for each variable that they hold."""
    total: Summed = {}
    matrix = system.powers_MN
    for m, (i, c) in enumerate(zip(system.equation_M.tolist(), system.coefficient_M.tolist(), strict=True)):
        span = slice(matrix.indptr[m], matrix.indptr[m + 1])
        powers = tuple(sorted(zip(matrix.indices[span].tolist(), matrix.data[span].tolist(), strict=True)))
        key = int(labels_N[i]), powers
        total[key] = total.get(key, 0.0) + c
    out: dict[int, Summed] = {}
    for (block, powers), c in total.items():
        for variable, _ in powers:
            out.setdefault(variable, {})[block, powers] = c
    return out


def _swap_distance(monomials: dict[int, Summed], i: int, j: int) -> float:
    """Σ_H |F_H - F_H[x_i -> s (x_i + x_j), x_j -> (1 - s)(x_i + x_j)]|, term by term."""
    change: dict[tuple[int, tuple[tuple[int, int], ...], int, int, int], float] = {}
    for (block, powers), c in {**monomials.get(i, {}), **monomials.get(j, {})}.items():
        p, q = dict(powers).get(i, 0), dict(powers).get(j, 0)
        rest = tuple(entry for entry in powers if entry[0] not in (i, j))
        own = (block, rest, p, q, 0)
        change[own] = change.get(own, 0.0) + c
        for a in range(p + q + 1):
            for k in range(q + 1):
                term = (block, rest, a, p + q - a, p + k)
                change[term] = change.get(term, 0.0) - c * math.comb(p + q, a) * math.comb(q, k) * (-1) ** k
    return float(sum(map(abs, change.values())))
