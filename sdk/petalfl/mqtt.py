"""MQTT on asyncio: paho without a thread per client.

paho's own network thread stops working at about 340 clients in a process (it uses `select`);
its socket callbacks let the event loop drive it instead. Only what is not its own, name, TCP and
TLS, blocks: on a thread that a client which leaves does not wait for.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import logging
import socket
import ssl
import termios
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from petalfl.backoff import delays
from petalfl.errors import TransportError
from petalfl.threads import abandon, run_aside
from petalfl.tls import Tls, explain
from petalfl.transport import Handler, dispatch
from petalfl.waiting import within

log = logging.getLogger("petalfl.mqtt")

CONNECT_TIMEOUT_S = 20.0  # of TCP, and again of TLS: four lost SYNs, or a slow handshake
KEEPALIVE_S = 60
MISC_INTERVAL_S = 5.0
MAX_PACKET_BYTES = 16 << 20  # a server reads the administration's answers, too
MOST_READS = 32  # before the event loop has its turn
BACKOFF_S = (0.5, 30.0)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a broker listens."""

    host: str
    port: int
    is_tls: bool = False

    def __str__(self) -> str:
        return f"{'mqtts' if self.is_tls else 'mqtt'}://{self.host}:{self.port}"


class MqttTransport:
    """A connection that comes back by itself, with its subscriptions, after every break.

    Args:
        endpoint: The broker.
        login: Username and password.
        client_id: Unique at the broker: a second connection with it ends the first.
        will: Topic and payload that the broker publishes, retained, when the client is lost.
        on_connect: Called on the event loop after each connect but the first.
        on_trouble: Called there with why a broken connection cannot be mended yet; of each break,
            once for each reason.
        tls: Whom to trust, and the certificate to show, at an endpoint with TLS; the default is
            to trust the system's authorities.
        timeout_s: For a connect, a subscription or a publish.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        login: tuple[str, str],
        client_id: str,
        will: tuple[str, bytes] | None = None,
        on_connect: Callable[[], None] = lambda: None,
        on_trouble: Callable[[TransportError], None] = lambda error: log.warning("%s", error),
        tls: Tls | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self._endpoint = endpoint
        self._tls = tls or Tls()
        self._context: ssl.SSLContext | None = None
        self._on_reconnect, self._on_trouble = on_connect, on_trouble
        self._timeout_s = timeout_s
        self._handlers: dict[str, Handler] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[Any]] = {}
        self._unacknowledged: set[int] = set()  # message ids
        self._connack: asyncio.Future[ReasonCode] | None = None
        self._lost = asyncio.Event()
        self._socket: socket.socket | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._misc_timer: asyncio.TimerHandle | None = None
        self._client = client = _Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, reconnect_on_failure=False
        )
        client.username_pw_set(*login)
        if will is not None:
            client.will_set(*will, qos=1, retain=True)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = lambda c, u, m: dispatch(self._handlers, m.topic, bytes(m.payload))
        client.on_publish = self._published
        client.on_subscribe = lambda c, u, mid, codes, p: self._resolve("subscribe", mid, codes)
        client.on_socket_open = self._socket_opened
        client.on_socket_close = self._socket_closed
        client.on_socket_register_write = lambda c, u, s: self._want_write(True)
        client.on_socket_unregister_write = lambda c, u, s: self._want_write(False)

    async def connect(self) -> None:
        """Connects for the first time; later breaks are mended in the background.

        Raises:
            TransportError: No broker answers there, it refuses the login, or a file of ``tls``
                cannot be used.
        """
        if self._endpoint.is_tls:
            try:
                self._context = self._tls.context()
            except ValueError as error:
                raise TransportError(str(error)) from error
        await self._connect_once()
        self._keeper = asyncio.create_task(self._keep_connected())

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`; during a break it waits for the connection to come back."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise TransportError(f"cannot publish on {topic}: {paho.error_string(info.rc)}")
        self._unacknowledged.add(info.mid)
        await self._wait_for("publish", info.mid, f"{self._endpoint} took no message on {topic}")

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Transport.subscribe`."""
        self._handlers[topic_filter] = handler
        code, mid = self._client.subscribe(topic_filter, qos=1)
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            return  # no connection now: the next one subscribes to all filters
        codes = await self._wait_for(
            "subscribe", mid, f"{self._endpoint} did not answer a subscription to {topic_filter}"
        )
        if any(c.is_failure for c in codes):
            del self._handlers[topic_filter]
            raise TransportError(f"{self._endpoint} refuses a subscription to {topic_filter}")

    async def close(self) -> None:
        """See `Transport.close`.

        The broker publishes the last will only if it may lack something that was published: a
        goodbye, for one, which a DISCONNECT would leave behind.
        """
        self._handlers.clear()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._unacknowledged and self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._client.loop_read()  # finds the end, and closes the socket
        else:
            self._client.disconnect()
        for _ in range(100):  # paho closes the socket once the DISCONNECT is written
            if self._socket is None:
                break
            await asyncio.sleep(0.01)
        if self._misc_timer is not None:
            self._misc_timer.cancel()

    async def _connect_once(self) -> None:
        loop = asyncio.get_running_loop()
        self._connack = loop.create_future()
        self._lost.clear()
        try:
            self._client.connection = await self._dial()
            self._client.connect(self._endpoint.host, self._endpoint.port, KEEPALIVE_S)
        except (OSError, ValueError) as error:
            raise self._no_answer(error) from error
        try:
            code = await within(self._timeout_s, self._connack)
        except asyncio.TimeoutError as error:  # an OSError too, on newer Pythons
            self._hang_up()
            raise TransportError(
                f"{self._endpoint} accepted the connection but sent no CONNACK "
                f"in {self._timeout_s:g} s; is it an MQTT broker?"
            ) from error
        except OSError as error:
            raise self._no_answer(error) from error
        if code.is_failure:
            raise TransportError(f"{self._endpoint} refuses the login: {code}")
        self._misc()

    async def _dial(self) -> socket.socket:
        dialing = run_aside(_connected_to, self._endpoint, self._context)
        try:
            return await asyncio.wrap_future(dialing)
        except asyncio.CancelledError:
            abandon(dialing, socket.socket.close)
            raise

    def _no_answer(self, error: Exception) -> TransportError:
        cause = explain(error, self._tls) if self._endpoint.is_tls else error
        return TransportError(f"no broker answers at {self._endpoint}: {cause}")

    async def _keep_connected(self) -> None:
        while True:
            await self._lost.wait()
            told: set[str] = set()
            for delay_s in delays(*BACKOFF_S):
                await asyncio.sleep(delay_s)
                if self._context is not None:
                    self._tls.renew(self._context)
                try:
                    await self._connect_once()
                    break
                except TransportError as error:
                    if str(error) not in told:
                        told.add(str(error))
                        self._on_trouble(error)
            log.info("connected to %s again", self._endpoint)
            for topic_filter in self._handlers:
                self._client.subscribe(topic_filter, qos=1)
            try:
                self._on_reconnect()
            except Exception:
                log.exception("the on_connect callback failed")

    async def _wait_for(self, kind: str, mid: int, complaint: str) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._waiting[kind, mid] = future
        try:
            return await within(self._timeout_s, future)
        except asyncio.TimeoutError as error:
            raise TransportError(f"{complaint} in {self._timeout_s:g} s") from error
        finally:
            self._waiting.pop((kind, mid), None)

    def _published(self, c: object, u: object, mid: int, code: object, p: object) -> None:
        self._unacknowledged.discard(mid)
        self._resolve("publish", mid, None)

    def _resolve(self, kind: str, mid: int, result: Any) -> None:
        future = self._waiting.get((kind, mid))
        if future is not None and not future.done():
            future.set_result(result)

    def _disconnected(self, c: object, u: object, f: object, code: object, p: object) -> None:
        self._lost.set()
        if self._connack is not None and not self._connack.done():
            closed = ConnectionResetError("the connection was closed before a CONNACK")
            self._connack.set_exception(closed)

    def _hang_up(self) -> None:
        """Ends a connection that led nowhere; paho closes its socket once that is written."""
        self._client.disconnect()
        self._client.loop_write()

    def _connected(self, c: object, u: object, f: object, code: ReasonCode, p: object) -> None:
        if self._connack is not None and not self._connack.done():
            self._connack.set_result(code)

    # The socket

    def _socket_opened(self, c: object, u: object, opened: Any) -> None:
        # Else a small message waits for the ACK of the one before, up to 40 ms.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = opened
        asyncio.get_running_loop().add_reader(opened, self._read)

    def _socket_closed(self, c: object, u: object, closed: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(closed)
        loop.remove_writer(closed)
        self._socket = None

    def _want_write(self, wants_write: bool) -> None:
        if self._socket is not None:
            loop = asyncio.get_running_loop()
            if wants_write:
                loop.add_writer(self._socket, self._client.loop_write)
            else:
                loop.remove_writer(self._socket)

    def _read(self) -> None:
        """Reads what has come; its acknowledgements go together, as a wake-up for each is dear."""
        self._cork(True)
        for _ in range(MOST_READS):
            self._client.loop_read()
            self._refuse_giants()
            if self._socket is None or not _has_more(self._socket):
                break
        self._cork(False)
        while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            self._client.loop_read()  # decrypted already: the socket will not say so again

    def _refuse_giants(self) -> None:
        """Leaves a broker that sends more in one packet than anything needs: up to 256 MiB."""
        packet = self._client._in_packet
        num_bytes = packet["to_process"] + len(packet["packet"])
        if num_bytes > MAX_PACKET_BYTES:
            log.warning("%s sends a packet of %d bytes, at most %d are read", self._endpoint,
                        num_bytes, MAX_PACKET_BYTES)  # fmt: skip
            self._hang_up()

    def _cork(self, is_corked: bool) -> None:
        if self._socket is not None and hasattr(socket, "TCP_CORK"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)

    def _misc(self) -> None:
        """Pings in time and notices a silent peer."""
        if self._misc_timer is not None:
            self._misc_timer.cancel()
        if self._client.loop_misc() == MQTTErrorCode.MQTT_ERR_SUCCESS:
            loop = asyncio.get_running_loop()
            self._misc_timer = loop.call_later(MISC_INTERVAL_S, self._misc)


def _has_more(connection: socket.socket) -> bool:
    """Whether bytes wait to be read, without reading them."""
    waiting = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
    return waiting[0] > 0


class _Client(paho.Client):
    """paho's, on a connection that has been made for it."""

    connection: socket.socket

    def _create_socket(self) -> socket.socket:
        return self.connection


def _connected_to(endpoint: Endpoint, context: ssl.SSLContext | None) -> socket.socket:
    """After the TLS handshake, where there is a context."""
    connection = socket.create_connection((endpoint.host, endpoint.port), CONNECT_TIMEOUT_S)
    if context is None:
        return connection
    try:
        return context.wrap_socket(connection, server_hostname=endpoint.host)
    except BaseException:
        connection.close()
        raise
