"""Fed-CMP (reconstructed): matrices are merged in a basis that their clients share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from petalfl.codecs.float32 import MAX
from petalfl.model import Block
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ..matrices import Matrix, matrices
from ..reducer import rules
from .aggregator import Aggregator
from .over_all import mean


class Canonical(NamedTuple):
    """The state: every delta, as it came, and every weight, in order of arrival."""

    matrices: list[Matrix]
    deltas: list[EncodedDelta]
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
    it is `weighted_mean`. Keeps all deltas until `finalize`, which takes O(rows · block.size) time
    for each of them and O(rows²) memory, besides a budget for the coefficients. A matrix of more
    than `MAX_ROWS` rows and fewer columns is merged transposed.

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
        return Canonical(matrices(block), [], [])

    def accumulate(state: Canonical, delta: EncodedDelta, weight: float) -> Canonical:
        state.deltas.append(delta)
        state.weights.append(weight)
        return state

    def finalize(state: Canonical) -> Vector | None:
        if not state.deltas:
            return None
        weights = np.array(state.weights, np.float64)
        shares, found = weights / weights.sum(), mean(state.deltas, weights)
        for matrix in state.matrices:
            merged = rules.active().canonical(matrix, state.deltas, shares, temperature, energy)
            # Beside the greatest values of float32, a mixture of directions may lie beyond them.
            matrix.view(found)[:] = np.clip(merged, -MAX, MAX)
        return found

    return Aggregator(init, accumulate, finalize, keeps_deltas=True)
