"""What a codec is: a vector as fewer bytes, and back from bytes that nobody vouches for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from petalfl.errors import WireError
from petalfl.vectors import Vector

from .encoded import Encoded


class Codec(NamedTuple):
    """A pair of pure functions, by the name that the wire has for them.

    Attributes:
        name: As in an update's manifest, parameters included.
        max_bytes: The most bytes of a vector of a size.
        encode: Vector and generator to payload. ValueError: a value is not finite or beyond the
            codec's range, when `f32` must do.
        parse: Payload and size to what they say, checked but not expanded; `WireError` for
            whatever `encode` cannot have made.
        has_fixed_length: Every payload is as long as ``max_bytes`` says.
        has_residual: What encoding leaves out is the sender's to keep and to add next time.
    """

    name: str
    max_bytes: Callable[[int], int]
    encode: Callable[[Vector, np.random.Generator], bytes]
    parse: Callable[[bytes | memoryview, int], Encoded]
    has_fixed_length: bool = True
    has_residual: bool = False

    def decode(self, data: bytes | memoryview, size: int) -> Vector:
        """The vector itself; errors as of ``parse``."""
        return self.parse(data, size).decode()


def check_length(name: str, data: bytes | memoryview, expected: int, size: int) -> None:
    """Refuses a payload that has not the length which follows from the vector's size.

    Raises:
        WireError: It has not.
    """
    if len(data) != expected:
        raise WireError(f"{name}: {len(data)} bytes, expected {expected} for {size} parameters")


def check_range(name: str, vector: Vector, limit: float) -> None:
    """Refuses to encode what the codec cannot say.

    Raises:
        ValueError: A value is NaN, infinite or beyond ±limit.
    """
    peak = max(float(vector.max()), -float(vector.min()))
    if not peak <= limit:  # NaN is not, either
        raise ValueError(f"{name}: a value of {peak:g}, expected none beyond {limit:g}")
