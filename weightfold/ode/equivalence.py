"""Exact differential equivalences: the coarsest partitions of a system's variables into blocks that act as one.

Backward: the variables of a block have equal derivatives once every variable is replaced by its block, so they stay
equal if they start equal. Forward: the summed derivative F_H of every block H depends on the variables through their
block sums alone, so the sums obey equations of their own; that is ∂F_H/∂x_i = ∂F_H/∂x_j as polynomials for i, j of one
block.

Both are found by refinement: start coarse, split every block whose variables differ under the present partition, until
none does. A variable is known by a signature, the sum over its entries of coefficient times a pseudo-random number that
belongs to the entry's monomial seen through the partition:

    backward  one entry per monomial of f_i;               key: powers of blocks
    forward   one per factor x_i of a monomial of any f_k; key: (block of k, the monomial with one x_i less)

Equal signatures mean equal polynomials, up to rounding and to collisions of two independent numbers of 53 bits. When a
block splits, its largest part keeps the number and only entries that see a smaller part are hashed anew. A variable is
in the smaller part at most log₂ n times, so the whole takes O(m d log n) operations for m monomials of d factors, in
vectorised passes (numpy alone: no compiler is needed at run time); a pass costs some tenths of a millisecond, which
counts where blocks peel off one by one, as along a chain.

Reference: Cardelli, Tribastone, Tschaikowski, Vandin, POPL 2016 (the equivalences) and TACAS 2016 (refinement); differs
in: signatures in place of syntactic comparison, for any degree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from weightfold.errors import DataError
from weightfold.ode.system import Array, PolynomialSystem, mixed, monomial_keys

RTOL = 1e-11
"""Difference of two signatures, over the sum of the variable's absolute coefficients, that counts as rounding."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What a signature is a sum of.

    Args:
        owner_E: whose signature an entry belongs to, shape (E,).
        coefficient_E: its factor.
        fixed_E: the part of its key that no block changes, uint64.
        seen: which variables' blocks it sees, as (entry, variable, power).
    """

    owner_E: Array
    coefficient_E: Array
    fixed_E: Array
    seen: tuple[Array, Array, Array]


def backward_entries(system: PolynomialSystem) -> Entries:
    """The entries whose sums differ where backward equivalence fails."""
    zero = np.zeros(system.n_monomials, np.uint64)
    return Entries(system.equation_M, system.coefficient_M, zero, system.entries())


def forward_entries(system: PolynomialSystem) -> Entries:
    """The entries whose sums differ where forward equivalence fails: the monomials of ∂f_k/∂x_i."""
    rows, columns, powers = system.entries()
    numbers = mixed(np.arange(system.n_variables))
    rest = monomial_keys(system.powers_MN)[rows] - numbers[columns]
    entry = np.arange(len(rows))
    seen = entry, system.equation_M[rows], np.ones(len(rows), np.int64)
    return Entries(columns, system.coefficient_M[rows] * powers, mixed(rest), seen)


def backward(
    system: PolynomialSystem, start: Iterable[Iterable[str]] | Array | None = None, *, equal_start: bool = True
) -> Array:
    """Find the coarsest backward equivalence.

    Args:
        start: blocks that it must refine: names (the others form one more block), or labels of shape (N,).
        equal_start: whether variables of one block must start equal, without which their trajectories differ.
    Returns:
        labels_N: block of each variable, numbered in order of first use, shape (N,), int64.
    Example:
        >>> x, y = (("x", 1),), (("y", 1),)
        >>> system = PolynomialSystem.of_terms({"x": {y: -1.0}, "y": {x: -1.0}, "z": {x: 1.0, y: 1.0}})
        >>> backward(system)
        array([0, 0, 1])
    """
    labels_N = initial_labels(system, start)
    if equal_start:
        labels_N = joined(labels_N, numbered(system.initial_N))
    return refine(system.n_variables, backward_entries(system), labels_N)


def forward(system: PolynomialSystem, start: Iterable[Iterable[str]] | Array | None = None) -> Array:
    """Find the coarsest forward equivalence; see `backward`.

    Example:
        >>> x, y = (("x", 1),), (("y", 1),)
        >>> system = PolynomialSystem.of_terms({"x": {x: -1.0}, "y": {y: -1.0}, "z": {x: 1.0, y: 1.0}})
        >>> forward(system, [["z"]])
        array([0, 0, 1])
    """
    return refine(system.n_variables, forward_entries(system), initial_labels(system, start))


def initial_labels(system: PolynomialSystem, start: Iterable[Iterable[str]] | Array | None) -> Array:
    """A partition from names or labels.

    Raises:
        DataError: a name is unknown or stands in two blocks, or the labels have another length.
    """
    if start is None:
        return np.zeros(system.n_variables, np.int64)
    if isinstance(start, np.ndarray):
        if start.shape != (system.n_variables,):
            raise DataError(f"A partition of {system.n_variables} variables cannot have shape {start.shape}.")
        return numbered(start)
    place = {name: i for i, name in enumerate(system.names)}
    labels_N = np.zeros(system.n_variables, np.int64)
    for number, block in enumerate(start, start=1):
        for name in block:
            if name not in place:
                raise DataError(f"The partition names '{name}', which is no variable of '{system.name}'.")
            if labels_N[place[name]]:
                raise DataError(f"The partition names '{name}' in two blocks.")
            labels_N[place[name]] = number
    return numbered(labels_N)


def numbered(values_N: Array) -> Array:
    """Labels of equal values, in order of first use.

    Example:
        >>> numbered(np.array([5.0, 2.0, 5.0]))
        array([0, 1, 0])
    """
    _, first, inverse = np.unique(values_N, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def joined(a_N: Array, b_N: Array) -> Array:
    """The coarsest partition that refines both."""
    return numbered(a_N.astype(np.int64) * (int(b_N.max(initial=0)) + 1) + b_N)


# refinement -----------------------------------------------------------------------------------------------------------


def refine(n_variables: int, entries: Entries, labels_N: Array, rtol: float = RTOL) -> Array:
    """Split blocks until all variables of each have equal signatures.

    Args:
        labels_N: the partition to start from, numbered from 0 without gaps.
        rtol: difference of signatures that counts as rounding, over the sum of absolute coefficients.
    Returns:
        labels_N: the coarsest refinement, numbered in order of first use.
    """
    if n_variables == 0:
        return labels_N
    signatures = _Signatures(n_variables, entries, labels_N, rtol)
    blocks = _Blocks(labels_N)
    changed = np.arange(n_variables)
    while len(changed):
        moved, old = blocks.split(changed, signatures)
        changed = signatures.update(moved, old, blocks.label_N[moved]) if len(moved) else moved
    return numbered(blocks.label_N)


class _Signatures:
    """Two signatures of every variable, kept up to date as labels change."""

    def __init__(self, n_variables: int, entries: Entries, labels_N: Array, rtol: float) -> None:
        self.entries = entries
        entry, variable, power = entries.seen
        order = np.argsort(variable, kind="stable")
        self.entry, self.power = entry[order], power[order].astype(np.uint64)
        self.span = np.concatenate([[0], np.cumsum(np.bincount(variable, minlength=n_variables))])
        shape = (len(entries.owner_E), n_variables)
        powers = csr_array((power, (entry, variable)), shape=shape)
        self.key_E = entries.fixed_E + monomial_keys(powers, labels_N)
        weights = [entries.coefficient_E * unit for unit in _units(self.key_E)]
        self.values_2N = np.stack([np.bincount(entries.owner_E, weights=w, minlength=n_variables) for w in weights])
        size_N = np.bincount(entries.owner_E, weights=np.abs(entries.coefficient_E), minlength=n_variables)
        self.tolerance_N = rtol * size_N

    def update(self, moved: Array, old: Array, new: Array) -> Array:
        """Hash anew what sees the moved variables; return the variables whose signature may differ now."""
        counts = self.span[moved + 1] - self.span[moved]
        at = _ranges(self.span[moved], counts)
        entry = self.entry[at]
        step = np.repeat(mixed(new) - mixed(old), counts) * self.power[at]
        touched = np.unique(entry)
        before = self.key_E[touched]
        np.add.at(self.key_E, entry, step)
        owners = self.entries.owner_E[touched]
        for row, was, now in zip(self.values_2N, _units(before), _units(self.key_E[touched]), strict=True):
            np.add.at(row, owners, self.entries.coefficient_E[touched] * (now - was))
        return np.unique(owners)


def _units(key: Array) -> tuple[Array, Array]:
    """Two independent numbers in [1, 2) of each key."""
    first = mixed(key)
    return tuple(1.0 + (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 for z in (first, mixed(first)))  # type: ignore[return-value]


def _ranges(starts: Array, counts: Array) -> Array:
    """The numbers start .. start + count - 1 of each range, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


class _Blocks:
    """A partition whose blocks are spans of one order, so that members are listed and moved without searching."""

    def __init__(self, labels_N: Array) -> None:
        n_blocks, n = int(labels_N.max()) + 1, len(labels_N)
        self.label_N = labels_N.copy()
        self.order = np.argsort(labels_N, kind="stable")
        self.place = np.empty(n, np.int64)
        self.place[self.order] = np.arange(n)
        self.size, self.start, self.common = np.zeros(n, np.int64), np.zeros(n, np.int64), np.full((2, n), np.nan)
        self.size[:n_blocks] = np.bincount(labels_N)
        self.start[1:n_blocks] = np.cumsum(self.size[: n_blocks - 1])
        self.n_blocks = n_blocks

    def split(self, changed: Array, signatures: _Signatures) -> tuple[Array, Array]:
        """Split the blocks of some variables by signature; the largest part keeps the label.

        Variables of the same blocks that are not named have the signature that their block had before.

        Returns:
            The variables that got a new label, and their labels before.
        """
        changed = changed[self.size[self.label_N[changed]] > 1]
        block, count = np.unique(self.label_N[changed], return_counts=True)
        whole = 2 * count >= self.size[block]
        open_blocks = np.zeros(self.n_blocks, bool)
        open_blocks[block[whole]] = True
        members = self.order[_ranges(self.start[block[whole]], self.size[block[whole]])]
        rest = block[~whole]
        some = changed[~open_blocks[self.label_N[changed]]]
        variables = np.concatenate([members, some])
        label = np.concatenate([self.label_N[variables], rest])
        values = np.concatenate([signatures.values_2N[:, variables], self.common[:, rest]], 1)
        near = np.concatenate([signatures.tolerance_N[variables], np.zeros(len(rest))])
        part, weight = _parts(label, values, near), np.ones(len(label), np.int64)
        weight[len(variables) :] = (self.size[block] - count)[~whole]
        return self._relabel(variables, label, part, weight, values)

    def _relabel(
        self, variables: Array, label: Array, part: Array, weight: Array, values: Array
    ) -> tuple[Array, Array]:
        n_parts = int(part.max(initial=-1)) + 1
        size = np.bincount(part, weights=weight, minlength=n_parts).astype(np.int64)
        owner = np.empty(n_parts, np.int64)
        owner[part] = label
        sample = np.empty((2, n_parts))
        sample[:, part] = values
        order = np.lexsort((-size, owner))
        keeps = np.ones(n_parts, bool)
        keeps[order[1:]] = owner[order[1:]] != owner[order[:-1]]
        fresh = np.flatnonzero(~keeps)
        name = owner.copy()
        name[fresh] = self.n_blocks + np.arange(len(fresh))
        self.common[:, name] = sample
        mine = part[: len(variables)]
        leaving = ~keeps[mine]
        moved, old, new = variables[leaving], label[: len(variables)][leaving], name[mine[leaving]]
        if len(moved):
            self._move(moved, old, new)
            self.n_blocks += len(fresh)
        return moved, old

    def _move(self, moved: Array, old: Array, new: Array) -> None:
        """Put the moved variables at the ends of their blocks' spans, and cut them off."""
        by_new = np.argsort(new, kind="stable")
        by_new = by_new[np.argsort(old[by_new], kind="stable")]
        moved, old, new = moved[by_new], old[by_new], new[by_new]
        block, count = np.unique(old, return_counts=True)
        tail = _ranges(self.start[block] + self.size[block] - count, count)
        going = np.zeros(len(self.label_N), bool) if len(moved) > 64 else None
        outside = self.place[moved] < np.repeat(self.start[block] + self.size[block] - count, count)
        holes = self.place[moved][outside]
        if going is None:
            staying = self.order[tail][~np.isin(self.order[tail], moved)]
        else:
            going[moved] = True
            staying = self.order[tail][~going[self.order[tail]]]
        self.order[holes], self.place[staying] = staying, holes
        self.order[tail], self.place[moved] = moved, tail
        self.label_N[moved] = new
        self.size[block] -= count
        first, starts, counts = np.unique(new, return_index=True, return_counts=True)
        self.start[first], self.size[first] = tail[starts], counts


def _parts(label: Array, values: Array, near: Array) -> Array:
    """Number the groups of equal signatures within equal labels."""
    part = label
    for row in values:
        order = np.lexsort((row, part))
        apart = np.ones(len(order), bool)
        tolerance = np.maximum(near[order[1:]], near[order[:-1]])
        apart[1:] = (np.diff(part[order]) != 0) | ~(np.diff(row[order]) <= tolerance)
        part = np.empty(len(order), np.int64)
        part[order] = np.cumsum(apart) - 1
    return part


# quotients ------------------------------------------------------------------------------------------------------------


def quotient(system: PolynomialSystem, labels_N: Array, kind: str) -> PolynomialSystem:
    """The smaller system of a partition's blocks, each named by its first member.

    Forward: a block's variable is the sum of its members. Its derivative is the sum of theirs, each member taken as an
    equal share of its block. Backward: a block's variable is any of its members, with the mean of their derivatives.
    Exact for exact equivalences; for others the nearest exactly lumpable system's quotient.

    Args:
        labels_N: block of each variable, shape (N,).
        kind: "forward" or "backward".
    Raises:
        DataError: backward, and the members of a block start from unequal values; or another kind.
    Example:
        >>> x, y = (("x", 1),), (("y", 1),)
        >>> system = PolynomialSystem.of_terms({"x": {x: -1.0}, "y": {y: -1.0}}, {"x": 1.0, "y": 3.0})
        >>> whole = quotient(system, np.array([0, 0]), "forward")
        >>> whole.terms(), whole.start()
        ({'x': {(('x', 1),): -1.0}}, {'x': 4.0})
    """
    if kind not in ("forward", "backward"):
        raise DataError(f"An equivalence is 'forward' or 'backward'. Got {kind!r} instead.")
    labels_N = initial_labels(system, labels_N)
    n_blocks = int(labels_N.max(initial=-1)) + 1
    size = np.bincount(labels_N, minlength=n_blocks).astype(np.float64)
    total = np.bincount(labels_N, weights=system.initial_N, minlength=n_blocks)
    coefficient = system.coefficient_M.copy()
    if kind == "backward":
        check_equal_start(system, labels_N)
        coefficient /= size[labels_N[system.equation_M]]
        total = total / size
    rows, columns, powers = system.entries()
    if kind == "forward":
        coefficient /= np.exp(
            np.bincount(rows, weights=powers * np.log(size[labels_N[columns]]), minlength=len(coefficient))
        )
    matrix = csr_array((powers, (rows, labels_N[columns])), shape=(len(coefficient), n_blocks))
    matrix.sum_duplicates()
    names = [""] * n_blocks
    for name, block in zip(reversed(system.names), labels_N[::-1].tolist(), strict=True):
        names[block] = name
    return PolynomialSystem.of_arrays(
        names, labels_N[system.equation_M], coefficient, matrix, total, f"{system.name}_{kind}"
    )


def check_equal_start(system: PolynomialSystem, labels_N: Array, rtol: float = 1e-12) -> None:
    """Refuse a backward equivalence whose variables start apart.

    Raises:
        DataError: names two of them, with their values.
    """
    first: dict[int, int] = {}
    scale = max(1.0, float(np.abs(system.initial_N).max(initial=0.0)))
    for i, block in enumerate(labels_N.tolist()):
        j = first.setdefault(block, i)
        if abs(system.initial_N[i] - system.initial_N[j]) > rtol * scale:
            raise DataError(
                f"'{system.names[j]}' and '{system.names[i]}' are one block of a backward equivalence, but start from "
                f"{system.initial_N[j]:g} and {system.initial_N[i]:g}: they will not stay equal.",
                remedy="Start from a partition that separates unequal initial values, or from equal ones.",
            )


def is_exact(system: PolynomialSystem, labels_N: Array, kind: str) -> bool:
    """Whether a partition is an exact equivalence: refining it changes nothing.

    Example:
        >>> is_exact(PolynomialSystem.of_terms({"x": {(): 1.0}, "y": {(): 2.0}}), np.array([0, 0]), "backward")
        False
    """
    labels_N = initial_labels(system, labels_N)
    entries = forward_entries(system) if kind == "forward" else backward_entries(system)
    return bool((refine(system.n_variables, entries, labels_N) == labels_N).all())


def blocks_of(names: Sequence[str], labels_N: Array) -> list[list[str]]:
    """A partition in names, block by block.

    Example:
        >>> blocks_of(("a", "b", "c"), np.array([0, 1, 0]))
        [['a', 'c'], ['b']]
    """
    out: list[list[str]] = [[] for _ in range(int(labels_N.max(initial=-1)) + 1)]
    for name, block in zip(names, labels_N.tolist(), strict=True):
        out[block].append(name)
    return out
