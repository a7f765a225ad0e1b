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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from petalfl.backoff import delays
from petalfl.mqtt import Endpoint

from .broker import BrokerError
from .credentials import Credential, load_credentials, make_credential, save_credentials
from .grants import topic_level

log = logging.getLogger("petalfl.broker")

HOST = "127.0.0.1"
SERVER_NAME = "$server"  # no device can have this name: see `topic_level`
ANSWER_TIMEOUT_S = 20.0
BACKOFF_S = (0.5, 30.0)  # between the attempts to start a child again
_CHILD_MODULE = f"{__package__}._amqtt_child"


class _ChildEndedError(BrokerError):
    """Its process is gone."""


class EmbeddedBroker:
    """amqtt on the loopback interface, as a child that cannot outlive this process.

    Its traffic costs this process nothing but a socket: a burst cannot stall the server's loop.
    A child that dies is started again on the same port, with the logins that there are.
    """

    def __init__(
        self, data_dir: Path, federation: str, port: int = 0, more: Sequence[str] = ()
    ) -> None:
        self.endpoint = Endpoint(HOST, port)
        self.server_login = (SERVER_NAME, "")
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
            log.warning("the embedded broker listens on port %d again", self.endpoint.port)

    async def _start_child(self) -> None:
        self._child = await _spawn()
        try:
            answer = await self._ask(start=self._settings())
        except BaseException:
            await self._end_child()
            raise
        self.endpoint = Endpoint(HOST, answer["port"])

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
        return {
            "host": HOST,
            "port": self.endpoint.port,
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
            if self._keeper is None:
                raise
            log.warning("%s", error)

    async def _ask(self, **command: Any) -> dict[str, Any]:
        """Send one command and return its answer, skipping those to cancelled commands."""
        number = next(self._numbers)
        child = self._child
        if child is None:
            raise BrokerError("the embedded broker is not running; start it first")
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
        line = await asyncio.wait_for(child.stdout.readline(), ANSWER_TIMEOUT_S)
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
