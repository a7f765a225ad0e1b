"""Tiles: all of a block, each value once, within the budget."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.payloads import EncodedDelta, plain_delta
from server.matrices import Matrix
from server.reducer.rules import numpy_rules, tiles
from server.reducer.rules.tiles import BUDGET_BYTES, Tiling, tiling

RULES = numpy_rules.NumpyRules()


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 5))
def test_each_value_is_in_one_tile(size: int, width: int, num_threads: int) -> None:
    def work(parts: Iterator[slice]) -> list[int]:
        return [k for part in parts for k in range(part.start, part.stop)]

    found = Tiling(size, width, num_threads).run(work)
    assert sorted(k for ks in found for k in ks) == list(range(size))


@given(st.integers(1, 2_000_000), st.integers(1, 30_000_000), st.sampled_from([8, 48]))
def test_a_tiling_keeps_to_the_budget(num_updates: int, size: int, bytes_per_value: int) -> None:
    class Sized:
        def __init__(self) -> None:
            self.size = size

        def __len__(self) -> int:
            return num_updates

        def __getitem__(self, k: int) -> Sized:
            return self

    plan = tiling(Sized(), bytes_per_value)  # type: ignore[arg-type]
    assert 1 <= plan.width <= size and plan.num_threads >= 1
    taken = plan.num_threads * plan.width * num_updates * bytes_per_value
    assert taken <= BUDGET_BYTES or plan.width == plan.num_threads == 1


def test_an_error_on_a_thread_is_raised() -> None:
    def work(parts: Iterator[slice]) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Tiling(10, 1, 2).run(work)


def updates(num_updates: int, size: int, num_values: int) -> list[EncodedDelta]:
    """Of few values, so that most are tied."""
    rng = np.random.default_rng(0)
    return [plain_delta(rng.integers(0, num_values, size).astype(np.float32))
            for _ in range(num_updates)]  # fmt: skip


MATRIX = Matrix("w", 0, (40, 500))
KERNELS: dict[str, Callable[[list[EncodedDelta]], object]] = {
    "median": RULES.median,
    "trimmed mean": lambda d: RULES.trimmed_mean(d, np.ones(len(d)), 3),
    "trimmed mean by weight": lambda d: RULES.trimmed_mean(d, np.arange(1.0, len(d) + 1), 3),
    "inner products": RULES.inner_products,
    "canonical": lambda d: RULES.canonical(MATRIX, d, np.full(len(d), 1 / len(d)), 0.5, 1.0),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("num_values", [2, 1 << 20])
def test_what_a_kernel_takes_is_within_the_budget(
    name: str, num_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 MB instead of 256; beside it the result, and G with its eigenvectors."""
    deltas = updates(300, 20_000, num_values)
    for delta in deltas:
        assert delta.norm > 0  # as the door has computed it
    budget = 2 << 20
    monkeypatch.setattr(tiles, "BUDGET_BYTES", budget)
    tracemalloc.start()
    try:
        KERNELS[name](deltas)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    beside = 4 * 20_000 + 3 * 8 * 300 * 300
    assert peak <= budget + beside + (1 << 18)


def test_passes_that_overlap_give_the_blas_its_threads_back() -> None:
    def num_threads() -> list[int]:
        return [
            one["num_threads"] for one in tiles._controller().info() if one["user_api"] == "blas"
        ]

    before, first, second = num_threads(), tiles.one_blas_thread(), tiles.one_blas_thread()
    first.__enter__()
    second.__enter__()
    assert set(num_threads()) <= {1}
    first.__exit__(None, None, None)
    assert set(num_threads()) <= {1}, "the other one is still at it"
    second.__exit__(None, None, None)
    assert num_threads() == before
