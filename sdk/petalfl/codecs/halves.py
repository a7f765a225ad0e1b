"""`f16` and `bf16`: two bytes a value, rounded to the nearest."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from petalfl.errors import WireError
from petalfl.vectors import Vector

from .codec import Codec, check_length, check_range
from .encoded import Encoded

F16_LIMIT = 65519.996  # the last float32 that is not rounded to infinity, as is
BF16_LIMIT = 3.3961775292304957e38  # this one
F16_INFINITY, BF16_INFINITY = 0x7C00, 0x7F80  # without their sign
SMALLEST_NORMAL = np.float32(2.0**-14).view(np.uint32)
STRIDE = 1 << 14  # values at a time, so that what lies between stays in the cache


def float16() -> Codec:
    """IEEE 754 binary16: 11 significant bits of what is not below 6.1e-5, and to 65504."""
    return Codec("f16", lambda size: 2 * size, _encode_f16, _parse_f16)


def bfloat16() -> Codec:
    """The upper half of a float32: 8 significant bits, and its range."""
    return Codec("bf16", lambda size: 2 * size, _encode_bf16, _parse_bf16)


def _encode_f16(vector: Vector, rng: np.random.Generator) -> bytes:
    check_range("f16", vector, F16_LIMIT)
    bits = np.ascontiguousarray(vector).view(np.uint32)
    halves = np.empty(vector.size, "<u2")
    for start in range(0, vector.size, STRIDE):
        halves[start : start + STRIDE] = _to_half(bits[start : start + STRIDE])
    return halves.tobytes()


def _to_half(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """As ``astype(np.float16)`` rounds, which takes ten times as long and more below 6.1e-5."""
    sign = bits & np.uint32(0x80000000)
    magnitude = bits ^ sign
    normal = _round_off(magnitude, 13)
    normal -= 112 << 10  # the exponent counts from 15, not from 127
    shifted = magnitude.view(np.float32) + np.float32(0.5)  # its unit is the smallest half
    subnormal = shifted.view(np.uint32) - np.float32(0.5).view(np.uint32)
    half = np.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    half |= sign >> 16
    return half


def _round_off(bits: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """Cuts the lowest bits off, rounded to the nearest, and halfway to even."""
    rounded: NDArray[np.uint32] = bits >> np.uint32(count)
    rounded &= 1
    rounded += (1 << count - 1) - 1
    rounded += bits
    rounded >>= count
    return rounded


def _parse_f16(data: bytes | memoryview, size: int) -> Encoded:
    return _parse("f16", F16_INFINITY, data, size)


def _encode_bf16(vector: Vector, rng: np.random.Generator) -> bytes:
    check_range("bf16", vector, BF16_LIMIT)
    bits = np.ascontiguousarray(vector).view(np.uint32)
    upper = np.empty(vector.size, "<u2")
    for start in range(0, vector.size, STRIDE):
        upper[start : start + STRIDE] = _round_off(bits[start : start + STRIDE], 16)
    return upper.tobytes()


def _parse_bf16(data: bytes | memoryview, size: int) -> Encoded:
    return _parse("bf16", BF16_INFINITY, data, size)


def _parse(
    form: Literal["f16", "bf16"], infinity: int, data: bytes | memoryview, size: int
) -> Encoded:
    check_length(form, data, 2 * size, size)
    bits = np.frombuffer(data, "<u2")
    for start in range(0, size, STRIDE):
        if (bits[start : start + STRIDE] & np.uint16(0x7FFF)).max() >= infinity:  # or NaN
            raise WireError(f"{form}: a value is NaN or infinite")
    return Encoded(size, form, bits)
