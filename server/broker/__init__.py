"""The MQTT broker as the server sees it: where it is, and who may log in.

`open_broker` gives one of two: `embedded`, amqtt in a child process, needs nothing installed;
`external`, a Mosquitto with its dynamic-security plugin, serves fleets. In both a client
without a valid password is refused at CONNECT, and a device reaches only the topics of
`grants.device_grants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from petalfl.tls import Tls, is_loopback

from ..tls import ServerTls
from .broker import Broker, BrokerError
from .embedded import EmbeddedBroker
from .external import ExternalBroker, parse_url

__all__ = ["Broker", "BrokerError", "open_broker"]


def open_broker(
    spec: str,
    *,
    data_dir: Path,
    federation: str,
    more: Sequence[str] = (),
    host: str = "127.0.0.1",
    tls: ServerTls | None = None,
    broker_tls: Tls | None = None,
) -> Broker:
    """Return the broker that ``spec`` names, not yet started.

    Args:
        spec: ``embedded`` (any free port), ``embedded:PORT``, or
            ``mqtt(s)://user:password@host:port`` of a Mosquitto with dynamic security. Without
            a login in the URL, PETALFL_BROKER_USERNAME and PETALFL_BROKER_PASSWORD give it.
        data_dir: Where the embedded broker keeps its credentials; unused otherwise.
        federation: Name of the federation, one topic level.
        more: Of further federations on the same broker.
        host: The embedded broker listens there, if it has TLS; without, on loopback alone.
        tls: The server's own certificate, which the embedded broker shows, too.
        broker_tls: Whom to trust at ``mqtts://``; the default is to trust the system's authorities.

    Raises:
        BrokerError: ``spec`` is none of these, has no login, or does not go with the rest.
        ValueError: ``federation`` is no topic level, or a file of ``broker_tls`` is unusable.
    """
    scheme, _, rest = spec.partition(":")
    if broker_tls is not None and scheme != "mqtts":
        raise BrokerError("a broker CA or certificate is given, but no broker mqtts://… to use it")
    if scheme == "embedded" and (spec == scheme or _is_port(rest)):
        return EmbeddedBroker(data_dir, federation, int(rest or 0), more, host=host, tls=tls)
    if scheme in ("mqtt", "mqtts"):
        endpoint, login = parse_url(spec)
        if tls is not None and not endpoint.is_tls and not is_loopback(endpoint.host):
            raise BrokerError(
                f"the server has TLS, and the broker {endpoint} none: devices send no password "
                "there; give it TLS (mqtts://), too"
            )
        return ExternalBroker(endpoint, login, federation, more, broker_tls)
    found = spec.rpartition("@")[2]  # never a password in a message
    raise BrokerError(
        f"no such broker: {found!r}; expected 'embedded', 'embedded:PORT' with a port in "
        "1-65535, or 'mqtt(s)://user:password@host:port'"
    )


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 65535
