from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.payloads import plain_delta
from petalfl.vectors import Vector
from server.aggregators import canonical, weighted_mean
from server.matrices import MAX_ROWS, matrices
from server.norms import clip
from server.reducer.rules.bases import leading_directions, reliabilities
from tests.server.aggregators.builders import Update, aggregate, assert_order_free, vector_block
from tests.server.builders import make_block

M, N = 6, 9
BLOCK = make_block(
    "projector", "encoder", ("acc",), {"bias": (4,), "w": (M, N), "tall": (7, 3)}, {"var": (2,)}
)[0]
MATRIX = make_block("projector", "encoder", ("acc",), {"w": (M, N)})[0]


def draw(seed: int, num_clients: int = 5, size: int = BLOCK.size) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=size).astype(np.float32), float(rng.integers(1, 50)))
        for _ in range(num_clients)
    ]


def flat(*matrices: NDArray[np.float64]) -> list[Update]:
    return [(matrix.astype(np.float32).ravel(), 1.0) for matrix in matrices]


def test_two_directions_by_hand() -> None:
    """Along e1 one of three disagrees, along e2 all agree; temperature 1.

    e1: votes (1, 1, −1) / 3 = 1/3, cosines 1, 1, −1: shares e, e, e⁻¹ of 2e + e⁻¹.
    """
    block = make_block("p", "encoder", ("acc",), {"w": (2, 3)})[0]
    e1, e2 = np.zeros((2, 3)), np.zeros((2, 3))
    e1[0, 0], e2[1, 1] = 3.0, 1.0
    drawn = flat(e1 + e2, e1 + e2, -e1 + e2)
    found = aggregate(canonical(1.0, 1.0), drawn, block).reshape(2, 3)
    e = float(np.e)
    expected = 3 * (2 * e - 1 / e) / (2 * e + 1 / e)
    merged = np.array([[expected, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(found, merged, rtol=1e-6, atol=1e-7)
    assert expected == pytest.approx(2.62, abs=0.01)  # the mean says 1


@given(st.integers(0, 1000), st.integers(1, 6))
def test_at_infinite_temperature_and_full_energy_it_is_fedavg(seed: int, num_clients: int) -> None:
    drawn = draw(seed, num_clients)
    found, expected = (
        aggregate(rule, drawn, BLOCK) for rule in (canonical(np.inf, 1.0), weighted_mean())
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_high_temperature_comes_close_to_fedavg() -> None:
    drawn, mean = draw(1), aggregate(weighted_mean(), draw(1), BLOCK)
    far = [np.abs(aggregate(canonical(t, 1.0), drawn, BLOCK) - mean).max() for t in (0.1, 1, 10)]
    assert far[0] > 3 * far[1] > 9 * far[2] > 0


def test_what_is_no_matrix_gets_the_weighted_mean() -> None:
    drawn = draw(2)
    found, mean = (aggregate(rule, drawn, BLOCK) for rule in (canonical(), weighted_mean()))
    np.testing.assert_array_equal(found[:4], mean[:4])  # the bias
    np.testing.assert_array_equal(found[-2:], mean[-2:])  # running statistics
    assert (np.abs(found - mean)[4:-2] > 1e-6).all()


def test_a_matrix_too_high_for_a_basis_of_its_rows_is_merged_transposed() -> None:
    high = MAX_ROWS + 1
    blocks = [
        make_block("p", "encoder", ("acc",), {"w": shape})[0] for shape in ((high, M), (M, high))
    ]
    drawn = draw(3, size=high * M)
    turned = [(d.reshape(high, M).T.ravel(), w) for d, w in drawn]
    assert [matrix.num_rows for matrix in matrices(blocks[0])] == [M]
    np.testing.assert_allclose(
        aggregate(canonical(), drawn, blocks[0]).reshape(high, M).T,
        aggregate(canonical(), turned, blocks[1]).reshape(M, high),
        rtol=1e-5,
        atol=1e-6,
    )


@given(st.integers(0, 1000), st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference(seed: int, random: object) -> None:
    assert_order_free(canonical(), draw(seed), random, BLOCK)


@given(st.integers(0, 1000), st.lists(st.sampled_from([-1.0, 1.0]), min_size=M, max_size=M))
def test_the_signs_of_the_basis_make_no_difference(seed: int, signs: list[float]) -> None:
    """An eigenvector is one up to its sign: U C must not depend on it."""
    rng = np.random.default_rng(seed)
    deltas, shares = rng.normal(size=(4, M, N)), np.full(4, 0.25)
    basis = leading_directions(np.einsum("kmn,kln->ml", deltas, deltas), 1.0)
    merged = []
    for one in (basis, basis * np.array(signs)):
        coefficients = np.stack([one.T @ delta for delta in deltas])
        weights = reliabilities(coefficients, shares, 0.5)
        merged.append(one @ np.einsum("kr,krn->rn", weights, coefficients))
    np.testing.assert_allclose(merged[0], merged[1], atol=1e-12)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_the_basis_is_orthonormal_and_has_the_energy(energy: float) -> None:
    rng = np.random.default_rng(7)
    samples = rng.normal(size=(8, 20)) * np.geomspace(1, 0.05, 8)[:, None]
    gram = samples @ samples.T
    basis = leading_directions(gram, energy)
    rank = basis.shape[1]
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)

    def share(columns: NDArray[np.float64]) -> float:
        return float(np.trace(columns.T @ gram @ columns) / np.trace(gram))

    assert share(basis) >= energy - 1e-12
    assert share(basis[:, :-1]) < energy  # and no more directions than it takes


def test_of_zeros_there_is_no_basis_and_the_delta_is_zero() -> None:
    assert leading_directions(np.zeros((4, 4)), 0.99).shape == (4, 0)
    zeros: list[Update] = [(np.zeros(MATRIX.size, np.float32), 1.0)] * 2
    np.testing.assert_array_equal(aggregate(canonical(), zeros, MATRIX), np.zeros(MATRIX.size))


def test_a_client_that_is_zero_has_a_finite_weight() -> None:
    drawn = [*draw(4, 3, MATRIX.size), (np.zeros(MATRIX.size, np.float32), 5.0)]
    assert np.isfinite(aggregate(canonical(), drawn, MATRIX)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_a_noisy_client_s_weight_falls_as_its_noise_grows(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    signal, noise = rng.normal(size=(2, M, N))
    shares = np.full(6, 1 / 6)
    weights = []
    for level in (0, 0.25, 0.5, 1, 2, 4, 8, 16, 100):
        deltas = np.stack([signal + level * noise, *[signal] * 5])
        weights.append(reliabilities(deltas, shares, temperature)[0].mean())
    assert weights[0] == pytest.approx(1 / 6)
    assert (np.diff(weights) < 0).all()


def by_magnitude(deltas: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
    """The first client's mean cosine to C̄ = Σ p_k C_k, without votes of length 1."""
    mean = np.tensordot(shares, deltas, 1)
    lengths = np.linalg.norm(deltas[0], axis=1) * np.linalg.norm(mean, axis=1)
    return float((np.sum(deltas[0] * mean, axis=1) / lengths).mean())


def test_votes_by_magnitude_would_find_much_noise_reliable() -> None:
    """Why votes have length 1: the law above would not hold."""
    rng = np.random.default_rng(0)
    signal, noise = rng.normal(size=(2, M, N))
    shares = np.full(6, 1 / 6)
    cosines = [
        by_magnitude(np.stack([signal + level * noise, *[signal] * 5]), shares)
        for level in (0, 2, 100)
    ]
    assert cosines[0] > cosines[1] < cosines[2]


def relative_error(found: Vector, truth: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found - truth.ravel()) / np.linalg.norm(truth))


@pytest.mark.parametrize("seed", range(3))
def test_it_merges_conflicting_clients_better_than_the_mean(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(M, N))
    drawn = flat(*[truth + 0.1 * rng.normal(size=(M, N)) for _ in range(7)], *[-truth] * 3)
    merged, mean = (
        relative_error(aggregate(rule, drawn, MATRIX), truth)
        for rule in (canonical(), weighted_mean())
    )
    assert merged < 0.1 < 0.5 < mean


def test_a_block_without_a_matrix_gets_the_weighted_mean() -> None:
    drawn = draw(5, size=8)
    np.testing.assert_array_equal(
        aggregate(canonical(), drawn, vector_block(8)),
        aggregate(weighted_mean(), drawn, vector_block(8)),
    )


def test_a_clipped_giant_drowns_nobody() -> None:
    """Scales go by what a delta is after it was clipped."""
    rule = canonical(1.0, 1.0)
    state = rule.init(MATRIX)
    honest = np.ones(M * N, np.float32)
    giant = clip(plain_delta(np.full(M * N, 1e24, np.float32)), 10.0)
    for delta in (plain_delta(honest), plain_delta(honest), giant):
        state = rule.accumulate(state, delta, 1.0)
    found = rule.finalize(state)
    assert found is not None
    expected = np.mean([1, 1, 10 / np.sqrt(M * N)])  # along the one direction that there is
    np.testing.assert_allclose(found, expected, rtol=0.05)
