"""`topk` and `topk-int8`: the values of largest magnitude; the rest waits with the sender.

Source:
    Stich et al. 2018, arXiv:1809.07599 (sparsified SGD with memory).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from petalfl.errors import WireError
from petalfl.vectors import Vector

from .codec import Codec, check_range
from .encoded import Encoded, sparse
from .float32 import MAX
from .lossless import deflate, inflate


def topk(name: str, share: float, values: Codec) -> Codec:
    """The ``max(1, floor(share * size + 0.5))`` largest; of equal ones the first.

    Args:
        name: Its own.
        share: Of the values that is kept, in (0, 0.5]: beyond, `f16` is shorter and keeps all.
        values: Encodes those that are kept.

    Raises:
        ValueError: ``share`` is outside (0, 0.5].
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"{name}: a share of {share:g}, expected one in (0, 0.5]")

    def num_kept(size: int) -> int:
        return max(1, int(share * size + 0.5))

    def num_bytes(size: int) -> int:
        return -(-size // 8) + values.max_bytes(num_kept(size))

    def encode(vector: Vector, rng: np.random.Generator) -> bytes:
        check_range(name, vector, MAX)
        is_kept = _largest(vector, num_kept(vector.size))
        bitmap = np.packbits(is_kept, bitorder="little").tobytes()
        return deflate(bitmap + values.encode(vector[is_kept], rng))

    def parse(data: bytes | memoryview, size: int) -> Encoded:
        content = inflate(name, data, num_bytes(size))
        bitmap = np.frombuffer(content, np.uint8, -(-size // 8))
        is_kept = _read_bitmap(name, bitmap, size, num_kept(size))
        kept = values.parse(content[bitmap.size :], num_kept(size))
        return sparse(size, is_kept, bitmap, kept)

    return Codec(name, num_bytes, encode, parse, has_fixed_length=False, has_residual=True)


def _largest(vector: Vector, count: int) -> NDArray[np.bool_]:
    magnitudes = np.abs(vector)
    rank = vector.size - count
    threshold = np.partition(magnitudes, rank)[rank]
    is_kept: NDArray[np.bool_] = magnitudes > threshold
    num_missing = count - np.count_nonzero(is_kept)
    is_kept[np.flatnonzero(magnitudes == threshold)[:num_missing]] = True
    return is_kept


def _read_bitmap(name: str, bitmap: NDArray[np.uint8], size: int, count: int) -> NDArray[np.bool_]:
    bits = np.unpackbits(bitmap, bitorder="little").view(np.bool_)
    if bits[size:].any():
        raise WireError(f"{name}: a bit is set beyond the last of {size} parameters")
    if (found := np.count_nonzero(bits)) != count:
        raise WireError(f"{name}: {found} bits are set, expected {count}")
    return bits[:size]
