"""What holds of every aggregator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.payloads import plain_delta
from petalfl.vectors import from_bytes, to_bytes
from server.aggregators import AGGREGATORS, Aggregator, parse_aggregator
from tests.server.aggregators.builders import (
    SIZE,
    Update,
    aggregate,
    any_updates,
    assert_order_free,
    vector_block,
)
from tests.server.builders import make_block

TEXTS = {
    "weighted-mean": "weighted-mean",
    "median": "median",
    "trimmed-mean": "trimmed-mean:0.3",
    "krum": "krum:1",
    "multi-krum": "multi-krum:1",
    "geometric-median": "geometric-median",
    "canonical": "canonical",
}
RULES = {name: parse_aggregator(text) for name, text in TEXTS.items()}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def test_every_rule_is_tested_here() -> None:
    assert TEXTS.keys() == AGGREGATORS.keys()


@every_rule
def test_without_updates_there_is_no_delta(rule: Aggregator[Any]) -> None:
    assert rule.finalize(rule.init(vector_block())) is None


@every_rule
@given(updates=any_updates)
def test_the_delta_lies_between_the_least_and_the_greatest(
    rule: Aggregator[Any], updates: list[Update]
) -> None:
    deltas = np.stack([delta for delta, _ in updates])
    found, slack = aggregate(rule, updates), 1e-6 * np.abs(deltas).max()
    assert found.dtype == np.float32 and found.shape == (SIZE,)
    assert (deltas.min(axis=0) - slack <= found).all()
    assert (found <= deltas.max(axis=0) + slack).all()


@every_rule
@given(updates=any_updates)
def test_equal_updates_are_their_own_delta(rule: Aggregator[Any], updates: list[Update]) -> None:
    delta = updates[0][0]
    found = aggregate(rule, [(delta, weight) for _, weight in updates])
    np.testing.assert_allclose(found, delta, rtol=2e-7)


@pytest.mark.parametrize(
    "rule",
    [rule for name, rule in RULES.items() if "krum" not in name],  # it breaks ties by arrival
    ids=[name for name in RULES if "krum" not in name],
)
@given(updates=any_updates, random=st.randoms(use_true_random=False))
def test_the_order_of_arrival_makes_no_difference(
    rule: Aggregator[Any], updates: list[Update], random: object
) -> None:
    assert_order_free(rule, updates, random)


@every_rule
def test_finalizing_again_gives_the_same(rule: Aggregator[Any]) -> None:
    """A round that could not be written is closed once more."""
    rng = np.random.default_rng(4)
    state = rule.init(vector_block(50))
    for _ in range(5):
        state = rule.accumulate(state, plain_delta(rng.normal(size=50).astype(np.float32)), 2.0)
    first, second = rule.finalize(state), rule.finalize(state)
    assert first is not None and second is not None
    assert to_bytes(first) == to_bytes(second)


@every_rule
def test_deltas_are_left_alone_and_not_handed_out(rule: Aggregator[Any]) -> None:
    delta = from_bytes(to_bytes(np.array([1, 2, 3], np.float32)), 3)  # read-only, as decoded
    found = aggregate(rule, [(delta, 2), (delta, 5)])
    found += 1
    np.testing.assert_array_equal(delta, [1, 2, 3])


@every_rule
@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-30])
def test_extreme_values_neither_overflow_nor_vanish(rule: Aggregator[Any], value: float) -> None:
    delta = np.full(SIZE, value, np.float32)
    found = aggregate(rule, [(delta, 1 << 40), (delta, 1 << 40), (delta, 1), (delta, 7)])
    np.testing.assert_allclose(found, delta, rtol=2e-7)


def corners() -> dict[str, tuple[NDArray[np.float64], list[float]]]:
    """Deltas ``(n, 24)`` and their weights."""
    some, greatest = np.random.default_rng(0).normal(size=(7, 24)), float(np.finfo(np.float32).max)
    one_huge, most_huge, huge_and_tiny = some.copy(), some.copy(), 1e-40 * some
    one_huge[3] = huge_and_tiny[3] = greatest
    most_huge[2:] = greatest * np.sign(some[2:])
    opposite = np.stack([np.full(24, greatest), np.full(24, -greatest)])
    return {
        "one": (some[:1], [5.0]),
        "two": (some[:2], [1.0, 2.0]),
        "nothing": (np.zeros((5, 24)), [1.0] * 5),
        "negative zeros": (np.full((4, 24), -0.0), [1.0] * 4),
        "one value each": (np.eye(7, 24), [1.0] * 7),
        "subnormal": (1e-44 * some, [1.0] * 7),
        "the greatest and its negative": (opposite, [1.0, 1.0]),
        "one as great as can be": (one_huge, [1.0] * 7),
        "most as great as can be": (most_huge, [1.0] * 7),
        "one as great as can be, others subnormal": (huge_and_tiny, [1.0] * 7),
        "weights far apart": (some, [1e-300, 1e-12, 1.0, 3.0, 1e18, 5.0, 1.0]),
        "the greatest of hardly any weight": (one_huge, [1.0, 1.0, 1.0, 1e-300, 1.0, 1.0, 1.0]),
    }


CORNERS = corners()
MATRIX = make_block("head", "head", ("acc",), {"w": (4, 6)})[0]
RULES_AT_CORNERS = {
    **RULES,
    "multi-krum of all": parse_aggregator("multi-krum:0:50"),
    "canonical, sharp": parse_aggregator("canonical:0.01:1"),
    "canonical, flat": parse_aggregator("canonical:inf:1"),
}


@pytest.mark.parametrize("name", RULES_AT_CORNERS)
@pytest.mark.parametrize("corner", CORNERS)
def test_whatever_is_finite_gives_what_is_finite(name: str, corner: str) -> None:
    """And, but for mixtures of directions, what lies among the deltas; without a warning."""
    deltas, weights = CORNERS[corner][0].astype(np.float32), CORNERS[corner][1]
    updates = list(zip(deltas, weights, strict=True))
    found = aggregate(RULES_AT_CORNERS[name], updates, MATRIX).astype(np.float64)
    assert np.isfinite(found).all()
    if not name.startswith("canonical"):
        slack = 2e-6 * np.abs(deltas).max().astype(np.float64)
        assert (found >= deltas.min(axis=0) - slack).all()
        assert (found <= deltas.max(axis=0) + slack).all()


@every_rule
def test_states_are_independent(rule: Aggregator[Any]) -> None:
    first, second = rule.init(vector_block()), rule.init(vector_block())
    rule.accumulate(first, plain_delta(np.ones(SIZE, np.float32)), 1)
    assert rule.finalize(second) is None


def many(num_updates: int, size: int) -> list[Update]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=size).astype(np.float32), float(k + 1)) for k in range(num_updates)]


@every_rule
def test_a_block_of_many_chunks_is_aggregated_whole(rule: Aggregator[Any]) -> None:
    """Where coordinates do not depend on one another, neither does a part of the block."""
    updates = many(5, 200_001)
    found = aggregate(rule, updates, vector_block(200_001))
    deltas = np.stack([delta for delta, _ in updates])
    assert (deltas.min(axis=0) <= found).all() and (found <= deltas.max(axis=0)).all()
    if rule in (RULES["median"], RULES["trimmed-mean"], RULES["weighted-mean"]):
        end = [(delta[-9:], weight) for delta, weight in updates]
        np.testing.assert_array_equal(found[-9:], aggregate(rule, end, vector_block(9)))


ROBUST = ("median", "trimmed-mean", "krum", "multi-krum", "geometric-median")


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("far", [1e3, 1e12, -1e30])
def test_robust_rules_stay_with_the_honest(name: str, far: float) -> None:
    """7 of 10 honest; the attackers agree on a place far away, or go each its own way."""
    rule = parse_aggregator({"krum": "krum:3", "multi-krum": "multi-krum:3"}.get(name, TEXTS[name]))
    rng = np.random.default_rng(2)
    honest: list[Update] = [(rng.normal(1, 0.1, 20).astype(np.float32), 1.0) for _ in range(7)]
    for spread in (0.0, 1.0):
        attack: list[Update] = [
            ((far * (1 + spread * rng.normal(size=20))).astype(np.float32), 1.0) for _ in range(3)
        ]
        found = aggregate(rule, attack[:2] + honest + attack[2:], vector_block(20))
        assert np.abs(found - 1).max() < 0.5


def test_the_mean_does_not_stay_with_the_honest() -> None:
    """Else the test above would show nothing."""
    updates: list[Update] = [(np.full(3, value, np.float32), 1.0) for value in (1, 1, 1, 1e3)]
    for name in ("weighted-mean", "canonical"):
        assert aggregate(RULES[name], updates).min() > 100


def test_a_rule_says_what_quorum_it_needs() -> None:
    quorums = {name: rule.quorum for name, rule in RULES.items()}
    assert quorums == {**dict.fromkeys(RULES, 1), "krum": 5, "multi-krum": 5}


BAD = {
    "mean": "aggregator 'mean' is not known; choose of weighted-mean, median, "
    "trimmed-mean:fraction, krum:num_attackers, multi-krum:num_attackers[:num_selected], "
    "geometric-median[:smoothing], canonical[:temperature[:energy]]",
    "trimmed-mean": "aggregator 'trimmed-mean': a parameter is missing; it is written",
    "trimmed-mean:0.5": "expected fraction in [0, 0.5), found 0.5",
    "trimmed-mean:-0.1": "expected fraction in [0, 0.5), found -0.1",
    "trimmed-mean:nan": "expected fraction in [0, 0.5), found nan",
    "krum:1.5": "num_attackers '1.5' is not an integer",
    "krum:-1": "expected num_attackers >= 0 and num_selected >= 0, found -1, 1",
    "multi-krum:1:-1": "expected num_attackers >= 0 and num_selected >= 0, found 1, -1",
    "geometric-median:0": "expected smoothing in (0, 1), found 0.0",
    "canonical:0": "expected temperature >= 0.01 and energy in (0, 1], found 0.0, 0.99",
    "canonical:nan": "expected temperature >= 0.01",
    "canonical:1:1.1": "expected temperature >= 0.01 and energy in (0, 1], found 1.0, 1.1",
    "canonical:1:0": "expected temperature >= 0.01 and energy in (0, 1], found 1.0, 0.0",
}


@pytest.mark.parametrize("text", BAD)
def test_a_rule_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_aggregator(text)
    assert BAD[text] in str(raised.value)
