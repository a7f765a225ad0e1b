"""When the compiled kernels are taken; what they find is tested with the others'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from server.reducer import choose, rules, use
from server.reducer.rules import numba_rules
from server.reducer.rules.numba_rules import NumbaRules
from server.reducer.rules.numpy_rules import NumpyRules
from tests.server.reducer.rules.builders import plain


def test_they_go_with_numbas_sums_alone() -> None:
    with use(choose("numba")):
        assert isinstance(rules.active(), NumbaRules) and rules.active() is rules.active()
    with use(choose("numpy")):
        assert type(rules.active()) is NumpyRules


def refuse(*arguments: Any) -> None:
    raise AssertionError("a network of too many")


def test_of_more_updates_than_a_network_is_for_numpy_sorts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, compiled = np.random.default_rng(0).normal(size=(9, 70)), NumbaRules()
    deltas, weights = plain(values), np.linspace(1, 2, 9)
    median, mean = compiled.median(deltas), compiled.trimmed_mean(deltas, weights, 2)
    monkeypatch.setattr(numba_rules, "_by_columns", refuse)
    with pytest.raises(AssertionError, match="too many"):
        compiled.median(deltas)
    monkeypatch.setattr(numba_rules, "MAX_UPDATES", 8)
    np.testing.assert_array_equal(compiled.median(deltas), median)
    np.testing.assert_allclose(compiled.trimmed_mean(deltas, weights, 2), mean, rtol=2e-7)
