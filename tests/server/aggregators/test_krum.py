from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.aggregators import krum, multi_krum, weighted_mean
from tests.server.aggregators.builders import Update, aggregate, any_updates, stacked, vector_block

# On a line; with one attacker each looks at its 5 − 1 − 2 = 2 nearest.
LINE = [0.0, 1.0, 3.0, 4.0, 50.0]
#        1+9  1+4  1+4  1+9  46²+47²      scores


def updates(values: list[float]) -> list[Update]:
    return [(np.array([v, 0, 0], np.float32), 1.0) for v in values]


def test_krum_by_hand() -> None:
    np.testing.assert_array_equal(aggregate(krum(1), updates(LINE)), [1, 0, 0])
    np.testing.assert_array_equal(aggregate(krum(1), updates(LINE[::-1])), [3, 0, 0])  # a tie


def test_multi_krum_by_hand() -> None:
    np.testing.assert_array_equal(aggregate(multi_krum(1, 2), updates(LINE)), [2, 0, 0])
    np.testing.assert_array_equal(aggregate(multi_krum(1), updates(LINE)), [2, 0, 0])  # four
    weighted = [(d, w) for (d, _), w in zip(updates(LINE), (1, 1, 3, 1, 9), strict=True)]
    np.testing.assert_array_equal(aggregate(multi_krum(1, 2), weighted), [2.5, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_krum_takes_the_lowest_of_scores_computed_plainly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    deltas = rng.normal(size=(9, 40)).astype(np.float32)
    exact = deltas.astype(np.float64)
    scores = [
        sum(sorted(((exact[k] - exact[j]) ** 2).sum() for j in range(9) if j != k)[: 9 - 2 - 2])
        for k in range(9)
    ]
    found = aggregate(krum(2), [(d, 1.0) for d in deltas], vector_block(40))
    np.testing.assert_array_equal(found, deltas[int(np.argmin(scores))])


def test_krum_does_not_depend_on_the_order_where_no_scores_are_equal() -> None:
    rng = np.random.default_rng(3)
    drawn: list[Update] = [(rng.normal(size=3).astype(np.float32), 1.0) for _ in range(5)]
    found = {aggregate(krum(1), list(order)).tobytes() for order in itertools.permutations(drawn)}
    assert len(found) == 1


@given(any_updates)
def test_all_selected_are_the_weighted_mean(drawn: list[Update]) -> None:
    scale = np.abs(stacked(drawn)[0]).max()
    np.testing.assert_allclose(
        aggregate(multi_krum(0, len(drawn)), drawn),
        aggregate(weighted_mean(), drawn),
        rtol=2e-7,
        atol=1e-13 * scale + 1e-37,
    )


@given(any_updates, st.integers(0, 3))
def test_krum_is_one_of_the_updates(drawn: list[Update], num_attackers: int) -> None:
    found = aggregate(krum(num_attackers), drawn)
    assert any((found == delta).all() for delta, _ in drawn)


def test_a_claim_of_many_examples_does_not_get_an_attacker_selected() -> None:
    drawn = [(d, 1e12 if d[0] == 50 else 1.0) for d, _ in updates(LINE)]
    assert aggregate(multi_krum(1), drawn)[0] == 2
