"""Merging in a shared basis: the same as by the singular vectors of all deltas side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from petalfl.payloads import EncodedDelta
from server.matrices import MAX_ROWS, Matrix
from server.reducer.rules import Rules, tiles
from tests.server.reducer.rules.builders import (
    Array,
    canonical_plainly,
    decoded,
    encoded,
    plain,
)

MATRICES = {
    "wide": Matrix("w", 3, (20, 50)),
    "high": Matrix("w", 0, (50, 20)),
    "turned": Matrix("w", 7, (MAX_ROWS + 1, 12)),
    "a row": Matrix("w", 0, (1, 90)),
    "a column": Matrix("w", 0, (90, 1)),
}
every_matrix = pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)


def draw(matrix: Matrix, num_clients: int, seed: int = 0) -> Array:
    """Clients that share directions of falling strength, with noise of their own: ``(n, size)``."""
    rng = np.random.default_rng(seed)
    rank = min(8, *matrix.shape)
    shared = rng.normal(size=(matrix.shape[0], rank)) * 0.6 ** np.arange(rank)
    own = rng.normal(size=(num_clients, rank, matrix.shape[1]))
    noise = 0.02 * rng.normal(size=(num_clients, *matrix.shape))
    values = rng.normal(size=(num_clients, matrix.start + matrix.size + 5))
    values[:, matrix.start : -5] = (shared @ own + noise).reshape(num_clients, -1)
    return values


def assert_as_plainly(
    rules: Rules, matrix: Matrix, deltas: Sequence[EncodedDelta], energy: float, scale: float = 1.0
) -> None:
    """Within 1e-5 of the result's norm."""
    shares = np.linspace(1, 2, len(deltas))
    shares /= shares.sum()
    found = rules.canonical(matrix, deltas, shares, 0.5, energy)
    vectors = [row.astype(np.float32) for row in decoded(deltas) / scale]
    expected = canonical_plainly(matrix, vectors, shares, 0.5, energy)
    assert found.shape == expected.shape
    assert np.linalg.norm(found / scale - expected) <= 1e-5 * np.linalg.norm(expected)


@every_matrix
@pytest.mark.parametrize("energy", [0.9, 0.99])
@pytest.mark.parametrize("num_clients", [1, 2, 9])
def test_it_is_what_the_formulas_say(
    rules: Rules, matrix: Matrix, energy: float, num_clients: int
) -> None:
    assert_as_plainly(rules, matrix, plain(draw(matrix, num_clients)), energy)


@pytest.mark.parametrize("codec", ["f16", "int8", "topk:0.5"])
def test_of_other_codecs_and_clipped(rules: Rules, codec: str) -> None:
    matrix = MATRICES["wide"]
    deltas = [encoded(row, codec, num_statistics=5) for row in draw(matrix, 6)]
    deltas[2] = replace(deltas[2], factor=0.25)
    assert_as_plainly(rules, matrix, deltas, 0.99)


@pytest.mark.parametrize("scale", [2.0**120, 2.0**-100])
def test_of_any_magnitude(rules: Rules, scale: float) -> None:
    """Products of float32 overflow from 1.8e19 on."""
    matrix = MATRICES["wide"]
    assert_as_plainly(rules, matrix, plain(scale * draw(matrix, 5)), 0.99, scale)


def test_the_greatest_values_of_float32(rules: Rules) -> None:
    matrix = Matrix("w", 0, (3, 400))
    deltas = plain(np.full((4, matrix.size), 3.4e38))
    found = rules.canonical(matrix, deltas, np.full(4, 0.25), 0.5, 0.99)
    np.testing.assert_allclose(found, np.full((3, 400), 3.4e38), rtol=1e-5)


def test_of_zeros_it_is_zero(rules: Rules) -> None:
    matrix = MATRICES["high"]
    found = rules.canonical(matrix, plain(np.zeros((3, 1000))), np.full(3, 1 / 3), 0.5, 0.99)
    np.testing.assert_array_equal(found, np.zeros((50, 20)))


def test_however_many_directions_fit_the_budget(
    rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = MATRICES["wide"]
    deltas = plain(draw(matrix, 7))
    shares = np.full(7, 1 / 7)
    expected = rules.canonical(matrix, deltas, shares, 0.5, 1.0)
    monkeypatch.setattr(tiles, "BUDGET_BYTES", 3 * 50 * (4 * 7 + 32))  # three directions
    found = rules.canonical(matrix, deltas, shares, 0.5, 1.0)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
