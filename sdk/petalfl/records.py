"""A record of the `ExampleStore`: how it lies in a file, and how arrays and labels lie in it.

A record is three little-endian uint32 (length, crc32 of the payload, crc32 of these two) and its
payload, a msgpack map. An array is ``(dtype, shape, bytes)``, little-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import msgpack
import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.data import Labels
from petalfl.errors import DataError

NO_TASK = ""  # of labels that were given without one
_PREFIX, _CRC = struct.Struct("<II"), struct.Struct("<I")
_HEADER_BYTES = _PREFIX.size + _CRC.size

Arrays: TypeAlias = dict[str, NDArray[Any]]
Span: TypeAlias = tuple[int, int]  # of a record, in its file


def framed(record: object) -> bytes:
    """What a file gets of it."""
    payload: bytes = msgpack.packb(record)
    prefix = _PREFIX.pack(len(payload), zlib.crc32(payload))
    return prefix + _CRC.pack(zlib.crc32(prefix)) + payload


def records(data: bytes) -> Iterator[tuple[Span, Any]]:
    """What lies in a file, None for a damaged record; ends where no record can begin."""
    start = 0
    while start + _HEADER_BYTES <= len(data):
        body = start + _HEADER_BYTES
        prefix = data[start : start + _PREFIX.size]
        length, crc = _PREFIX.unpack(prefix)
        is_framed = _CRC.unpack_from(data, start + _PREFIX.size) == (zlib.crc32(prefix),)
        if not is_framed or body + length > len(data):
            return
        payload = data[body : body + length]
        is_intact = zlib.crc32(payload) == crc
        yield (start, body + length), msgpack.unpackb(payload) if is_intact else None
        start = body + length


def pack_labels(labels: Labels | None) -> dict[str, Any] | None:
    """Labels of a record, by task; `DataError` as `pack`."""
    if labels is None:
        return None
    if isinstance(labels, Mapping):
        return pack("task", labels)
    return {NO_TASK: _pack_array("labels", labels)}


def pack(kind: str, arrays: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Arrays of a record, by name.

    Args:
        kind: Of the names, in words.

    Raises:
        DataError: There is no array, or one is not of finite numbers.
    """
    if not arrays:
        raise DataError(f"an example of no {kind}: expected one at least")
    for name in arrays:
        if not isinstance(name, str) or not name:
            raise DataError(f"{kind} {name!r}: expected a name")
    return {name: _pack_array(f"{kind} {name}", array) for name, array in arrays.items()}


def _pack_array(where: str, value: ArrayLike) -> tuple[str, tuple[int, ...], bytes]:
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"{where}: found no array: {error}") from error
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise DataError(f"{where}: found {array.dtype}, expected numbers of 64 bits at most")
    if not np.isfinite(array).all():
        raise DataError(f"{where}: found NaN or infinity")
    dtype = array.dtype.newbyteorder("<")
    return dtype.str, array.shape, array.astype(dtype, copy=False).tobytes()


def unpack(packed: Mapping[str, Any], names: Iterable[str]) -> Arrays:
    """Some of a record's arrays; they cannot be written to."""
    arrays = {}
    for name in names:
        dtype, shape, data = packed[name]
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays
