"""The child process of the embedded broker: amqtt 0.12.1, with its gaps closed.

Left alone, amqtt would: send anyone who connects the retained messages of others; publish a
last will past the access rules; look up, and overwrite, the session of a client id before it
checks the password; hand the session of one user to another with the same client id; never
notice a silent peer, or one that leaves at once; wait forever on one that stopped reading;
forget messages it has acknowledged when their sender leaves; and read packets of 256 MB.
`GuardedBroker` overrides its private methods for that, hence the pin to one version in
pyproject.toml.

Commands come as JSON lines on stdin and are answered on stdout. At the end of stdin the process
exits: the parent may be gone by kill -9, and no orphan may keep the port.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import logging
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker as AmqttBroker
from amqtt.contexts import Action
from amqtt.errors import AMQTTError, ProtocolHandlerError
from amqtt.mqtt.connack import NOT_AUTHORIZED, ConnackPacket
from amqtt.mqtt.protocol.broker_handler import BrokerProtocolHandler

from petalfl.mqtt import Endpoint

from ..tls import ServerTls
from .credentials import Credential
from .grants import Grants, covers, device_grants, server_grants

MAX_PACKET_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0
_MAX_COMMAND_BYTES = 1 << 26  # the first command holds all credentials
_LISTENER = "default"

logger = logging.getLogger("petalfl.broker")


class _Reader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt is untyped
    """A reader that bounds a packet and knows when its peer last finished one.

    Attributes:
        is_public: Whether it came in where others than the server itself may.
    """

    def __init__(self, reader: asyncio.StreamReader, is_public: bool) -> None:
        super().__init__(reader)
        self.is_public = is_public
        self.heard_s = asyncio.get_running_loop().time()
        self.max_silence_s = math.inf

    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET_BYTES:
            raise ValueError(f"found a packet of {n} bytes; at most {MAX_PACKET_BYTES} are read")
        data: bytes = await super().read(n)
        self.heard_s = asyncio.get_running_loop().time()
        return data


class _Writer(StreamWriterAdapter):  # type: ignore[misc]
    """A writer that hangs up at once; amqtt's waits for a peer that stopped reading."""

    async def close(self) -> None:
        self.is_closed = True
        self._writer.transport.abort()


class _Handler(BrokerProtocolHandler):  # type: ignore[misc]
    """A protocol handler that notices a peer which leaves as soon as it is let in.

    amqtt makes its future for that after it starts to read, and may wait on it forever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._end: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def handle_disconnect(self, disconnect: Any) -> None:
        if not self._end.done():
            self._end.set_result(disconnect)

    async def handle_connect(self, connect: Any) -> None:
        await self.handle_disconnect(None)  # a second CONNECT is a breach of the protocol

    async def wait_disconnect(self) -> Any:
        return await self._end

    async def stop(self) -> None:
        await super().stop()
        await self.handle_disconnect(None)


class GuardedBroker(AmqttBroker):  # type: ignore[misc]
    """amqtt with our logins and grants, checked at CONNECT, publish, subscribe and delivery."""

    def __init__(
        self, federations: list[str], server: str, credentials: dict[str, Credential]
    ) -> None:
        # No plugins: the default ones let anybody in, log every packet and publish $SYS topics.
        super().__init__({"listeners": {_LISTENER: {"type": "external"}}, "plugins": {}})
        self._federations = federations
        self._server = server
        self._credentials = credentials
        self._grants = {
            name: self._grants_of(name, credential)
            for name, credential in credentials.items()
            if name != server
        }
        self._grants[server] = server_grants(*federations)

    async def accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_public: bool = True
    ) -> None:
        """Serve one connection to its end; where it is not public, the server's own."""
        hang_up = _Writer(writer)
        try:
            await self.external_connected(_Reader(reader, is_public), hang_up, _LISTENER)
        finally:
            await hang_up.close()

    async def grant(self, device: str, credential: Credential) -> None:
        """Let a device in with this credential only."""
        self._credentials[device] = credential
        self._grants[device] = self._grants_of(device, credential)
        await self._cut(device)

    def _grants_of(self, device: str, credential: Credential) -> Grants:
        return device_grants(credential.federation or self._federations[0], device)

    async def revoke(self, device: str) -> None:
        """Let a device in no more."""
        self._credentials.pop(device, None)
        self._grants.pop(device, None)
        await self._cut(device)

    async def _cut(self, username: str) -> None:
        for client_id, (session, _) in list(self._sessions.items()):
            if session.username == username:
                await self._cleanup_session(client_id)

    # What follows overrides amqtt.

    async def _authenticate(self, session: Any, _: Any = None) -> bool:
        credential = self._credentials.get(session.username)
        return credential is not None and credential.admits(session.password or "")

    async def _topic_filtering(self, session: Any, topic: str, action: Any) -> bool:
        # Unlike amqtt's plugin call this never yields to the loop, during which a change of the
        # subscriptions would break the iteration in `_run_broadcast` and lose the message.
        grants = self._grants.get(session.username, Grants((), ()))
        filters = grants.publish if action == Action.PUBLISH else grants.receive
        return any(covers(granted, topic) for granted in filters)

    async def _initialize_client_session(
        self, reader: _Reader, writer: _Writer, remote_address: str, remote_port: int
    ) -> tuple[Any, Any]:
        try:
            handler, session = await asyncio.wait_for(
                _Handler.init_from_connect(reader, writer, self.plugins_manager),
                CONNECT_TIMEOUT_S,
            )
        except Exception as error:  # any bytes may arrive here
            raise AMQTTError(f"no CONNECT from {remote_address}: {error!r}") from error
        is_expected = reader.is_public or session.username == self._server
        if not is_expected or not await self._may_connect(session):
            logger.warning("refused %r from %s", session.username, remote_address)
            await ConnackPacket.build(0, NOT_AUTHORIZED).to_stream(writer)
            raise AMQTTError("not authorized")
        await self._make_fresh(session, reader)
        return handler, session

    async def _may_connect(self, session: Any) -> bool:
        if not await self._authenticate(session):
            return False
        if not session.will_flag:
            return True
        return await self._topic_filtering(session, session.will_topic, Action.PUBLISH)

    async def _make_fresh(self, session: Any, reader: _Reader) -> None:
        """Give every connection a clean session under a client id of its own user."""
        session.client_id = f"{session.username}/{session.client_id}"
        session.clean_session, session.parent = True, 0
        # Silence is ours to judge: amqtt would arm a timer per packet and then ignore it.
        reader.max_silence_s = 1.5 * session.keep_alive or math.inf
        session.keep_alive = 0
        while session.client_id in self._sessions:
            await self._cleanup_session(session.client_id)

    async def _handle_client_session(
        self, reader: _Reader, writer: _Writer, client_session: Any, handler: Any, *rest: Any
    ) -> None:
        try:
            await super()._handle_client_session(reader, writer, client_session, handler, *rest)
        finally:
            if self._get_handler(client_session) is handler:
                await self._cleanup_session(client_session.client_id)

    async def _handle_disconnect(self, client_session: Any, handler: Any, waiter: Any) -> None:
        while not client_session.delivered_message_queue.empty():  # acknowledged already
            message: asyncio.Future[Any] = asyncio.Future()
            message.set_result(client_session.delivered_message_queue.get_nowait())
            await self._handle_message_delivery(client_session, handler, message)
        await super()._handle_disconnect(client_session, handler, waiter)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Any
    ) -> None:
        # On connect amqtt calls this with everybody's filters.
        owners = self._subscriptions.get(subscription[0], ())
        if any(owner is session for owner, _ in owners):
            await super()._publish_retained_messages_for_subscription(subscription, session)

    async def _session_monitor(self) -> None:
        while True:
            now_s = asyncio.get_running_loop().time()
            for _, handler in list(self._sessions.values()):
                reader = handler.reader
                if reader is not None and now_s - reader.heard_s > reader.max_silence_s:
                    await handler.writer.close()  # the peer is gone; now its will is published
            await asyncio.sleep(1)


async def serve() -> None:
    """Answer the parent's commands until stdin ends."""
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader(limit=_MAX_COMMAND_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    child: _Child | None = None
    async for line in commands:
        command = json.loads(line)
        if child is None:
            child, answer = await start(command["start"])
        else:
            answer = await child.obey(command)
        print(json.dumps({"number": command["number"], **answer}), flush=True)


class _Child:
    """The broker, and what its listeners show."""

    def __init__(self, broker: GuardedBroker, tls: ServerTls | None) -> None:
        self._broker = broker
        self._tls = tls
        self._context = tls.context() if tls else None

    async def listen(self, listener: dict[str, Any]) -> asyncio.Server:
        """Listens at an endpoint."""
        endpoint = Endpoint(**listener["endpoint"])
        secured: dict[str, Any] = {}
        if endpoint.is_tls:
            secured = {"ssl": self._context, "ssl_handshake_timeout": CONNECT_TIMEOUT_S}
        accept = functools.partial(self._broker.accept, is_public=listener["is_public"])
        return await asyncio.start_server(
            accept, endpoint.host, endpoint.port, limit=MAX_PACKET_BYTES, backlog=1024, **secured
        )

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command; it is in force when the answer is written."""
        if "grant" in command:
            await self._broker.grant(command["grant"], Credential(**command["credential"]))
        elif "revoke" in command:
            await self._broker.revoke(command["revoke"])
        elif self._tls is not None and self._context is not None:
            try:
                self._tls.renew(self._context)
            except ValueError as error:
                return {"error": str(error)}
        return {}


async def start(settings: dict[str, Any]) -> tuple[_Child | None, dict[str, Any]]:
    """Start a broker as told; the answer says the ports it listens on, or the error."""
    credentials = {name: Credential(**one) for name, one in settings["credentials"].items()}
    broker = GuardedBroker(settings["federations"], settings["server"], credentials)
    await broker.start()
    files = {name: Path(path) for name, path in settings["tls"].items()}
    ports = []
    try:
        child = _Child(broker, ServerTls(**files) if files else None)
    except ValueError as error:
        return None, {"error": str(error)}
    for listener in settings["listeners"]:
        try:
            listening = await child.listen(listener)
        except OSError as error:
            return None, {"error": _why_not(listener["endpoint"]["port"], error)}
        ports.append(listening.sockets[0].getsockname()[1])
    return child, {"ports": ports}


def _why_not(port: int, error: OSError) -> str:
    advice = "free it, give another one as embedded:PORT, or let 'embedded' choose"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use by another process; {advice}"
    return f"cannot listen on port {port} ({error}); {advice}"


def main() -> None:
    """Run until the parent closes our stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    # amqtt logs a traceback for every receiver that takes over 5 s to acknowledge.
    logging.getLogger("amqtt").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_serve_and_exit())
    finally:
        os._exit(1)


def quiet_cut_offs(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Passes on what tasks fail with, but for a connection that is lost amid a message.

    amqtt cancels the message's task then, makes an error of the cancellation, and awaits neither.
    The sender has no acknowledgement and sends again.
    """
    if isinstance(context.get("exception"), ProtocolHandlerError):
        logger.debug("a connection was lost amid a message: %s", context["exception"])
    else:
        loop.default_exception_handler(context)


async def _serve_and_exit() -> None:
    asyncio.get_running_loop().set_exception_handler(quiet_cut_offs)
    await serve()
    os._exit(0)  # at once: amqtt's tasks may swallow their cancellation


if __name__ == "__main__":
    main()
