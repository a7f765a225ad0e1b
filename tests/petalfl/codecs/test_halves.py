from __future__ import annotations

import numpy as np
from hypothesis import given

from petalfl.codecs import parse_codec
from petalfl.vectors import Vector
from tests.petalfl.codecs.vectors import vectors

RNG = np.random.default_rng(0)
F16, BF16 = parse_codec("f16"), parse_codec("bf16")


def neighbors(vector: Vector) -> Vector:
    """Each value with the floats next to it, and its negative."""
    near = [vector, np.nextafter(vector, np.float32(0)), np.nextafter(vector, np.float32(9e37))]
    return np.concatenate([*near, *(-part for part in near)]).astype(np.float32)


def all_halves() -> Vector:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16)  # the finite ones, not negative
    return halves.astype(np.float32)


def test_every_half_is_kept() -> None:
    halves = np.concatenate([all_halves(), -all_halves()])
    assert F16.decode(F16.encode(halves, RNG), halves.size).tobytes() == halves.tobytes()


def test_f16_rounds_as_numpy_does() -> None:
    halves = all_halves()
    middles = (halves[1:] + halves[:-1]) / 2  # exact in float32
    vector = neighbors(np.concatenate([halves[:-1], middles]))
    assert F16.encode(vector, RNG) == vector.astype("<f2").tobytes()


@given(vectors())
def test_f16_is_numpys(vector: Vector) -> None:
    assert F16.encode(vector, RNG) == vector.astype("<f2").tobytes()


def test_bf16_by_hand() -> None:
    """Seven bits behind the point: 1 + n/128; what lies between goes to the even one."""
    cases = {1.0: 1.0, 1 + 1 / 256: 1.0, 1 + 3 / 256: 1 + 2 / 128, 1 + 1.01 / 256: 1 + 1 / 128,
             -1 - 0.99 / 256: -1.0, 255.4: 255.0, 255.6: 256.0, 0.0: 0.0}  # fmt: skip
    vector = np.array([*cases], np.float32)
    assert BF16.decode(BF16.encode(vector, RNG), len(cases)).tolist() == [*cases.values()]


@given(vectors(3.38e38))
def test_bf16_is_the_nearest(vector: Vector) -> None:
    found = BF16.decode(BF16.encode(vector, RNG), vector.size).astype(np.float64)
    bits = vector.view(np.uint32) & np.uint32(0xFFFF0000)
    below = bits.view(np.float32).astype(np.float64)
    above = (bits + np.uint32(0x10000)).view(np.float32).astype(np.float64)
    least = np.minimum(np.abs(vector - below), np.abs(vector - above))
    np.testing.assert_array_equal(np.abs(found - vector), least)
