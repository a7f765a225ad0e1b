from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.weighting import parse_weighting, staleness_factor, weight


@pytest.mark.parametrize(
    ("rule", "num_examples", "expected"),
    [
        ("examples", 1, 1.0),
        ("examples", 1 << 40, 2.0**40),
        ("uniform", 1, 1.0),
        ("uniform", 1 << 40, 1.0),
        ("capped:100", 99, 99.0),
        ("capped:100", 100, 100.0),
        ("capped:100", 1 << 40, 100.0),
    ],
)
def test_weights_by_hand(rule: str, num_examples: int, expected: float) -> None:
    found = weight(num_examples, rule)
    assert found == expected and type(found) is float


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("size", "weighting 'size' is not known; choose of examples, uniform, capped:max_examples"),
        ("capped", "weighting 'capped': a parameter is missing; it is written capped:max_examples"),
        ("capped:0", "weighting 'capped:0': expected max_examples >= 1, found 0"),
        ("capped:1.5", "max_examples '1.5' is not an integer"),
        ("uniform:1", "found 1 parameters, expected 0 at most"),
    ],
)
def test_an_unknown_rule_is_refused(rule: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_weighting(rule)
    assert message in str(raised.value)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40), st.integers(1, 1 << 40))
def test_a_weight_is_above_zero_and_grows_with_the_examples(a: int, b: int, cap: int) -> None:
    for rule in ("examples", "uniform", f"capped:{cap}"):
        low, high = weight(min(a, b), rule), weight(max(a, b), rule)
        assert 0 < low <= high


def test_staleness_by_hand() -> None:
    assert [staleness_factor(s) for s in (0, 3, 8, 99)] == [1.0, 0.5, 1 / 3, 0.1]
    with pytest.raises(ValueError, match="expected staleness >= 0, found -1"):
        staleness_factor(-1)
