"""A Mosquitto >= 2.0 whose dynamic-security plugin holds the logins of the devices.

Every device gets a client and a role with its literal topics: the plugin of 2.0 does not
replace ``%u`` in a topic.

Source:
    https://mosquitto.org/documentation/dynamic-security/
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import secrets
import ssl
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from petalfl.mqtt import Endpoint
from petalfl.tls import Tls, explain

from .broker import BrokerError
from .grants import Grants, device_grants, server_grants, topic_level

CONTROL = "$CONTROL/dynamic-security/v1"
ANSWER_TIMEOUT_S = 20.0
_FORM = "mqtt(s)://user:password@host:port"
_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}

T = TypeVar("T")
Json = dict[str, Any]


class ExternalBroker:
    """A Mosquitto that the server's login administers; passwords and roles live there."""

    def __init__(
        self,
        endpoint: Endpoint,
        login: tuple[str, str],
        federation: str,
        more: Sequence[str] = (),
        tls: Tls | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.tls = tls or Tls()
        self.context = self.tls.context() if endpoint.is_tls else None
        self.server_login = login
        self._federations = [topic_level(name) for name in (federation, *more)]
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Check that the broker can be administered, and let the server use its topics."""
        for federation in self._federations:
            await self._in_thread(functools.partial(self._admit_server, federation))

    async def grant(self, device: str, password: str, federation: str = "") -> None:
        """Create or replace a device's login."""
        owner = topic_level(federation or self._federations[0])
        await self._in_thread(lambda: self._grant(owner, device, password))

    async def revoke(self, device: str) -> None:
        """Remove a device's login; the plugin cuts its connections."""
        await self._in_thread(lambda: self._revoke(device))

    def device_endpoint(self, host: str) -> Endpoint:
        """The same for everybody, wherever the server itself is."""
        return self.endpoint

    async def renew_certificate(self) -> None:
        """The broker's own is its own affair; here it is what the server trusts and shows."""
        if self.context is not None:
            self.tls.renew(self.context)

    async def close(self) -> None:
        """Nothing to release: every exchange has its own short connection."""

    async def _in_thread(self, work: Callable[[], T]) -> T:
        async with self._lock:
            return await asyncio.to_thread(work)

    def _admit_server(self, federation: str) -> None:
        username, role = self.server_login[0], f"petalfl/{federation}/server"
        if role in (self._roles(username) or ()):
            return
        acls = _allow(server_grants(federation))
        self._ask([{"command": "createRole", "rolename": role, "acls": acls}], ok="already exists")
        try:
            self._ask([{"command": "addClientRole", "username": username, "rolename": role}])
        except BrokerError:
            # The plugin cuts a client whose roles change, here before it could answer.
            if role not in (self._roles(username) or ()):
                raise

    def _grant(self, federation: str, device: str, password: str) -> None:
        role = _role(federation, device)
        acls = _allow(device_grants(federation, device)) + _deny_the_rest()
        roles = self._roles(device)
        if roles is None:
            self._ask([{"command": "deleteRole", "rolename": role}], ok="not found")
            make = {"command": "createRole", "rolename": role, "acls": acls}
            client = {"command": "createClient", "username": device, "password": password}
            self._ask([make, {**client, "roles": [{"rolename": role}]}])
            return
        if role not in roles:  # else anybody who may enroll could take over that login
            raise BrokerError(
                f"found the login {device!r} on the broker, and not from this federation; "
                "choose another device id, or delete it with mosquitto_ctrl"
            )
        change = {"command": "setClientPassword", "username": device, "password": password}
        self._ask([{"command": "modifyRole", "rolename": role, "acls": acls}, change])

    def _revoke(self, device: str) -> None:
        ours = {_role(federation, device) for federation in self._federations}
        for role in ours & set(self._roles(device) or ()):
            delete = {"command": "deleteClient", "username": device}
            self._ask([delete, {"command": "deleteRole", "rolename": role}])

    def _roles(self, username: str) -> list[str] | None:
        """Return the role names of a login, None if there is no such login."""
        [answer] = self._ask([{"command": "getClient", "username": username}], ok="not found")
        if "error" in answer:
            return None
        return [role["rolename"] for role in answer["data"]["client"].get("roles", [])]

    def _ask(self, commands: list[Json], ok: str = "\0") -> list[Json]:
        """Send commands and return their answers; an error is one unless it holds ``ok``."""
        answers = _Exchange(self, commands).run()
        for answer in answers:
            if ok not in answer.get("error", ok):
                raise BrokerError(f"the broker refused {answer['command']}: {answer['error']}")
        return answers


class _Exchange:
    """One connection that sends commands to the plugin and waits for all their answers."""

    def __init__(self, broker: ExternalBroker, commands: list[Json]) -> None:
        endpoint = broker.endpoint
        self._where = f"{endpoint.host}:{endpoint.port}"
        self._broker, self._login = broker, broker.server_login
        self._tag = secrets.token_hex(8)
        self._commands = [{**one, "correlationData": self._tag} for one in commands]
        self._answers: list[Json] = []
        self._error = ""

    def run(self) -> list[Json]:
        """Return one answer per command, in their order."""
        client = self._connect()
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        try:
            while not self._error and len(self._answers) < len(self._commands):
                self._step(client, deadline_s)
        finally:
            client.disconnect()
        if self._error:
            raise BrokerError(self._error)
        return self._answers

    def _connect(self) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.username_pw_set(*self._login)
        if self._broker.context is not None:
            client.tls_set_context(self._broker.context)
        client.connect_timeout = ANSWER_TIMEOUT_S
        client.on_connect, client.on_subscribe = self._on_connect, self._on_subscribe
        client.on_message = self._on_message
        try:
            client.connect(self._broker.endpoint.host, self._broker.endpoint.port)
        except (OSError, ValueError) as error:
            _close_leftovers(error)
            raise BrokerError(
                f"cannot reach the MQTT broker at {self._where} ({self._why(error)}); start it, "
                "or correct the URL"
            ) from error
        return client

    def _step(self, client: paho.Client, deadline_s: float) -> None:
        if time.monotonic() > deadline_s:
            self._error = (
                f"the MQTT broker at {self._where} gave no answer in {ANSWER_TIMEOUT_S:.0f} s; "
                "expected a Mosquitto >= 2.0 with mosquitto_dynamic_security.so loaded"
            )
        elif (code := client.loop(timeout=0.1)) != paho.MQTT_ERR_SUCCESS and not self._error:
            reason = self._why(ConnectionResetError(paho.error_string(code)))
            self._error = f"the MQTT broker at {self._where} closed the connection: {reason}"

    def _why(self, error: Exception) -> str:
        if self._broker.context is not None:
            return f"{explain(error, self._broker.tls)}; see --broker-ca and --broker-cert"
        if isinstance(error, ConnectionResetError):  # as one does that expects a TLS handshake
            return f"{error}; a broker with TLS has a URL that begins with mqtts"
        return str(error)

    def _on_connect(
        self, client: paho.Client, _data: Any, _flags: Any, reason: Any, _props: Any
    ) -> None:
        if reason.is_failure:
            user = self._login[0]
            self._error = f"the MQTT broker at {self._where} refused the login {user!r}: {reason}"
        else:
            client.subscribe(f"{CONTROL}/response")

    def _on_subscribe(
        self, client: paho.Client, _data: Any, _mid: Any, reasons: Any, _props: Any
    ) -> None:
        if reasons[0].is_failure:
            self._error = (
                f"the login {self._login[0]!r} may not administer the broker at {self._where}; "
                "give it the role that 'mosquitto_ctrl dynsec init' creates for the admin"
            )
        else:
            client.publish(CONTROL, json.dumps({"commands": self._commands}))

    def _on_message(self, _client: paho.Client, _data: Any, message: Any) -> None:
        # Every administrator's answers come on this one topic.
        answers = json.loads(message.payload).get("responses", [])
        self._answers += [one for one in answers if one.get("correlationData") == self._tag]


def _role(federation: str, device: str) -> str:
    return f"petalfl/{federation}/device/{topic_level(device)}"


def _allow(grants: Grants) -> list[Json]:
    send = [_acl("publishClientSend", topic, True) for topic in grants.publish]
    receive = [_acl("publishClientReceive", topic, True) for topic in grants.receive]
    return send + receive + [_acl("subscribePattern", topic, True) for topic in grants.receive]


def _deny_the_rest() -> list[Json]:
    """Deny everything at a lower priority, so that the broker's own defaults do not matter.

    Its `defaultACLAccess` is left alone: other users of the broker may rely on it.
    """
    kinds = ("publishClientSend", "publishClientReceive", "subscribePattern")
    every_topic = ("#", "$SYS/#", "$CONTROL/#")  # "#" matches no topic that starts with "$"
    return [_acl(kind, topic, False) for kind in kinds for topic in every_topic]


def _acl(kind: str, topic: str, allow: bool) -> Json:
    return {"acltype": kind, "topic": topic, "allow": allow, "priority": 0 if allow else -1}


def parse_url(url: str) -> tuple[Endpoint, tuple[str, str]]:
    """Split ``mqtt(s)://user:password@host:port`` into where to connect and the login.

    Raises:
        BrokerError: Not such a URL, or no login in it nor in the environment.
    """
    found = url.rpartition("@")[2]  # never a password in a message
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise BrokerError(f"found the broker {found!r} ({error}); expected {_FORM}") from error
    if not parts.hostname or parts.path.strip("/") or parts.query or parts.fragment:
        raise BrokerError(f"found the broker {found!r}; expected {_FORM}")
    return Endpoint(parts.hostname, port, parts.scheme == "mqtts"), _login(parts)


def _login(parts: SplitResult) -> tuple[str, str]:
    username = unquote(parts.username or "") or os.environ.get("PETALFL_BROKER_USERNAME", "")
    password = unquote(parts.password or "") or os.environ.get("PETALFL_BROKER_PASSWORD", "")
    if not username or not password:
        raise BrokerError(
            f"no login for the broker at {parts.hostname}; write {_FORM}, "
            "or set PETALFL_BROKER_USERNAME and PETALFL_BROKER_PASSWORD"
        )
    return username, password


def _close_leftovers(error: Exception) -> None:
    """Closes the socket of a failed TLS handshake, which paho's ``connect`` leaves open."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        leftover = frame.f_locals.get("ssl_sock")
        if isinstance(leftover, ssl.SSLSocket):
            leftover.close()
