"""The MQTT broker as the server sees it: where it is, and who may log in.

`open_broker` gives one of two: `embedded`, amqtt in a child process, needs nothing installed;
`external`, a Mosquitto with its dynamic-security plugin, serves fleets. In both a client
without a valid password is refused at CONNECT, and a device reaches only the topics of
`grants.device_grants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .broker import Broker, BrokerError
from .embedded import EmbeddedBroker
from .external import ExternalBroker, parse_url

__all__ = ["Broker", "BrokerError", "open_broker"]


def open_broker(spec: str, *, data_dir: Path, federation: str, more: Sequence[str] = ()) -> Broker:
    """Return the broker that ``spec`` names, not yet started.

    Args:
        spec: ``embedded`` (any free port), ``embedded:PORT``, or
            ``mqtt(s)://user:password@host:port`` of a Mosquitto with dynamic security. Without
            a login in the URL, PETALFL_BROKER_USERNAME and PETALFL_BROKER_PASSWORD give it.
        data_dir: Where the embedded broker keeps its credentials; unused otherwise.
        federation: Name of the federation, one topic level.
        more: Of further federations on the same broker.

    Raises:
        BrokerError: ``spec`` is none of these, or has no login.
        ValueError: ``federation`` is no topic level.
    """
    scheme, colon, rest = spec.partition(":")
    if scheme == "embedded" and not colon:
        return EmbeddedBroker(data_dir, federation, more=more)
    if scheme == "embedded" and rest.isascii() and rest.isdigit() and 1 <= int(rest) <= 65535:
        return EmbeddedBroker(data_dir, federation, port=int(rest), more=more)
    if scheme in ("mqtt", "mqtts"):
        endpoint, login = parse_url(spec)
        return ExternalBroker(endpoint, login, federation, more)
    found = spec.rpartition("@")[2]  # never a password in a message
    raise BrokerError(
        f"no such broker: {found!r}; expected 'embedded', 'embedded:PORT' with a port in "
        "1-65535, or 'mqtt(s)://user:password@host:port'"
    )
