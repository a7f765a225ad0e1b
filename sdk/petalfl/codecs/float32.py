"""`f32`: every value as it is."""

from __future__ import annotations

import numpy as np

from petalfl.errors import WireError
from petalfl.vectors import Vector, from_bytes, to_bytes

from .codec import Codec, check_range
from .encoded import Encoded, plain

MAX = float(np.finfo(np.float32).max)


def float32() -> Codec:
    """Little-endian float32: exact."""
    return Codec("f32", lambda size: 4 * size, _encode, _parse)


def _encode(vector: Vector, rng: np.random.Generator) -> bytes:
    check_range("f32", vector, MAX)
    return to_bytes(vector)


def _parse(data: bytes | memoryview, size: int) -> Encoded:
    try:
        return plain(from_bytes(data, size))
    except ValueError as error:
        raise WireError(f"f32: {error}") from error
