"""A bad network between devices and server: a TCP proxy that is late, loses and hangs up.

What the network loses, TCP sends again: on a stream a loss is a stall, and all that follows
waits. Two connections at once stall each on its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

SEGMENT_BYTES = 1460
READ_BYTES = 4 * SEGMENT_BYTES
_Queue: TypeAlias = "asyncio.Queue[tuple[float, bytes]]"  # when it is due, and what


class LossyProxy:
    """Forwards connections to a port of 127.0.0.1; on a thread of its own.

    Args:
        delay_s: Of each direction.
        loss: The share of segments that is lost; each stalls its stream by ``stall_s``.
        stall_s: Until it is sent again, after the delay: a retransmission timeout.
        reset_every_bytes: Of a connection, about how many pass until it is reset; 0: never.
    """

    def __init__(
        self,
        target_port: int,
        rng: random.Random,
        *,
        delay_s: float = 0.0,
        loss: float = 0.0,
        stall_s: float = 0.3,
        reset_every_bytes: int = 0,
    ) -> None:
        self.port = 0
        self.num_connections = self.num_stalls = self.num_resets = 0
        self._target_port, self._rng = target_port, rng
        self._delay_s, self._loss, self._stall_s = delay_s, loss, stall_s
        self._reset_every = reset_every_bytes
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lossy proxy")
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Future[None]] = set()

    def start(self) -> None:
        """Listens, on the port that it had before if it had one."""
        if not self._thread.is_alive():
            self._thread.start()
        self._call(self._listen())

    def vanish(self) -> None:
        """Resets every connection and refuses new ones, until it is started again."""
        self._call(self._hang_up())

    def close(self) -> None:
        """Vanishes for good."""
        self.vanish()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it has vanished since this was accepted
            writer.transport.abort()
            return
        self.num_connections += 1
        connection = asyncio.ensure_future(self._forward(reader, writer))
        self._connections.add(connection)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await connection
        writer.transport.abort()  # also where the forwarding was ended before it began
        self._connections.discard(connection)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pumps: list[asyncio.Task[None]] = []
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            writers.append(far_writer)
            left = _Lifetime(self._rng.uniform(0.5, 1.5) * self._reset_every)
            for source, sink in ((reader, far_writer), (far_reader, writer)):
                queue: _Queue = asyncio.Queue(1000)
                pumps += [
                    asyncio.create_task(self._read(source, queue)),
                    asyncio.create_task(self._write(sink, queue, left)),
                ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for one in writers:
                one.transport.abort()

    async def _read(self, reader: asyncio.StreamReader, queue: _Queue) -> None:
        """What is under way lies in the queue, so that a delay does not slow down what follows."""
        due_s, data = 0.0, b"-"
        while data:
            data = await reader.read(READ_BYTES)
            due_s = max(due_s, self._loop.time() + self._delay_s)
            if self._rng.random() > (1 - self._loss) ** -(-len(data) // SEGMENT_BYTES):
                self.num_stalls += 1
                due_s += self._stall_s
            await queue.put((due_s, data))

    async def _write(self, writer: asyncio.StreamWriter, queue: _Queue, left: _Lifetime) -> None:
        while True:
            due_s, data = await queue.get()
            await asyncio.sleep(max(0.0, due_s - self._loop.time()))
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            left.num_bytes -= len(data)
            if self._reset_every and left.num_bytes <= 0:
                self.num_resets += 1
                raise ConnectionResetError("by lot")


@dataclass(slots=True)
class _Lifetime:
    """Of a connection."""

    num_bytes: float


@contextlib.contextmanager
def lossy_proxy(target_port: int, seed: int = 0, **more: Any) -> Iterator[LossyProxy]:
    """A proxy that listens; ``more`` as in `LossyProxy`."""
    proxy = LossyProxy(target_port, random.Random(seed), **more)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
