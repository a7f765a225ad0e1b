"""Files over HTTP: ranges, entity tags, and never more than a piece of one in memory.

Source: RFC 9110, sections 8.8.3, 13.1 and 14.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from aiohttp import web

from petalfl.errors import PetalError

from .catalog import File

PIECE_BYTES = 128 << 10


async def send_file(
    request: web.Request, file: File, sent: Callable[[int], None]
) -> web.StreamResponse:
    """Answers with a file, or with the part of it that is asked for.

    Its ETag is its sha256. A range in ``Range`` is sent alone (206), if ``If-Range`` is missing or
    names this file; of several ranges, or malformed ones, the whole is sent.

    Args:
        sent: Called with the number of bytes of each piece that went out.
    """
    headers = {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes"}
    if any(tag.value in ("*", file.sha256) for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    start, end = _range(request, file)
    if start >= end and file.num_bytes:
        headers["Content-Range"] = f"bytes */{file.num_bytes}"
        raise web.HTTPRequestRangeNotSatisfiable(headers=headers)
    is_whole = (start, end) == (0, file.num_bytes)
    if not is_whole:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.num_bytes}"
    response = web.StreamResponse(status=200 if is_whole else 206, headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = end - start
    if request.method != "HEAD":
        await _send_pieces(request, response, file, range(start, end, PIECE_BYTES), sent)
    if not response.prepared:
        await response.prepare(request)
    await response.write_eof()
    return response


async def _send_pieces(
    request: web.Request,
    response: web.StreamResponse,
    file: File,
    offsets: range,
    sent: Callable[[int], None],
) -> None:
    for offset in offsets:
        try:
            data = await _read(file, offset, min(offset + offsets.step, offsets.stop))
        except PetalError as error:
            if not response.prepared:
                raise  # it can still be told
            raise ConnectionResetError(str(error)) from error
        if not response.prepared:
            await response.prepare(request)
        await response.write(data)
        sent(len(data))


async def _read(file: File, start: int, end: int) -> bytes | memoryview:
    if isinstance(file.source, bytes):
        return file.read(start, end)
    return await asyncio.to_thread(file.read, start, end)


def _range(request: web.Request, file: File) -> tuple[int, int]:
    """Start and end of what is asked for; start is not before end where there is nothing."""
    is_other = request.headers.get("If-Range", f'"{file.sha256}"') != f'"{file.sha256}"'
    if request.method != "GET" or is_other:
        return 0, file.num_bytes
    if re.fullmatch("bytes=-0+", request.headers.get("Range", "")):  # the last 0: of no byte
        return file.num_bytes, file.num_bytes
    try:
        start, end, _ = request.http_range.indices(file.num_bytes)
    except ValueError:
        return 0, file.num_bytes
    return start, end
