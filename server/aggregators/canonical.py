"""Fed-CMP (reconstructed): matrices are merged in a basis that their clients share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..matrices import Matrix, matrices
from .aggregator import Aggregator
from .over_all import Weights, weighted_sum

Array: TypeAlias = NDArray[np.float64]
_TINY = 1e-150  # to divide by


class Canonical(NamedTuple):
    """The state: every delta and weight, and by matrix G = Σ D_k D_kᵀ of the deltas so far."""

    matrices: list[Matrix]
    grams: list[Array]
    deltas: list[Vector]
    weights: list[float]


def canonical(temperature: float = 0.5, energy: float = 0.99) -> Aggregator[Canonical]:
    """Canonical reliability-aware aggregation: U C per matrix, the weighted mean for the rest.

    With deltas D_k, shares p_k = w_k / Σ w and U the leading eigenvectors of G = Σ D_k D_kᵀ::

        C_k = Uᵀ D_k                               (r, n), by client
        C̄_i = Σ p_k C_k,i / ‖C_k,i‖                the consensus along direction i
        ρ_k,i ∝ p_k exp(cos(C_k,i, C̄_i) / temperature)
        C_i = Σ ρ_k,i C_k,i

    Every client has one vote of length 1 in the consensus: by magnitude, a client that is all
    noise would carry C̄ to itself and be found the most reliable. With temperature inf and energy 1
    it is `weighted_mean`. G grows as updates arrive; the deltas are kept for the coefficients:
    O(cohort × block.size + rows²) memory, in float64 while it is finalized, and O(rows ·
    block.size) time per update. A matrix of more than `MAX_ROWS` rows and fewer columns is merged
    transposed.

    Args:
        temperature: At least 0.01; inf weighs all clients by their shares alone.
        energy: The share of G's trace that U spans at least, in (0, 1].

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Modelled on Fed-CMP, arXiv:2603.26786, whose formulas may differ; on KnOTS,
        arXiv:2410.19735, and Core Space merging, arXiv:2509.17786.
    """
    if not temperature >= 0.01 or not 0 < energy <= 1:
        raise ValueError(
            f"expected temperature >= 0.01 and energy in (0, 1], found {temperature}, {energy}"
        )

    def init(block: Block) -> Canonical:
        parts = matrices(block)
        grams = [np.zeros((m.num_rows, m.num_rows), np.float64) for m in parts]
        return Canonical(parts, grams, [], [])

    def accumulate(state: Canonical, encoded: EncodedDelta, weight: float) -> Canonical:
        delta = encoded.decode()
        for matrix, gram in zip(state.matrices, state.grams, strict=True):
            values = matrix.view(delta).astype(np.float64)
            gram += values @ values.T
        state.deltas.append(delta)
        state.weights.append(weight)
        return state

    def finalize(state: Canonical) -> Vector | None:
        if not state.deltas:
            return None
        shares = np.array(state.weights, np.float64)
        shares /= shares.sum()
        found = weighted_sum(state.deltas, shares)
        for matrix, gram in zip(state.matrices, state.grams, strict=True):
            basis = leading_directions(gram, energy)
            views = [matrix.view(delta) for delta in state.deltas]
            matrix.view(found)[:] = basis @ _fuse(basis, views, shares, temperature)
        return found

    return Aggregator(init, accumulate, finalize)


def leading_directions(gram: Array, energy: float) -> Array:
    """The fewest leading eigenvectors with that share of the trace: ``(m, r)``; r 0 of a zero."""
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    sums = np.cumsum(values)
    if not sums[-1]:
        return vectors[:, :0]
    return vectors[:, : int(np.searchsorted(sums, energy * sums[-1])) + 1]


def reliabilities(coefficients: Array, shares: Weights, temperature: float) -> Array:
    """ρ: the weight of each client along each direction, ``(clients, r)``; columns sum to 1.

    Args:
        coefficients: ``(clients, r, n)``.
        shares: ``(clients,)``.
    """
    squares = np.einsum("krn,krn->kr", coefficients, coefficients)
    norms = np.maximum(np.sqrt(squares), _TINY)
    consensus = np.einsum("kr,krn->rn", shares[:, None] / norms, coefficients)
    lengths = np.maximum(np.linalg.norm(consensus, axis=1), _TINY)
    cosines = np.einsum("krn,rn->kr", coefficients, consensus) / (norms * lengths)
    scores = shares[:, None] * np.exp((cosines - 1) / temperature)
    return np.asarray(scores / scores.sum(axis=0))


def _fuse(basis: Array, views: Sequence[Vector], shares: Weights, temperature: float) -> Array:
    coefficients = np.empty((len(views), basis.shape[1], views[0].shape[1]), np.float64)
    for view, one in zip(views, coefficients, strict=True):
        np.matmul(basis.T, view, out=one)
    weights = reliabilities(coefficients, shares, temperature)
    return np.asarray(np.einsum("kr,krn->rn", weights, coefficients))
