from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.codecs import parse_codec
from petalfl.errors import WireError
from petalfl.vectors import Vector
from tests.petalfl.codecs.vectors import deltas

INT8 = parse_codec("int8")
NUM_REPEATS = 4000


def z_scores(name: str, vector: Vector) -> NDArray[np.float64]:
    """Of the mean error of each value over many encodings: standard normal, if unbiased.

    Values all but on a level, whose error is too skewed for that, count as if a bit off.
    """
    codec, rng = parse_codec(name), np.random.default_rng(0)
    errors = [
        codec.decode(codec.encode(vector, rng), vector.size).astype(np.float64) - vector
        for _ in range(NUM_REPEATS)
    ]
    groups = [np.abs(vector[i : i + 256]) for i in range(0, vector.size, 256)]
    steps = np.concatenate([np.full(g.size, g.max() / 127) for g in groups])
    spread = np.maximum(np.std(errors, axis=0), 0.1 * steps)
    return cast("NDArray[np.float64]", np.mean(errors, axis=0) / spread * np.sqrt(NUM_REPEATS))


def test_it_is_unbiased() -> None:
    vector = np.concatenate([deltas(512), np.linspace(-1, 1, 300, dtype=np.float32)])
    z = z_scores("int8", vector)
    assert np.abs(z).max() < 5
    assert abs(z.mean()) * np.sqrt(z.size) < 4
    assert 0.85 < z.std() < 1.15


def test_the_statistic_sees_a_bias() -> None:
    """Rounding to the nearest half is off by far less than int8, but always to the same side."""
    assert np.abs(z_scores("bf16", np.linspace(-1, 1, 300, dtype=np.float32))).max() > 20


def test_the_mean_of_many_comes_nearer() -> None:
    """What the server averages: the error falls as the square root of the number of devices."""
    vector, rng = deltas(2000), np.random.default_rng(0)

    def error(num_devices: int) -> float:
        decoded = [INT8.decode(INT8.encode(vector, rng), 2000) for _ in range(num_devices)]
        return float(np.linalg.norm(np.mean(decoded, axis=0) - vector))

    assert error(400) < 0.07 * error(1)


def test_a_large_value_disturbs_its_group_alone() -> None:
    vector = deltas(1000)
    spoiled = vector.copy()
    spoiled[300] = 1000.0
    found = [INT8.decode(INT8.encode(v, np.random.default_rng(1)), 1000) for v in (vector, spoiled)]
    same = np.ones(1000, bool)
    same[256:512] = False
    np.testing.assert_array_equal(found[0][same], found[1][same])
    assert np.abs(found[1][300] - 1000) < 8


class _Lots:
    """Draws the same lot for everything."""

    def __init__(self, lot: float) -> None:
        self._lot = np.float32(lot)

    def random(self, shape: tuple[int, ...], dtype: type) -> NDArray[np.float32]:
        return np.full(shape, self._lot, dtype)


@pytest.mark.parametrize("lot", [0.0, 1 - 2.0**-24])
def test_no_lot_leads_beyond_127(lot: float) -> None:
    peaks = np.random.default_rng(0).uniform(1e-30, 1e30, 20_000).astype(np.float32)
    vector = np.stack([peaks, -peaks], axis=1).ravel()
    groups = np.zeros((20_000, 256), np.float32)
    groups[:, :2] = vector.reshape(-1, 2)
    payload = INT8.encode(groups.ravel(), cast(np.random.Generator, _Lots(lot)))
    levels = np.frombuffer(payload, np.int8, groups.size, 4 * 20_000).reshape(groups.shape)
    expected = [126, -127] if lot == 0 else [127, -127 + 1]
    assert (levels[:, :2] == expected).all()


def test_what_is_next_to_nothing_counts_as_nothing() -> None:
    vector = np.full(3, 1e-40, np.float32)
    assert INT8.encode(vector, np.random.default_rng(0)) == bytes(4 + 3)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1e-9, 2.0**121, 3e38])
def test_scales_are_checked(scale: float) -> None:
    payload = np.array([scale, 1], "<f4").tobytes() + bytes([127]) * 300
    with pytest.raises(WireError, match=r"a scale is not in \[0"):
        INT8.decode(payload, 300)


def test_the_largest_scale_makes_finite_values() -> None:
    payload = np.array([2.0**120], "<f4").tobytes() + bytes([0x80, 0x7F])
    assert INT8.decode(payload, 2).tolist() == [-(2.0**127), 127 * 2.0**120]
