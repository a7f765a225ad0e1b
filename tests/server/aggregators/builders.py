"""Updates as the aggregators' tests draw them, and one way to aggregate them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.model import Block
from petalfl.payloads import plain_delta
from petalfl.vectors import Vector
from server.aggregators import Aggregator
from tests.server.builders import make_block

SIZE = 3
Update = tuple[Vector, float]


def vector_block(size: int = SIZE) -> Block:
    return make_block("head", "head", ("acc",), {"w": (size,)})[0]


def aggregate(
    aggregator: Aggregator[Any], updates: Sequence[Update], block: Block | None = None
) -> Vector:
    state = aggregator.init(block or vector_block())
    for delta, weight in updates:
        state = aggregator.accumulate(state, plain_delta(delta), weight)
    found = aggregator.finalize(state)
    assert found is not None
    return found


def updates_of(
    values: st.SearchStrategy[float], min_size: int = 1, max_size: int = 6
) -> st.SearchStrategy[list[Update]]:
    vectors = st.lists(values, min_size=SIZE, max_size=SIZE).map(lambda v: np.array(v, np.float32))
    return st.lists(
        st.tuples(vectors, st.integers(1, 1 << 20)), min_size=min_size, max_size=max_size
    )


any_values = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
any_updates = updates_of(any_values)
# Products and sums of these are exact in float64: the order can make no difference at all.
exact_updates = updates_of(st.integers(-(1 << 20), 1 << 20).map(lambda i: i / 1024))


def stacked(updates: Sequence[Update]) -> tuple[NDArray[np.float64], list[float]]:
    return np.stack([delta.astype(np.float64) for delta, _ in updates]), [w for _, w in updates]


def assert_order_free(
    aggregator: Aggregator[Any], updates: list[Update], random: Any, block: Block | None = None
) -> None:
    """To rounding: of float64 sums for most, of float64 eigenvectors for one."""
    shuffled = list(updates)
    random.shuffle(shuffled)
    found, expected = (aggregate(aggregator, u, block) for u in (shuffled, updates))
    scale = max(np.abs(delta).max() for delta, _ in updates)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale + 1e-37)
