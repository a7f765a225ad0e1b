"""Tiles of encoded vectors as one run of bytes, as they are sent to a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded
from petalfl.codecs.encoded import ALIGN, GROUP, Form

LINE = 256  # bytes: where every array begins


class Array(NamedTuple):
    """Where an array lies in a run of bytes."""

    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of it."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Packed(NamedTuple):
    """A tile of some vectors of one form, whose arrays lie one behind the other.

    Attributes:
        form: As of `Encoded`.
        num_bytes: Of all.
        factors: float64 ``(rows,)``.
        values: ``(rows, width)``; of a sparse vector, which is alone, ``(kept,)``.
        scales: float32 ``(rows, groups)``; of a sparse one ``(groups,)``; else nothing.
        bitmap: Of a sparse vector: uint8 ``(ceil(width / 8),)``.
        starts: Of a sparse vector: int64, by `ALIGN` positions: how many values lie before.
        skip: Of a sparse vector: values of its first group that lie before the tile.
    """

    form: Form
    width: int
    num_bytes: int
    factors: Array
    values: Array
    scales: Array
    bitmap: Array | None = None
    starts: Array | None = None
    skip: int = 0


def pack(
    vectors: Sequence[Encoded],
    factors: NDArray[np.float64],
    start: int,
    stop: int,
    out: NDArray[np.uint8],
) -> tuple[int, Packed]:
    """Writes as many of the vectors' tiles as ``out`` has room for; how many, and where.

    Those at the beginning that have one form; of sparse ones the first alone.
    """
    first = vectors[0]
    if first.bitmap is not None:
        return 1, _pack_sparse(first, float(factors[0]), start, stop, out)
    width, groups = stop - start, slice(start // GROUP, -(-stop // GROUP))
    num_groups = len(first.scales[groups])
    row_bytes = width * first.values.itemsize + 4 * num_groups + 8
    most = max(1, (out.size - 3 * LINE) // row_bytes)
    rows = []
    for vector in vectors[:most]:
        if vector.form != first.form or vector.bitmap is not None:
            break
        rows.append(vector)
    layout = _Layout()
    packed = Packed(
        first.form, width, 0,
        layout.array("f8", len(rows)),
        layout.array(first.values.dtype.str, len(rows), width),
        layout.array("f4", len(rows), num_groups),
    )  # fmt: skip
    packed = packed._replace(num_bytes=layout.end)
    view(out, packed.factors)[:] = factors[: len(rows)]
    values, scales = view(out, packed.values), view(out, packed.scales)
    for k, vector in enumerate(rows):
        values[k] = vector.values[start:stop]
        scales[k] = vector.scales[groups]
    return len(rows), packed


def _pack_sparse(
    vector: Encoded, factor: float, start: int, stop: int, out: NDArray[np.uint8]
) -> Packed:
    assert vector.bitmap is not None and vector.starts is not None
    starts = vector.starts[start // ALIGN : -(-stop // ALIGN) + 1]
    low, high = int(starts[0]), int(starts[-1])
    has_scales = bool(vector.scales.size)
    scales = vector.scales[low // GROUP : -(-high // GROUP)] if has_scales else vector.scales
    bitmap = vector.bitmap[start // 8 : -(-stop // 8)]
    layout = _Layout()
    packed = Packed(
        vector.form, stop - start, 0,
        layout.array("f8", 1),
        layout.array(vector.values.dtype.str, high - low),
        layout.array("f4", scales.size),
        layout.array("u1", bitmap.size),
        layout.array("i8", starts.size),
        low % GROUP,
    )  # fmt: skip
    assert packed.bitmap is not None and packed.starts is not None
    view(out, packed.factors)[:] = factor
    view(out, packed.values)[:] = vector.values[low:high]
    view(out, packed.scales)[:] = scales
    view(out, packed.bitmap)[:] = bitmap
    view(out, packed.starts)[:] = starts - low
    return packed._replace(num_bytes=layout.end)


def room_for(width: int, rows: int) -> int:
    """The bytes that so many vectors take at most, whatever their form."""
    return rows * (5 * width + 32 * LINE)


def view(data: NDArray[np.uint8], array: Array) -> NDArray[Any]:
    """An array in a run of bytes."""
    part = data[array.offset : array.offset + array.num_bytes]
    return part.view(array.dtype).reshape(array.shape)


class _Layout:
    def __init__(self) -> None:
        self.end = 0

    def array(self, dtype: str, *shape: int) -> Array:
        """Room for one more."""
        made = Array(-(-self.end // LINE) * LINE, dtype, shape)
        self.end = made.offset + made.num_bytes
        return made
