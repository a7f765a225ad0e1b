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
from .tiles import read

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
    basis = leading_directions(_gram(matrix, deltas, scale), energy)
    merged = np.empty((basis.shape[1], matrix.num_columns))
    for some in groups(basis.shape[1], len(deltas) * matrix.num_columns * merged.itemsize):
        rows = basis[:, some].T.astype(np.float32)
        coefficients = np.empty((len(deltas), *rows.shape[:1], matrix.num_columns), np.float32)
        for one, values in zip(coefficients, _scaled(matrix, deltas, scale), strict=True):
            np.matmul(rows, values, out=one)
        weights = reliabilities(coefficients, shares, temperature)
        merged[some] = np.einsum("kr,krn->rn", weights, coefficients)
    return np.asarray(basis @ merged * scale)


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


def groups(num_directions: int, bytes_per_direction: int) -> Iterator[slice]:
    """Directions whose coefficients fit the budget together."""
    count = max(1, tiles.BUDGET_BYTES // 2 // bytes_per_direction)
    for start in range(0, num_directions, count):
        yield slice(start, min(start + count, num_directions))


def power_of_two_above(deltas: Sequence[EncodedDelta]) -> float:
    """Above the norms of the deltas, or the greatest of float32; to divide by it is exact."""
    exponent = int(np.frexp(max(delta.norm for delta in deltas))[1])
    return float(2.0 ** min(max(exponent, -126), 127))


def _gram(matrix: Matrix, deltas: Sequence[EncodedDelta], scale: float) -> Array:
    """Σ D_k D_kᵀ: ``(m, m)``."""
    total = np.zeros((matrix.num_rows, matrix.num_rows))
    product = np.empty(total.shape, np.float32)
    for values in _scaled(matrix, deltas, scale):
        total += np.matmul(values, values.T, out=product)
    return total


def _scaled(matrix: Matrix, deltas: Sequence[EncodedDelta], scale: float) -> Iterator[Vector]:
    """The matrix of each delta in turn, over the scale; overwritten by the next."""
    values = np.empty(matrix.size, np.float32)
    for delta in deltas:
        read(delta, slice(matrix.start, matrix.start + matrix.size), values)
        values /= np.float32(scale)
        yield matrix.of(values)
