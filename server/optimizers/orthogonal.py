"""Orthogonality-preserved momentum of Fed-CMP (reconstructed)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.vectors import Vector

from ..matrices import matrices
from ..reducer.rules.tiles import one_blas_thread
from .optimizer import OptimizerState, ServerOptimizer


def orthogonal(beta: float = 0.5, energy: float = 0.99) -> ServerOptimizer:
    """Steps of matrices go through a basis with momentum; all other tensors get x ← x + Δ.

    With Δ of one matrix ``(m, n)``, U ``(m, r)`` its leading left singular vectors and Ū the
    basis so far::

        R = polar(Uᵀ Ū)                            aligns signs and rotation with the last basis
        Ū ← polar(beta Ū Rᵀ + (1 − beta) U)        Ūᵀ Ū = I
        x ← x + Ū Ūᵀ Δ

    What a single round adds in directions that are new to the basis is damped, as an oscillation
    is. With beta 0 and energy 1 it is FedAvg. One singular value decomposition per matrix:
    O(block.size · min(m, n)) time; the state is no larger than the block. Matrices are turned as
    `canonical` turns them.

    Args:
        beta: In [0, 1).
        energy: The share of ‖Δ‖² that U spans at least, in (0, 1].

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Modelled on Fed-CMP, arXiv:2603.26786, whose formulas may differ.
    """
    if not 0 <= beta < 1 or not 0 < energy <= 1:
        raise ValueError(f"expected beta in [0, 1) and energy in (0, 1], found {beta}, {energy}")

    def init(block: Block) -> OptimizerState:
        return {m.name: np.zeros((m.num_rows, 0), np.float32) for m in matrices(block)}

    def update(
        block: Block, parameters: Vector, delta: Vector, state: OptimizerState
    ) -> tuple[Vector, OptimizerState]:
        moved, bases = parameters + delta, dict(state)
        for matrix in matrices(block):
            change = matrix.view(delta).astype(np.float64)
            with one_blas_thread():  # several spend more time on one another than they save
                directions = _directions(change, energy)
                if not directions.shape[1]:  # the matrix did not move
                    continue
                basis = blend(bases[matrix.name], directions, beta)
                matrix.view(moved)[:] = matrix.view(parameters) + basis @ (basis.T @ change)
            bases[matrix.name] = basis.astype(np.float32)
        return moved, bases

    return ServerOptimizer(init, update)


def blend(
    basis: NDArray[np.floating], directions: NDArray[np.float64], beta: float
) -> NDArray[np.float64]:
    """The next orthonormal basis ``(m, r)``: of ``basis`` ``(m, any)`` and the new ``directions``.

    A rank that grows or shrinks takes the directions that it has; of no basis it is the new one.
    """
    rotation = polar(directions.T @ basis)
    return polar(beta * (basis @ rotation.T) + (1 - beta) * directions)


def polar(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The orthogonal factor of the polar decomposition: the nearest with orthonormal columns.

    ``(m, r)``; of a wide one, orthonormal rows.
    """
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(left @ right)


def _directions(change: NDArray[np.float64], energy: float) -> NDArray[np.float64]:
    left, values, _ = np.linalg.svd(change, full_matrices=False)
    sums = np.cumsum(values**2)
    if not sums[-1]:
        return left[:, :0]
    return left[:, : int(np.searchsorted(sums, energy * sums[-1])) + 1]
