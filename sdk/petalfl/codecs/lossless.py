"""zlib where it pays: content of a known length, sent as it is where that is no longer."""

from __future__ import annotations

import zlib

from petalfl.errors import WireError

LEVEL = 1  # higher ones take longer and save next to nothing


def deflate(content: bytes) -> bytes:
    """A zlib stream (RFC 1950) of the content, or the content where that is no longer."""
    stream = zlib.compress(content, LEVEL)
    return stream if len(stream) < len(content) else content


def inflate(name: str, data: bytes | memoryview, num_bytes: int) -> memoryview:
    """The content of ``num_bytes`` bytes; never takes more memory than that.

    Raises:
        WireError: It is longer or shorter, or its stream is damaged.
    """
    if len(data) == num_bytes:
        return memoryview(data)
    if len(data) > num_bytes:
        raise WireError(f"{name}: {len(data)} bytes, expected {num_bytes} at most")
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, num_bytes + 1)  # with room to see that it goes on
    except zlib.error as error:
        raise WireError(f"{name}: no zlib stream: {error}") from error
    if len(content) != num_bytes or not stream.eof or stream.unused_data:
        raise WireError(f"{name}: its zlib stream has not the {num_bytes} bytes expected")
    return memoryview(content)
