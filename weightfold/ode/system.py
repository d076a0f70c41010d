"""Systems of ordinary differential equations with polynomial right-hand sides, as sparse data.

    x_i' = Σ over the monomials m of equation i:  c_m Π_j x_j^p_mj

Monomials lie in flat arrays (equation, coefficient) with their powers in one sparse matrix, so that a system of 10⁶ of
them is read, simplified and evaluated by a few vectorised passes. A monomial is known by the hash Σ_j p_mj r_j mod 2⁶⁴
of its powers, with fixed pseudo-random r_j: equal multisets of variables are found by sorting numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.integrate
from scipy.sparse import coo_array, csr_array

from weightfold.errors import DataError

Array = np.ndarray
Monomial = tuple[tuple[str, int], ...]
"""Variables with their powers, sorted by name; () is the constant 1."""
Polynomial = Mapping[Monomial, float]

UNBOUNDED = 1e9
"""Growth over the largest start (at least 1) beyond which a simulation counts as unstable."""


def mixed(x: Array) -> Array:
    """A fixed 64-bit hash of integers (splitmix64), the same in every process."""
    with np.errstate(over="ignore"):
        z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, eq=False)
class PolynomialSystem:
    """A polynomial system with initial values; simplified: no equation holds a monomial twice, or with coefficient 0.

    Args:
        names: the variables, N of them, in order.
        equation_M: the variable in whose derivative each monomial stands, shape (M,), int64, ascending.
        coefficient_M: its coefficient, shape (M,), float64.
        powers_MN: powers of the variables in each monomial, shape (M, N), sparse, int32.
        initial_N: values at time 0, shape (N,).
        name: of the model.

    Example:
        >>> system = PolynomialSystem.of_terms({"x": {(("x", 1),): -2.0}, "y": {(("x", 1),): 2.0}}, {"x": 1.0})
        >>> system.n_variables, system.n_monomials, system.rhs(system.initial_N)
        (2, 2, array([-2.,  2.]))
    """

    names: tuple[str, ...]
    equation_M: Array
    coefficient_M: Array
    powers_MN: csr_array
    initial_N: Array
    name: str = "model"

    @classmethod
    def of_terms(
        cls, terms: Mapping[str, Polynomial], initial: Mapping[str, float] | None = None, name: str = "model"
    ) -> PolynomialSystem:
        """Build a system from one polynomial per variable.

        Args:
            terms: for each variable its derivative, by monomial; the order of the keys is the order of the variables.
            initial: values at time 0; 0 where none is given.
        Raises:
            DataError: a term or a start names a variable without an equation, or a number is not finite.
        """
        place = {variable: i for i, variable in enumerate(terms)}
        rows, columns, powers, equations, coefficients = [], [], [], [], []
        for variable, polynomial in terms.items():
            for monomial, coefficient in polynomial.items():
                for factor, power in monomial:
                    if factor not in place:
                        raise _unknown(factor, f"in the derivative of '{variable}'", place)
                    rows.append(len(equations))
                    columns.append(place[factor])
                    powers.append(power)
                equations.append(place[variable])
                coefficients.append(coefficient)
        start = np.zeros(len(place))
        for variable, value in (initial or {}).items():
            if variable not in place:
                raise _unknown(variable, "among the initial values", place)
            start[place[variable]] = value
        matrix = coo_array((powers, (rows, columns)), shape=(len(equations), len(place)))
        return cls.of_arrays(tuple(place), np.array(equations, np.int64), np.array(coefficients), matrix, start, name)

    @classmethod
    def of_arrays(
        cls,
        names: Sequence[str],
        equation_M: Array,
        coefficient_M: Array,
        powers_MN: Any,
        initial_N: Array | None = None,
        name: str = "model",
    ) -> PolynomialSystem:
        """Build a system from flat arrays in any order; equal monomials of an equation are added up.

        Args:
            powers_MN: any sparse matrix of powers >= 0, shape (M, N).
        Raises:
            DataError: shapes that do not fit, powers below 0, numbers that are not finite.
        """
        matrix = csr_array(powers_MN, dtype=np.int32)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        coefficients = np.asarray(coefficient_M, np.float64)
        equations = np.asarray(equation_M, np.int64)
        start = np.zeros(len(names)) if initial_N is None else np.asarray(initial_N, np.float64)
        _check(names, equations, coefficients, matrix, start)
        key = monomial_keys(matrix)
        order = np.lexsort((key, equations))
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(key[order]) != 0) | (np.diff(equations[order]) != 0)
        first = order[new]
        total = np.bincount(np.cumsum(new) - 1, weights=coefficients[order], minlength=len(first)).astype(np.float64)
        size = np.bincount(np.cumsum(new) - 1, weights=np.abs(coefficients[order]), minlength=len(first))
        kept = np.abs(total) > 1e-15 * size
        first, total = first[kept], total[kept]
        return cls(tuple(names), equations[first], total, csr_array(matrix[first]), start, name)

    @property
    def n_variables(self) -> int:
        return len(self.names)

    @property
    def n_monomials(self) -> int:
        return len(self.coefficient_M)

    @property
    def degree(self) -> int:
        """The highest total degree of a monomial."""
        return int(self.powers_MN.sum(1).max()) if self.n_monomials else 0

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        """Monomials that have factors, and where those of each begin."""
        nonempty = np.flatnonzero(np.diff(self.powers_MN.indptr))
        return nonempty, self.powers_MN.indptr[:-1][nonempty]

    def rhs(self, x_N: Array) -> Array:
        """The derivatives at a point, shape (N,)."""
        nonempty, starts = self._factors
        value_M = self.coefficient_M.copy()
        if len(nonempty):
            value_M[nonempty] *= np.multiply.reduceat(x_N[self.powers_MN.indices] ** self.powers_MN.data, starts)
        return np.bincount(self.equation_M, weights=value_M, minlength=self.n_variables)

    def jacobian(self, x_N: Array) -> csr_array:
        """∂f_i/∂x_j at a point, shape (N, N), sparse."""
        rows, columns, powers = self.entries()
        value = self.coefficient_M.copy()
        zero = x_N == 0
        safe_N = np.where(zero, 1.0, x_N)
        nonempty, starts = self._factors
        if len(nonempty):
            raised = safe_N[self.powers_MN.indices] ** self.powers_MN.data
            value[nonempty] *= np.multiply.reduceat(raised, starts)
        n_zero = np.bincount(rows, weights=zero[columns], minlength=self.n_monomials)
        others = n_zero[rows] - zero[columns]
        alive = (others == 0) & (~zero[columns] | (powers == 1))
        entry = np.where(alive, value[rows] * powers / safe_N[columns], 0.0)
        shape = (self.n_variables, self.n_variables)
        return csr_array(coo_array((entry, (self.equation_M[rows], columns)), shape=shape))

    def entries(self) -> tuple[Array, Array, Array]:
        """Every factor as (monomial, variable, power), ascending in the monomial."""
        counts = np.diff(self.powers_MN.indptr)
        return np.repeat(np.arange(self.n_monomials), counts), self.powers_MN.indices, self.powers_MN.data

    def terms(self) -> dict[str, dict[Monomial, float]]:
        """The right-hand sides as plain data: the inverse of `of_terms`."""
        out: dict[str, dict[Monomial, float]] = {name: {} for name in self.names}
        matrix = self.powers_MN
        for m, (i, c) in enumerate(zip(self.equation_M.tolist(), self.coefficient_M.tolist(), strict=True)):
            span = slice(matrix.indptr[m], matrix.indptr[m + 1])
            factors = zip(matrix.indices[span].tolist(), matrix.data[span].tolist(), strict=True)
            out[self.names[i]][tuple(sorted((self.names[j], int(p)) for j, p in factors))] = c
        return out

    def start(self) -> dict[str, float]:
        """The initial values by name."""
        return dict(zip(self.names, self.initial_N.tolist(), strict=True))

    def simulate(self, times: Sequence[float] | Array, *, rtol: float = 1e-10, atol: float = 1e-12) -> Array:
        """Integrate from the initial values.

        LSODA with the analytic Jacobian: non-stiff and stiff systems alike.

        Args:
            times: ascending, from 0 on, shape (T,).
            rtol: relative tolerance of a step.
            atol: absolute tolerance of a step.
        Returns:
            x_TN: shape (T, N).
        Raises:
            DataError: a solution grows beyond all bounds (names variable and time), or the solver fails.
        Example:
            >>> decay = PolynomialSystem.of_terms({"x": {(("x", 1),): -1.0}}, {"x": 1.0})
            >>> round(float(decay.simulate([0.0, 1.0])[1, 0]), 8)
            0.36787944
        """
        times_T = np.asarray(times, np.float64)
        limit = UNBOUNDED * max(1.0, float(np.abs(self.initial_N).max(initial=0.0)))

        def grown(_: float, x_N: Array) -> float:
            return limit - float(np.abs(x_N).max(initial=0.0))

        grown.terminal = True  # type: ignore[attr-defined]
        with np.errstate(over="ignore", invalid="ignore"):
            found = scipy.integrate.solve_ivp(
                lambda _, x: self.rhs(x),
                (0.0, float(times_T.max(initial=0.0))),
                self.initial_N,
                method="LSODA",
                t_eval=times_T,
                jac=lambda _, x: self.jacobian(x).toarray(),
                events=grown,
                rtol=rtol,
                atol=atol,
            )
        if found.status != 0 or found.y.shape[1] < len(times_T) or not np.isfinite(found.y).all():
            raise self._unstable(found)
        return found.y.T

    def _unstable(self, found: Any) -> DataError:
        ends = found.y_events[0] if found.y_events is not None else []
        if len(ends):
            name, at = self.names[int(np.abs(ends[0]).argmax())], float(found.t_events[0][0])
            return DataError(
                f"'{self.name}' is unstable: '{name}' grows beyond {UNBOUNDED:.0e} times the start by t = {at:.4g}.",
                remedy="Check signs and rates, or simulate a shorter time.",
            )
        return DataError(f"'{self.name}' could not be simulated: {found.message}", remedy="Simulate a shorter time.")


def monomial_keys(powers_MN: csr_array, value_N: Array | None = None) -> Array:
    """A 64-bit hash of each monomial: Σ_j p_mj r_j mod 2⁶⁴, shape (M,), uint64.

    Args:
        value_N: what is hashed in place of a variable (its block), shape (N,); by default its number.
    """
    numbers = np.arange(int(powers_MN.indices.max(initial=-1)) + 1) if value_N is None else value_N
    product = powers_MN.data.astype(np.uint64) * mixed(numbers)[powers_MN.indices]
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(product, dtype=np.uint64)])
    return running[powers_MN.indptr[1:]] - running[powers_MN.indptr[:-1]]


def _unknown(name: str, where: str, known: Mapping[str, int]) -> DataError:
    return DataError(
        f"'{name}' stands {where}, but has no equation of its own.",
        remedy=f"Give it a value as a parameter, or an equation. Variables: {', '.join(list(known)[:8])}.",
    )


def _check(names: Sequence[str], equations: Array, coefficients: Array, matrix: csr_array, start: Array) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise DataError(f"The variable '{twice}' is defined twice.")
    if matrix.shape != (len(equations), len(names)) or len(coefficients) != len(equations) or len(start) != len(names):
        raise DataError(
            f"A system of {len(names)} variables and {len(equations)} monomials cannot have powers of shape "
            f"{matrix.shape}, {len(coefficients)} coefficients and {len(start)} initial values."
        )
    if len(equations) and not 0 <= int(equations.min()) <= int(equations.max()) < len(names):
        raise DataError(f"A monomial names equation {int(equations.max())} of {len(names)}.")
    if matrix.nnz and int(matrix.data.min()) < 0:
        entry = int(matrix.data.argmin())
        raise DataError(
            f"A power of '{names[matrix.indices[entry]]}' is {int(matrix.data[entry])}: the system is not polynomial.",
            remedy="Powers are whole numbers from 0 on; add a variable for the reciprocal.",
        )
    for what, values in (("coefficient", coefficients), ("initial value", start)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            owner = names[int(equations[bad[0]])] if what == "coefficient" else names[int(bad[0])]
            raise DataError(f"A {what} of '{owner}' is {values[bad[0]]}, which is not a finite number.")
