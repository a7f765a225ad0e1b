"""A block's parameters and running statistics: one flat float32 vector, and its bytes."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[np.float32]  # (block.size,)


def to_bytes(vector: Vector) -> bytes:
    """The vector as little-endian float32: stored, sent and served in this form alone."""
    vector.flags.writeable = False
    return vector.astype("<f4", copy=False).tobytes()


def from_bytes(data: bytes | memoryview, size: int) -> Vector:
    """The inverse of `to_bytes`, read-only and without a copy.

    Raises:
        ValueError: The length is not that of ``size`` parameters, or a value is not finite.
    """
    if len(data) != 4 * size:
        raise ValueError(f"{len(data)} bytes, expected {4 * size} for {size} parameters")
    vector = np.frombuffer(data, "<f4").astype(np.float32, copy=False)
    if not np.isfinite(vector).all():
        raise ValueError("a value is NaN or infinite")
    vector.flags.writeable = False
    return vector
