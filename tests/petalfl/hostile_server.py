"""A server that speaks the protocol, HTTP and MQTT, and lies where a test wants it to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from petalfl import wire
from petalfl.model import MANIFEST_NAME, ModelManifest
from petalfl.training import Hyperparameters

IDENTITY = {
    "federation": "default", "device": "d", "password": "p" * 43, "private_blocks": ["head"],
}  # fmt: skip
Answer = tuple[int, bytes]


class HostileServer:
    """Honest in everything that is not replaced; one thread, loopback alone.

    Args:
        artifacts: Of an honest model.

    Attributes:
        replies: By path below ``/v1/default/``: status and body.
        wrap: Makes MQTT packets of that, given the topic.
        tell: What it publishes to the device on a message of its, besides receipts.
        received: What the device has published.
    """

    def __init__(self, artifacts: Path) -> None:
        self.manifest = ModelManifest.load(artifacts)
        files = {
            f"artifacts/{path.relative_to(artifacts).as_posix()}": path.read_bytes()
            for path in artifacts.rglob("*")
            if path.is_file()
        }
        self.replies: dict[str, Answer] = {path: (200, data) for path, data in files.items()}
        self.replies["manifest"] = (200, (artifacts / MANIFEST_NAME).read_bytes())
        self.replies["modalities"] = (200, b"{}")
        self.replies["enroll"] = (200, json.dumps(IDENTITY).encode())
        self.pointers = {}
        for block in self.manifest.blocks:
            data = (artifacts / block.artifacts.parameters.path).read_bytes()
            self.replies[f"blocks/{block.name}/1"] = (200, data)
            self.pointers[block.name] = wire.BlockVersion(1, hashlib.sha256(data).hexdigest())
        self.received: list[wire.Message] = []
        self.num_requests = 0
        self.tell: Callable[[wire.Message], Sequence[bytes]] = self.be_honest
        self.wrap: Callable[[str, bytes], bytes] = publish
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._servers: list[asyncio.Server] = []

    def task(self, **changes: Any) -> wire.Task:
        """An honest task of a device with modality ``a``; ``hyperparameters`` may be a mapping."""
        shared = {name: self.pointers[name] for name in ("encoder-a", "fusion")}
        fields = {
            "round_num": 1, "num_rounds": 0, "hyperparameters": Hyperparameters(0.01), "seed": 0,
            "blocks": shared,
        }  # fmt: skip
        return wire.Task(**{**fields, **changes})

    def be_honest(self, message: wire.Message) -> list[bytes]:
        """A task for who is ready, a receipt for what is complete, an end after the report."""
        if isinstance(message, wire.Ready):
            return [wire.encode(self.task())]
        if isinstance(message, (wire.Fin, wire.Report)):
            answers = [wire.encode(wire.Receipt(message.update_id, "accepted"))]
            if isinstance(message, wire.Report):
                answers.append(wire.encode(wire.Finish({})))
            return answers
        return []

    def start(self) -> None:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        http = await asyncio.start_server(self._serve_http, "127.0.0.1", 0)
        mqtt = await asyncio.start_server(self._serve_mqtt, "127.0.0.1", 0)
        self._servers = [http, mqtt]
        self.url = f"http://127.0.0.1:{http.sockets[0].getsockname()[1]}"
        port = mqtt.sockets[0].getsockname()[1]
        session = {"mqtt_host": "127.0.0.1", "mqtt_port": port, "mqtt_is_tls": False}
        self.replies.setdefault("session", (200, json.dumps(session).encode()))

    async def _serve_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.num_requests += 1
            if length := re.search(rb"(?i)content-length: (\d+)", head):
                await reader.readexactly(int(length[1]))
            path = head.split()[1].decode().removeprefix("/v1/default/")
            status, body = self.replies.get(path, (404, b"no such file"))
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
            writer.write(body)
            await writer.drain()
        writer.close()

    async def _serve_mqtt(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                kind, body = await _read_packet(reader)
                if kind >> 4 == 1:
                    writer.write(b"\x20\x02\0\0")
                elif kind >> 4 == 8:
                    writer.write(b"\x90\x03" + body[:2] + b"\x01")
                elif kind >> 4 == 3:
                    length = struct.unpack(">H", body[:2])[0]
                    writer.write(b"\x40\x02" + body[2 + length : 4 + length])
                    message = wire.decode(body[4 + length :])
                    self.received.append(message)
                    for answer in self.tell(message):
                        writer.write(self.wrap("fl/v1/default/down/d/task", answer))
                elif kind >> 4 == 14:
                    break
                await writer.drain()
        writer.close()


def publish(topic: str, payload: bytes) -> bytes:
    """An MQTT packet, QoS 0."""
    body = struct.pack(">H", len(topic)) + topic.encode() + payload
    length, digits = len(body), bytearray()
    while True:
        length, digit = divmod(length, 128)
        digits.append(digit | (0x80 if length else 0))
        if not length:
            return b"\x30" + bytes(digits) + body


async def _read_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    [kind] = await reader.readexactly(1)
    length = 0
    for shift in (0, 7, 14, 21):
        [digit] = await reader.readexactly(1)
        length |= (digit & 0x7F) << shift
        if digit < 0x80:
            break
    return kind, await reader.readexactly(length)


@contextmanager
def hostile_server(artifacts: Path) -> Iterator[HostileServer]:
    """Listens while the block runs."""
    server = HostileServer(artifacts)
    server.start()
    try:
        yield server
    finally:
        server.close()
