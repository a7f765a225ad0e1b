"""An update's payload: a block's parameters as its codec writes them, then the running statistics.

Statistics travel as float32 whatever the codec: a variance that is a bit off may be below 0.
"""

from __future__ import annotations

import numpy as np

from petalfl.codecs import Codec, encode_with_feedback
from petalfl.errors import WireError
from petalfl.model import Block
from petalfl.vectors import Vector, from_bytes, to_bytes


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


def decode_payload(codec: Codec, block: Block, payload: bytes | memoryview) -> Vector:
    """The inverse: a delta ``(block.size,)``, finite.

    Raises:
        WireError: The payload is not one of this codec and block.
    """
    if block.num_trainable == block.size:
        return codec.decode(payload, block.size)
    view, end = memoryview(payload), len(payload) - _num_behind(block)
    if end < 0:
        raise WireError(f"{len(payload)} bytes, expected {_num_behind(block)} of statistics alone")
    parameters = codec.decode(view[:end], block.num_trainable)
    try:
        statistics = from_bytes(view[end:], block.size - block.num_trainable)
    except ValueError as error:
        raise WireError(f"statistics: {error}") from error
    return np.concatenate([parameters, statistics])


def _num_behind(block: Block) -> int:
    return 4 * (block.size - block.num_trainable)
