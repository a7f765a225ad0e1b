"""What the rules that need all updates at once ask of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ...matrices import Matrix


class Rules(Protocol):
    """Kernels over stored updates, at least one, within `BUDGET_BYTES` of working memory.

    On every backend the numbers are the same: exactly for `median`, to rounding of float64 sums
    for `trimmed_mean` and `inner_products`, to that of float32 products for `canonical`.
    `BUDGET_BYTES` are those of tiles; `canonical` has the basis and G of a matrix beside them.
    """

    def median(self, deltas: Sequence[EncodedDelta]) -> Vector:
        """The median of every coordinate; of an even number, the mean of the two in float64."""

    def trimmed_mean(
        self, deltas: Sequence[EncodedDelta], weights: NDArray[np.float64], cut: int
    ) -> Vector:
        """The weighted mean of every coordinate without its ``cut`` least and greatest values.

        Of equal values the first of ``deltas`` counts as the least. Sums in float64.

        Args:
            cut: At least 1, and less than half of the updates.
        """

    def inner_products(self, deltas: Sequence[EncodedDelta]) -> NDArray[np.float64]:
        """⟨Δ_j − Δ_o, Δ_k − Δ_o⟩ for all pairs: ``(n, n)``; reads the updates once.

        The origin Δ_o is the update of the median norm, which no minority can make long.
        Distances between updates do not depend on it, and what they lose to cancellation is
        relative to how far from it they lie: ‖Δ_j − Δ_k‖² is exact to about
        1e-15 · (‖Δ_j − Δ_o‖² + ‖Δ_k − Δ_o‖²).
        """

    def canonical(
        self,
        matrix: Matrix,
        deltas: Sequence[EncodedDelta],
        shares: NDArray[np.float64],
        temperature: float,
        energy: float,
    ) -> NDArray[np.float64]:
        """U C, by the formulas of `server.aggregators.canonical`: ``(m, n)``, as of `Matrix.view`.

        Args:
            shares: p_k, of sum 1.
        """
