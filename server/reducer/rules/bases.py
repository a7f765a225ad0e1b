"""Merging matrices in a basis that they share: `server.aggregators.canonical`, by the BLAS.

The products with the deltas are in float32, half the time of float64: the basis is of the sum of
many, and what is added up over clients is added up in float64. Deltas are scaled by a power of two
to below 1, so that no product overflows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ...matrices import Matrix
from . import tiles
from .tiles import Tiling, num_cores, one_blas_thread, read, within_budget

Array: TypeAlias = NDArray[np.float64]
_TINY = 1e-150  # to divide by


def canonical(
    matrix: Matrix,
    deltas: Sequence[EncodedDelta],
    shares: Array,
    temperature: float,
    energy: float,
) -> Array:
    """As of `Rules`. Expands every delta once for G, and once for each group of directions."""
    scale = power_of_two_above(deltas)
    with one_blas_thread():
        basis = leading_directions(_gram(matrix, deltas, scale), energy)
        return np.asarray(
            basis @ _merged(matrix, deltas, scale, basis, shares, temperature) * scale
        )


def leading_directions(gram: Array, energy: float) -> Array:
    """The fewest leading eigenvectors with that share of the trace: ``(m, r)``; r 0 of a zero."""
    values, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, : num_directions(values[::-1], energy)]


def num_directions(values: Array, energy: float) -> int:
    """How many of the eigenvalues, the greatest first, have that share of their sum."""
    sums = np.cumsum(np.maximum(values, 0.0))
    return int(np.searchsorted(sums, energy * sums[-1])) + 1 if sums[-1] else 0


def reliabilities(coefficients: NDArray[np.floating], shares: Array, temperature: float) -> Array:
    """ρ: the weight of each client along each direction, ``(clients, r)``; columns sum to 1.

    Args:
        coefficients: ``(clients, r, n)``.
        shares: ``(clients,)``.
    """
    squares = np.einsum("krn,krn->kr", coefficients, coefficients, dtype=np.float64)
    norms = np.maximum(np.sqrt(squares), _TINY)
    consensus = np.einsum("kr,krn->rn", shares[:, None] / norms, coefficients)
    lengths = np.maximum(np.linalg.norm(consensus, axis=1), _TINY)
    cosines = np.einsum("krn,rn->kr", coefficients, consensus) / (norms * lengths)
    scores = shares[:, None] * np.exp((cosines - 1) / temperature)
    return np.asarray(scores / scores.sum(axis=0))


def groups(num_directions: int, num_clients: int, num_columns: int) -> Tiling:
    """Directions whose coefficients fit the budget together, in float32 and what comes of them."""
    num_bytes = num_columns * (4 * num_clients + 32)
    width = min(-(-num_directions // num_cores()), tiles.BUDGET_BYTES // num_bytes // num_cores())
    return within_budget(num_directions, max(1, width), num_bytes)


def power_of_two_above(deltas: Sequence[EncodedDelta]) -> float:
    """Above the norms of the deltas, or the greatest of float32; to divide by it is exact."""
    exponent = int(np.frexp(max(delta.norm * delta.factor for delta in deltas))[1])
    return float(2.0 ** min(max(exponent, -126), 127))


def _gram(matrix: Matrix, deltas: Sequence[EncodedDelta], scale: float) -> Array:
    """Σ D_k D_kᵀ: ``(m, m)``; clients are dealt to the threads."""
    shape = (matrix.num_rows, matrix.num_rows)
    plan = within_budget(len(deltas), 1, 12 * shape[0] ** 2 + 4 * matrix.size)

    def work(clients: Iterator[slice]) -> Array:
        total, product = np.zeros(shape), np.empty(shape, np.float32)
        dealt = [delta for some in clients for delta in deltas[some]]
        for values in _scaled(matrix, dealt, scale):
            total += np.matmul(values, values.T, out=product)
        return total

    return np.asarray(sum(plan.run(work)))


def _merged(
    matrix: Matrix,
    deltas: Sequence[EncodedDelta],
    scale: float,
    basis: Array,
    shares: Array,
    temperature: float,
) -> Array:
    """C: ``(r, n)``; groups of directions are dealt to the threads."""
    num_clients, num_columns = len(deltas), matrix.num_columns
    merged = np.zeros((basis.shape[1], num_columns))

    def work(some_directions: Iterator[slice]) -> None:
        for some in some_directions:
            rows = basis[:, some].T.astype(np.float32)
            coefficients = np.empty((num_clients, len(rows), num_columns), np.float32)
            for one, values in zip(coefficients, _scaled(matrix, deltas, scale), strict=True):
                np.matmul(rows, values, out=one)
            weights = reliabilities(coefficients, shares, temperature)
            merged[some] = np.einsum("kr,krn->rn", weights, coefficients)

    if merged.size:
        groups(len(merged), num_clients, num_columns).run(work)
    return merged


def _scaled(matrix: Matrix, deltas: Sequence[EncodedDelta], scale: float) -> Iterator[Vector]:
    """The matrix of each delta in turn, over the scale; overwritten by the next."""
    values = np.empty(matrix.size, np.float32)
    for delta in deltas:
        read(delta, slice(matrix.start, matrix.start + matrix.size), values)
        values /= np.float32(scale)
        yield matrix.of(values)
