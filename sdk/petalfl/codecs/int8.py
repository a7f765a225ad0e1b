"""`int8`: one byte a value and a scale for every 256, rounded up or down by lot.

Source:
    Alistarh et al. 2017, arXiv:1610.02132 (QSGD): stochastic rounding in buckets; here the scale
    is the bucket's largest magnitude, not its Euclidean norm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from petalfl.errors import WireError
from petalfl.vectors import Vector

from .codec import Codec, check_length, check_range
from .encoded import GROUP, Encoded

LEVELS = 127 - 2.0**-10  # so that a rounding error cannot lead beyond 127
LIMIT = 2.0**126
MAX_SCALE = 2.0**120  # times 128 it is finite
MIN_PEAK = 2.0**-100  # what is smaller counts as 0
STRIDE = 64  # groups at a time, so that what lies between stays in the cache


def int8() -> Codec:
    """One byte a value: unbiased, each off by less than 1/126 of its group's largest."""
    return Codec("int8", _num_bytes, _encode, _parse)


def _num_bytes(size: int) -> int:
    return 4 * _num_groups(size) + size


def _num_groups(size: int) -> int:
    return -(-size // GROUP)


def _encode(vector: Vector, rng: np.random.Generator) -> bytes:
    check_range("int8", vector, LIMIT)
    num_full = vector.size // GROUP
    rows, rest = np.split(vector, [num_full * GROUP])
    rows = rows.reshape(num_full, GROUP)
    parts = [_quantize(rows[i : i + STRIDE], rng) for i in range(0, num_full, STRIDE)]
    if rest.size:
        parts.append(_quantize(rest[np.newaxis], rng))
    scales, levels = zip(*parts, strict=True)
    return b"".join(scales + levels)


def _quantize(rows: NDArray[np.float32], rng: np.random.Generator) -> tuple[bytes, bytes]:
    """Scales and levels of groups, a row ``(<= GROUP,)`` each."""
    values = np.abs(rows)
    peaks = values.max(axis=1)
    scales = np.where(peaks < MIN_PEAK, 0, peaks / np.float32(LEVELS)).astype("<f4")
    inverses = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    np.multiply(rows, inverses[:, np.newaxis], out=values)
    values += rng.random(values.shape, np.float32)
    np.floor(values, out=values)
    return scales.tobytes(), values.astype(np.int8).tobytes()


def _parse(data: bytes | memoryview, size: int) -> Encoded:
    check_length("int8", data, _num_bytes(size), size)
    scales = np.frombuffer(data, "<f4", _num_groups(size))
    if not ((scales >= 0) & (scales <= MAX_SCALE)).all():
        raise WireError(f"int8: a scale is not in [0, {MAX_SCALE:g}]")
    levels = np.frombuffer(data, np.int8, size, 4 * scales.size)
    return Encoded(size, "int8", levels, scales)
