"""An HTTP server of a test's own files, with ranges and entity tags, and with faults on demand."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """Serves ``files`` by path.

    Attributes:
        requests: Path, ``Range`` and ``If-Range`` of each.
        sent: Bytes of bodies by path.
        cuts: After how many bytes of body the next answers end; then they are whole.
        headers: Instead of those that would be sent.
        has_ranges: Else the whole comes every time.
        status: An error that is the answer to everything.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    cuts: list[int] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    has_ranges: bool = True
    status: int = 0
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        self.requests.append((handler.path, asked, condition))
        body = self.files.get(handler.path)
        if body is None or self.status:
            handler.send_error(self.status or 404)
            return
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        if handler.headers.get("If-None-Match") == etag:
            handler.send_response(304)
            handler.end_headers()
            return
        start, headers = 0, {"ETag": etag}
        if asked and self.has_ranges and condition in (None, etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        handler.send_response(206 if "Content-Range" in headers else 200)
        part = body[start:]
        for name, value in (headers | {"Content-Length": str(len(part))} | self.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        part = part[: self.cuts.pop(0)] if self.cuts else part
        self.sent[handler.path] += len(part)
        handler.wfile.write(part)


@contextmanager
def file_server(**fields: Any) -> Iterator[FileServer]:
    served = FileServer(**fields)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        served.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield served
        finally:
            http.shutdown()
            thread.join()
