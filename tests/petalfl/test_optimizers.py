from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.optimizers import sgd

VECTORS = st.lists(
    st.floats(-10, 10, width=32, allow_subnormal=False), min_size=3, max_size=3
)  # fmt: skip


def test_by_hand() -> None:
    """Two steps with momentum 0.5, decay 0.25 and rates 0.5, then 1, in exact binary numbers."""
    optimizer = sgd(momentum=0.5, weight_decay=0.25)
    w = np.array([4.0], np.float32)
    v = optimizer.init(w)
    np.testing.assert_array_equal(v, [0.0])
    w, v = optimizer.update(w, np.array([2.0], np.float32), v, 0.5)
    np.testing.assert_array_equal(v, [3.0])  # 2 + 0.25 * 4
    np.testing.assert_array_equal(w, [2.5])  # 4 - 0.5 * 3
    w, v = optimizer.update(w, np.array([-1.0], np.float32), v, 1.0)
    np.testing.assert_array_equal(v, [1.125])  # 0.5 * 3 + (-1 + 0.25 * 2.5)
    np.testing.assert_array_equal(w, [1.375])


@settings(max_examples=60, deadline=None)
@given(
    start=VECTORS,
    gradients=st.lists(VECTORS, min_size=1, max_size=5),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    weight_decay=st.sampled_from([0.0, 1e-5, 0.1]),
    rate=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_as_pytorch(
    start: list[float],
    gradients: list[list[float]],
    momentum: float,
    weight_decay: float,
    rate: float,
) -> None:
    expected = torch.nn.Parameter(torch.tensor(start))
    judge = torch.optim.SGD([expected], lr=rate, momentum=momentum, weight_decay=weight_decay)
    optimizer = sgd(momentum, weight_decay)
    found = np.array(start, np.float32)
    state = optimizer.init(found)
    for gradient in gradients:
        expected.grad = torch.tensor(gradient)
        judge.step()
        found, state = optimizer.update(found, np.array(gradient, np.float32), state, rate)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_the_arguments_are_not_changed() -> None:
    optimizer = sgd(0.9, 0.1)
    arrays = [np.full(3, x, np.float32) for x in (1.0, 2.0, 3.0)]
    after, state = optimizer.update(arrays[0], arrays[1], arrays[2], 0.1)
    assert after.dtype == state.dtype == np.float32
    for array, x in zip(arrays, (1.0, 2.0, 3.0), strict=True):
        np.testing.assert_array_equal(array, np.full(3, x))


@pytest.mark.parametrize(
    ("momentum", "weight_decay"),
    [(1.0, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.0, -1e-9), (0.0, math.nan)],
)
def test_arguments_outside_their_intervals(momentum: float, weight_decay: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= momentum < 1"):
        sgd(momentum, weight_decay)
