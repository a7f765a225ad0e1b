"""What the server asks of any MQTT broker."""

from __future__ import annotations

from typing import Protocol

from petalfl.errors import PetalError
from petalfl.mqtt import Endpoint


class BrokerError(PetalError):
    """A broker that cannot be started, reached or administered."""


class Broker(Protocol):
    """A broker that lets in the server and the devices it was told of, nobody else.

    `endpoint`, where the aggregator itself connects, and `server_login`, its username and
    password, are valid once `start` has returned. Every method may raise `BrokerError`.
    """

    endpoint: Endpoint
    server_login: tuple[str, str]

    async def start(self) -> None:
        """Bring the broker up, or check that it is there and can be administered."""

    async def grant(self, device: str, password: str, federation: str = "") -> None:
        """Create or replace a device's login; durable and in force on return.

        A connection with the former password is cut. The login is for the topics of one
        federation: the broker's first unless another one is named.
        """

    async def revoke(self, device: str) -> None:
        """Remove a device's login and cut its connection; an unknown device is no error."""

    def device_endpoint(self, host: str) -> Endpoint:
        """Where devices connect that have reached the server's HTTP as ``host``."""

    async def renew_certificate(self) -> None:
        """Read the certificates again that the server gives to it or trusts in it."""

    async def close(self) -> None:
        """Release what `start` acquired; logins stay."""
