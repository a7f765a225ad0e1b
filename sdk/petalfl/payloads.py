"""An update's payload: a block's parameters as its codec writes them, then the running statistics.

Statistics travel as float32 whatever the codec: a variance that is a bit off may be below 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from petalfl.codecs import Codec, Encoded, encode_with_feedback
from petalfl.codecs.encoded import plain
from petalfl.errors import WireError
from petalfl.model import Block
from petalfl.vectors import Vector, from_bytes, to_bytes

_PIECE = 1 << 15  # values that are expanded at a time: they stay in the cache


@dataclass(frozen=True, eq=False)
class EncodedDelta:
    """A delta ``(size,)`` as it came: checked, finite, and expanded where it is needed alone.

    Attributes:
        codec: The name of what the payload was encoded with.
        payload: The bytes themselves, which ``parameters`` and ``statistics`` are views of; empty
            where whoever keeps the delta has moved these.
        factor: What every value is to be multiplied by, in (0, 1]: of a clipped delta.
    """

    codec: str
    payload: bytes | memoryview
    parameters: Encoded
    statistics: Encoded
    factor: float = 1.0

    @property
    def size(self) -> int:
        """Of the vector."""
        return self.parameters.size + self.statistics.size

    @property
    def num_bytes(self) -> int:
        """That its arrays take."""
        return self.parameters.num_bytes + self.statistics.num_bytes

    def decode(self) -> Vector:
        """All of it as float32; not a copy where the payload has it as it is."""
        if self.factor == 1 and not self.statistics.size:
            return self.parameters.decode()
        vector = np.empty(self.size, np.float32)
        self.read(0, self.size, vector)
        return vector

    def read(self, start: int, stop: int, out: Vector) -> None:
        """Writes the values from ``start``, a multiple of `ALIGN`, up to ``stop`` into ``out``."""
        end = self.parameters.size
        behind = max(start, end)
        if start < end:
            self.parameters.read(start, min(stop, end), out[: min(stop, end) - start])
        if behind < stop:
            out[behind - start :] = self.statistics.values[behind - end : stop - end]
        if self.factor != 1:
            np.multiply(out, self.factor, out=out, dtype=np.float64, casting="same_kind")

    @functools.cached_property
    def norm(self) -> float:
        """Euclidean, summed in float64: no finite delta overflows; without the factor."""
        squares = sum(_sum_of_squares(part) for part in (self.parameters, self.statistics))
        return float(np.sqrt(squares))


def plain_delta(vector: Vector, num_parameters: int | None = None) -> EncodedDelta:
    """A finite delta as it is, for what arrives otherwise than over the wire.

    Args:
        num_parameters: What lies behind them are statistics; the default is that there are none.
    """
    end = vector.size if num_parameters is None else num_parameters
    data = np.ascontiguousarray(vector, "<f4").data.cast("B")
    parameters = vector if end == vector.size else vector[:end]
    return EncodedDelta("f32", data, plain(parameters), plain(vector[end:]))


def max_payload_bytes(codec: Codec, block: Block) -> int:
    """The most bytes that an update of the block takes."""
    return codec.max_bytes(block.num_trainable) + _num_behind(block)


def check_payload_bytes(codec: Codec, num_bytes: int, block: Block) -> None:
    """Refuses to wait for a payload that no update of the block can have.

    Raises:
        WireError: It is too long, or too short where the length is fixed.
    """
    most = max_payload_bytes(codec, block)
    if num_bytes > most or (codec.has_fixed_length and num_bytes < most):
        or_less = "" if codec.has_fixed_length else " at most"
        raise WireError(f"{num_bytes} bytes of {codec.name} announced, expected {most}{or_less}")


def encode_payload(
    codec: Codec, block: Block, delta: Vector, residual: Vector | None, rng: np.random.Generator
) -> tuple[bytes, Vector | None]:
    """The payload of a delta, and the new residual ``(block.num_trainable,)``.

    Raises:
        ValueError: The codec cannot encode the delta.
    """
    parameters, statistics = np.split(delta, [block.num_trainable])
    payload, left = encode_with_feedback(codec, parameters, residual, rng)
    if not np.isfinite(statistics).all():
        raise ValueError("a running statistic is NaN or infinite")
    return payload + to_bytes(statistics), left


def parse_payload(codec: Codec, block: Block, payload: bytes | memoryview) -> EncodedDelta:
    """The inverse: a delta ``(block.size,)``, finite, and not expanded.

    Raises:
        WireError: The payload is not one of this codec and block.
    """
    view, end = memoryview(payload), len(payload) - _num_behind(block)
    if end < 0:
        raise WireError(f"{len(payload)} bytes, expected {_num_behind(block)} of statistics alone")
    parameters = codec.parse(view[:end], block.num_trainable)
    try:
        statistics = from_bytes(view[end:], block.size - block.num_trainable)
    except ValueError as error:
        raise WireError(f"statistics: {error}") from error
    return EncodedDelta(codec.name, payload, parameters, plain(statistics))


def _sum_of_squares(part: Encoded) -> float:
    total, values = 0.0, np.empty(min(part.size, _PIECE), np.float32)
    for start in range(0, part.size, _PIECE):
        stop = min(start + _PIECE, part.size)
        piece = values[: stop - start]
        part.read(start, stop, piece)
        total += float(np.einsum("i,i->", piece, piece, dtype=np.float64))
    return total


def _num_behind(block: Block) -> int:
    return 4 * (block.size - block.num_trainable)
