from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from petalfl.vectors import Vector
from server.optimizers import OptimizerState, orthogonal, step
from server.optimizers.orthogonal import blend, polar
from tests.server.builders import make_block

M, N = 6, 9
MATRIX = make_block("p", "encoder", ("acc",), {"w": (M, N)})[0]
BLOCK = make_block(
    "p", "encoder", ("acc",), {"bias": (4,), "w": (M, N), "tall": (7, 3)}, {"var": (2,)}
)[0]
SQUARE = make_block("p", "encoder", ("acc",), {"w": (M, M)})[0]
Array = NDArray[np.float64]


def draw(seed: int, num_steps: int, rank: int = 3) -> list[Vector]:
    """Deltas of `MATRIX` of some rank."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(M, rank)) @ rng.normal(size=(rank, N))).astype(np.float32).ravel()
        for _ in range(num_steps)
    ]


def basis_of(rng: np.random.Generator, rank: int) -> Array:
    return np.asarray(np.linalg.qr(rng.normal(size=(M, rank)))[0])


def test_one_direction_by_hand() -> None:
    """Δ along e1, then along e2: the basis turns half way, and half of e2's step is taken.

    UᵀŪ = 0 leaves the sign of R free, so the second delta leans a little to e1.
    """
    block = make_block("p", "encoder", ("acc",), {"w": (2, 3)})[0]
    zero, e1 = np.zeros(6, np.float32), np.array([1, 0, 0, 0, 0, 0], np.float32)
    moved, state = step(orthogonal(0.5), block, zero, 4 * e1, {})
    np.testing.assert_allclose(moved, 4 * e1, atol=1e-6)
    np.testing.assert_allclose(np.abs(state["w"]), [[1], [0]], atol=1e-6)
    angle = np.pi / 2 - 1e-3
    delta = np.array([np.cos(angle), 0, 0, np.sin(angle), 0, 0], np.float32)
    moved, state = step(orthogonal(0.5), block, zero, delta, state)
    half = np.array([np.cos(angle / 2), np.sin(angle / 2)])  # of e1 and U, in equal parts
    np.testing.assert_allclose(np.abs(state["w"]).ravel(), half, atol=1e-6)
    expected = half * np.cos(angle / 2)  # of a delta of length 1
    np.testing.assert_allclose(moved[[0, 3]], expected, atol=1e-6)


@given(st.integers(0, 1000), st.sampled_from([1, 3, 6]))
def test_without_momentum_and_with_full_energy_it_is_fedavg(seed: int, rank: int) -> None:
    x = np.zeros(MATRIX.size, np.float32)
    state: OptimizerState = {}
    for delta in draw(seed, 4, rank):
        moved, state = step(orthogonal(0.0, 1.0), MATRIX, x, delta, state)
        np.testing.assert_allclose(moved, x + delta, rtol=1e-5, atol=1e-5)
        x = moved


@given(st.integers(0, 1000), st.floats(0, 0.99), st.lists(st.integers(1, 6), max_size=6))
def test_the_basis_stays_orthonormal(seed: int, beta: float, ranks: list[int]) -> None:
    """Also as it is saved, in float32, and as its rank grows and shrinks."""
    x, state = np.zeros(MATRIX.size, np.float32), orthogonal(beta).init(MATRIX)
    for i, rank in enumerate(ranks):
        [delta] = draw(seed + i, 1, rank)
        x, state = step(orthogonal(beta), MATRIX, x, delta, state)
        basis = state["w"]
        assert basis.dtype == np.float32 and basis.shape[1] <= rank
        product = basis.T.astype(np.float64) @ basis
        np.testing.assert_allclose(product, np.eye(basis.shape[1]), atol=1e-6)


@given(
    st.integers(0, 1000),
    st.floats(0.1, 0.9),
    st.lists(st.sampled_from([-1.0, 1.0]), min_size=3, max_size=3),
)
def test_signs_and_rotations_of_either_basis_make_no_difference(
    seed: int, beta: float, signs: list[float]
) -> None:
    """Only the spaces count: the projection that the step takes stays the same."""
    rng = np.random.default_rng(seed)
    old, new = basis_of(rng, 3), basis_of(rng, 3)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    projections = [
        blend(a, b, beta) @ blend(a, b, beta).T
        for a, b in ((old, new), (old, new * np.array(signs)), (old @ turn, new), (old, new @ turn))
    ]
    for one in projections[1:]:
        np.testing.assert_allclose(one, projections[0], atol=1e-8)


def test_the_basis_moves_from_the_old_to_the_new() -> None:
    rng = np.random.default_rng(0)
    old, new = basis_of(rng, 3), basis_of(rng, 3)

    def closeness(beta: float) -> float:
        return float(np.linalg.norm(new.T @ blend(old, new, beta)))

    found = [closeness(beta) for beta in (0.0, 0.3, 0.6, 0.9)]
    assert found[0] == pytest.approx(np.sqrt(3)) and (np.diff(found) < 0).all()


def test_without_a_basis_so_far_it_is_the_new_one() -> None:
    new = basis_of(np.random.default_rng(0), 3)
    np.testing.assert_allclose(blend(np.zeros((M, 0)), new, 0.9), new, atol=1e-12)


def test_polar_is_the_nearest_with_orthonormal_columns() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(5, 3))
    found = polar(matrix)
    np.testing.assert_allclose(found.T @ found, np.eye(3), atol=1e-12)
    best = np.linalg.norm(found - matrix)
    others = (np.linalg.qr(found + 0.1 * rng.normal(size=(5, 3)))[0] for _ in range(50))
    assert all(best < np.linalg.norm(other * np.sign(np.diag(other.T @ matrix)) - matrix)
               for other in others)  # fmt: skip


def strayed(beta: float, seed: int) -> float:
    """How far steps lie from what their deltas have in common, on average; 1: as the deltas."""
    rng = np.random.default_rng(seed)
    common = 3 * np.outer(basis_of(rng, 1), basis_of(rng, 1))
    x, state = np.zeros(M * M, np.float32), orthogonal(beta).init(SQUARE)
    distances = []
    for _ in range(30):
        swing = np.outer(basis_of(rng, 1), basis_of(rng, 1))  # of length 1
        delta = (common + swing).astype(np.float32).ravel()
        moved, state = step(orthogonal(beta), SQUARE, x, delta, state)
        distances.append(np.linalg.norm(moved - x - common.ravel()))
    return float(np.mean(distances[5:]))


@pytest.mark.parametrize("seed", range(4))
def test_what_changes_from_round_to_round_is_damped(seed: int) -> None:
    assert strayed(0.0, seed) == pytest.approx(1, abs=0.01)
    assert strayed(0.9, seed) < 0.8


def test_what_is_no_matrix_and_a_matrix_at_rest_are_added_to() -> None:
    rng = np.random.default_rng(3)
    x, delta = rng.normal(size=(2, BLOCK.size)).astype(np.float32)
    delta[4 : 4 + M * N] = 0
    moved, state = step(orthogonal(0.5, 1.0), BLOCK, x, delta, {})
    np.testing.assert_allclose(moved, x + delta, rtol=1e-5, atol=1e-6)
    assert {name: basis.shape for name, basis in state.items()} == {"w": (M, 0), "tall": (7, 3)}


def test_a_step_changes_nothing_that_it_was_given() -> None:
    [first, second] = draw(4, 2)
    _, state = step(orthogonal(), MATRIX, first, first, {})
    for array in (first, second, *state.values()):
        array.flags.writeable = False
    before = {name: basis.copy() for name, basis in state.items()}
    found = [step(orthogonal(), MATRIX, first, second, state)[0] for _ in range(2)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(state["w"], before["w"])


def test_its_decompositions_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two busy cores, that of a 1024 × 1024 matrix took ten times as long on two."""
    found: list[list[int]] = []
    svd = np.linalg.svd

    def noted(matrix: Array, full_matrices: bool) -> object:
        info = ThreadpoolController().select(user_api="blas").info()
        found.append([one["num_threads"] for one in info])
        return svd(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(np.linalg, "svd", noted)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        step(orthogonal(0.5), MATRIX, np.zeros(M * N, np.float32), draw(0, 1)[0], {})
    assert len(found) == 3 and all(found)
    assert {count for counts in found for count in counts} == {1}
