"""A broker, a cable to it that a test can pull, and what comes through."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from petalfl.mqtt import MqttTransport
from server.broker import Broker, open_broker

CHUNK = 120 * 1024
UP, STATUS = "fl/v1/f/req/dev-1", "fl/v1/f/dev/dev-1/status"
DOWN = "fl/v1/f/down/dev-1"
LOGIN = ("dev-1", "pw-1")
Opener = Callable[..., Awaitable[MqttTransport]]


async def start_broker(folder: Path, stack: AsyncExitStack, spec: str = "embedded") -> Broker:
    broker = open_broker(spec, data_dir=folder, federation="f")
    await broker.start()
    stack.push_async_callback(broker.close)
    await broker.grant(*LOGIN)
    return broker


class Cable:
    """A TCP relay to a broker: `pull` breaks it, `plug` mends it, `mute` keeps only the form."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.target, self.port = port, 0
        self.num_connections = 0
        self.is_mute = False
        self.num_stalled = 0
        self.num_bytes, self.cut_after_bytes = 0, 1 << 62
        self.is_flowing = asyncio.Event()  # when not, what comes is kept and then sent as one
        self.is_flowing.set()
        self.tls = tls
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._relays: set[asyncio.Task[None]] = set()

    @property
    def is_in_use(self) -> bool:
        return bool(self._relays)

    async def plug(self) -> None:
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=1 << 20, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def pull(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()
        for end in self._ends:
            with contextlib.suppress(OSError):
                await end.wait_closed()
        if self._relays:
            await asyncio.wait(self._relays)

    def cut(self) -> None:
        """Breaks the connections there are; new ones come through."""
        for end in self._ends:
            end.transport.abort()
        for relay in self._relays:
            relay.cancel()

    def unmute(self) -> None:
        """Breaks the connections that were made while it was mute; new ones come through."""
        self.is_mute = False
        self.cut()

    def stall(self) -> None:
        """Swallows what the connections there are carry, without breaking them."""
        self.num_stalled = self.num_connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._ends.add(writer)
        if self.is_mute:
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._ends.add(far_writer)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            relay = asyncio.create_task(self._relay(self.num_connections, source, sink))
            self._relays.add(relay)
            relay.add_done_callback(self._relays.discard)

    async def _relay(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 16):
                await self.is_flowing.wait()
                if number > self.num_stalled:
                    sink.write(data)
                    await sink.drain()
                self.num_bytes += len(data)
                if self.num_bytes > self.cut_after_bytes:
                    self.cut_after_bytes = 1 << 62
                    self.cut()
        except (OSError, asyncio.CancelledError):
            pass
        if number > self.num_stalled:
            sink.close()


class Inbox:
    """A handler that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []

    def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, payload))

    async def wait_for(self, message: tuple[str, bytes]) -> None:
        await until(lambda: message in self.messages, f"{message[0]}: {self.messages[-3:]}")


async def until(is_so: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_s, f"waited for {what}"
        await asyncio.sleep(0.01)


async def until_arrived(sender: MqttTransport, topic: str, inbox: Inbox, payload: bytes) -> None:
    """Sends until it comes: on_connect is called before the subscriptions are answered."""

    async def attempt() -> bool:
        await sender.publish(topic, payload)
        await asyncio.sleep(0.05)
        return (topic, payload) in inbox.messages

    for _ in range(600):
        if await attempt():
            return
    raise AssertionError(f"{topic} never came")


async def put_away(transport: MqttTransport) -> None:
    """Closes a transport even if its keeper has died."""
    with contextlib.suppress(Exception):
        await transport.close()
    transport._keeper = None
    await transport.close()


def open_sockets() -> int:
    gc.collect()
    links = [fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return sum(str(link).startswith("socket:") for link in links)


async def settled(sockets: int, tasks: int) -> None:
    await until(
        lambda: (open_sockets(), len(asyncio.all_tasks())) == (sockets, tasks),
        f"{sockets} sockets and {tasks} tasks: {open_sockets()} and {asyncio.all_tasks()}",
    )
