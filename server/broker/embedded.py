"""A broker that needs no installation: amqtt in a child process, driven over its stdin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from petalfl.backoff import delays
from petalfl.mqtt import Endpoint
from petalfl.waiting import within

from ..tls import ServerTls
from .broker import BrokerError
from .credentials import Credential, load_credentials, make_credential, save_credentials
from .grants import topic_level

log = logging.getLogger("petalfl.broker")

LOOPBACK = "127.0.0.1"
SERVER_NAME = "$server"  # no device can have this name: see `topic_level`
ANSWER_TIMEOUT_S = 20.0
BACKOFF_S = (0.5, 30.0)  # between the attempts to start a child again
_CHILD_MODULE = f"{__package__}._amqtt_child"


class _ChildEndedError(BrokerError):
    """Its process is gone."""


class EmbeddedBroker:
    """amqtt as a child that cannot outlive this process.

    Its traffic costs this process nothing but a socket: a burst cannot stall the server's loop.
    A child that dies is started again on the same port, with the logins that there are. Without
    TLS it listens on the loopback interface. With TLS devices connect to ``host``, and only the
    server itself comes in by loopback, where it needs no certificate.
    """

    def __init__(
        self,
        data_dir: Path,
        federation: str,
        port: int = 0,
        more: Sequence[str] = (),
        *,
        host: str = LOOPBACK,
        tls: ServerTls | None = None,
    ) -> None:
        self.endpoint = Endpoint(LOOPBACK, 0 if tls else port)
        self.server_login = (SERVER_NAME, "")
        self._public = Endpoint(host, port, is_tls=True) if tls else None
        self._tls = tls
        self._federations = [topic_level(name) for name in (federation, *more)]
        self._path = data_dir / "broker" / "credentials.json"
        self._credentials: dict[str, Credential] = {}
        self._child: Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Start the child and wait until it listens; the server gets a fresh password."""
        if self._child is not None:
            raise ValueError("the embedded broker is already started; close it first")
        self._credentials = load_credentials(self._path)
        self.server_login = (SERVER_NAME, secrets.token_urlsafe(32))
        await self._start_child()
        self._keeper = asyncio.create_task(self._keep_running())

    async def grant(self, device: str, password: str, federation: str = "") -> None:
        """Create or replace a device's login."""
        credential = make_credential(password, federation and topic_level(federation))
        async with self._lock:
            await self._save({**self._credentials, topic_level(device): credential})
            await self._tell(grant=device, credential=asdict(credential))

    async def revoke(self, device: str) -> None:
        """Remove a device's login and cut its connections."""
        async with self._lock:
            rest = {name: one for name, one in self._credentials.items() if name != device}
            await self._save(rest)
            if device != SERVER_NAME:
                await self._tell(revoke=device)

    def device_endpoint(self, host: str) -> Endpoint:
        """With TLS the host by which the device knows the server: its certificate is the same."""
        return replace(self._public, host=host) if self._public else self.endpoint

    async def renew_certificate(self) -> None:
        """Read certificate and key again, for the connections to come."""
        if self._tls is not None:
            async with self._lock:
                await self._tell(renew=True)

    async def close(self) -> None:
        """End the child, if there is one."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        await self._end_child()

    async def _keep_running(self) -> None:
        while self._child is not None:
            code = await self._child.wait()
            log.error("the embedded broker ended with code %s: starting it again", code)
            for delay_s in delays(*BACKOFF_S):
                await asyncio.sleep(delay_s)
                try:
                    async with self._lock:
                        await self._start_child()
                    break
                except BrokerError as error:
                    log.error("%s", error)
            port = self.device_endpoint("").port
            log.warning("the embedded broker listens on port %d again", port)

    async def _start_child(self) -> None:
        self._child = await _spawn()
        try:
            answer = await self._ask(start=self._settings())
        except BaseException:
            await self._end_child()
            raise
        [port, *public] = answer["ports"]
        self.endpoint = replace(self.endpoint, port=port)
        if self._public is not None:
            self._public = replace(self._public, port=public[0])

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            await asyncio.wait_for(child.wait(), 5)
        except asyncio.TimeoutError:
            child.kill()
            await child.wait()

    def _settings(self) -> dict[str, Any]:
        logins = {**self._credentials, SERVER_NAME: make_credential(self.server_login[1])}
        listeners = [{"endpoint": asdict(self.endpoint), "is_public": self._public is None}]
        if self._public is not None:
            listeners.append({"endpoint": asdict(self._public), "is_public": True})
        files = asdict(self._tls) if self._tls else {}
        return {
            "listeners": listeners,
            "tls": {name: str(path) for name, path in files.items() if path is not None},
            "federations": self._federations,
            "server": SERVER_NAME,
            "credentials": {name: asdict(one) for name, one in logins.items()},
        }

    async def _save(self, credentials: dict[str, Credential]) -> None:
        await asyncio.to_thread(save_credentials, self._path, credentials)
        self._credentials = credentials

    async def _tell(self, **command: Any) -> None:
        """Sends a change that is saved; if the child ends meanwhile, its successor knows it."""
        try:
            await self._ask(**command)
        except _ChildEndedError as error:
            if self._keeper is None or self._keeper.done():
                raise
            log.warning("%s", error)

    async def _ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and return its answer, skipping those to cancelled commands."""
        number = next(self._numbers)
        child = self._child
        if child is None:
            raise _ChildEndedError("the embedded broker is not running; start it first")
        assert child.stdin is not None
        child.stdin.write(json.dumps({"number": number, **command}).encode() + b"\n")
        answer: dict[str, Any] = {}
        while answer.get("number") != number:
            answer = await _read_answer(child)
        if "error" in answer:
            raise BrokerError(answer["error"])
        return answer


async def _spawn() -> Process:
    # The child must find this package wherever the parent found it, whatever its name.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", _CHILD_MODULE, stdin=PIPE, stdout=PIPE, env=environment
        )
    except OSError as error:
        raise BrokerError(f"cannot start the embedded broker: {error}") from error


async def _read_answer(child: Process) -> dict[str, Any]:
    assert child.stdout is not None
    try:
        line = await within(ANSWER_TIMEOUT_S, child.stdout.readline())
    except asyncio.TimeoutError as error:
        raise BrokerError(
            f"the embedded broker (pid {child.pid}) gave no answer in {ANSWER_TIMEOUT_S:.0f} s"
        ) from error
    if not line:
        code = await child.wait()
        raise _ChildEndedError(
            f"the embedded broker (pid {child.pid}) ended with code {code}; its last words are "
            "on stderr"
        )
    answer: dict[str, Any] = json.loads(line)
    return answer
