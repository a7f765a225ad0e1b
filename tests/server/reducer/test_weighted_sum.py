from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from petalfl.codecs import parse_codec
from petalfl.payloads import EncodedDelta, encode_payload, parse_payload, plain_delta
from petalfl.vectors import Vector
from server.norms import clip
from server.reducer import use, weighted_sum
from server.reducer.numpy_backend import NumpyBackend
from server.reducer.weighted_sum import WeightedSum
from tests.petalfl.builders import make_block

NORMED = make_block("encoder-acc", ("acc",), 4, 9, statistics=8)


def mean_of(target: WeightedSum) -> Vector:
    found = target.mean()
    assert found is not None
    return found


def delta_of(seed: int, codec: str = "f32") -> EncodedDelta:
    rng = np.random.default_rng(seed)
    vector = rng.standard_normal(NORMED.size).astype(np.float32)
    payload, _ = encode_payload(parse_codec(codec), NORMED, vector, None, rng)
    return parse_payload(parse_codec(codec), NORMED, payload)


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_the_mean_of_parameters_and_statistics(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(weighted_sum, "BYTES_A_VALUE", most)
    codecs = ["f32", "int8", "topk:0.3", "f16"] * 6
    deltas = [delta_of(seed, codec) for seed, codec in enumerate(codecs)]
    target = WeightedSum(NORMED.size)
    for k, delta in enumerate(deltas):
        target.add(delta, k + 1)
    weights = np.arange(1, len(deltas) + 1)
    expected = np.average([delta.decode() for delta in deltas], axis=0, weights=weights)
    np.testing.assert_allclose(mean_of(target), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(mean_of(target), mean_of(target))


@pytest.mark.parametrize(
    ("what", "most"), [("BYTES_A_VALUE", 40), ("MAX_BYTES", 40_000), ("MAX_VALUES", 10_000)]
)
def test_updates_wait_until_there_are_enough(
    monkeypatch: pytest.MonkeyPatch, what: str, most: int
) -> None:
    """Neither does a pass read the sum for one update, nor do all of a round wait."""
    size, sizes = 1000, list[int]()
    monkeypatch.setattr(weighted_sum, what, most)

    class Spy:
        name = description = "spy"

        def fold(self, total: object, vectors: list[object], factors: object) -> None:
            sizes.append(len(vectors))

    monkeypatch.setattr(weighted_sum, "active", Spy)
    target = WeightedSum(size)
    for _ in range(25):
        target.add(plain_delta(np.ones(size, np.float32)), 1.0)
    target.mean()
    assert sizes == [10, 10, 5]


def test_a_clipped_update_counts_as_it_was_clipped() -> None:
    long, short = plain_delta(np.array([3, 4], np.float32)), plain_delta(np.ones(2, np.float32))
    target = WeightedSum(2)
    target.add(clip(long, 2.5), 1)  # 1.5, 2
    target.add(clip(short, 2.5), 3)
    np.testing.assert_allclose(mean_of(target), np.array([(1.5 + 3) / 4, (2 + 3) / 4]), rtol=1e-7)
    np.testing.assert_allclose(replace(long, factor=0.5).decode(), [1.5, 2])


@pytest.mark.parametrize("most", [40, 1 << 30], ids=["as updates come", "at the end"])
def test_a_sum_that_has_failed_is_none(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A part of it may be there: what is made of it again would count that twice."""
    monkeypatch.setattr(weighted_sum, "BYTES_A_VALUE", most)

    class Failing(NumpyBackend):
        def fold(self, total: Any, vectors: Any, factors: Any) -> None:
            super().fold(total[:500], vectors, factors)
            raise MemoryError("no room")

    target, delta = WeightedSum(1000), plain_delta(np.ones(1000, np.float32))
    with use(Failing()):
        for _ in range(15):
            target.add(delta, 1.0)
        with pytest.raises((MemoryError, RuntimeError)):
            target.mean()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a sum has failed: start the server again"):
            target.mean()
