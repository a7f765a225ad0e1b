from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.schedules import ScheduleName, learning_rate

rounds = st.integers(2, 200)


@given(rounds, st.integers(1, 300))
def test_a_constant_rate_stays(num_rounds: int, round_num: int) -> None:
    assert learning_rate("constant", 0.05, round_num, num_rounds) == 0.05


@given(rounds)
def test_a_cosine_starts_at_the_base_and_ends_at_one_percent_of_it(num_rounds: int) -> None:
    assert learning_rate("cosine", 0.05, 1, num_rounds) == pytest.approx(0.05, rel=1e-12)
    assert learning_rate("cosine", 0.05, num_rounds, num_rounds) == pytest.approx(0.0005, rel=1e-9)


def test_a_cosine_by_hand() -> None:
    # Of five rounds: cos of 0°, 45°, 90°, 135°, 180°.
    expected = [1.0, 0.01 + 0.99 * 0.8535533906, 0.505, 0.01 + 0.99 * 0.1464466094, 0.01]
    found = [learning_rate("cosine", 1.0, n, 5) for n in range(1, 6)]
    assert found == pytest.approx(expected, abs=1e-9)


@given(rounds, st.floats(1e-6, 10))
def test_a_cosine_falls_with_every_round(num_rounds: int, base: float) -> None:
    rates = [learning_rate("cosine", base, n, num_rounds) for n in range(1, num_rounds + 1)]
    assert all(earlier > later > 0 for earlier, later in pairwise(rates))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("num_rounds", [0, 1])
def test_without_a_planned_end_or_with_one_round_the_rate_is_the_base(
    schedule: ScheduleName, num_rounds: int
) -> None:
    assert [learning_rate(schedule, 0.3, n, num_rounds) for n in (1, 2, 50)] == [0.3] * 3


def test_after_the_last_round_a_cosine_stays_at_its_end() -> None:
    assert learning_rate("cosine", 1.0, 9, 4) == learning_rate("cosine", 1.0, 4, 4)
