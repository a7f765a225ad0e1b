"""The seam between petalfl and the network: bytes on topics, nothing else.

`petalfl.mqtt.MqttTransport` is the real one; `MemoryTransport` joins clients and server inside
one process, for tests and studies.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Protocol, TypeAlias

from paho.mqtt.client import topic_matches_sub

Handler: TypeAlias = Callable[[str, bytes], None]
log = logging.getLogger("petalfl.transport")
_matches = functools.lru_cache(4096)(topic_matches_sub)  # which builds a tree each time


class Transport(Protocol):
    """Publishes and subscribes with at-least-once delivery."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hands ``payload`` to the broker; returns when the broker has it.

        That is no delivery: only a receipt from the other side is.

        Raises:
            TransportError: The broker did not take it in time.
        """
        ...

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Calls ``handler(topic, payload)`` on the event loop for every matching message.

        Raises:
            TransportError: The broker refuses the filter.
        """
        ...

    async def close(self) -> None:
        """Leaves; messages that arrive later are dropped."""
        ...


def dispatch(handlers: dict[str, Handler], topic: str, payload: bytes) -> None:
    """Calls every handler whose filter matches; what a handler raises is logged, not spread."""
    for topic_filter, handler in list(handlers.items()):
        if _matches(topic_filter, topic):
            try:
                handler(topic, payload)
            except Exception:
                log.exception("the handler of %s failed on a message", topic_filter)


class MemoryBroker:
    """Joins `MemoryTransport`s of one event loop: retained messages, wildcards, in order."""

    def __init__(self) -> None:
        self._retained: dict[str, bytes] = {}
        self._transports: list[MemoryTransport] = []

    def connect(self) -> MemoryTransport:
        """A new transport on this broker."""
        transport = MemoryTransport(self)
        self._transports.append(transport)
        return transport

    def _publish(self, topic: str, payload: bytes, retain: bool) -> None:
        if retain and payload:
            self._retained[topic] = payload
        elif retain:
            self._retained.pop(topic, None)
        for transport in self._transports:
            transport._deliver(topic, payload)


class MemoryTransport:
    """See `Transport`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._handlers: dict[str, Handler] = {}

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """See `Transport.publish`."""
        self._broker._publish(topic, payload, retain)

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """See `Transport.subscribe`."""
        self._handlers[topic_filter] = handler
        for topic, payload in self._broker._retained.items():
            if topic_matches_sub(topic_filter, topic):
                self._deliver(topic, payload)

    async def close(self) -> None:
        """See `Transport.close`."""
        self._handlers.clear()
        if self in self._broker._transports:
            self._broker._transports.remove(self)

    def _deliver(self, topic: str, payload: bytes) -> None:
        handlers = dict(self._handlers)  # those of now: nobody gets what came before
        asyncio.get_running_loop().call_soon(self._dispatch, handlers, topic, payload)

    def _dispatch(self, handlers: dict[str, Handler], topic: str, payload: bytes) -> None:
        if self._handlers:  # not closed since
            dispatch(handlers, topic, payload)
