"""A vector as its payload has it: checked, and expanded piece by piece where it is needed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.vectors import Vector

GROUP = 256  # int8 values that share a scale: as exact as a scale for each row of a matrix
ALIGN = 8 * GROUP  # where pieces begin: whole groups, and whole bytes of a bitmap

Form: TypeAlias = Literal["f32", "f16", "bf16", "int8"]


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A finite vector ``(size,)``; its arrays are views of the payload.

    Attributes:
        size: Of the vector.
        form: What a value is.
        values: ``(size,)``, or with a bitmap those alone that are not left out: float32, the bits
            of an f16 or bf16 as uint16, or the levels of an int8.
        scales: Of int8, float32: the k-th is that of ``values[k * GROUP : (k + 1) * GROUP]``.
        bitmap: Which values are not left out, and thus 0: uint8 ``(ceil(size / 8),)``, the low bit
            first. None: all are there.
        starts: With a bitmap: how many ``values`` lie before each multiple of `ALIGN`, and in all.
    """

    size: int
    form: Form
    values: NDArray[Any]
    scales: Vector = field(default_factory=lambda: np.zeros(0, np.float32))
    bitmap: NDArray[np.uint8] | None = None
    starts: NDArray[np.int64] | None = None

    @property
    def num_bytes(self) -> int:
        """That it takes."""
        bitmap = 0 if self.bitmap is None else self.bitmap.nbytes
        return self.values.nbytes + self.scales.nbytes + bitmap

    def decode(self) -> Vector:
        """All of it; not a copy where the payload has it as it is."""
        if self.form == "f32" and self.bitmap is None:
            return self.values
        vector = np.empty(self.size, np.float32)
        self.read(0, self.size, vector)
        return vector

    def read(self, start: int, stop: int, out: Vector) -> None:
        """Writes the values from ``start``, a multiple of `ALIGN`, up to ``stop`` into ``out``."""
        if self.bitmap is None or self.starts is None:
            expand(self.form, self.values[start:stop], self._scales(start, stop), 0, out)
            return
        bitmap = self.bitmap[start // 8 : -(-stop // 8)]
        is_kept = np.unpackbits(bitmap, count=stop - start, bitorder="little").view(np.bool_)
        low = int(self.starts[start // ALIGN])
        high = low + np.count_nonzero(is_kept)
        kept = np.empty(high - low, np.float32)
        expand(self.form, self.values[low:high], self._scales(low, high), low % GROUP, kept)
        out[:] = 0
        out[is_kept] = kept

    def _scales(self, start: int, stop: int) -> Vector:
        return self.scales[start // GROUP : -(-stop // GROUP)]


def plain(vector: Vector) -> Encoded:
    """A finite float32 vector as it is."""
    return Encoded(vector.size, "f32", vector)


def sparse(size: int, bits: NDArray[np.bool_], bitmap: NDArray[np.uint8], kept: Encoded) -> Encoded:
    """The vector of which only ``kept`` is not 0; ``bits`` ``(size,)`` are those of ``bitmap``."""
    padded = np.zeros(-(-size // ALIGN) * ALIGN, np.bool_)
    padded[:size] = bits
    counts = np.count_nonzero(padded.reshape(-1, ALIGN), axis=1)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return Encoded(size, kept.form, kept.values, kept.scales, bitmap, starts)


def expand(form: Form, values: NDArray[Any], scales: Vector, skip: int, out: Vector) -> None:
    """Writes values as float32; of the first scale's group, ``skip`` lie before them."""
    if form == "f32":
        out[:] = values
    elif form == "f16":
        np.take(every_half(), values, out=out, mode="clip")  # faster than ``astype``
    elif form == "bf16":
        bits = out.view(np.uint32)
        bits[:] = values
        bits <<= np.uint32(16)
    else:
        _expand_int8(values, scales, skip, out)


def _expand_int8(levels: NDArray[np.int8], scales: Vector, skip: int, out: Vector) -> None:
    if skip:
        head = min(GROUP - skip, levels.size)
        np.multiply(levels[:head], scales[0], out=out[:head])
        levels, scales, out = levels[head:], scales[1:], out[head:]
    num_full = levels.size // GROUP
    end = num_full * GROUP
    np.multiply(
        levels[:end].reshape(num_full, GROUP),
        scales[:num_full, np.newaxis],
        out=out[:end].reshape(num_full, GROUP),
    )
    np.multiply(levels[end:], scales[num_full:], out=out[end:])


@functools.cache
def every_half() -> Vector:
    """By the 65,536 bit patterns of an f16, what it is as float32."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
